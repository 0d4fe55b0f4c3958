"""Functions of each element, and tensors made like a sharded one."""

from distpatch.rules.elementwise import creation as creation
from distpatch.rules.elementwise import in_place as in_place
from distpatch.rules.elementwise import pointwise as pointwise
from distpatch.rules.elementwise import register_pointwise as register_pointwise
