"""Tensors sharded along several dims: the cases of all tables once more, on meshes of ranks."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.support.oracle import check

TABLES = "convolution transposed pointwise losses linalg halo_rows fresh_tensors own_functions pad".split()


def _cases() -> dict[str, partial[None]]:
    """Those whose rows are the dim before the last, which is sharded, too."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("test_*.py")):
        if path.stem[5:] not in TABLES:
            continue
        for table in vars(importlib.import_module(f"tests.ranks.{path.stem}")).values():
            for name, case in table.items() if isinstance(table, dict) else ():
                if isinstance(case, partial) and case.func is check and case.keywords.get("dim", -2) == -2:
                    found[f"{path.stem[5:]}: {name}"] = case
    return found


CASES = _cases()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.filterwarnings("ignore:distpatch has no sharded rule")
@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.filterwarnings("ignore:`nn.functional.upsample")
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_meshes(case: Callable[..., None]) -> None:
    case(meshes=[(2, 2)], p2p=None)
