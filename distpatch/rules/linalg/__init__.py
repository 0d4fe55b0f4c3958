"""Products of matrices, attention, decompositions."""

from distpatch.rules.linalg import attention as attention
from distpatch.rules.linalg import decompositions as decompositions
from distpatch.rules.linalg import flex_attention as flex_attention
from distpatch.rules.linalg import matmul as matmul
