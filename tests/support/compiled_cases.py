"""The cases of all tables once more, compiled by torch.compile: some of them, or all (``pytest --compiled``).

Without gradients, which sharded tensors cannot carry into a compiled function, on two ranks.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import distpatch
from tests.support.mesh_cases import Case, cases
from tests.support.oracle import assert_same, check, make_inputs, whole
from tests.support.threads import run_ranks

every = 31  # which cases are run: each 31st

SIZES, ASKS = "data-dependent", r"sourceless builder|repr\(\) on tensor"
# What torch refuses to compile of sharded tensors: sizes that values say; cases that ask what is sharded; and some more.
REFUSED = {
    **dict.fromkeys(
        [
            "argument_forms: truth values as indices",
            "every_function: repeat_interleave of repeats alone",
            "concatenation: repeat_interleave rows by tensor",
            "index_writes: by mask, values",
            "index_writes: by mask, rows of values",
            "index_writes: by mask, what was there",
            "index_writes: increased",
            "indexing: rows by a mask",
            "indexing: rows by numbers, then joined",
            "reduction: bincount",
            "shape: by mask",
        ],
        SIZES,
    ),
    **dict.fromkeys(
        [
            "attention: tokens of frames",
            "attention: tokens of frames, mask of frames",
            "attention: tokens of frames, mask with a gradient",
            "fresh_tensors: one-hot by scatter_",
            "fresh_tensors: one-hot by scatter_ of ones",
            "fresh_tensors: a histogram by scatter_add_",
            "fresh_tensors: scatter_reduce_",
            "fresh_tensors: index_add_",
            "fresh_tensors: index_copy_",
            "fresh_tensors: copy_",
            "fresh_tensors: +=",
            "fresh_tensors: add_ of another layout",
            "fresh_tensors: addcmul_",
            "fresh_tensors: add, out=",
            "fresh_tensors: where, out=",
            "gpu_choices: group_norm of frames",
            "index_writes: packed on text",
            "normalization: group_norm of frames",
            "ways_of_attention: tokens of frames",
            "ways_of_attention: tokens of frames, mask of frames",
            "ways_of_attention: tokens of frames, mask with a gradient",
        ],
        ASKS,
    ),
    "operators: attention, decomposed": "returned non-Tensor",
    "shape: mT": "hash_impl",  # of an input of the graph
}


def chosen(always: frozenset[str]) -> list[object]:
    """Name and case of those that are run."""
    found = cases(along_any_dim=True)
    return [
        pytest.param(name, case, id=name)
        for at, (name, case) in enumerate(found.items())
        if at % every == 0 or name in always
    ]


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(fn, fullgraph=True, backend="aot_eager", dynamic=False)


def check_compiled(name: str, one: Case) -> None:
    """The compiled function gives the values of one device, where torch compiles it for one and is right."""
    given = inspect.signature(check).bind(*one.args, **one.keywords)
    given.apply_defaults()
    fn, inputs, options = given.arguments["fn"], given.arguments["inputs"], given.arguments
    tensors = make_inputs(inputs, options["heights"][0], options["channels_last"])
    torch._dynamo.reset()
    with torch.no_grad():
        right = whole(fn(*copies(tensors)))
        with _skipped("torch does not compile it"):
            same(whole(compiled(fn)(*copies(tensors))), right, options["tolerance"], "compiled by torch alone")
    torch._dynamo.reset()

    def uneven(t: Tensor) -> tuple[int, int, int]:
        """Of which pairs of rows, too, have to move before they can be seen as one."""
        size = t.shape[options["dim"]]
        return 0, (size // 2) | 1, size

    def body(rank: int) -> list[Tensor]:
        first, rest = tensors[: options["sharded"]], tensors[options["sharded"] :]
        rows = [distpatch.shard(t, dist.group.WORLD, dim=options["dim"], bounds=uneven(t)) for t in copies(first)]
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what is gathered
            return whole(compiled(fn)(*rows, *copies(rest)))

    if name in REFUSED:
        with pytest.raises(Exception, match=REFUSED[name]):
            run_ranks(2, body)
        return
    for rank, found in enumerate(run_ranks(2, body, timeout=60.0)):  # ranks compile at their own pace
        same(found, right, options["tolerance"], f"rank {rank}")


def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.clone() for t in tensors]


def same(found: Sequence[Tensor], right: Sequence[Tensor], tolerance: float, where: str) -> None:
    assert len(found) == len(right)
    for at, (value, wanted) in enumerate(zip(found, right)):
        assert_same(value, wanted, max(tolerance, 1e-9), f"result {at} on {where}")


@contextlib.contextmanager
def _skipped(why: str) -> Any:
    try:
        yield
    except (Exception, AssertionError) as error:
        pytest.skip(f"{why}: {type(error).__name__}")
