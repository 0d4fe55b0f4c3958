"""torch's own choice of a kernel for small pieces, against oneDNN: run ``python -m benchmarks.kernels``."""
