"""The cases of all tables once more, sharded along height and width: some of them, or all (``pytest --meshes``)."""

from __future__ import annotations

import importlib
from collections.abc import Collection
from functools import partial
from pathlib import Path

import pytest

from tests.support.oracle import check

Case = partial[None]
Shape = tuple[int, ...]

HERE = Path(__file__).parents[1] / "ranks"
EVERY = {(2, 2): 19, (2, 3): 97, (1, 4): 89, (4, 1): 83}  # which cases are run: each 19th ...
UNDER_A_LOCK = frozenset(  # whose draw is under a lock, and which ask other ranks along the width
    {"gumbel_softmax", "gumbel_softmax, hard", "rrelu in training", "dropout of tokens"}
)

# What some cases of a file gather there and not on a group: mostly what works along the width, which is sharded, too.
GATHERS = {
    "argument_forms": "reshape",
    "attention": "reshape scaled_dot_product_attention",
    "concatenation": "add cat unbind",
    "every_function": "reshape",
    "flex_attention": "flex_attention",
    "gpu_choices": "reshape",
    "index_writes": "__setitem__ reshape scatter_ scatter_reduce",
    "indexing": "__getitem__ gather masked_select nonzero",
    "matmul": "cdist",
    "normalization": "reshape",
    "operators": "reshape",
    "pooling": "reshape scatter",
    "reduction": "reshape",
    "second_order": "scatter_add",
    "shape": "cdist conv1d group_norm reshape shard sub unbind",
    "unfold": "reshape",
    "ways_of_attention": "reshape scaled_dot_product_attention",
}


class _All:
    """``on``: whether all cases are run, and the nets of other libraries."""

    on = False


everything = _All()


def cases(along_any_dim: bool = False) -> dict[str, Case]:
    """All of them, or those whose rows are the dim before the last, by the file's name and their own."""
    found: dict[str, Case] = {}
    for path in sorted(HERE.glob("test_*.py")):
        if path.stem in {"test_meshes", "test_compiled"}:
            continue
        for table in vars(importlib.import_module(f"tests.ranks.{path.stem}")).values():
            for name, case in table.items() if isinstance(table, dict) else ():
                is_case = isinstance(case, partial) and case.func is check
                if is_case and name not in UNDER_A_LOCK and (along_any_dim or case.keywords.get("dim", -2) == -2):
                    found[f"{path.stem.removeprefix('test_')}: {name}"] = case
    return found


def chosen(always: Collection[str]) -> list[object]:
    """Mesh, name and case of those that are run; ``always``: these on 2 x 2."""
    found = []
    for at, (name, case) in enumerate(cases().items()):
        for mesh, every in EVERY.items():
            if everything.on or at % every == 0 or (mesh == (2, 2) and name in always):
                found.append(pytest.param(mesh, name, case, id=f"{mesh[0]}x{mesh[1]} {name}"))
    return found
