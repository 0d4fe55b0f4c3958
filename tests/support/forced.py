"""The suite once more, with all that is usually kept for large tensors: ``pytest --forced``.

Rows of any size are deferred, and every convolution is cut into three patches.
"""

from __future__ import annotations

import os

VARIABLE = "DISTPATCH_TESTS_FORCED"
SPLITS = 3
IS_ON = bool(os.environ.get(VARIABLE))


def defer_rows_of_any_size() -> None:
    """Small results are deferred, too."""
    from distpatch.lazy import recipe

    recipe.LEAST_BYTES = 0


def apply() -> None:
    """In this process, and in those that it starts."""
    from distpatch.model.convert import convert_model
    from distpatch.tensor import options

    global IS_ON
    IS_ON = True
    os.environ[VARIABLE] = "1"
    defer_rows_of_any_size()
    options.DEFAULT = options.Options(splits=SPLITS, lazy=True)
    convert_model.__kwdefaults__["splits"] = SPLITS


if os.environ.get(VARIABLE):
    apply()
