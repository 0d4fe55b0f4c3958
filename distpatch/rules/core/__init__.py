"""What all rules share: registration, operands, halos, the fallback, aliasing."""

from distpatch.rules.core import dispatch as dispatch
