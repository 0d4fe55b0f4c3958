"""Programs that call operators: ``torch.ops``, exported graphs, TorchScript; each runs by the rules of torch functions.

Importing this package fills the table to its end.
"""

from distpatch import rules as rules
from distpatch.model.exported import forms, norms, operators, torchscript
from distpatch.rules.elementwise import in_place

__all__ = ["forms", "norms", "operators", "torchscript"]

forms.fill_in()
in_place.fill_in()
