"""The one oracle: a sharded run gives the values and gradients of the unsharded one, on every rank.

>>> check(lambda x, w: F.conv2d(x, w, padding=1), (2, 3, H, 5), (4, 3, 3, 3))

runs the function on random fp64 tensors of these shapes, for several heights ``H``; the first input
is sharded, the weight is replicated. Compared are outputs, input gradients and weight gradients (for
random cotangents), with and without autograd, at world sizes 1 to 4, for even and random bounds. Where a
test has put a transport in place (``using``), all of them run on it.
"""

from __future__ import annotations

import contextlib
import math
import random
import threading
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import distpatch
from distpatch.comm.communicator import communicator
from distpatch.comm.meshes import axis_of_other_parts
from distpatch.layout.rows import Bounds, even_bounds
from distpatch.torch_utils import private
from distpatch.torch_utils.tree import tensors_in
from tests.support.threads import run_ranks
from tests.support.transports.late import late
from tests.support.transports.staged import is_usual

H = -1  # in a shape: the number of rows of the case
HEIGHTS = (7, 2, 1)
WORLDS = (1, 3, 4, 2)
OVER_GLOO = (2,)  # the other worlds' rows move in memory, as late as they may, and what does not match is named
TOLERANCE = 1e-10

Shape = tuple[int, ...]
Input = Shape | Callable[[int], Tensor]
compared = 0  # sharded runs that were compared, for the summary of the session
notes: dict[str, list[str]] = {}  # tables for that summary: lines under their headers


@dataclass
class Result:
    outputs: list[Tensor]
    grads: list[Tensor | None]
    inference: list[Tensor]


def case(fn: Callable[..., Any], *inputs: Input, **options: Any) -> Callable[[], None]:
    """One line of a table: ``check`` with its arguments, to be called by a test."""
    return partial(check, fn, *inputs, **options)


def since_2_13(test: Callable[[], None]) -> Callable[[], None]:
    """A test of what torch 2.11 has not got: it skips itself there, and says so."""
    return test if private.RELEASE >= (2, 13) else partial(pytest.skip, "torch 2.11 has not got this, 2.13 has")


def check(
    fn: Callable[..., Any],
    *inputs: Input,
    heights: Sequence[int] = HEIGHTS,
    worlds: Sequence[int] = WORLDS,
    dim: int = -2,
    sharded: int = 1,
    fallback: str | None = None,
    p2p: int | None = None,
    channels_last: bool = False,
    tolerance: float = TOLERANCE,
    order: int = 1,
    meshes: Sequence[tuple[int, ...]] = (),
    dims: tuple[int, ...] = (-2, -1),
    gathers: Container[str] = (),
) -> None:
    """Compare ``fn`` on sharded tensors with ``fn`` on plain ones.

    ``inputs``: shapes, in which ``H`` stands for the rows, or functions from the rows to a tensor;
    ``sharded``: how many of them, from the first, are sharded along ``dim``. ``fallback``: the operation
    that is expected to be gathered (None: none may be). ``p2p``: the most point-to-point batches that
    one forward pass may take where all inputs have the same bounds. ``order``: of the highest derivatives
    compared. ``meshes``: of ranks, in place of ``worlds``: each input is sharded along all ``dims``; ``gathers``:
    operations that may be gathered there, too.
    """
    global compared
    runs = [(rows, make_inputs(inputs, rows, channels_last)) for rows in heights]
    expected = [run(fn, tensors, list, rows, order=order) for rows, tensors in runs]
    for mesh in meshes or [(world,) for world in worlds]:
        world, along = math.prod(mesh), dims if meshes else (dim,)
        layouts = [_layouts(tensors[:sharded], mesh, along, first=rows == heights[0]) for rows, tensors in runs]

        expected_of = fallback, gathers if meshes else ()

        def body(rank: int) -> list[list[tuple[Result, list[int]]]]:
            group = mesh_of(mesh) if meshes else dist.group.WORLD

            def one(rows: int, tensors: list[Tensor], bounds: Any) -> tuple[Result, list[int]]:
                result = _sharded(fn, tensors, rows, group, along, bounds, expected_of, p2p, order)
                return result, parts_sent(group) if isinstance(group, DeviceMesh) else []

            return [[one(rows, tensors, bounds) for bounds in layouts[i]] for i, (rows, tensors) in enumerate(runs)]

        transport = late() if is_usual() and world not in OVER_GLOO else contextlib.nullcontext()
        with _expect_warning(None if meshes else fallback), transport:
            ranks = run_ranks(world, body, keep=True)
        for i, (rows, _) in enumerate(runs):
            for j, bounds in enumerate(layouts[i]):
                where = f"{rows} rows on {mesh} ranks, bounds {bounds}"
                compare([results[i][j][0] for results in ranks], expected[i], where, tolerance)
                compare_parts([results[i][j][1] for results in ranks], mesh, where)
                compared += 1


def random_tensor(shape: Shape, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal values of a generator of its own: thread-ranks share the default one."""
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_inputs(inputs: Sequence[Input], rows: int, channels_last: bool) -> list[Tensor]:
    tensors = []
    for index, item in enumerate(inputs):
        if callable(item):
            tensors.append(item(rows))
            continue
        tensor = random_tensor(tuple(rows if n == H else n for n in item), seed=index)
        if channels_last and tensor.ndim == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        tensors.append(tensor)
    return tensors


def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    """A mesh of all ranks, made once a thread."""
    known: dict[tuple[int, ...], DeviceMesh] = _thread.__dict__.setdefault("meshes", {})
    if shape not in known:
        known[shape] = init_device_mesh("cpu", shape)
    return known[shape]


def parts_sent(mesh: DeviceMesh) -> list[int]:
    """A checksum for each axis of which parts were sent since the last one (``Communicator.sends_parts``)."""
    comms = [communicator(mesh.get_group(axis)) for axis in range(mesh.ndim)]
    parts = [comm.parts for comm in comms]
    for comm in comms:
        comm.parts = 0
    return parts


def compare_parts(sent: Sequence[list[int]], mesh: tuple[int, ...], where: str) -> None:
    """The ranks of an axis have sent parts of the same tensors, sharded alike over the other axes."""
    if sent[0]:
        assert axis_of_other_parts(mesh, sent) is None, f"{where}: other parts sent"


_thread = threading.local()


def _layouts(
    tensors: Sequence[Tensor], mesh: tuple[int, ...], dims: tuple[int, ...], first: bool
) -> list[list[tuple[Bounds, ...]]]:
    """Bounds of each sharded input along each dim, random and different ones; for the first height even ones too."""
    every = [[(t.shape[dim], ranks) for dim, ranks in zip(dims, mesh)] for t in tensors]
    layouts = [[tuple(even_bounds(*axis) for axis in axes) for axes in every]] if first else []
    if math.prod(mesh) > 1:
        layouts.append([tuple(_random_bounds(*axis, seed) for axis in axes) for seed, axes in enumerate(every)])
    if len(mesh) > 1 and first:  # the first rank of the outermost axis has nothing
        layouts.append([(*(even_bounds(*axis) for axis in axes[:-1]), _none_first(*axes[-1])) for axes in every])
    return layouts


def _none_first(size: int, ranks: int) -> Bounds:
    return (0, *even_bounds(size, ranks - 1)) if ranks > 1 else (0, size)


def _random_bounds(rows: int, world: int, seed: int) -> Bounds:
    """Any bounds: a rank may own all rows, or none."""
    draw = random.Random(f"{rows} {world} {seed}")
    return (0, *sorted(draw.randint(0, rows) for _ in range(world - 1)), rows)


def _sharded(
    fn: Callable[..., Any],
    tensors: list[Tensor],
    rows: int,
    group: Any,
    dims: tuple[int, ...],
    bounds: list[tuple[Bounds, ...]],
    gathers: tuple[str | None, Container[str]],
    p2p: int | None,
    order: int,
) -> Result:
    def distribute(leaves: list[Tensor]) -> list[Tensor]:
        pairs = zip(leaves, bounds, strict=False)
        cut = [distpatch.shard(t, group, dim=dims, bounds=b if len(dims) > 1 else b[0]) for t, b in pairs]
        return cut + leaves[len(bounds) :]

    with distpatch.trace() as t:
        same_bounds = len(set(bounds)) == 1
        result = run(fn, tensors, distribute, rows, p2p if same_bounds else None, order)
    gathered, (expected, may) = {record.op for record in t.fallbacks}, gathers
    if len(dims) == 1 or _is_regular(tensors, dims, bounds):
        assert expected is None or expected in gathered, f"{expected} was not gathered"
        assert all(op in may for op in gathered - {expected}), f"operations gathered: {gathered}"
    return result


def _is_regular(tensors: list[Tensor], dims: tuple[int, ...], bounds: list[tuple[Bounds, ...]]) -> bool:
    """Whether all are shared out evenly along several dims, two rows or more a rank: else some may be gathered."""
    return all(
        axis == even_bounds(t.shape[dim], len(axis) - 1) and t.shape[dim] >= 2 * (len(axis) - 1)
        for t, axes in zip(tensors, bounds, strict=False)
        for dim, axis in zip(dims, axes)
    )


def run(
    fn: Callable[..., Any],
    tensors: list[Tensor],
    distribute: Callable[[list[Tensor]], list[Tensor]],
    rows: int,
    p2p: int | None = None,
    order: int = 1,
) -> Result:
    """Outputs (gathered) with and without autograd, and the gradient of every input, of each order."""
    leaves = [t.clone().requires_grad_(t.is_floating_point()) for t in tensors]
    with torch.no_grad(), distpatch.trace() as t:
        result = fn(*distribute([t.clone() for t in tensors]))
        assert p2p is None or t.count("p2p") <= p2p, f"more than {p2p} point-to-point batches:\n{t.table()}"
        inference = whole(result)
    outputs = whole(fn(*distribute(leaves)))
    below: list[Tensor | None] = []
    found, wanted = list(outputs), [leaf for leaf in leaves if leaf.requires_grad]
    for _ in range(order - 1):
        loss = _loss([found_one.tanh() for found_one in found if found_one.requires_grad], rows)
        found = [g for g in torch.autograd.grad(loss, wanted, create_graph=True, allow_unused=True) if g is not None]
        below += [g.detach() for g in found]
    if any(out.requires_grad for out in found):
        _loss([out for out in found if out.requires_grad], rows).backward()
    return Result([out.detach() for out in outputs], below + [leaf.grad for leaf in leaves], inference)


def _loss(outputs: list[Tensor], seed: int) -> Tensor:
    return torch.stack([(out * random_tensor(tuple(out.shape), seed=seed)).sum() for out in outputs]).sum()


def whole(result: Any) -> list[Tensor]:
    """Every tensor of a result, gathered; what it said of itself before is true."""
    tensors = list(tensors_in(result))
    gathered = [distpatch.gather(tensor) for tensor in tensors]
    for before, after in zip(tensors, gathered, strict=True):
        assert (before.shape, before.dtype) == (after.shape, after.dtype)
        assert before.requires_grad == after.requires_grad
    return gathered


def compare(
    ranks: list[Result], expected: Result, where: str, tolerance: float = TOLERANCE, same_bits: bool = True
) -> None:
    """Every rank has the expected values and gradients, and the same bits as rank 0."""
    for kind in ("inference", "outputs", "grads"):
        wanted = getattr(expected, kind)
        for rank, result in enumerate(ranks):
            got = getattr(result, kind)
            assert len(got) == len(wanted), f"{kind} of rank {rank}: {len(got)} of {len(wanted)}; {where}"
            for index, (value, right, first) in enumerate(zip(got, wanted, getattr(ranks[0], kind), strict=True)):
                label = f"{kind}[{index}] of rank {rank}; {where}"
                assert_same(value, right, tolerance, label)
                same = value is None or not same_bits or torch.equal(value, first) or _equal_with_nan(value, first)
                assert same, f"{label}: other bits than on rank 0"


def _equal_with_nan(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def assert_same(value: Tensor | None, right: Tensor | None, tolerance: float, label: str) -> None:
    """Same shape, dtype and values, to ``tolerance``; also both None."""
    assert (value is None) == (right is None), f"{label}: {value} for {right}"
    if value is not None and right is not None:
        torch.testing.assert_close(
            value, right, rtol=tolerance, atol=tolerance, equal_nan=True, msg=lambda m: f"{label}\n{m}"
        )


@contextlib.contextmanager
def _expect_warning(fallback: str | None) -> Iterator[None]:
    if fallback is None:
        yield
    else:
        with pytest.warns(UserWarning, match=f"no sharded rule for {fallback}"):
            yield
