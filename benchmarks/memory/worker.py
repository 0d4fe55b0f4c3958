"""One rank of one contestant of ``benchmarks.memory``: builds what is measured, then measures what it is asked to."""

from __future__ import annotations

import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from benchmarks._harness.crew import serve
from benchmarks._harness.decoder import FORMATS, build_decoder, draw_latents
from benchmarks._harness.resident import reset_resident_peak, resident_peak
from distpatch import launch

CONV_CHANNELS = 128
BLOCK_ROWS = 64  # of a drawn image: random ones, the next block the same at another scale
WARM_UP_ROWS = 64  # image rows: enough for every contestant to run as it does on the whole image
CPU = torch.device("cpu")
PATIENCE = timedelta(minutes=10)
LARGEST_TILE = 512


class Conv:
    """One 128 to 128, 3 x 3 convolution of this rank's rows."""

    def __init__(self, kind: str, size: int, memory_format: str, ranks: int, options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        conv = nn.Conv2d(CONV_CHANNELS, CONV_CHANNELS, 3, padding=1)
        self.model = conv.requires_grad_(False).to(memory_format=FORMATS[memory_format])
        self.kind, self.size, self.format, self.ranks = kind, size, FORMATS[memory_format], ranks
        if kind == "distpatch":
            distpatch.convert_model(self.model, _group(ranks), output="shard" if ranks > 1 else "gather", **options)
        elif kind == "patch_conv":
            self.model = _patch_conv(self.model, **options)
        elif kind == "DistVAE":
            from distvae.modules.adapters.layers.conv_adapters import Conv2dAdapter
            from distvae.utils import parallel_context

            self.model = Conv2dAdapter(self.model, parallel_context=parallel_context(_group(ranks), -2, ndim=4))

    def bounds(self, rows: int) -> list[int]:
        """Even shares of the ranks; the first ones take the longer ones."""
        share, extra = divmod(rows, self.ranks)
        return [rank * share + min(rank, extra) for rank in range(self.ranks + 1)]

    def own(self, rows: int) -> tuple[int, int]:
        """This rank's share."""
        bounds, rank = self.bounds(rows), dist.get_rank() if self.ranks > 1 else 0
        return bounds[rank], bounds[rank + 1]

    def draw(self, rows: int) -> Tensor:
        """This rank's rows of an image of so many rows."""
        lo, hi = self.own(rows)
        generator = torch.Generator().manual_seed(1)
        block = torch.randn(1, CONV_CHANNELS, BLOCK_ROWS, self.size, generator=generator)
        local = torch.empty(1, CONV_CHANNELS, hi - lo, self.size, memory_format=self.format)
        for row in range(lo, hi):
            torch.mul(block[:, :, row % BLOCK_ROWS], 1 / (1 + row // BLOCK_ROWS), out=local[:, :, row - lo])
        if self.kind == "distpatch" and self.ranks > 1:
            return distpatch.PatchTensor.from_local(local, _group(self.ranks), bounds=self.bounds(rows))
        return local

    def run(self, image: Tensor) -> Tensor:
        result: Tensor = self.model(image)
        return result


class Decode:
    """The Stable Diffusion decoder of ``benchmarks.decode``."""

    def __init__(self, kind: str, size: int, memory_format: str, ranks: int, options: dict[str, Any]) -> None:
        self.vae = build_decoder(FORMATS[memory_format])
        self.size, self.memory_format = size, memory_format
        if kind == "distpatch":
            distpatch.convert_model(self.vae, _group(ranks), **options)
        elif kind == "patch_conv":
            _patch_conv(self.vae, **options)
        elif kind == "tiling":
            self.vae.enable_tiling()
            self.vae.tile_sample_min_size = min(size // 2, LARGEST_TILE)  # so that it cuts, at every size
            self.vae.tile_latent_min_size = self.vae.tile_sample_min_size // 8
        elif kind == "DistVAE":
            from distvae.vae import parallelize_decoder

            parallelize_decoder(self.vae, _group(ranks))

    def own(self, rows: int) -> tuple[int, int]:
        """Every rank has the whole picture."""
        return 0, rows

    def draw(self, rows: int) -> Tensor:
        latents = draw_latents(self.size, FORMATS[self.memory_format])
        return latents[:, :, : rows // 8]

    def run(self, latents: Tensor) -> Tensor:
        picture: Tensor = self.vae.decode(latents).sample
        return picture


CASES = {"conv": Conv, "decode": Decode}


class Worker:
    """The orders that ``benchmarks.memory`` gives; each answers with a dict of numbers."""

    def __init__(self, subject: Conv | Decode) -> None:
        self.subject = subject
        self.result: Tensor | None = None

    def warm_up(self) -> dict[str, Any]:
        """What a process needs once: threads, channels, kernels."""
        self._run(self.subject.draw(min(self.subject.size, WARM_UP_ROWS)))
        return {}

    def time(self) -> dict[str, Any]:
        """Seconds of one pass; the image lives no longer, since other contestants want the memory."""
        image = self.subject.draw(self.subject.size)
        self._meet()
        started = time.perf_counter()
        self._run(image)
        return {"seconds": time.perf_counter() - started}

    def resident(self) -> dict[str, Any]:
        """How far the first pass over the whole image raises the process's resident peak."""
        self.warm_up()
        image = self.subject.draw(self.subject.size)
        gc.collect()
        self._meet()
        before = reset_resident_peak(CPU)
        self.result = self._run(image)
        return {"resident_bytes": resident_peak(CPU) - before}

    def live(self) -> dict[str, Any]:
        image = self.subject.draw(self.subject.size)
        with distpatch.LivePeak() as peak:
            self._run(image)
        return {"live_bytes": peak.peak_bytes, "live_op": peak.peak_op}

    def save(self, path: str) -> dict[str, Any]:
        """Write what ``resident`` computed."""
        torch.save(self.result, path)
        return {}

    def compare(self, path: str) -> dict[str, Any]:
        """Largest difference of what ``resident`` computed from what is saved, over the largest value there."""
        assert self.result is not None
        saved, (lo, hi) = torch.load(path, mmap=True), self.subject.own(self.subject.size)
        difference = largest = 0.0
        for row in range(lo, hi, BLOCK_ROWS):
            stop = min(row + BLOCK_ROWS, hi)
            mine, right = self.result[:, :, row - lo : stop - lo], saved[:, :, row:stop]
            difference = max(difference, (mine - right).abs().max().item())
            largest = max(largest, right.abs().max().item())
        return {"error": difference / largest}

    def _run(self, image: Tensor) -> Tensor:
        with torch.inference_mode():
            result = self.subject.run(image)
        return result.local if isinstance(result, distpatch.PatchTensor) else result

    def _meet(self) -> None:
        if dist.is_initialized():
            dist.barrier()


def _group(ranks: int) -> dist.ProcessGroup | None:
    return dist.group.WORLD if ranks > 1 else None


def _patch_conv(model: nn.Module, splits: int) -> nn.Module:
    """Converted by patch_conv, its threshold (2**30 elements) lowered so that it acts."""
    import patch_conv

    code = patch_conv.PatchConv2d.forward.__code__
    constants = tuple(0 if constant == 1 << 30 else constant for constant in code.co_consts)
    if constants == code.co_consts:
        raise RuntimeError("this release of patch_conv has another threshold than 2**30 elements")
    patch_conv.PatchConv2d.forward.__code__ = code.replace(co_consts=constants)
    converted: nn.Module = patch_conv.convert_model(model, splits=splits)
    return converted


def _guarded(order: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A contestant that fails is shown as failed, with what it said."""

    def obey(**details: Any) -> dict[str, Any]:
        try:
            return order(**details)
        except Exception as error:
            return _failure(error)

    return obey


def _failure(error: Exception) -> dict[str, Any]:
    """What it said or, since a bare assert says nothing, the line that failed."""
    line = traceback.extract_tb(error.__traceback__)[-1].line
    return {"failure": f"{type(error).__name__}: {str(error) or line}"}


def main(
    case: str, size: int, memory_format: str, kind: str, ranks: int, options: dict[str, Any], threads: int
) -> None:
    torch.set_num_threads(threads)
    with ExitStack() as stack:
        if ranks > 1:
            stack.enter_context(launch.process_group(device="cpu", threads=threads, timeout=PATIENCE))
        orders = ("warm_up", "time", "resident", "live", "save", "compare")
        try:
            worker = Worker(CASES[case](kind, size, memory_format, ranks, options))
        except Exception as error:
            failure = _failure(error)
            serve({name: lambda **_: failure for name in orders})
        else:
            serve({name: _guarded(getattr(worker, name)) for name in orders})


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # to take torch apart in order costs each process seconds, for nothing
