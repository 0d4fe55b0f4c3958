"""Operations of random chains: norms, reductions, products and functions of elements."""

from __future__ import annotations

from torch import Tensor

from tests.support.chains.vocabulary import Draw, lines, op

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
    "x = F.normalize(x, dim={d}, eps=0.01)",
    "x = F.normalize(x, 3.0, {d}, 0.01)",
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
