"""What all rules share: registration, operands, halos, the fallback, aliasing."""

from distpatch.rules.core import aliasing as aliasing
from distpatch.rules.core import argument_names as argument_names
from distpatch.rules.core import empty_tensors as empty_tensors
from distpatch.rules.core import fallback as fallback
from distpatch.rules.core import memory_order as memory_order
