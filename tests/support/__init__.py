"""What the tests share: the oracle, ranks that are threads, transports, models, random chains."""
