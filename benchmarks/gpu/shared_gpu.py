"""Ranks as processes over gloo that share one device: on a GPU their rows travel through the CPU's memory."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import CASES, NETS, TOLERANCE, case_error, denoised, difference, net_error
from benchmarks.gpu.processes import Outcome, Say, failures, in_processes
from benchmarks.gpu.section import Row, Section, exact
from tests.support import forced

DELAY_S = 0.002


def run(section: Section) -> None:
    gpus = min(section.where.gpus, 1)
    for world in section.pick(full=(2, 3), tiny=(2,)):
        if section.seconds_left <= 0:
            section.skip(f"{world} processes", "out of time")
            continue
        outcomes = in_processes(world, body, backend="gloo", gpus=gpus, seconds=section.seconds_left)
        for name in PARTS:
            section.row(f"{name}, {world} processes", partial(row, outcomes, name), anyway=True)


def body(group: Any, device: torch.device, say: Say) -> None:
    for name, part in PARTS.items():
        say(name, part(group, device))


def row(outcomes: list[Outcome], name: str) -> Row:
    parts = [outcome.said[name] for outcome in outcomes if name in outcome.said]
    if len(parts) < len(outcomes):
        raise RuntimeError(failures(outcomes))
    case, worst = max((error for part in parts for error in part), key=lambda named: named[1])
    return exact(worst, TOLERANCE, cases=len(parts[0]), worst=case)


def families(group: Any, device: torch.device) -> list[tuple[str, float]]:
    draw = random.Random(group.rank())
    errors = []
    for case in CASES:
        time.sleep(draw.uniform(0, DELAY_S))  # ranks come to their messages at times of their own
        errors.append((case.family, case_error(case, group, device, seed=1)))
    return errors


def nets(group: Any, device: torch.device) -> list[tuple[str, float]]:
    forced.defer_rows_of_any_size()
    return [(net.name, net_error(net, group, device, train=train)) for net in NETS for train in (False, True)]


def displaced(group: Any, device: torch.device) -> list[tuple[str, float]]:
    """Without stale steps they are the images of one device."""
    images = denoised(NETS[2], group, device, "full_sync")
    right = denoised(NETS[2], None, device, "full_sync")
    return [("displaced steps", max(difference(a, b) for a, b in zip(images, right, strict=True)))]


PARTS = {"every family of rules": families, "nets": nets, "displaced steps": displaced}
