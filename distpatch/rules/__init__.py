"""The sharded meaning of torch functions, a file a family. Importing this package fills the table."""

from distpatch.rules import (
    along,
    attention,
    convolution,
    creation,
    fallback,
    matmul,
    metadata,
    normalization,
    pad,
    pointwise,
    reduction,
    resize,
    shape,
)

__all__ = [
    "along",
    "attention",
    "convolution",
    "creation",
    "fallback",
    "matmul",
    "metadata",
    "normalization",
    "pad",
    "pointwise",
    "reduction",
    "resize",
    "shape",
]
