"""Operators of torch.ops, as exported programs call them."""

from distpatch.rules.aten import forms as forms
from distpatch.rules.aten import norms as norms
from distpatch.rules.aten import operators as operators
