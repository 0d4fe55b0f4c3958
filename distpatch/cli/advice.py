"""How many ranks a model should run on, and with what options: from plans at the rates that were measured here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

import distpatch
from distpatch.planning.report import GIB

USED = 0.9  # of a rank's memory, by what a plan counts
WORTH = 1.1  # times the time of the fastest: more ranks than that do not pay
FASTER = 1.5  # times as many FLOPs, for which half precision is worth its rounding
MESHES_FROM = 4  # ranks


@dataclass(frozen=True)
class Advice:
    """``ranks``: 0 where none of those asked for suffices; ``options``: of ``convert_model``, and the ``mesh`` if any.

    ``bound``: what takes most of the time ("computing", "sending", "host"), None where time was not estimated.
    """

    ranks: int
    dtype: str
    options: dict[str, Any]
    bound: str | None
    memory_bytes: int
    reasons: list[str]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        options = ", ".join(f"{name}={value!r}" for name, value in self.options.items())
        head = f"{self.ranks} rank(s) in {self.dtype}, {options}" if self.ranks else f"none of these, in {self.dtype}"
        return [f"RECOMMENDED {head}", *(f"  {reason}" for reason in self.reasons)]


def advise(
    build: Callable[[torch.dtype], nn.Module],
    shape: Sequence[int],
    method: str | None,
    sizes: Sequence[int],
    device: distpatch.Device,
    link: distpatch.Link | None,
) -> Advice:
    """For ``device`` as it was measured; ``link`` between ranks, None where there was one rank alone.

    A GPU's memory is a rank's own; that of a host is shared by ranks on its CPUs.
    """
    dtype, reasons = _dtype(device)
    precision = getattr(torch, dtype)
    model, given = build(precision), torch.empty(tuple(shape), dtype=precision, device="meta")
    call: dict[str, Any] = {"method": method, "device": device, "link": link}
    plans = distpatch.scaling(model, given, world_sizes=sorted(sizes), **call).plans

    def room(plan: distpatch.Plan) -> float:
        return USED * device.memory_bytes / (plan.world_size if device.kind == "cpu" else 1)

    fit = [plan for plan in plans if plan.memory_bytes <= room(plan)]
    if not fit:
        least = min(plans, key=lambda plan: plan.memory_bytes)
        reasons.append(
            f"{least.world_size} ranks need {least.memory_bytes / GIB:.2f} GiB each, and there are "
            f"{room(least) / GIB:.2f}: more ranks (--world-size), or a smaller shape"
        )
        return Advice(0, dtype, {}, least.bound, least.memory_bytes, reasons)
    chosen, why = _chosen(fit, link)
    reasons += [f"{chosen.memory_bytes / GIB:.3f} GiB a rank, of {room(chosen) / GIB:.2f}", why]
    options, more = _options(model, given, chosen, call)
    return Advice(chosen.world_size, dtype, options, chosen.bound, chosen.memory_bytes, reasons + more)


def _dtype(device: distpatch.Device) -> tuple[str, list[str]]:
    times = device.flops["half"] / device.flops["float32"]
    if times >= FASTER:
        return "bfloat16", [f"bfloat16: {device.name} convolves {times:.1f} times as fast as in float32, measured"]
    return "float32", [f"float32: bfloat16 has {times:.1f} times its rate on {device.name}, measured; it halves memory"]


def _chosen(fit: list[distpatch.Plan], link: distpatch.Link | None) -> tuple[distpatch.Plan, str]:
    """The fewest ranks that are nearly as fast as any, or, where time is not known, that suffice."""
    timed = {plan.world_size: plan.seconds for plan in fit if plan.seconds is not None}
    if link is None or not timed:
        return fit[0], "the fewest that suffice; run it under torchrun, and links are measured, and time is estimated"
    fastest = min(timed.values())
    chosen = next(plan for plan in fit if (plan.seconds or fastest) <= WORTH * fastest)
    times = ", ".join(f"{seconds:.3g} s on {ranks}" for ranks, seconds in timed.items())
    return chosen, f"the fewest within {WORTH - 1:.0%} of the fastest: {times} (estimated, {link.name})"


def _options(
    model: nn.Module, given: torch.Tensor, chosen: distpatch.Plan, call: dict[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Of ``convert_model``, with the reason of each that is not its default."""
    options: dict[str, Any] = {"splits": "auto", "policy": "shard"}
    reasons = []
    if chosen.bound in {"host", "sending"}:
        options["policy"] = "auto"
        what = "launching kernels" if chosen.bound == "host" else "sending"
        reasons.append(f"policy: {what} takes most of the time; small calls may be faster whole on every rank")
    if chosen.bound == "host":
        reasons.append("host-bound: compile=True leaves out the rules' part of the host's time (docs/compile.md)")
    if chosen.bound == "sending" and chosen.world_size >= MESHES_FROM:
        meshed = distpatch.plan(model, given, world_size=chosen.world_size, options={"dim": "auto"}, **call)
        if len(meshed.mesh) > 1 and meshed.sent_bytes < chosen.sent_bytes:
            options |= {"mesh": "x".join(map(str, meshed.mesh)), "policy": "shard"}  # a mesh has no other
            fewer = 1 - meshed.sent_bytes / chosen.sent_bytes
            reasons.append(f"mesh: {fewer:.0%} fewer bytes are sent than along the height alone (docs/meshes.md)")
    if chosen.fallbacks:
        reasons.append(f"gathered, as there is no rule: {', '.join(sorted({f.op for f in chosen.fallbacks}))}")
    return options, reasons
