"""Operations of random chains that write in place, also through views."""

from __future__ import annotations

from torch import Tensor

from tests.support.chains.shapes import index_of
from tests.support.chains.vocabulary import Draw, lines, op


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
