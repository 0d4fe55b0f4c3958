"""The sharded meaning of torch functions, a file a family. Importing this package fills the table."""

from distpatch.rules import composites as composites
from distpatch.rules import core as core
from distpatch.rules import elementwise as elementwise
from distpatch.rules import linalg as linalg
from distpatch.rules import reductions as reductions
from distpatch.rules import shapes as shapes
from distpatch.rules import tensor_api as tensor_api
from distpatch.rules import windows as windows
