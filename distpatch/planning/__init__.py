"""A run on fake tensors, and its report: memory, time, messages, for any number of ranks."""
