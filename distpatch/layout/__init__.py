"""Who owns, reads and sends which rows: integers only, no tensors, no communication."""
