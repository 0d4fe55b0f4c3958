"""Every product: a label that stays is sharded, one that is summed over is summed over ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.support.oracle import H, case

X = (2, H, 6)
FEW: dict[str, Any] = {"worlds": (3, 2), "heights": (7, 2)}
EINSUM = torch.einsum
CASES = {
    "linear of tokens": case(F.linear, X, (5, 6), (5,), p2p=0),
    "linear without bias": case(F.linear, X, (5, 6)),
    "linear over the rows, alone": case(lambda x, w: F.linear(x, w), (2, 6, H), (5, H), dim=-1),
    "rows @ plain": case(torch.matmul, X, (6, 5), p2p=0),
    "rows @ plain batch": case(lambda a, b: a @ b, X, (2, 6, 5)),
    "rows @ plain of more dims": case(torch.matmul, X, (3, 2, 6, 4)),
    "plain @ columns": case(lambda x, a: a @ x, (2, 6, H), (5, 6), dim=-1, p2p=0),
    "plain @ rows, batched": case(lambda x, a: a @ x, (2, H, 6), (5, H)),
    "contraction": case(lambda a, b: a.transpose(-1, -2) @ b, X, X, sharded=2),
    "contraction of other layouts": case(lambda a, b: a.mT.matmul(b), X, (2, H, 3), sharded=2),
    "bmm": case(torch.bmm, (3, H, 6), (3, 6, 4)),
    "mm of rows": case(torch.mm, (H, 6), (6, 4)),
    "both left": case(lambda a, b: a @ b.transpose(-1, -2), X, X, sharded=2),
    "batch dim": case(torch.matmul, (H, 3, 4), (H, 4, 2), sharded=2, dim=0),
    "vector": case(torch.matmul, X, (6,)),
    "einsum": case(lambda x, w: torch.einsum("bnc,dc->bnd", x, w), X, (5, 6)),
    # Rows of the left, of the right, and both.
    "matrix @ vector": case(torch.matmul, X, (6,)),
    "rows @ vector": case(torch.mv, (H, 6), (6,)),
    "vector @ rows": case(lambda x, v: v @ x, (H, 6), (H,)),
    "vector @ columns": case(lambda x, v: torch.matmul(v, x), (2, 6, H), (6,), dim=-1),
    "rows of a vector": case(torch.matmul, (H,), (H, 4), dim=0),
    "vector times batch of rows": case(lambda x, y: y @ x, (2, H, 3), (H,)),
    "dot": case(torch.dot, (H,), (H,), dim=0, sharded=2),
    "dot, plain": case(lambda x, y: y.dot(x), (H,), (H,), dim=0),
    "plain @ rows": case(lambda x, a: a @ x, (2, H, 6), (5, H), p2p=0),
    "plain batch @ rows": case(lambda x, a: torch.matmul(a, x), (2, H, 6), (2, 5, H), **FEW),
    "columns @ plain": case(torch.matmul, (2, 5, H), (H, 4), dim=-1),
    "columns @ rows": case(lambda x, y: x.mT @ y, (2, H, 3), (2, H, 4), sharded=2),
    "columns @ columns": case(lambda x, y: x @ y.mT, (2, 3, H), (2, 4, H), dim=-1, sharded=2),
    "rows @ columns": case(lambda x, y: x @ y.mT, X, X, sharded=2),
    "rows @ rows": case(torch.matmul, (1, H, 6), (3, 6, 4), **FEW),
    "contraction, columns": case(lambda x, y: x.mT @ y, (4, H, 3), (2, 4, H, 5)),
    "batch of the left": case(torch.matmul, (H, 3, 4), (4, 5), dim=0),
    "batch of both": case(torch.bmm, (H, 3, 4), (H, 4, 5), dim=0, sharded=2),
    "batch of one": case(torch.bmm, (H, 3, 4), (H, 4, 5), dim=0, p2p=0),
    "batch of the right": case(lambda x, y: y @ x, (H, 3, 4), (5, 3), dim=0),
    "batch broadcast": case(torch.matmul, (2, H, 3, 4), (H, 4, 5), dim=1, sharded=1),
    "batch of one row": case(torch.matmul, (H, 3, 4), (5, 4, 2), dim=0, heights=(1,)),
    "rows against batch": case(lambda x, y: x @ y.movedim(0, 1), (2, H, 4), (4, 2, 3), **FEW),
    "batch against rows": case(lambda x, y: x.permute(1, 0, 2) @ y.mT, (2, H, 4), (H, 3, 4), sharded=1),
    "in half precision": case(lambda x, y: x.bfloat16().mT @ y.bfloat16(), (1, H, 3), (1, H, 3), sharded=2, tolerance=1e-1),
    "in whole numbers": case(lambda x: (x * 4).long().mT @ (x * 4).long(), (2, H, 3)),
    "mm": case(lambda x, y: x.mm(y) + torch.mm(y.mT, x.mT).mT, (H, 6), (6, 4)),
    # With something added.
    "addmm": case(lambda x, y, b: torch.addmm(b, x, y, beta=0.5, alpha=2), (H, 6), (6, 4), (4,)),
    "addmm of columns and rows": case(lambda x, y, b: b.addmm(x.mT, y), (H, 6), (H, 4), (6, 4), sharded=2),
    "baddbmm": case(lambda x, y, b: torch.baddbmm(b, x, y, beta=0.5, alpha=0.3), X, (2, 6, 3), (2, 1, 3)),
    "baddbmm, attention scores": case(
        lambda q, k: torch.baddbmm(torch.full((2, q.shape[1], q.shape[1]), torch.nan, dtype=q.dtype), q, k.mT, beta=0, alpha=0.4),
        X, X, sharded=2,
    ),
    "baddbmm, sharded added": case(torch.baddbmm, (2, H, 4), (2, H, 3), (2, 3, 4), sharded=2),
    "addbmm": case(lambda x, y, b: torch.addbmm(b, x, y, alpha=2), X, (2, 6, 3), (3,)),
    "addbmm, batch sharded": case(lambda x, y, b: torch.addbmm(b, x, y), (H, 3, 4), (H, 4, 5), (3, 5), dim=0, sharded=2),
    "addmv": case(lambda x, v, b: torch.addmv(b, x, v, beta=2), (H, 6), (6,), (H,)),
    "addr": case(lambda x, y, b: torch.addr(b, x, y, alpha=3), (H,), (4,), (H, 4), dim=0),
    # Linear layers.
    "linear": case(F.linear, (2, 3, H, 6), (5, 6), (5,), p2p=0),
    "linear over the rows": case(F.linear, (2, 6, H), (5, H), (5,), dim=-1, p2p=0),
    "linear over the rows, no bias": case(F.linear, (2, 6, H), (5, H), dim=-1, **FEW),
    "linear of a vector": case(F.linear, X, (6,)),
    "linear, sharded weight": case(lambda w, x, b: F.linear(x, w, b), (H, 6), (2, 3, 6), (H,)),
    "bilinear": case(F.bilinear, (2, H, 3), (2, H, 4), (5, 3, 4), (5,), sharded=2),
    "bilinear, plain": case(F.bilinear, (H, 3), (H, 4), (5, 3, 4), **FEW),
    "bilinear over the rows": case(F.bilinear, (2, H), (2, 4), (5, H, 4), (5,), dim=-1),
    "inner": case(torch.inner, X, (4, 6)),
    "inner of rows": case(torch.inner, (2, 3, H), (4, H), dim=-1, sharded=2),
    "inner of a number": case(torch.inner, X, (), **FEW),
    "outer": case(torch.outer, (H,), (4,), dim=0),
    "outer, right": case(lambda x, y: torch.outer(y, x), (H,), (4,), dim=0),
    "outer of rows": case(torch.outer, (H,), (H,), dim=0, sharded=2),
    "tensordot": case(lambda x, y: torch.tensordot(x, y, 1), X, (6, 3)),
    "tensordot over the rows": case(lambda x, y: torch.tensordot(x, y, dims=([1, 0], [0, 2])), X, (H, 4, 2)),
    "tensordot, right": case(lambda x, y: torch.tensordot(y, x, dims=([1], [2])), X, (4, 6)),
    # einsum: letters kept, summed, repeated, left out.
    "einsum, linear": case(lambda x, w: EINSUM("bnc,dc->bnd", x, w), X, (5, 6), p2p=0),
    "einsum, scores": case(lambda q, k: EINSUM("bnc,bmc->bnm", q, k), X, X, sharded=2),
    "einsum, contraction": case(lambda k, v: EINSUM("bnc,bnd->bcd", k, v), X, (2, H, 3), sharded=2, p2p=0),
    "einsum, contraction with plain": case(lambda k, v: EINSUM("bnc,bnd->bcd", k, v), X, (2, H, 3), p2p=0),
    "einsum, linear attention": case(lambda q, k, v: EINSUM("bnc,bmc,bmd->bnd", q, k, v), X, X, (2, H, 3), sharded=3),
    "einsum, heads": case(lambda q, k: EINSUM("b h i d, b h j d -> b h i j", q, k), (2, 3, H, 4), (2, 3, 5, 4), p2p=0),
    "einsum, ellipsis": case(lambda x, w: EINSUM("...c,dc->...d", x, w), (2, 3, H, 4), (5, 4)),
    "einsum, ellipsis both": case(lambda x, y: EINSUM("...nc,...cd->...nd", x, y), (2, 3, H, 4), (3, 4, 2)),
    "einsum, ellipsis sharded": case(lambda x, y: EINSUM("...nc,...cd->n...d", x, y), (2, H, 3, 4), (H, 4, 2), dim=1),
    "einsum, no arrow": case(lambda x, w: EINSUM("nc,cd", x, w), (H, 6), (6, 4)),
    "einsum, no arrow, sum": case(lambda x, y: EINSUM("nc,n", x, y), (H, 6), (H,)),
    "einsum, sum of all": case(lambda x: EINSUM("bchw->", x), (2, 3, H, 4)),
    "einsum, sum of columns": case(lambda x: EINSUM("bchw->bh", x), (2, 3, H, 4)),
    "einsum, permute": case(lambda x: EINSUM("bchw->hwbc", x), (2, 3, H, 4), p2p=0),
    "einsum, trace beside": case(lambda x: EINSUM("bnii->bn", x), (2, H, 3, 3), dim=1),
    "einsum, diagonal of rows": case(lambda x: EINSUM("bnn->bn", x), lambda h: torch.ones(2, h, h, dtype=torch.float64), heights=(7,), fallback="einsum"),
    "einsum, sublists": case(lambda x, w: EINSUM(x, [0, 1, 2], w, [3, 2], [0, 3, 1]), X, (5, 6)),
    "einsum, list": case(lambda x, w: EINSUM("bnc,cd->bnd", [x, w]), X, (6, 4)),
    "einsum, width and height": case(lambda x, y: EINSUM("bchw,bcgw->bhg", x, y), (2, 3, H, 4), (2, 3, H, 4), sharded=2),
    "einsum, broadcast": case(lambda x, y: EINSUM("bnc,bnd->bnd", x, y), (2, H, 3), (2, 1, 4)),
    # Distances.
    "cosine_similarity": case(F.cosine_similarity, (2, 3, H, 4), (2, 3, H, 4), sharded=2),
    "cosine_similarity of rows": case(lambda x, y: F.cosine_similarity(x, y, dim=2), (2, 3, H, 4), (2, 3, H, 4), sharded=2),
    "cosine_similarity, broadcast": case(lambda x, y: F.cosine_similarity(x, y, dim=-1), (2, 1, H, 4), (3, 1, 4), **FEW),
    "pairwise_distance": case(F.pairwise_distance, X, X, sharded=2),
    "pairwise_distance of rows": case(lambda x, y: F.pairwise_distance(x, y, p=1, keepdim=True), (2, 3, H), (2, 3, H), dim=-1),
    "dist": case(lambda x, y: torch.dist(x, y) + x.dist(y, 1), X, X, sharded=2),
    "vecdot": case(lambda x, y: torch.linalg.vecdot(x, y), X, X, sharded=2),
    "cdist": case(torch.cdist, X, (2, 5, 6)),
    "cdist of rows": case(lambda x, y: torch.cdist(x, y, p=1.0), X, X, sharded=2),
    "cdist to rows": case(lambda x, y: torch.cdist(y, x), X, (2, 5, 6), **FEW),
    "cdist over the rows": case(torch.cdist, (2, 3, H), (2, 4, H), dim=-1, heights=(7,), fallback="cdist"),
    "kron": case(torch.kron, (H, 2), (2, 3), heights=(7,), fallback="kron"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matmul(case: Callable[[], None]) -> None:
    case()
