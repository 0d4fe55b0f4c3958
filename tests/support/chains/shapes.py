"""Operations of random chains: dims split, merged, moved; rows joined and chosen."""

from __future__ import annotations

from torch import Tensor

from tests.support.chains.vocabulary import Draw, lines, op

# --- shape


@op("shape", "shape of rows")
def reshape(d: Draw, x: Tensor) -> str:
    return f"x = x.{d.of('reshape', 'reshape', 'view')}{d.shape(x.numel())}"


@op("shape", "shape of rows")
def merge(d: Draw, x: Tensor) -> str:
    first = d.int(0, x.ndim - 1)
    return f"x = x.flatten({first}, {d.int(first, x.ndim - 1)})"


@op("shape", "shape of rows")
def split_dim(d: Draw, x: Tensor) -> str:
    dim = d.dim(x)
    unit = d.divisor(x.shape[dim])
    return f"x = x.unflatten({dim}, {d.of((-1, unit), (unit, -1))})"


@op("shape")
def permute(d: Draw, x: Tensor) -> str:
    order = list(range(x.ndim))
    d.rng.shuffle(order)
    return f"x = x.permute({order}){d.of('', '', '.contiguous()')}"


@op("shape")
def rearrange(d: Draw, x: Tensor) -> str:
    """Some dims are split, all are put in another order, some are merged."""
    left, right, sizes = [], [], {}
    for name, n in zip("abcde", x.shape):
        unit = d.divisor(n) if d.maybe() else 1
        left.append(f"({name} {name}2)" if unit > 1 else name)
        sizes |= {f"{name}2": unit} if unit > 1 else {}
        right += [name, f"{name}2"] if unit > 1 else [name]
    if d.maybe():
        d.rng.shuffle(right)
    cuts = sorted(d.rng.sample(range(1, len(right)), d.int(1, min(4, len(right)) - 1))) if len(right) > 1 else []
    groups = [right[a:b] for a, b in zip([0, *cuts], [*cuts, len(right)])]
    pattern = f"{' '.join(left)} -> {' '.join('(' + ' '.join(g) + ')' for g in groups)}"
    given = "".join(f", {name}={n}" for name, n in sizes.items())
    return f"x = einops.rearrange(x, {pattern!r}{given})"


@op("shape of rows")
def windows(d: Draw, x: Tensor) -> str:
    """Swin's: windows of the last two of (B, H, W, C), some work in them, and back."""
    if x.ndim != 4:
        return d.of()
    b, h, w, c = x.shape
    p, q = d.divisor(h), d.divisor(w)
    step = f"x = x.view({b}, {h // p}, {p}, {w // q}, {q}, {c}).permute(0, 1, 3, 2, 4, 5).reshape(-1, {p * q}, {c})"
    if d.maybe():
        step += d.of("; x = (x @ x.mT / 4).softmax(-1) @ x", "; x = x.softmax(1)", "; x = x * x.mean((1, 2), True)", "")
        step += f"; x = x.view({b}, {h // p}, {w // q}, {p}, {q}, {c}).permute(0, 1, 3, 2, 4, 5).reshape({b}, {h}, {w}, {c})"
    return step


@op("shape")
def roll(d: Draw, x: Tensor) -> str:
    dims = d.dims(x)
    return f"x = x.roll({d.each(len(dims), -5, 5)}, {dims})"


@op("shape")
def expand(d: Draw, x: Tensor) -> str:
    sizes = [d.int(1, 4) if n == 1 else d.of(-1, n) for n in x.shape]
    return f"x = x.expand({[d.int(1, 3)] * d.of(0, 0, 1) + sizes})"


@op("shape")
def repeat(d: Draw, x: Tensor) -> str:
    return f"x = x.repeat({[d.int(1, 2)] * d.of(0, 0, 1) + [d.of(1, 1, 1, 2, 3) for _ in x.shape]})"


lines(
    "shape",
    "x = x.transpose({d}, {e})",
    "x = x.movedim({d}, {e})",
    "x = x.flip({ds})",
    "x = x.flip({d})",
    "x = x.unsqueeze({d})",
    "x = x.squeeze()",
    "x = x.squeeze({d})",
    "x = x.narrow({d}, 0, {n})",
    "x = x.rot90({j}, ({d}, {e}))",
    "x = x.tril({j})",
    "x = x.triu({j})",
    "x = x.tile(({n}, 1))",
    "x = x.mT",
    "x = x.diff(dim={d})",
    "x = x.contiguous()",
    "x = x.contiguous(memory_format=torch.channels_last)",
    "x = x.diagonal(0, {d}, {e})",
)
lines(
    "joining",
    "x = torch.cat([x, {like}], {d})",
    "x = torch.cat([{like}, x, x], {d})",
    "x = torch.cat([x[{pre}:{n}], x], {d})",
    "x = torch.cat([x, x.flip({d})], {e})",
    "x = torch.stack([x, {like}], {d})",
    "x = torch.stack([{like}, x * 2], {d}).flatten({d}, {d} + 1) if {d} >= 0 else x.exp().log1p()",
    "x = torch.cat(x.split({n}, {d})[::-1], {d})",
    "x = torch.cat(x.chunk({n}, {d})[::-1], {d})",
    "x = x.chunk({n}, {d})[-1]",
    "x = x.tensor_split({n}, {d})[0]",
    "a, *b = x.tensor_split(({n}, {j}), {d}); x = torch.cat([a, *b, a.tanh()], {d})",
    "x = torch.stack(x.unbind({d}), {e})",
    "x = sum(x.unbind({d}))",
    "x = torch.cat([x, z], {d})",
    "x = torch.cat([z, x], {d})",
    "x = torch.stack([z, x], {d})",
    "x = torch.hstack([x, {like}])",
    "x = torch.vstack([x, {like}])",
)

# --- indexing


@op("indexing", "indexing")
def index(d: Draw, x: Tensor) -> str:
    return f"x = x[{index_of(d, x)}]"


def index_of(d: Draw, x: Tensor, seldom: float = 0.25) -> str:
    """Slices, numbers, None and an ellipsis; at most one list of numbers."""
    items, lists = [], 0
    for n in x.shape[: d.int(1, x.ndim)] if x.ndim else d.of():
        kind = d.rng.random()
        if kind < seldom / 2:
            items.append(str(d.int(-n, n - 1)))
        elif kind < seldom and not lists:
            lists += 1
            items.append(str(d.rows(n)))
        else:
            items.append(d.slice(n))
    if d.maybe():
        at = d.int(0, len(items))
        items.insert(at, d.of("None", "...") if at == len(items) else "None")
    return ", ".join(items)


lines(
    "indexing",
    "x = x[{pre}{s}]",
    "x = x[{pre}{s}]",
    "x = x[{pre}{k}]",
    "x = x[..., {n}:]",
    "x = x.select({d}, {i})",
    "x = x.index_select({d}, torch.tensor({k}))",
    "x = x[{pre}torch.tensor({k})]",
    "x = x.take_along_dim(x.argsort({d}), {d})",
    "x = x.gather({d}, {like}.argsort({d}))",
    "x = x.take_along_dim({like}.argsort({d}), {d})",
    "x = x.scatter({d}, {like}.argsort({d}), {like})",
    "x = x.index_add({d}, torch.tensor({p}), x.index_select({d}, torch.tensor({p})) * 2)",
    "x = x.index_copy({d}, torch.tensor({p}), x.index_select({d}, torch.tensor({p})) * 2)",
    "x = x.index_fill({d}, torch.tensor({k}), {f})",
    "x = torch.where({like} > 0, x, {y})",
    "x = x.masked_fill({y} > 0, {f})",
    "x = x.masked_scatter({like} > 0, {like})",
    "x = x[x > {f}]",
    "x = x[{like}.sum({d}, keepdim=True).expand_as(x) > 0].reshape(-1, 1) * torch.ones(1, 2, dtype=x.dtype)",
    "x = x.sort({d}).values",
    "x = x.topk(1, {d}).values",
    "x = x.select_scatter(x.select({d}, 0) * 2, {d}, {i})",
    "x = x.slice_scatter(x.narrow({d}, 0, 1) * 2, {d}, 0, 1)",
)

lines(
    "indexing",
    "x = x[{pre}torch.tensor([{k}, {k}])]",
    "x = x[{k}, {l}]",
    "x = x[..., {k}, {l}]",
    "x = x[:, {k}][..., {l}]",
    "x = x[torch.tensor({k})[:, None], torch.tensor({l})]",
    "x = x[{like}[..., 0] > 0]",
    "x = x[{like} > 0]",
    "x = x[{pre}[bool(n % 2) for n in range(x.shape[{d}])]]",
    "x = x[None, {k}, ..., None]",
    "x = x[..., 0]",
    "x = x[0] + x[-1]",
    "x = x.take(torch.tensor({k}))",
    "x = x.scatter_add({d}, {like}.argsort({d}), {like})",
    "x = x.scatter_reduce({d}, {like}.argsort({d}), {like}, 'sum')",
    "x = x.scatter({d}, {like}.argsort({d}), {f})",
    "x = x.scatter({d}, x.argsort({d}), x * {f})",
    "x = x.repeat_interleave(torch.tensor([n % 3 for n in range(1, x.shape[{d}] + 1)]), {d})",
    "x = x.index_put(({like}.reshape(-1).argsort()[:1] % x.shape[0],), x.new_ones(()))",
    "x = torch.where(x > {f}, x, {like})",
    "x = torch.stack([row * 2 for row in x])",
    "x = torch.cat([row.tanh() for row in x])",
    "x = x * len(x) + float(x.sum().tanh())",
    "x = x * 2 if x.square().mean() > 0.1 else x - 1",
    "x = x.gather({d}, x.argsort({d}).narrow({d}, 0, 1))",
    "x = torch.vstack([x, x])",
    "a, b = torch.broadcast_tensors(x, {y}); x = a * b",
    "x = x + F.one_hot(x.argmax({d}), x.shape[{d}]).movedim(-1, {d})",
    "x = x.swapaxes({d}, {e}).unfold({d}, 1, {n})",
)
