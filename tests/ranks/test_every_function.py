"""Every function that torch lets a tensor type override, called with a sharded tensor: the value of one device,
an error that one device gives too, or a refusal by name."""

from __future__ import annotations

import functools
import inspect
import itertools
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import get_testing_overrides
from torch.utils._pytree import tree_leaves, tree_map_only

import distpatch
from distpatch.comm.collectives import narrow_rows
from distpatch.errors import UnsupportedOpError
from distpatch.layout.blocks import BlockLayout
from distpatch.tensor.patch_tensor import PatchTensor
from distpatch.torch_utils import private
from docs import coverage
from tests.support import oracle
from tests.support.oracle import H, case, random_tensor
from tests.support.threads import run_ranks

# Say where they are in memory, or what object they are: another for every tensor.
IDENTITIES = {"__hash__", "__repr__", "__format__", "__dir__", "_cdata.__get__"}
# Return memory as they find it.
UNINITIALISED = {"empty_like", "new_empty", "new_empty_strided", "new", "empty_strided"}
# Are sampled with a seed of their own, of a generator that thread-ranks share.
SEEDED = {"exponential", "log_normal", "normal", "nn.functional.rrelu", "svd_lowrank", "pca_lowrank"}
# Take seconds, act on the process, or answer by the tensor's address.
# Without arguments torch asks no rule: refused below the table, by name.
BELOW = {"set_"}
LEFT_OUT = {
    "lobpcg",
    "__cuda_array_interface__.__get__",
    "__dlpack__",
    "register_hook",
    "module_load",
    "autocast",
    "__deepcopy__",
}

X = (2, 3, H, 5)
GRID = (2, 3, 6, 5)
SHAPES: tuple[tuple[tuple[int, ...], torch.dtype], ...] = (
    (GRID, torch.float64),
    ((4, 4), torch.float64),
    ((3, 4, 4), torch.float64),
    ((6,), torch.float64),
    (GRID, torch.int64),
    ((6,), torch.int64),
    (GRID, torch.bool),
    (GRID, torch.complex128),
    ((1, 2, 4, 6, 5), torch.float64),
)
BY_NAME: dict[str, Any] = {
    **dict.fromkeys("dim dim0 axis0 axis dimension source0 start k groups num_groups chunks".split(), 1),
    **dict.fromkeys("dim1 axis1 destination n length diagonal tau step N num_layers".split(), 2),
    **dict.fromkeys("p eps exponent norm_type value alpha min fill_value maxnorm dropout scale".split(), 0.5),
    **dict.fromkeys("max threshold".split(), 1.5),
    **dict.fromkeys("kernel_size stride upscale_factor downscale_factor dilation".split(), 1),
    **dict.fromkeys("padding output_padding quant_min zero_point ch_axis axis_".split(), 0),
    **dict.fromkeys("train training bidirectional batch_first align_corners use_input_stats log_input full".split(), False),
    **dict.fromkeys("split_size_or_sections split_size split_sizes indices_or_sections bins n_bins num_samples".split(), 2),
    **dict.fromkeys("dims names source shifts".split(), (1,)),
    **dict.fromkeys("size shape".split(), GRID),
    **dict.fromkeys("output_size".split(), 4),
    "equation": "...ij->...ji",
    "reduce": "sum",
    "dtype": torch.float32,
    "pad": (1, 1, 2, 1),
    "normalized_shape": (6, 5),
    "n_fft": 4,
    "quant_max": 7,
    "momentum": 0.1,
    "memo": {},
    "format_spec": "",
    "reduction": 1,
    "proto": 2,
    "callable": float,
    "sizes": (6,),
}  # fmt: skip
SEVERAL = {"tensors", "matrices", "inputs"}


def arguments(func: Any, kind: int) -> tuple[Any, ...] | None:
    """A value for every argument that the function needs; of shape and dtype number ``kind``. None: unknown."""
    override = get_testing_overrides().get(func)
    if override is None:
        return (_tensor(kind, 0),)
    given: list[Any] = []
    for index, parameter in enumerate(inspect.signature(override).parameters.values()):
        if parameter.kind is parameter.VAR_POSITIONAL and parameter.name in {"args", "tensors"} and not given:
            given += [_tensor(kind, 0), _tensor(kind, 1)]
        if parameter.default is not parameter.empty or parameter.kind in {
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        }:
            continue
        if index > 0 and parameter.name in BY_NAME:
            given.append(BY_NAME[parameter.name])
        elif parameter.name in SEVERAL:
            given.append([_tensor(kind, 0), _tensor(kind, 1)])
        else:
            given.append(_tensor(kind, index))
    return tuple(given)


@functools.cache
def _tensor(kind: int, index: int) -> Tensor:
    shape, dtype = SHAPES[kind]
    values = random_tensor(shape, seed=index)
    if not (dtype.is_floating_point or dtype.is_complex):
        values = values * 3 if dtype != torch.bool else values > 0
    return (values.abs() if dtype == torch.int64 else values).to(dtype)


def _fresh(tree: Any) -> Any:
    return tree_map_only(Tensor, torch.clone, tree)


def _attempt(func: Any, args: tuple[Any, ...], seed: int = 0) -> tuple[Any, Exception | None]:
    torch.manual_seed(seed)
    try:
        return func(*args), None
    except Exception as error:
        return None, error


@functools.cache
def calls() -> list[tuple[Any, str, list[tuple[Any, ...]]]]:
    """Each function with arguments that one device takes, or, where none of ours are taken, with any."""
    found = []
    for func, path in coverage.functions().items():
        if path.rpartition(".")[2] in LEFT_OUT or coverage.op_name(func) in LEFT_OUT:
            continue
        tried = [arguments(func, kind) for kind in range(len(SHAPES))]
        taken = (args for args in tried if args and _attempt(func, _fresh(args))[1] is None)
        found.append((func, path, list(itertools.islice(taken, 2)) or [args for args in tried[:1] if args]))
    return found


def _sharded(tensor: Tensor) -> Tensor:
    """By its second last dim, or its only one."""
    if tensor.ndim == 0 or tensor.layout != torch.strided:
        return tensor.clone()
    return distpatch.shard(tensor.clone(), dist.group.WORLD, dim=max(tensor.ndim - 2, 0))


def _in_rows(x: PatchTensor) -> Tensor:
    """To be compared row by row; merged blocks of rows are gathered."""
    return distpatch.gather(x) if isinstance(x.row_layout, BlockLayout) else x


def _same(value: Any, right: Any) -> bool:
    """Of a sharded value this rank's rows."""
    if isinstance(right, Tensor):
        if isinstance(value, PatchTensor):
            if value.shape != right.shape:
                return False
            value, right = value.local, narrow_rows(right, value.row_layout, value.region.comm.rank)
        if not isinstance(value, Tensor) or (value.shape, value.dtype) != (right.shape, right.dtype):
            return False
        return right.layout != torch.strided or torch.allclose(value, right, rtol=1e-8, atol=1e-10, equal_nan=True)
    if isinstance(right, (bool, int, float, complex, str, torch.Size, torch.dtype, torch.device)):
        return type(value) is type(right) and (value == right or repr(value) == repr(right) == "nan")
    return True


def _outcome(func: Any, path: str, args: tuple[Any, ...], world: int) -> str:
    """What became of one call on all ranks: same, error or refused; an AssertionError says what else."""
    plain_args = _fresh(args)
    right, error = _attempt(func, plain_args)
    name = coverage.op_name(func)
    again = [_attempt(func, _fresh(args), seed=seed)[0] for seed in (1, 2, 3)]
    random = not all(_same(*pair) for other in again for pair in zip(tree_leaves(other), tree_leaves(right)))
    unknown = name in IDENTITIES | UNINITIALISED or (random and world > 1)  # threads share the generator

    def body(rank: int) -> Any:
        sharded = tree_map_only(Tensor, _sharded, args)
        try:
            result = func(*sharded)
        except Exception as failure:
            return failure
        return tree_map_only(PatchTensor, _in_rows, (result, sharded))

    torch.manual_seed(0)  # not in a rank: it holds the interpreter, and waits for a draw of another thread
    outcomes = run_ranks(world, body, keep=True)
    kinds = set()
    for outcome in outcomes:
        if isinstance(outcome, UnsupportedOpError) or "use distpatch.gather" in str(outcome):
            assert "below the table" not in str(outcome) or name in BELOW, f"{path} slipped through: {outcome}"
            kinds.add("refused")
        elif isinstance(outcome, Exception):
            assert error is not None, f"{path}{_shown(args)}: {outcome!r}, where one device gives {_shown(right)}"
            kinds.add("error")
        else:
            assert error is None, f"{path}{_shown(args)}: {_shown(outcome[0])}, where one device raises {error!r}"
            got, expected = tree_leaves(outcome), tree_leaves((right, plain_args))
            assert len(got) == len(expected), f"{path}{_shown(args)}: {_shown(got)}, not {_shown(expected)}"
            for value, wanted in zip(got, expected):
                alike = isinstance(wanted, Tensor) and isinstance(value, Tensor) and value.shape == wanted.shape
                assert _same(value, wanted) or (unknown and (alike or not isinstance(wanted, Tensor))), (
                    f"{path}{_shown(args)}: {_shown(value)}, where one device gives {_shown(wanted)}"
                )
            kinds.add("same")
    assert len(kinds) == 1, f"{path}{_shown(args)}: {kinds} on different ranks"
    return kinds.pop()


def _shown(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: f"{t.dtype}{tuple(t.shape)}" if t.ndim else t, value)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("world", [1, 2])
def test_every_function(world: int) -> None:
    found: Counter[str] = Counter()
    wrong: list[str] = []
    with warnings.catch_warnings(), torch.no_grad():
        for func, path, some in calls():
            for args in some[:world]:
                try:
                    found[_outcome(func, path, args, world)] += 1
                except AssertionError as error:
                    wrong.append(str(error).splitlines()[0])
    assert not wrong, "\n".join(wrong)
    assert found["same"] > 1000, found


def torch_samples() -> Iterator[tuple[Any, str, tuple[Any, ...]]]:
    """Calls that torch tests its own functions with: the first of each."""
    from torch.testing._internal.common_methods_invocations import op_db  # takes seconds

    for op in op_db:
        kind = next((t for t in (torch.float64, torch.int64, torch.bool) if t in op.supported_dtypes("cpu")), None)
        if (
            kind is None
            or op.name.startswith(("_refs", "torch.ops", "sparse"))
            or op.name in SEEDED | LEFT_OUT | UNINITIALISED
        ):
            continue
        for sample in itertools.islice(op.sample_inputs("cpu", kind), 1):
            args = (sample.input, *sample.args)
            if any(isinstance(t, Tensor) for t in tree_leaves(args)):
                yield functools.partial(op.op, **sample.kwargs), f"{op.name} {_shown(sample.kwargs)}", args


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_torch_samples() -> None:
    """Arguments that fit, which the walk above can only guess."""
    wrong, found = [], Counter[str]()
    with warnings.catch_warnings(), torch.no_grad():
        for func, name, args in torch_samples():
            try:
                found[_outcome(func, name, args, 2)] += 1
            except AssertionError as error:
                said = str(error).splitlines()[0]
                try:  # a rule that is wrong is wrong twice; a decomposition may hang on where its input is stored
                    _outcome(func, name, args, 2)
                    oracle.notes.setdefault("samples that gave two values:", []).append(said)
                except AssertionError:
                    wrong.append(said)
    assert not wrong, "\n".join(wrong)
    assert found["same"] > 300, found


MASK = random_tensor((5,)) > 0
# What these walks, and one over the samples that torch tests its own functions with, found wrong.
FOUND = {
    "log_softmax of special": case(lambda x: torch.special.log_softmax(x, 2), X),
    "detach_ of a slice": case(lambda x: x.detach().detach_() * 2, X),
    "repeat_interleave of repeats alone": case(
        lambda x: torch.repeat_interleave(x.detach().abs().long().flatten()), X, fallback="repeat_interleave"
    ),
    "is_same_size": case(lambda x: x * x.is_same_size(x.clone()) + torch.is_same_size(x, x[:, :1]), X),
    "diff of nothing": case(lambda x: x.diff(n=0, dim=2, prepend=x), X),
    "cosine_similarity of broadcast operands": case(
        lambda x, y: F.cosine_similarity(x, y, dim=1), (1, 3, H, 5), (2, 1, 1, 5)
    ),
    "circular pad after a crop": case(lambda x: F.pad(x, (1, -1, 1, -1), mode="circular"), X, heights=(7, 3)),
    "circular pad before a crop": case(lambda x: F.pad(x, (-1, 1, -2, 1), mode="circular"), X, heights=(7, 4)),
    "keys of more batch dims than queries": case(F.scaled_dot_product_attention, (3, H, 4), (2, 3, 6, 4), (2, 3, 6, 4)),
    "squeeze of no dims": case(lambda x: x.squeeze(()) + x, (1, 1, H, 1)),
    "mean of nothing": case(lambda x: torch.var_mean(x[:0], correction=-1), X),
    "softmax of nothing": case(lambda x: x[:0].softmax(2), X),
    "masked_scatter with a wide mask": case(
        lambda x: x[0, 0, 0].masked_scatter(x[0, 0] > 0, x[0, 0]), X, fallback="masked_scatter", heights=(7,)
    ),
    "masked_scatter with a narrow mask": case(lambda x: x.masked_scatter(MASK, x * 2), X),
    "take_along_dim from behind": case(lambda x: torch.take_along_dim(x, (x[:, :1] > 0).long() - 2, dim=1), X),
    "sharded weights of norms": case(
        lambda x, w: F.group_norm(x, 1, w[0, 0, :3, 0], w[1, 0, :3, 1]),
        (2, 3, H, 5),
        (2, 1, 4, 2),
        sharded=2,
        heights=(4,),
    ),
    "only empty tensors": case(lambda x: torch.cat([x.flatten()[:0], x.flatten()[:0]]), X),
}


@pytest.mark.parametrize("case", FOUND.values(), ids=FOUND)
def test_found(case: Callable[[], None]) -> None:
    case()


@pytest.mark.parametrize("inference", [False, True])
def test_writes_that_no_name_tells_of(inference: bool) -> None:
    """``max_norm`` writes to the table, which gets it back; running statistics, which no schema names, are refused."""

    def body(rank: int) -> None:
        group = dist.group.WORLD
        with torch.inference_mode(inference):
            table = distpatch.shard(random_tensor((6, 5)), group)
            x, mean = (
                distpatch.shard(random_tensor((2, 4, 5, 3)), group),
                distpatch.shard(torch.zeros(4).double(), group, dim=0),
            )
            plain = distpatch.gather(table)
            found = F.embedding(torch.tensor([1, 2]), table, max_norm=0.1)
            assert torch.equal(found, F.embedding(torch.tensor([1, 2]), plain, max_norm=0.1))
            assert torch.equal(distpatch.gather(table), plain)
            with pytest.raises(UnsupportedOpError, match="running"):
                F.batch_norm(distpatch.gather(x), mean, mean, training=True)
            torch.native_batch_norm(x, None, None, mean, mean.clone(), True, 0.1, 1e-5)
            assert torch.allclose(distpatch.gather(mean), 0.1 * distpatch.gather(x).mean((0, 2, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run_ranks(2, body)


def test_the_coverage_table_is_up_to_date() -> None:
    """Else: make coverage."""
    table = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")
    release = ".".join(map(str, private.RELEASE))
    if f"torch {release}: " not in table:
        pytest.skip(f"the table is of another release of torch than {release}, whose functions are others")
    assert coverage.table() == table


def test_kinds() -> None:
    """What the table says of a few whose kind is known."""
    known = {
        "sharded": [torch.relu, F.gelu, torch.Tensor.add_, F.max_pool2d, torch.Tensor.shape.__get__],
        "partial": [F.interpolate, torch.where, torch.Tensor.__getitem__, torch.var],
        "fallback": [torch.renorm, torch.histogram, torch.cov, torch.Tensor.renorm_],
        "refused": [torch.Tensor.data_ptr, torch.Tensor.numpy, torch.Tensor.itemsize.__set__],
    }
    for kind, funcs in known.items():
        for func in funcs:
            assert coverage.kind(func) == kind, func
