"""One rank's rows, computed later or a patch at a time; no communication."""
