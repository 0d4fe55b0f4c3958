"""Peak memory of one convolution and of a decode."""
