"""What a sharded tensor says of itself, its gradients and hooks."""

from distpatch.rules.tensor_api import autograd as autograd
from distpatch.rules.tensor_api import metadata as metadata
