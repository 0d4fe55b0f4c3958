"""Ranks as processes over gloo that share one device: on a GPU their rows travel through the CPU's memory."""

from __future__ import annotations

import random
import time
from functools import partial
from typing import Any

import torch

import distpatch
from benchmarks.gpu.cases import CASES, NETS, TOLERANCE, case_error, denoised, difference, net_error
from benchmarks.gpu.processes import Say, in_processes, values
from benchmarks.gpu.section import Row, Section, exact

DELAY_S = 0.002


def run(section: Section) -> None:
    for world in section.pick(full=(2, 3), tiny=(2,)):
        for name, body in (("every family of rules", families), ("nets", nets), ("displaced steps", displaced)):
            section.row(f"{name}, {world} processes", partial(row, section, world, body))


def row(section: Section, world: int, body: Any) -> Row:
    outcomes = in_processes(
        world, body, backend="gloo", gpus=min(section.where.gpus, 1), seconds=max(section.seconds_left, 5)
    )
    errors = [error for rank in values(outcomes) for error in rank]
    name, worst = max(errors, key=lambda named: named[1])
    return exact(worst, TOLERANCE, cases=len(errors) // world, worst=name)


def families(group: Any, device: torch.device, say: Say) -> list[tuple[str, float]]:
    draw = random.Random(group.rank())
    errors = []
    for case in CASES:
        time.sleep(draw.uniform(0, DELAY_S))  # ranks come to their messages at times of their own
        errors.append((case.family, case_error(case, group, device, seed=1)))
    return errors


def nets(group: Any, device: torch.device, say: Say) -> list[tuple[str, float]]:
    distpatch.lazy.LEAST_BYTES = 0
    return [(net.name, net_error(net, group, device, train=train)) for net in NETS for train in (False, True)]


def displaced(group: Any, device: torch.device, say: Say) -> list[tuple[str, float]]:
    """Without stale steps they are the images of one device."""
    images = denoised(NETS[2], group, device, "full_sync")
    right = denoised_alone(device)
    return [("displaced steps", max(difference(a, b) for a, b in zip(images, right, strict=True)))]


def denoised_alone(device: torch.device) -> list[torch.Tensor]:
    return denoised(NETS[2], None, device, "full_sync")
