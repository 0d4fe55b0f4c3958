"""Helpers around torch that know nothing of ranks: trees of tensors, memory formats, names, private names of torch."""
