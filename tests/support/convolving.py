"""The choice of a convolution's kernel, seen from inside: for benchmarks, which use public names only."""

from __future__ import annotations

from distpatch.torch_utils.convolution_kernel import convolve
from distpatch.torch_utils.private import conv_backend

__all__ = ["conv_backend", "convolve"]
