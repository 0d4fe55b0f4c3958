"""``convert_model(policy="auto")``: calls of small inputs computed whole on every rank, where that is faster.

The first calls of a shape are tried, each of them a right one: ``TRIES`` sharded, then as many whole. What the ranks
measured they tell each other when they meet for the next call, so that all decide the same; then it stays so. A call
that is computed whole asks nobody any more: a rank's result is right for what this rank was called with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from distpatch.comm.communicator import Communicator
from distpatch.layout.blocks import BlockLayout
from distpatch.layout.rows import RowLayout
from distpatch.model.calls import Call, leave
from distpatch.profiling.live_memory import LivePeak
from distpatch.profiling.op_costs import mark, seconds_between
from distpatch.profiling.trace import trace
from distpatch.tensor.patch_tensor import PatchTensor, shard_in, shard_input
from distpatch.torch_utils.chunk_sizes import sizes_of
from distpatch.torch_utils.tree import map_tensors, streams_in

SHARDED, WHOLE = "sharded", "whole"
TRIES = 4  # of each way; the first of each loads kernels and makes plans
HOPELESS = 1.5  # times a sharded call: then a whole one is not tried again
FREE_PART = 8  # of a GPU's free memory, what a call may take that is computed whole
MOST_SHAPES = 4096  # that are remembered; further ones are sharded
Answers = list[dict[str, Any]]
Layouts = list[RowLayout | None]  # of each tensor of a result, None where it is plain


class Policy:
    """What is known of the calls of one converted model, by entry point and signature."""

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm
        self.trials: dict[str, Trial] = {}

    def trial_of(self, call: Call) -> Trial | None:
        """None where the call is sharded whatever it costs: given rows, or values that come one by one."""
        if any(isinstance(tensor, PatchTensor) for tensor in call.sharded) or streams_in(call.arguments):
            return None
        key = f"{call.what} {call.signature}"
        if key not in self.trials and len(self.trials) < MOST_SHAPES:
            self.trials[key] = Trial(key, self.comm)
        return self.trials.get(key)


class Trial:
    """The calls of one signature (``model.calls.Told``): how they are computed, and how long either way takes.

    ``settled``: the way that is kept, empty while both are tried; ``seconds``: of either way, of the slowest rank.
    """

    def __init__(self, key: str, comm: Communicator) -> None:
        self.key, self.comm = key, comm
        self.way, self.settled = SHARDED, ""
        self.seconds: dict[str, float] | None = None
        self._device = torch.device("cpu")
        self._times: dict[str, list[float]] = {SHARDED: [], WHOLE: []}
        self._span: tuple[str, Any, Any] | None = None  # of the last try, not read yet
        self._peak: float | None = None  # bytes that the first sharded call held at once; infinite: never whole
        self._layouts: Layouts = []  # of the result of a sharded call

    def needs_nobody(self, output: str) -> bool:
        """Whether the other ranks need not be met: they have decided the same, and no result is shared among them."""
        return self.settled == WHOLE and output == "gather"

    @property
    def sends(self) -> bool:
        return self.way != WHOLE

    def payload(self, replicated: list[Tensor]) -> dict[str, object]:
        if self.settled:
            return {"settled": self.settled, "seconds": self.seconds}
        if self._span is not None:
            (way, *span), self._span = self._span, None
            self._times[way].append(seconds_between(*span))
        mine = {"times": self._times, "peak": self._peak, "room": _room(self._device), "bits": _bits(self._device)}
        return {"settled": "", **mine}

    def begin(self, signature: str, answers: Answers) -> None:
        """Choose the way of this call, from what all ranks know alike."""
        self.way = self.settled or SHARDED
        if self.settled or any("settled" not in answer for answer in answers):
            return
        known = next((answer for answer in answers if answer["settled"]), None)
        if known is not None:  # a rank that was torn out of the meeting where the others settled it
            self._settle(known["settled"], known["seconds"])
            return
        sharded, whole = (
            [max(times) for times in zip(*(answer["times"][way] for answer in answers))] for way in (SHARDED, WHOLE)
        )
        if len(sharded) < TRIES:
            return
        if not _may_be_whole(answers):
            self._settle(SHARDED, None)
        elif len(whole) < TRIES and not (len(whole) > 1 and min(whole) > HOPELESS * min(sharded)):
            self.way = WHOLE
        else:
            seconds = {SHARDED: min(sharded), WHOLE: min(whole)}
            self._settle(min(seconds, key=seconds.__getitem__), seconds)

    def _settle(self, way: str, seconds: dict[str, float] | None) -> None:
        self.way = self.settled = way
        self.seconds = seconds

    def run(self, call: Call, sharded: Callable[[], Any], function: Callable[..., Any]) -> Any:
        """The result of the call, as the caller gets it."""
        self._device = call.sharded[0].device
        args, kwargs = call.arguments
        if self.way == WHOLE:
            with self._clock(), nullcontext() if self.settled else trace() as seen:
                result = _left_whole(call, function(*args, **kwargs), self._layouts)
            if seen is not None and seen.records:  # the model keeps rows since a sharded call: whole it is not
                self._peak = math.inf
            seconds = None if self.seconds is None else (self.seconds[WHOLE], self.seconds[SHARDED])
            self.comm.recorder.whole(self.key, seconds)
            return result
        if self.settled:
            return call.leave(sharded())
        first = self._peak is None
        with self._clock(), LivePeak() if first else nullcontext() as live:
            result = sharded()
            self._layouts = _layouts_of(result)
            result = call.leave(result)
        if live is not None:
            self._peak = math.inf if streams_in(result) else live.peak_bytes
        return result

    @contextmanager
    def _clock(self) -> Iterator[None]:
        start = None if self.settled else mark(self._device)
        yield
        if start is not None:
            self._span = self.way, start, mark(self._device)


def _layouts_of(result: Any) -> Layouts:
    """The rows that each rank has of a result that has not left its call yet."""
    layouts: Layouts = []

    def note(tensor: Tensor) -> Tensor:
        layout = tensor.row_layout if isinstance(tensor, PatchTensor) else None
        if isinstance(layout, BlockLayout) and isinstance(tensor, PatchTensor):  # it will leave with its rows in order
            layout = RowLayout(layout.dim, tensor.region.bounds(layout.size))
        layouts.append(layout)
        return tensor

    map_tensors(note, result)
    return layouts


def _left_whole(call: Call, result: Any, layouts: Layouts) -> Any:
    """What the caller gets of a result that this rank has computed alone: of the form that a sharded call's has."""
    options, region, expected = call.state.options, call.state.region.handed_out, iter(layouts)

    def left(tensor: Tensor) -> Any:
        layout = next(expected, None)
        if isinstance(tensor, PatchTensor):  # that the model has kept since another call
            return leave(tensor, call.state)
        if options.output == "gather" or layout is None:
            return tensor
        if options.output == "rank0":
            return tensor.detach() if region.comm.rank == 0 else None
        if layout.dim >= tensor.ndim or layout.size != tensor.shape[layout.dim]:  # it was another result
            return shard_input(tensor, layout.dim, region) if layout.dim < tensor.ndim else tensor
        return shard_in(region, tensor, layout)

    result = map_tensors(left, result)
    call.tidy()
    return result


def _may_be_whole(answers: Answers) -> bool:
    """Whether every rank has room for all that the ranks held together, and gets the bits of the others."""
    bits = {answer["bits"] for answer in answers}
    peaks = [math.inf if answer["peak"] is None else answer["peak"] for answer in answers]
    return max(peaks) * len(answers) <= min(answer["room"] for answer in answers) and len(bits) == 1 and "" not in bits


def _room(device: torch.device) -> int:
    """Bytes of activations that a whole call may take."""
    room = sizes_of(device).whole_bytes
    return min(room, torch.cuda.mem_get_info(device)[0] // FREE_PART) if device.type == "cuda" else room


def _bits(device: torch.device) -> str:
    """What decides how this rank rounds: ranks of which it is the same compute the same. Empty: nobody can tell.

    Without gradients it is enough that they have the same device. With gradients, weights that differ by rounding
    would drift apart from step to step, and no rank would notice.
    """
    if device.type == "cpu":
        return f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads"
    if torch.is_grad_enabled() and not (
        torch.are_deterministic_algorithms_enabled() and not torch.backends.cudnn.benchmark
    ):
        return ""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
