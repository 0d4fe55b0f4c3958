"""Ranks as threads on one device, over a transport in memory that is as asynchronous as NCCL: exactness and times.

NCCL refuses two ranks on one GPU. These ranks compute on streams of their own, and their rows are copied on side
streams behind random delays, so that what is not ordered shows as wrong values (tests/support/transports/late.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

import distpatch
from benchmarks.gpu.cases import CASES, NETS, TOLERANCE, case_error, denoised, difference, net_error, normal
from benchmarks.gpu.decode import BF16
from benchmarks.gpu.measure import launches
from benchmarks.gpu.nets import SdDecoder, seeded
from benchmarks.gpu.section import Row, Section, exact
from tests.support import forced
from tests.support.threads import run_ranks
from tests.support.transports.late import Late, late

T = TypeVar("T")
POLICIES = ("full_sync", "corrected_async_gn")
DELAY_S = 0.001


def run(section: Section) -> None:
    forced.defer_rows_of_any_size()
    worlds = section.pick(full=(2, 3, 4), tiny=(2, 3))
    device = section.device
    for family in dict.fromkeys(case.family for case in CASES):
        section.row(f"{family}", partial(family_row, family, device, worlds))
    for net in NETS:
        for train in (False, True):
            name = f"{net.name}, {'with all gradients' if train else 'lazy, three patches'}"
            section.row(name, partial(net_row, net, device, worlds, train))
    for policy in POLICIES:
        section.row(f"displaced steps, {policy}", partial(displaced_row, policy, device, worlds[:2]))
    for pixels in section.pick(full=(512, 1024, 2048), quick=(512,), tiny=(32,)):
        for world in section.pick(full=(1, 2, 4, 8), tiny=(2,)):
            section.row(
                f"SD decoder {pixels}², bf16, {world} ranks in turn", partial(turns_row, section, pixels, world)
            )


def on_ranks(world: int, device: torch.device, body: Callable[[Any], T], hub: Late) -> list[T]:
    """``body(group)`` on every rank, each on a stream of its own, over this transport."""

    def rank_main(rank: int) -> T:
        if device.type != "cuda":
            return body(dist.group.WORLD)
        # A backward pass in the thread of its rank: the one of autograd's own for a GPU serves all threads.
        with torch.cuda.stream(torch.cuda.Stream(device)), torch.autograd.set_multithreading_enabled(False):
            result = body(dist.group.WORLD)
            torch.cuda.current_stream().synchronize()
            return result

    with late(hub):
        return run_ranks(world, rank_main, keep=True)


def family_row(family: str, device: torch.device, worlds: tuple[int, ...]) -> Row:
    cases = [case for case in CASES if case.family == family]
    worst, messages = 0.0, 0
    for world in worlds:
        hub = Late(delay_s=DELAY_S, seed=world)
        for case in cases:
            errors = on_ranks(world, device, partial(case_error, case, device=device, seed=world), hub)
            worst = max(worst, *errors)
        messages += hub.messages // 2
    return exact(worst, TOLERANCE, cases=len(cases), ranks="/".join(map(str, worlds)), messages=messages)


def net_row(net: Any, device: torch.device, worlds: tuple[int, ...], train: bool) -> Row:
    worst, messages = 0.0, 0
    for world in worlds:
        hub = Late(delay_s=DELAY_S, seed=world)
        worst = max(worst, *on_ranks(world, device, lambda group: net_error(net, group, device, train=train), hub))
        messages += hub.messages // 2
    return exact(worst, TOLERANCE, cases=1, ranks="/".join(map(str, worlds)), messages=messages)


def displaced_row(policy: str, device: torch.device, worlds: tuple[int, ...]) -> Row:
    """Messages that come late give the images of those that come at once."""
    worst, messages = 0.0, 0
    for world in worlds:
        body = partial(denoised, NETS[2], device=device, policy=policy)
        runs = []
        for delay_s in (0.0, DELAY_S):
            hub = Late(delay_s=delay_s, seed=world)
            runs.append([image for images in on_ranks(world, device, body, hub) for image in images])
            messages += hub.messages // 2
        worst = max(worst, *(difference(a, b) for a, b in zip(*runs, strict=True)))
    return exact(worst, TOLERANCE, cases=1, ranks="/".join(map(str, worlds)), messages=messages)


def turns_row(section: Section, pixels: int, world: int) -> Row:
    """What each rank's part of a decode takes with the device to itself, as the ranks compute in turn."""
    device = section.device
    build = section.pick(full=SdDecoder, tiny=lambda: SdDecoder((8, 8, 16, 16), blocks=1, groups=4))
    latents = normal((1, 4, pixels // 8, pixels // 8), 1, device, BF16)
    hub = Late()

    def body(group: Any) -> dict[str, float]:
        rank, own = group.rank(), seeded(build).to(device, BF16).requires_grad_(False)
        distpatch.convert_model(own, group, fallback="error")
        with torch.inference_mode():
            own.decode(latents)  # warms up
            # A turn begins behind the handshake of the call, in which all ranks must be there at once.
            own.post_quant_conv.register_forward_pre_hook(lambda *_: hub.begin(rank, device))
            in_turn(own)
            dist.barrier()
            seconds, hub.turn_ms[rank] = hub.turn_ms[rank], 0.0
            with launches(device) if rank == 0 else contextlib.nullcontext({}) as counted:
                dist.barrier()
                in_turn(own)
                dist.barrier()
        return {"turn_ms": seconds, **counted}

    def in_turn(own: Any) -> None:
        try:
            own.decode(latents)
        finally:
            hub.end()

    ranks = on_ranks(world, device, body, hub)
    by_rank = [rank["turn_ms"] for rank in ranks]
    row: Row = {"ranks": str(world), "longest_ms": max(by_rank), "shortest_ms": min(by_rank)}
    if device.type == "cuda":  # of all ranks: what a CPU counts is of one
        row.update({f"{key}_a_rank": ranks[0][key] / world for key in ("launches", "device_ms")})
    return row
