"""Every reduction, over the rows and beside them: values, places, ties, dtypes and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import distpatch
from tests.support.makers import anywhere
from tests.support.oracle import H, case, random_tensor, since_2_13
from tests.support.threads import run_ranks

X = (2, 3, H, 5)
WIDTH = (2, 3, 5, H)
MANY = (7, 3, 2)  # at least two rows, so that a sample variance exists


def ties(*shape: int) -> Callable[[int], Tensor]:
    """Few different values, so that the largest stands in many places, of many ranks."""
    return lambda rows: random_tensor(tuple(rows if n == H else n for n in shape)).mul(1.5).round()


def with_nan(*shape: int) -> Callable[[int], Tensor]:
    """Some values are missing; never all of a column."""

    def make(rows: int) -> Tensor:
        x = random_tensor(tuple(rows if n == H else n for n in shape))
        return torch.where(random_tensor(tuple(x.shape), seed=1) > 1.2, math.nan, x)

    return make


def whole_numbers(*shape: int, dtype: torch.dtype = torch.int64) -> Callable[[int], Tensor]:
    return lambda rows: random_tensor(tuple(rows if n == H else n for n in shape)).mul(3).to(dtype)


BESIDE = {"worlds": (3,), "heights": (7, 1)}  # what stays on a rank needs no more
FEW: dict[str, Any] = {"worlds": (4, 2), "heights": (7, 2)}


def over(fn: Callable[..., Any], name: str, make: Any = X, **options: Any) -> dict[str, Callable[[], None]]:
    """A reduction of all elements, of the rows, of pixels, of all but rows, and of channels."""
    beside = options | BESIDE | {key: options[key] for key in ("heights",) if key in options}
    return {
        f"{name}": case(lambda x: fn(x), make, **options),
        f"{name} rows": case(lambda x: fn(x, dim=-2), make, **options),
        f"{name} pixels": case(lambda x: fn(x, dim=(2, 3), keepdim=True), make, **options),
        f"{name} batch and channels": case(lambda x: fn(x, dim=(0, 1)), make, **beside),
        f"{name} channels": case(lambda x: fn(x, dim=1, keepdim=True), make, **beside),
    }


def one_dim(fn: Callable[..., Any], name: str, make: Any = X, **options: Any) -> dict[str, Callable[[], None]]:
    """A reduction along the rows, with and without them kept, or along another dim."""
    return {
        f"{name} rows": case(lambda x: fn(x, dim=2), make, **options),
        f"{name} rows, kept": case(lambda x: fn(x, -2, keepdim=True), make, **options),
        f"{name} channels": case(lambda x: fn(x, 1), make, **(options | BESIDE)),
        f"{name} batch, kept": case(lambda x: fn(x, 0, True), make, **(options | BESIDE)),
    }


def norm(ord: Any) -> Callable[..., Tensor]:
    return lambda x, **options: torch.linalg.vector_norm(x, ord, **options)


def with_options(name: str) -> dict[str, Callable[[], None]]:
    """One reduction over all dims, the rows, other dims, and some of both."""
    fn = getattr(torch, name)
    return {
        f"{name}": case(fn, X),
        f"{name} of rows": case(lambda x: fn(x, dim=-2), X),
        f"{name} of rows, keepdim": case(lambda x: fn(x, dim=2, keepdim=True) + x, X),
        f"{name} of pixels": case(lambda x: fn(x, dim=(2, 3)), X),
        f"{name} of channels": case(lambda x: fn(x, dim=1), X),
        f"{name} of channels and columns": case(lambda x: fn(x, dim=(1, -1), keepdim=True), X),
    }


CASES = {
    **with_options("sum"),
    **with_options("mean"),
    **with_options("amax"),
    **with_options("amin"),
    "method": case(lambda x: x.mean() + x.sum((-1, -2), keepdim=True), X),
    "sum as fp32": case(lambda x: torch.sum(x.float(), dtype=torch.float64), X, tolerance=1e-6),
    "max": case(lambda x: x.max(), X),
    "min": case(lambda x: x.min(), X),
    "max of channels": case(lambda x: x.max(dim=1), X),
    "any, compared": case(lambda x: (x > 1.5).any(), X),
    "all of rows": case(lambda x: (x < 1.0).all(dim=-2), X),
    "any of columns": case(lambda x: (x > 1.0).any(dim=-1), X),
    "var": case(torch.var, X, heights=MANY),
    "var biased": case(lambda x: x.var(unbiased=False), X),
    "var of pixels": case(lambda x: torch.var(x, dim=(2, 3), keepdim=True), X),
    "var of rows": case(lambda x: torch.var(x, dim=2, correction=0), X),
    "var of channels": case(lambda x: torch.var(x, dim=1), X),
    "std of pixels": case(lambda x: x.std(dim=(2, 3)), X),
    "var_mean of pixels": case(lambda x: torch.var_mean(x, dim=(2, 3)), X),
    "var_mean of channels": case(lambda x: torch.var_mean(x, dim=1), X),
    "std_mean": case(lambda x: torch.std_mean(x, dim=(0, 2, 3), correction=0), X),
    "used again": case(lambda x: (x - x.mean((2, 3), keepdim=True)) / x.std(), X),
    "instance norm by hand": case(lambda x: (x - x.mean((2, 3), True)) / (x.var((2, 3), keepdim=True) + 0.1).sqrt(), X),
    "squeeze and excite": case(lambda x, w: x * torch.sigmoid(x.mean((2, 3)) @ w)[:, :, None, None], X, (3, 3)),
    "loss": case(lambda x, y: (x - y).square().mean(), X, X),
    "width": case(lambda x: x.sum(-1) * x.mean(), (2, 3, 5, H), dim=-1),
    "norm, of a method": case(lambda x: x.norm(), X),
    "argmax": case(lambda x: x.argmax(dim=1), X),
    "median of all": case(lambda x: x.median(), X, fallback="median"),
    "prod of rows": case(lambda x: x.prod(dim=2), X),
    **over(torch.nansum, "nansum", with_nan(*X)),
    **over(torch.nanmean, "nanmean", with_nan(*X)),
    **over(torch.amax, "amax of ties", ties(*X)),
    **over(torch.amin, "amin of ties", ties(*X), **FEW),
    **over(torch.sum, "sum of numbers", whole_numbers(*X), **FEW),
    **over(torch.any, "any", whole_numbers(*X, dtype=torch.bool), **FEW),
    **over(torch.all, "all of bytes", whole_numbers(*X, dtype=torch.uint8), **FEW),
    **over(torch.amax, "amax of numbers", whole_numbers(*X, dtype=torch.int32), **FEW),
    **over(torch.logsumexp, "logsumexp", X) | {"logsumexp": case(lambda x: x.logsumexp((0, 1, 2, 3)), X)},
    **over(torch.std, "std", X, heights=MANY),
    **over(lambda x, **o: torch.var_mean(x, correction=0, **o), "var_mean", X),
    **over(torch.norm, "norm"),
    **over(norm(1), "1-norm"),
    **over(norm(3.5), "3.5-norm", **FEW),
    **over(norm(-1), "-1-norm", **FEW),
    "logsumexp of complex": case(lambda x: torch.complex(x, x).logsumexp(2).abs(), X, fallback="logsumexp", **FEW),
    "0-norm of complex": case(lambda x: norm(0)(torch.complex(x, x).detach(), dim=2), ties(*X), **FEW),
    **over(lambda x, **options: norm(0)(x.detach(), **options), "0-norm", ties(*X), **FEW),
    **over(norm(math.inf), "max-norm", ties(*X), **FEW),
    **over(norm(-math.inf), "min-norm", ties(*X), **FEW),
    **over(torch.linalg.vector_norm, "vector_norm", WIDTH, dim=-1),
    **one_dim(torch.max, "max"),
    **one_dim(torch.min, "min", ties(*X), **FEW),
    **one_dim(torch.max, "max of ties", ties(*X), **FEW),
    **one_dim(torch.max, "max of numbers", whole_numbers(*X, dtype=torch.int16), **FEW),
    **one_dim(torch.argmax, "argmax", ties(*X)),
    **one_dim(torch.argmin, "argmin", ties(*WIDTH), dim=-1),
    **one_dim(torch.prod, "prod"),
    **one_dim(torch.prod, "prod with zeros", ties(*X)),
    "mean, numpy names": case(lambda x: x.mean(axis=(2, 3), keepdims=True) + x.sum(axis=1, keepdims=True), X),
    "sum in fp64": case(lambda x: x.float().sum(dim=2, dtype=torch.float64), X, tolerance=1e-6),
    "mean of bool": case(lambda x: torch.mean((x > 0).float(), (2, 3)), X, tolerance=1e-6),
    "sum of bool": case(lambda x: (x > 0).sum(), X),
    "bincount": case(lambda x: torch.bincount(x[:, 0]), anywhere(H, 2)),
    "bincount, weights": case(lambda x, w: x[:, 0].bincount(w[:, 1].detach(), 9), anywhere(H, 2), (H, 2), sharded=2),
    "count_nonzero": case(lambda x: torch.count_nonzero(x), ties(*X)),
    "count_nonzero rows": case(lambda x: torch.count_nonzero(x, dim=2), ties(*X)),
    "count_nonzero channels": case(lambda x: torch.count_nonzero(x, dim=(0, 1)), ties(*X)),
    "sum batch, sharded": case(lambda x: x.sum(0) + x.sum((0, 1)), (H, 3, 4), dim=0),
    "max of all, ties": case(lambda x: x.max() - x.min(), ties(*X)),
    "max of two": case(lambda x, y: torch.max(x, y) + torch.min(x, other=y), X, X, sharded=2),
    "max, used again": case(lambda x: x / x.max(dim=-2, keepdim=True).values, X),
    "max, named": case(lambda x: x.max(2).indices.sum(1) + x.min(dim=2).values.sum(1), X),
    "max of minus infinity": case(lambda x: torch.where(x < 9, -math.inf, x).max(2), X),
    "argmax of all": case(lambda x: x.argmax(), ties(*X)),
    "argmin of all, kept": case(lambda x: x.argmin(keepdim=True), ties(*X)),
    "argmax of all, of one row": case(torch.argmax, (2, 3, H, 1)),
    "argmax of nan": case(lambda x: x.argmax(2), with_nan(*X)),
    "argmax of all, nan": case(torch.argmax, with_nan(*X)),
    "argmax of flat": case(torch.argmax, ties(H), dim=0),
    "aminmax": since_2_13(case(lambda x: torch.aminmax(x), ties(*X))),
    "aminmax rows": since_2_13(case(lambda x: x.aminmax(dim=2, keepdim=True), ties(*X))),
    "aminmax channels": since_2_13(case(lambda x: x.aminmax(dim=1), X)),
    "prod": case(torch.prod, X),
    "prod of the only dim, kept": case(lambda x: x.prod(0, keepdim=True), (H,), dim=0),
    "prod with one zero": case(lambda x: (x * (x != x.max())).prod(), (1, 1, H, 2)),
    "logsumexp of large": case(lambda x: (x * 1e3).logsumexp(2), X),
    "logsumexp of minus infinity": case(lambda x: torch.where(x < -0.5, -math.inf, x).logsumexp((0, 1, 2, 3)), X),
    "norm of two": case(lambda x: x.norm(2, dim=(1, 2)) + x.norm(dim=-1).mean(2).norm(p=1), X),
    "norm p=1": case(lambda x: torch.norm(x, p=1, dim=2, keepdim=True), X),
    "norm p=inf": case(lambda x: torch.norm(x, p=math.inf), ties(*X)),
    "norm of zeros": case(lambda x: (x * 0).norm() + (x[:, :, :1] * x[:, :, -1:]).norm(), X),
    "nuclear norm": case(lambda x: torch.norm(x, p="nuc", dim=(2, 3)), X, heights=(7, 3), fallback="norm"),
    "linalg.norm": case(lambda x: torch.linalg.norm(x) + torch.linalg.norm(x, dim=2).sum(), X),
    "linalg.norm fro": case(lambda x: torch.linalg.norm(x, "fro", dim=(-2, -1)), X),
    "linalg.norm of columns": case(lambda x: torch.linalg.norm(x, 1, dim=(-2, -1)), X),
    "linalg.norm of rows": case(lambda x: torch.linalg.norm(x, math.inf, dim=(2, 3), keepdim=True), X),
    "linalg.norm, smallest column": case(lambda x: torch.linalg.norm(x, -1, dim=(-1, -2)), X),
    "linalg.norm of a matrix": case(lambda x: torch.linalg.norm(x, -math.inf), (H, 4), dim=0),
    "matrix_norm": case(torch.linalg.matrix_norm, X),
    "matrix_norm beside": case(lambda x: torch.linalg.matrix_norm(x, 1, dim=(0, 1)), X),
    "spectral norm": case(lambda x: torch.linalg.matrix_norm(x, 2), X, heights=(7,), fallback="linalg_matrix_norm"),
    # Along a dim.
    "softmax rows": case(lambda x: x.softmax(-2), X, p2p=0),
    "softmax rows of F": case(lambda x: F.softmax(x, 2, dtype=torch.float64), X),
    "softmax columns": case(lambda x: torch.softmax(x, -1), WIDTH, dim=-1),
    "softmax of large": case(lambda x: (x * 1e4 + 1e6).softmax(-2), X),
    "softmax masked": case(lambda x: torch.where(x < -0.2, -math.inf, x * 1).softmax(1), X),
    "softmax rows, masked": case(lambda x, y: torch.where(y < -1, -math.inf, x).softmax(2)[..., :1], X, lambda h: random_tensor((2, 3, h, 5), 1).abs()),
    "softmax, old default": case(lambda x: F.softmax(x[0], dim=0) * x.flatten(2).softmax(-1).sum(), X),
    "softmax channels": case(lambda x: x.softmax(1), X, p2p=0),
    "log_softmax rows": case(lambda x: torch.log_softmax(x, dim=2), X),
    "log_softmax of tokens": case(lambda x: x.flatten(2).log_softmax(-1), X),
    "softmin rows": case(lambda x: F.softmin(x, dim=2), X),
    "softmin channels": case(lambda x: F.softmin(x, dim=1), X),
    "cumsum rows": case(lambda x: x.cumsum(2), X),
    "cumsum rows of numbers": case(lambda x: torch.cumsum(x, 2), whole_numbers(*X, dtype=torch.int32)),
    "cumsum of bool": case(lambda x: (x > 0).cumsum(-2), X),
    "cumsum columns": case(lambda x: torch.cumsum(x, dim=-1), WIDTH, dim=-1),
    "cumsum batch": case(lambda x: torch.cumsum(x, dim=0, dtype=torch.float64), X, p2p=0),
    "cumprod rows": case(lambda x: x.cumprod(dim=2), X),
    "cumprod rows, zeros": case(lambda x: x.cumprod(dim=2), ties(*X)),
    "logcumsumexp rows": case(lambda x: x.logcumsumexp(2), X),
    "cummax columns": case(lambda x: x.cummax(-1), X),
    "cummax rows": case(lambda x: x.cummax(2), X),
    "normalize rows": case(lambda x: F.normalize(x, dim=2), X),
    "normalize pixels": case(lambda x: F.normalize(x, p=1.0, dim=(2, 3)), X),
    "normalize small": case(lambda x: F.normalize(x * 1e-14, dim=2), X),
    "normalize channels": case(lambda x: F.normalize(x), X, p2p=0),
    "glu channels": case(lambda x: F.glu(x, 1), (2, 4, H, 3)),
    "glu rows": case(lambda x: F.glu(x, -2), (2, 3, H, 5), heights=(8, 2)),
    "sort channels": case(lambda x: x.sort(1), X),
    "sort columns, stable": case(lambda x: torch.sort(x, dim=-1, descending=True, stable=True), ties(*X)),
    "sort rows": case(lambda x: x.sort(2), X),
    "sort rows with ties, descending": case(lambda x: torch.sort(x, dim=2, descending=True, stable=True), ties(*X)),
    "argsort": case(lambda x: x.argsort(1, descending=True), X),
    "topk channels": case(lambda x: x.topk(2, dim=1), X),
    "topk columns": case(lambda x: torch.topk(x, k=3), X),
    "topk rows": case(lambda x: x.topk(1, dim=2), X),
    "topk rows of channels": case(lambda x: x.transpose(1, 2).topk(2, 1)[0].sum(1), X, heights=(7, 2)),
    "kthvalue": case(lambda x: x.kthvalue(2, 1), X),
    "kthvalue kept": case(lambda x: x.kthvalue(2, dim=0, keepdim=True), X),
    "median": case(lambda x: x.median(), X, fallback="median"),
    "median channels": case(lambda x: x.median(dim=1), X),
    "median rows": case(lambda x: x.median(dim=2), X),
    "kthvalue rows": case(lambda x: x.kthvalue(1, 2, keepdim=True), X),
    "mode rows": case(lambda x: x.mode(2)[0], ties(*X)),
    "sort a vector": case(lambda x: x.mean((0, 1, 3)).sort(), X),
    "sort a vector with ties": case(lambda x: torch.sort(x.sum((0, 1, 3)), stable=True, descending=True), ties(*X)),
    "argsort a vector": case(lambda x: x.sum((1, 3), keepdim=True)[:1].argsort(2, descending=True), ties(*X)),
    "argsort a vector of numbers": case(lambda x: (x.detach().sum((0, 1, 3)) * 4).long().argsort(stable=True), X),
    "sort a vector with NaN": case(lambda x: x.sum((0, 1, 3)).argsort(), with_nan(*X)),
    "nanmedian columns": case(lambda x: x.nanmedian(-1, True), with_nan(*X)),
    "mode": case(lambda x: x.mode(1)[0], ties(*X)),
    "histc": case(lambda x: torch.histc(x.detach(), 10, -2, 2), X),
    "histc between the extrema": case(lambda x: x.detach().histc(7), X, fallback="histc"),
    "histc of equal values": case(lambda x: torch.ones_like(x).detach().histc(5, min=3, max=3), X, fallback="histc"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_reduction(case: Callable[[], None]) -> None:
    case()


def test_reductions_agree_on_every_rank() -> None:
    """A scalar that steers the model must be the same number everywhere: it is compared bit for bit."""

    def steer(x: Tensor) -> Tensor:
        return x * 2 if bool(x.mean() > 0) else x - 1

    case(steer, X)()


@pytest.mark.filterwarnings("ignore:distpatch has no sharded rule")
def test_sorting_vectors_of_other_dtypes() -> None:
    """Half precision, signed zeros and infinities in torch's order; what the rule cannot order is torch's to sort."""
    values = torch.tensor([0.0, -math.inf, 2.0, -0.0, math.nan, -1.5, math.inf, 2.0])
    given = [
        values.half(),
        values.bfloat16(),
        values,
        values > 0,
        torch.tensor([3, 2**63 + 1, 1, 2**62], dtype=torch.uint64),
    ]

    def body(rank: int) -> None:
        for vector in given:
            x = distpatch.shard(vector, dist.group.WORLD, dim=0)
            for descending in (False, True):
                found = torch.sort(x, stable=True, descending=descending)
                right = torch.sort(vector, stable=True, descending=descending)
                assert torch.equal(distpatch.gather(found.indices), right.indices), vector.dtype
                assert torch.equal(distpatch.gather(found.values).nan_to_num(7), right.values.nan_to_num(7)), (
                    vector.dtype
                )
        with pytest.raises(RuntimeError, match="complex"):
            distpatch.shard(values.to(torch.complex64), dist.group.WORLD, dim=0).sort()

    run_ranks(2, body)
