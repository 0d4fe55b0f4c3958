"""What the vocabulary of random chains holds, family by family."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tests.vocabulary import FAMILIES, Draw, lines, op

__all__ = ["FAMILIES"]

# --- stencils


@op("stencil")
def conv(d: Draw, x: Tensor) -> str:
    n, channels = d.spatial(x), x.shape[1]
    groups = d.divisor(channels) if d.maybe() else 1
    weight = d.plain(groups * d.int(1, 2), channels // groups, *d.each(n, 1, 3))
    bias = d.plain(d.inputs[-1].shape[0]) if d.maybe() else None
    padding: Any = d.of(repr("same"), repr("valid"), d.int(0, 2), d.each(n, 0, 3), d.each(n, 0, 3))
    stride, dilation = d.of(1, d.each(n, 1, 3)), d.of(1, d.each(n, 1, 2))
    if x.shape[0] == 1 and d.maybe():
        return f"x = F.conv{n}d(x[0], {weight}, {bias}, {stride}, {padding}, {dilation}, {groups})[None]"
    return f"x = F.conv{n}d(x, {weight}, {bias}, {stride}, {padding}, {dilation}, {groups})"


@op("stencil")
def conv_transpose(d: Draw, x: Tensor) -> str:
    n, channels = d.spatial(x), x.shape[1]
    groups = d.divisor(channels) if d.maybe() else 1
    weight = d.plain(channels, d.int(1, 2), *d.each(n, 1, 4))
    stride, padding, dilation = d.each(n, 1, 3), d.each(n, 0, 2), d.each(n, 1, 2)
    extra = d.of(0, d.each(n, 0, 2))
    return f"x = F.conv_transpose{n}d(x, {weight}, None, {stride}, {padding}, {extra}, {groups}, {dilation})"


@op("stencil")
def max_pool(d: Draw, x: Tensor) -> str:
    n, k = d.spatial(x), d.int(1, 4)
    padding, stride = d.int(0, k // 2), d.of(None, d.int(1, 3))
    dilation = d.of(1, 1, 2) if min(x.shape[2:]) > 1 else 1  # torch writes beyond an image that no tap meets
    return f"x = F.max_pool{n}d(x, {k}, {stride}, {padding}, {dilation}, {d.maybe()})"


@op("stencil")
def avg_pool(d: Draw, x: Tensor) -> str:
    n, k = d.spatial(x), d.int(1, 4)
    padding, stride = d.int(0, k // 2), d.of(None, d.int(1, 3))
    divisor = f", {d.of(None, 3)}" if n > 1 else ""
    return f"x = F.avg_pool{n}d(x, {k}, {stride}, {padding}, {d.maybe()}, {d.maybe()}{divisor})"


@op("stencil")
def lp_pool(d: Draw, x: Tensor) -> str:
    return f"x = F.lp_pool{d.spatial(x)}d(x, {d.of(2.0, 3.0)}, {d.int(1, 3)}, {d.of(None, 2)}, {d.maybe()})"


@op("stencil")
def adaptive_pool(d: Draw, x: Tensor) -> str:
    n = d.spatial(x)
    return f"x = F.adaptive_{d.of('avg', 'max')}_pool{n}d(x, {d.each(n, 1, 8)})"


@op("stencil")
def unpool(d: Draw, x: Tensor) -> str:
    n, k = d.spatial(x), d.int(1, 3)
    pooled = f"x, i = F.max_pool{n}d(x, {k}, return_indices=True); "
    return pooled + d.of(f"x = F.max_unpool{n}d(x, i, {k})", "x = x + i * 0.01")


@op("stencil", "pad")
def pad(d: Draw, x: Tensor) -> str:
    mode = d.of("constant", "reflect", "replicate", "circular")
    n = d.int(1, x.ndim) if mode == "constant" else d.spatial(x)
    low = -2 if mode in {"constant", "replicate"} else 0
    return f"x = F.pad(x, {d.each(2 * n, low, 3)}, {mode!r})"


@op("stencil")
def unfold(d: Draw, x: Tensor) -> str:
    kernel, dilation, padding, stride = (d.each(2, lo, hi) for lo, hi in ((1, 3), (1, 2), (0, 2), (1, 3)))
    if x.ndim != 4:
        dim = d.dim(x)
        return f"x = x.unfold({dim}, {d.int(1, min(4, x.shape[dim]))}, {d.int(1, 3)})"
    step = f"x = F.unfold(x, {kernel}, {dilation}, {padding}, {stride})"
    if d.maybe():
        step += f"; x = F.fold(x, {tuple(x.shape[-2:])}, {kernel}, {dilation}, {padding}, {stride})"
    return step


@op("stencil")
def shuffle(d: Draw, x: Tensor) -> str:
    return d.of(
        "x = F.pixel_shuffle(x, 2)", "x = F.pixel_unshuffle(x, 2)", f"x = F.channel_shuffle(x, {d.int(1, 3)})",
        f"x = F.pixel_unshuffle(x, {d.int(2, 3)})",
    )  # fmt: skip


# --- resize


@op("resize")
def interpolate(d: Draw, x: Tensor) -> str:
    n = d.spatial(x)
    smooth = {1: ("linear",), 2: ("bilinear", "bicubic"), 3: ("trilinear",)}[n]
    mode = d.of("nearest", "nearest-exact", "area", *smooth, *smooth)
    sizes: Any = d.each(n, 1, 10)
    to = f"size={sizes}"
    if d.maybe():
        factors = d.of((2,) * n, (0.5,) * n, (1.5,) * n, tuple(d.of(0.5, 0.7, 1.0, 1.3, 2.0) for _ in range(n)))
        sizes = [int(size * factor) for size, factor in zip(x.shape[2:], factors)]
        to = f"scale_factor={factors}" + d.of("", ", recompute_scale_factor=True")
    options = f", align_corners={d.maybe()}" if mode in smooth else ""
    if mode in {"bilinear", "bicubic"} and sizes[-1] > 1:  # torch 2.13 resizes to one column wrongly
        options += d.of("", ", antialias=True")
    return f"x = F.interpolate(x, {to}, mode={mode!r}{options})"


@op("resize")
def grid_sample(d: Draw, x: Tensor) -> str:
    n = d.spatial(x, 2)
    sizes = d.each(n, 1, 6) if d.maybe() else tuple(x.shape[2:])
    grid = d.operand((x.shape[0], *sizes, n))
    mode, padding = d.of("bilinear", "nearest"), d.of("zeros", "border", "reflection")
    return f"x = F.grid_sample(x, {grid}.tanh(), {mode!r}, {padding!r}, {d.maybe()})"


@op("resize")
def affine_grid(d: Draw, x: Tensor) -> str:
    n = d.spatial(x, 2)
    size = (*x.shape[:2], *d.each(n, 1, 6))
    return (
        f"x = F.grid_sample(x, F.affine_grid({d.operand((x.shape[0], n, n + 1))}, {size}, False), align_corners=False)"
    )


@op("resize")
def upsample_by_hand(d: Draw, x: Tensor) -> str:
    return f"x = x.repeat_interleave({d.int(2, 3)}, {d.dim(x)})"


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
    "x = x * 2 if x.mean() > 0 else x - 1",
    "x = x.gather({d}, x.argsort({d}).narrow({d}, 0, 1))",
    "x = torch.vstack([x, x])",
    "a, b = torch.broadcast_tensors(x, {y}); x = a * b",
    "x = x + F.one_hot(x.argmax({d}), x.shape[{d}]).movedim(-1, {d})",
    "x = x.swapaxes({d}, {e}).unfold({d}, 1, {n})",
)

# --- norms


@op("norm")
def group_norm(d: Draw, x: Tensor) -> str:
    c = x.shape[1] if x.ndim > 1 else d.of()
    weight, bias = (d.plain(c), d.plain(c)) if d.maybe() else (None, None)
    return f"x = F.group_norm(x, {d.divisor(c)}, {weight}, {bias})"


@op("norm")
def batch_norm(d: Draw, x: Tensor) -> str:
    c = x.shape[1] if x.ndim > 1 else d.of()
    weight, bias = (d.plain(c), d.plain(c)) if d.maybe() else (None, None)
    if d.maybe():
        return f"x = F.batch_norm(x, None, None, {weight}, {bias}, True)"
    return f"x = F.batch_norm(x, {d.plain(c)}.detach(), {d.plain(c)}.detach().exp(), {weight}, {bias})"


@op("norm")
def layer_norm(d: Draw, x: Tensor) -> str:
    shape = tuple(x.shape[d.int(0, x.ndim - 1) :])
    weight = d.plain(*shape) if d.maybe() else None
    return f"x = F.{d.of('layer', 'rms')}_norm(x, {shape}, {weight})"


lines(
    "norm",
    "x = F.instance_norm(x)",
    "x = F.local_response_norm(x, {n})",
    "x = F.normalize(x, dim={d})",
    "x = F.normalize(x, 3.0, dim={d})",
    "x = x.softmax({d})",
    "x = x.log_softmax({d})",
    "x = F.softmin(x, {d})",
    "x = x / (x.square().mean({ds}, True) + 1).sqrt()",
    "x = (x - x.mean({ds}, keepdim=True)) / (x.var({ds}, keepdim=True, correction=0) + 0.1).sqrt()",
    "x = (x - x.amax({d}, keepdim=True)).exp()",
)

# --- reductions

for _name in ("sum", "mean", "var", "std", "amax", "amin", "logsumexp"):
    lines("reduction", f"x = x.{_name}({{ds}}, keepdim={{b}})")
    lines("reduction", f"x = x - x.{_name}({{ds}}, keepdim=True)")
lines(
    "reduction",
    "x = x.max({d}, keepdim={b}).values",
    "x = x.min({d}).values + x",
    "x = x * x.argmax({d}, keepdim=True)",
    "x = x.norm(dim={d}, keepdim={b})",
    "x = torch.linalg.vector_norm(x, 3, {ds}, {b})",
    "x = x.prod({d}, keepdim={b})",
    "x = x.cumsum({d})",
    "x = x.logcumsumexp({d})",
    "x = x.median({d}).values",
    "x = x * (x > {f}).any({d}, keepdim=True)",
    "x = x * (x > {f}).sum({ds}, keepdim=True)",
    "v, m = torch.var_mean(x, {ds}, keepdim=True); x = (x - m) * v",
    "x = einops.reduce(x, 'a b ... -> a ...', 'mean')",
    "x = einops.reduce(x, 'a b ... -> b ...', 'max')",
    "x = x * x.mean()",
    "x = x + x.sum(-1, keepdim=True).softmax(0)",
)

lines(
    "reduction",
    "x = x.cumprod({d})",
    "x = x.cummax({d}).values",
    "x = x.kthvalue(1, {d}).values",
    "x = x.quantile(0.3, {d}, keepdim={b})",
    "x = x.aminmax(dim={d}).max",
    "x = x.nanmean({ds})",
    "x = x.sum() + x",
    "x = x.mean({d}).unsqueeze({d}) * x",
    "x = x.std({d}, keepdim=True) + x",
    "x = einops.reduce(x, '... a -> ...', 'sum')",
    "x = einops.reduce(x, 'a ... -> ...', 'max')",
    "x = einops.repeat(x, 'a ... -> (a k) ...', k=2)",
    "x = einops.repeat(x, 'a ... -> (k a) ...', k=2)",
    "x = einops.repeat(x, '... a -> ... k a', k=2)",
    "x = x - x.detach().mean({ds}, keepdim=True)",
    "x = x.norm(p=1, dim={d}, keepdim=True) * x",
    "x = x.flatten().norm() * x",
    "x = torch.trapezoid(x, dim={d})",
    "x = x.amax() - x",
    "x = x.max(-1, keepdim=True).values.expand_as(x) * x",
    "x = F.mse_loss(x, {like}, reduction='none')",
    "x = x * F.l1_loss(x, {like})",
    "x = x * F.cosine_similarity(x, {like}, dim={d}).unsqueeze({d})",
)

# --- products


@op("product")
def linear(d: Draw, x: Tensor) -> str:
    if not x.ndim:
        return d.of()
    out = d.int(1, 5)
    bias = d.plain(out) if d.maybe() else None
    return f"x = F.linear(x, {d.plain(out, x.shape[-1])}, {bias}) / 4"


@op("product")
def matmul(d: Draw, x: Tensor) -> str:
    if x.ndim < 2:
        return d.of()
    batch = () if d.maybe() else tuple(x.shape[:-2])
    if d.maybe():
        return f"x = x @ {d.operand((*batch, x.shape[-1], d.int(1, 5)))} / 4"
    return f"x = {d.operand((*batch, d.int(1, 5), x.shape[-2]))} @ x / 4"


@op("product")
def attention(d: Draw, x: Tensor) -> str:
    if x.ndim < 3:
        return d.of()
    tokens = d.int(1, 6)
    shape = (*x.shape[:-2], tokens, x.shape[-1])
    causal = ", is_causal=True" if d.rng.random() < 0.3 else ""
    if d.maybe():
        return f"x = F.scaled_dot_product_attention(x, {d.operand(shape)}, {d.operand(shape)}{causal})"
    mask = f", {d.operand((x.shape[-2], x.shape[-2]))}" if not causal and d.maybe() else ""
    return f"x = F.scaled_dot_product_attention(x, {d.of('x', 'x.tanh()', 'x.flip(-2)')}, x * 2{mask}{causal})"


@op("product")
def einsum(d: Draw, x: Tensor) -> str:
    letters = "abcde"[: x.ndim]
    shared = d.rng.sample(letters, d.int(1, min(2, x.ndim))) if x.ndim else d.of()
    other = d.operand((*(x.shape[letters.index(c)] for c in shared), d.int(1, 3)))
    kept = [c for c in letters if c not in shared or d.maybe()]
    out = [*kept, "z"]
    if d.maybe():
        d.rng.shuffle(out)
    return f"x = torch.einsum('{letters},{''.join(shared)}z->{''.join(out)}', x, {other}) / 4"


lines(
    "product",
    "x = x @ x.mT / 4",
    "x = x.mT @ x / 4",
    "x = (x @ x.mT / 4).softmax(-1) @ x",
    "x = x @ {like}.mT / 4",
    "x = x.flatten(0, -3) @ {like}.flatten(0, -3).mT / 4",
)


@op("product", "product")
def heads(d: Draw, x: Tensor) -> str:
    """Attention of several heads over the tokens of (B, N, C)."""
    if x.ndim != 3:
        return d.of()
    b, n, c = x.shape
    h = d.divisor(c)
    mix = d.plain(3 * c, c)
    step = f"q, k, v = F.linear(x, {mix}).view({b}, {n}, 3, {h}, {c // h}).permute(2, 0, 3, 1, 4); "
    if d.maybe():
        step += f"x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape({b}, {n}, {c})"
    else:
        step += "x = q.softmax(-1) @ (k.softmax(-2).mT @ v); x = einops.rearrange(x, 'b h n c -> b n (h c)')"
    return step


@op("product")
def spatial_attention(d: Draw, x: Tensor) -> str:
    """Of the pixels of (B, C, H, W), as a U-Net's attention block does it."""
    if x.ndim != 4:
        return d.of()
    step = "y = x.flatten(2).transpose(1, 2); y = F.scaled_dot_product_attention(y, y * 2, y); "
    return step + d.of("x = x + y.transpose(1, 2).reshape(x.shape)", "x = y.mT.reshape(x.shape) - x", "x = y")


lines(
    "product",
    "x = torch.baddbmm({y}, x, x.mT) / 4",
    "x = torch.tensordot(x, {like}, ([{d}], [{d}])) / 4",
    "x = torch.cdist(x, {like})",
    "x = torch.kron(x.flatten()[:3], x.flatten()[:{n}])",
    "x = torch.outer(x.flatten(), {like}.flatten()[:2])",
    "x = F.bilinear(x, {like}, torch.ones(2, x.shape[-1], x.shape[-1], dtype=x.dtype)) / 4",
    "x = torch.einsum('...ij,...kj->...ik', x, {like}) / 4",
    "x = x.flatten() @ {like}.flatten() * x",
    "x = torch.linalg.vecdot(x, {like}).unsqueeze(-1) + x",
)

# --- pointwise

lines(
    "pointwise",
    *(
        f"x = F.{name}(x)"
        for name in ("silu", "gelu", "relu", "leaky_relu", "softplus", "tanh", "sigmoid", "mish", "elu")
    ),
    "x = F.glu(x, {d})",
    "x = x + {y}",
    "x = x * {y}",
    "x = {y} - x",
    "x = x + {y} * {y}",
    "x = torch.maximum(x, {y})",
    "x = torch.lerp(x, {like}, {f})",
    "x = x.addcmul({y}, {y})",
    "x = x.clamp(-1, {f})",
    "x = x * {f} + 1",
    "x = x.abs() ** 0.5 * x",
    "x = x.to(torch.float64) / 3",
    "x = x.pow(2) / (1 + x.pow(2))",
    "x = (x > {f}) * x",
    "x = F.dropout(x, 0.5, False)",
    "x = x + z",
    "x = x * z.tanh()",
    "x = x + torch.ones_like(x) * x.new_ones(1)",
    "x = x + torch.arange(x.shape[{d}], dtype=x.dtype) * (x.shape[-1] == x.shape[{d}])",
)
lines(
    "pointwise",
    "x = torch.fft.ifft2(torch.fft.fft2(x)).real",
    "x = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous()) * 1j).flatten(-2)",
    "x = torch.utils.checkpoint.checkpoint(lambda t: F.silu(t) * t, x, use_reentrant=False)",
    "x = torch.addcdiv(x, {y}, {y}.square() + 1)",
    "x = x.type_as({y}) - x.view_as(x)",
    "x = torch.logaddexp(x, {y})",
    "x = torch.hypot(x, {y})",
    "x = x.neg().exp().clamp(max=3) + {y}",
    "x = (x.bool().to(x.dtype) + x) * {f}",
    "x = torch.complex(x, {like}).abs()",
    "x = {y}.exp().clamp(max=2) * x",
    "x = x.round(decimals=1) + x",
    "x = F.prelu(x, torch.full((1,), {f}, dtype=x.dtype))",
    "x = F.hardtanh(F.softsign(x), -{n}, {n})",
)
lines("keep", "z = x", "z = x * 2", "z, x = x, F.silu(x)", "x, z = x.tanh(), x")

# --- writing


@op("writing", "writing")
def setitem(d: Draw, x: Tensor) -> str:
    at = index_of(d, x)
    value = d.of(0, "x.tanh()", 2.5)
    if value == "x.tanh()":
        return f"x = x.clone(); x[{at}] = x[{at}].tanh()"
    return f"x = x.clone(); x[{at}] = {value}"


@op("writing")
def set_rows(d: Draw, x: Tensor) -> str:
    dim = d.dim(x) % x.ndim
    n = d.int(1, x.shape[dim])
    start = d.int(0, x.shape[dim] - n)
    value = d.operand(tuple(n if e == dim else d.of(m, m, 1) for e, m in enumerate(x.shape)))
    return f"x = x.clone(); x[{':, ' * dim}{start}:{start + n}] = {value}"


@op("writing")
def set_chosen(d: Draw, x: Tensor) -> str:
    dim = d.dim(x) % x.ndim
    rows = d.rows(x.shape[dim], distinct=True)
    value = d.operand(tuple(len(rows) if e == dim else m for e, m in enumerate(x.shape)))
    return f"x = x.clone(); x[{':, ' * dim}{rows}] = {value}"


@op("writing")
def view_written(d: Draw, x: Tensor) -> str:
    """A view of a view is written to, and what it is a view of is looked at."""
    dim = d.dim(x)
    views = [
        f".transpose({dim}, {d.dim(x)})", f".narrow({dim}, 0, {d.int(1, x.shape[dim])})", ".flatten()", ".view(-1)",
        f".chunk(2, {dim})[0]", f".unsqueeze({dim})", f".flatten({d.int(0, x.ndim - 1)})", f".select({dim}, 0)", "[0]",
        "[..., 1:]", "[::2]", f".movedim({dim}, 0)", ".reshape(-1)", ".contiguous()", f".unbind({dim})[-1]", ".squeeze()",
        f".expand_as({d.operand((2, *x.shape))})", ".detach()", f".unfold({dim}, 1, 1)", ".mT", ".split(1)[0]",
    ]  # fmt: skip
    first, second = d.of(*views), d.of("", *views)
    write = d.of("mul_(2)", "sub_(1)", "zero_()", "clamp_(-1, 0.5)", "copy_(y.tanh())", "add_(y.mean())")
    return f"x = x * 1; y = x{first}{second}; y.{write}" + d.of("", "; x = x + y.sum()", "; z = y", "; x, z = y, x")


lines(
    "writing",
    "x = x.clone(); x.mul_({f})",
    "x = x.clone(); x[{like}[..., 0] > 0] = {f}",
    "x = x.clone(); x[{pre}{s}] = x.new_full((), {f})",
    "x = x.clone(); x[{pre}{i}] = {like}.select({d}, 0)",
    "x = x.clone(); x[{pre}{i}] = x[{pre}0]",
    "x = x.clone(); x[..., 0] = x[..., -1] * 2",
    "x = x.clone(); x[0], z = x[-1], x",
    "x = x.clone(); x[{like} > 0] = x[{like} > 0]",
    "x = x.clone(); x.fill_diagonal_({f})",
    "x = x.clone(); x.tril_({j})",
    "x = x.clone(); x.scatter_({d}, x.argsort({d}), {f})",
    "x = x.clone(); x.index_copy_({d}, torch.tensor({p}), x.index_select({d}, torch.tensor({p})) * 2)",
    "x = x.clone(); y = x.unsqueeze(0); y += {y}; x = x + y[0]",
    "x = torch.empty_like(x).copy_(x)",
    "z = torch.zeros_like(x); z[{pre}{s}] = x[{pre}{s}]; x = z + x",
    "z = x.new_zeros(x.shape); z[{pre}{s}] = x[{pre}{s}]; x = z + x",
    "x = torch.add(x, {y}, out=torch.empty_like(x)) if not torch.is_grad_enabled() else x + {y}",
    "x = x.clone(); x += {y}",
    "x = x * 1; x *= {like}",
    "x = x.clone(); x.add_({y}, alpha=2)",
    "x = x * 2; x.clamp_(-1, 1)",
    "x = x.clone(); x[{pre}{s}].mul_({f})",
    "x = x.clone(); x[{pre}{s}] += 1",
    "x = x.clone(); x[{pre}{i}] = {f}",
    "x = x.clone(); x[{pre}{i}] *= {f}",
    "x = x.clone(); x.select({d}, {i}).mul_({f})",
    "x = x.clone(); x.transpose({d}, {e}).mul_({like}.transpose({d}, {e}))",
    "x = x.clone(); x.flatten().mul_({f})",
    "x = x.clone(); x.view(-1).add_({like}.reshape(-1))",
    "x = x.clone(); x.flatten({n}).sub_(1)",
    "x = x.clone(); x.chunk(2, {d})[0].mul_({f})",
    "x = x.clone(); x.copy_({y})",
    "x = x.clone(); x.masked_fill_({y} > 0, {f})",
    "x = x.clone(); x.index_fill_({d}, torch.tensor({k}), {f})",
    "x = x.clone(); x.index_add_({d}, torch.tensor({p}), x.index_select({d}, torch.tensor({p})) * 2)",
    "x = x.clone(); x[{like} > 0] = {f}",
    "x = x.clone(); x[{pre}{k}] = {f}",
    "x = x.clone(); z = x; x = x[{pre}{s}]; x.mul_({f})",
    "x = x.clone(); z = x; x = x.flip({d}); x.mul_({f})",
    "x = x.clone(); z = x.transpose({d}, {e}); x.mul_({f})",
    "x = x.contiguous().clone(); z = x.view(-1); x.mul_({f})",
    "x = F.relu(x * 1, inplace=True)",
    "x = x.clone(); x.diagonal(0, {d}, {e}).mul_({f})",
    "x = x.new_zeros(x.shape).copy_({like}) + x",
    "x = torch.zeros_like(x).add_(x)",
)
