"""PatchTensor, the region that it belongs to, and the table of rules."""
