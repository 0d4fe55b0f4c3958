"""``convert_model(weights=...)``: how fast each rank is, as the caller says or as a short computation shows."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F
from torch import nn

from distpatch.comm import devices
from distpatch.comm.communicator import Communicator
from distpatch.layout.shares import Weights, checked
from distpatch.profiling.op_costs import mark, seconds_between

MEASURED = "measured"
SECONDS, LEAST = 1.0, 5  # how long a rank convolves, and how often at the least
ALIKE = 1.1  # ranks whose times differ by less share evenly: the next measurement would tell otherwise
# Channels and rows of the convolution: milliseconds of one core, and of a GPU.
ON_CPU, ELSEWHERE = (64, 64), (256, 256)


def weights_for(given: object, comm: Communicator, model: nn.Module) -> Weights | None:
    """One positive number a rank, the same on all of them; None: all alike.

    Every rank of the group calls it, with the same. Raises ``ValueError`` for weights that are none.
    """
    if given is None:
        return None
    if given != MEASURED:
        return checked(given, comm.size)
    if not comm.has_peers:
        return None
    answers = comm.rendezvous.require_same_call("convert_model: speeds", "", {"seconds": seconds_of(model)})
    seconds = [float(str(answer["seconds"])) for answer in answers]
    return None if max(seconds) < ALIKE * min(seconds) else tuple(min(seconds) / each for each in seconds)


def seconds_of(model: nn.Module) -> float:
    """Seconds that this rank takes for a convolution of a fixed size, on the model's device and in its dtype.

    The mean of a second: where another process has the core half of the time, most of these take as long as without it,
    and some much longer.
    """
    device = devices.of_model(model) or torch.device("cpu")
    channels, side = ON_CPU if device.type == "cpu" else ELSEWHERE
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point() and p.element_size() > 1), torch.float32)
    image = torch.full((1, channels, side, side), 0.01, dtype=dtype, device=device)
    weight = torch.full((channels, channels, 3, 3), 0.01, dtype=dtype, device=device)
    times: list[float] = []
    with torch.inference_mode():
        F.conv2d(image, weight, padding=1)  # loads kernels
        end = time.perf_counter() + SECONDS
        while len(times) < LEAST or time.perf_counter() < end:
            start = mark(device)
            F.conv2d(image, weight, padding=1)
            times.append(seconds_between(start, mark(device)))
    return sum(times) / len(times)
