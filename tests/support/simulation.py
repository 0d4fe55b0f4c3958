"""Displaced steps on one device: a plain model, whose every rank's view of an image is put together by hand.

Written from the algorithm and not from distpatch's code. At each convolution, norm and self-attention, rank r sees
the whole input of the step before with its own rows replaced by this step's; its rows of the result are kept.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from distpatch.layout.rows import Bounds


class Simulation(TorchFunctionMode):
    """Open around the plain model's forwards; ``begin_step()`` before each.

    ``bounds``: of the rows of the model's input; those of every other height are in proportion to them. ``others``:
    bounds that are not, such as of image and text tokens together.
    """

    def __init__(self, policy: str, warmup_steps: int, bounds: Bounds, others: Sequence[Bounds] = ()) -> None:
        super().__init__()
        self.policy, self.warmup_steps, self.bounds = policy, warmup_steps, bounds
        self.others = {each[-1]: each for each in others}
        self.step = -1
        self.memory: dict[int, Any] = {}
        self.sites = itertools.count()

    def begin_step(self) -> None:
        self.step += 1
        self.sites = itertools.count()

    @property
    def synchronous(self) -> bool:
        return self.policy == "full_sync" or self.step <= self.warmup_steps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            args = (*args, *(kwargs.pop(name) for name in ("query", "key", "value")[len(args) :]))
        if func is F.conv2d and args[1].shape[-2] > 1:
            return self._by_view(lambda x: func(x, *args[1:], **kwargs), -2, args[0])
        if func is F.scaled_dot_product_attention and args[0].shape[-2] == args[1].shape[-2]:
            return self._attention(func, args, kwargs)
        if func is F.group_norm:
            return self._norm(*args, **kwargs)
        return func(*args, **kwargs)

    def _ranks(self, size: int) -> list[tuple[int, int]]:
        if size in self.others:
            return list(itertools.pairwise(self.others[size]))
        assert all(b * size % self.bounds[-1] == 0 for b in self.bounds), "not in proportion"
        return list(itertools.pairwise(b * size // self.bounds[-1] for b in self.bounds))

    def _remember(self, site: int, value: Any) -> Any:
        """What the site held in the last step, before it holds this."""
        last = self.memory.get(site, value)
        if self.synchronous or self.policy != "no_sync":
            self.memory[site] = value
        return value if self.synchronous else last

    def _by_view(self, op: Any, dim: int, x: Tensor) -> Tensor:
        last = self._remember(next(self.sites), x)
        parts = []
        for rank, (lo, hi) in enumerate(self._ranks(x.shape[dim])):
            view = last.clone()
            view.narrow(dim, lo, hi - lo).copy_(x.narrow(dim, lo, hi - lo))
            out = op(view)
            a, b = self._ranks(out.shape[dim])[rank]
            parts.append(out.narrow(dim, a, b - a))
        return torch.cat(parts, dim)

    def _attention(self, func: Any, args: Any, kwargs: Any) -> Tensor:
        query, key, value = args[:3]
        last_key, last_value = self._remember(next(self.sites), (key, value))
        parts = []
        for lo, hi in self._ranks(query.shape[-2]):
            keys, values = last_key.clone(), last_value.clone()
            keys[..., lo:hi, :], values[..., lo:hi, :] = key[..., lo:hi, :], value[..., lo:hi, :]
            parts.append(func(query[..., lo:hi, :], keys, values, *args[3:], **kwargs))
        return torch.cat(parts, -2)

    def _norm(
        self, x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
    ) -> Tensor:
        """By the first two moments of each rank's rows, weighted by how many they are."""
        dim = -2 if x.ndim == 4 else -1
        ranks = self._ranks(x.shape[dim])
        shares = [(hi - lo) / x.shape[dim] for lo, hi in ranks]
        grouped = x.unflatten(1, (groups, -1))
        own = []
        for lo, hi in ranks:
            rows = grouped.narrow(dim, lo, hi - lo)
            dims = tuple(range(2, rows.ndim))
            own.append(torch.stack([rows.mean(dims), rows.square().mean(dims)]))
        last = self._remember(next(self.sites), own)
        parts = []
        for rank, (lo, hi) in enumerate(ranks):
            if self.synchronous or self.policy == "sync_gn":
                moments = sum(s * m for s, m in zip(shares, own))
            elif self.policy in {"separate_gn", "no_sync"}:
                moments = own[rank]
            elif self.policy == "stale_gn":
                moments = sum(s * (own if r == rank else last)[r] for r, s in enumerate(shares))
            else:
                moments = sum(s * m for s, m in zip(shares, last)) + own[rank] - last[rank]
            variance = moments[1] - moments[0].square()
            own_variance = own[rank][1] - own[rank][0].square()
            variance = torch.where(variance < 0, own_variance, variance)
            shape = (*variance.shape, *[1] * (grouped.ndim - 2))
            rows = grouped.narrow(dim, lo, hi - lo)
            parts.append((rows - moments[0].view(shape)) / (variance.view(shape) + eps).sqrt())
        out = torch.cat(parts, dim).flatten(1, 2)
        affine = (1, -1, *[1] * (x.ndim - 2))
        out = out if weight is None else out * weight.view(affine)
        return out if bias is None else out + bias.view(affine)
