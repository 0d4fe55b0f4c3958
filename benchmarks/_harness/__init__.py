"""What benchmarks share: processes that take turns, the decoder that they run, and the process's own memory."""
