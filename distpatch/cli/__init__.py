"""The ``distpatch`` command: see before you run, run, and see what is wrong.

Every sub-command is one file here; each runs in one process, or on every rank that torchrun started.
Exit codes: 0 done, 1 failed, 2 an option or a file is not as it must be, 3 ``doctor`` found a fault.
"""

from distpatch.cli.app import app

__all__ = ["app"]
