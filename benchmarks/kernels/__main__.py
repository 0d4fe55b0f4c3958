"""Convolutions that torch does not give to oneDNN: how much faster would it be, and what does distpatch choose?

    python -m benchmarks.kernels --threads 1

One line a shape, in float32 on a CPU: the kernel that torch chooses, its time over oneDNN's, and whether
``distpatch`` calls oneDNN (``torch_utils/convolution_kernel.py`` has the rule, and its thresholds). Both take turns,
and the least of each is taken: of what is otherwise done on the machine, the least.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from benchmarks._harness.printed import machine, markdown_table, said, wide_console
from tests.support.convolving import conv_backend, convolve

CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
SECONDS = 0.15  # a shape
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class Case(NamedTuple):
    """One convolution of a batch of one: of these sizes, to so many channels."""

    channels: int
    sizes: tuple[int, ...]
    out: int
    kernel: tuple[int, ...]
    stride: int = 1
    dilation: int = 1
    groups: int = 1

    @property
    def how(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation."""
        dims = len(self.sizes)
        return [self.stride] * dims, [self.dilation * (k // 2) for k in self.kernel], [self.dilation] * dims


def cases() -> Iterator[Case]:
    for channels, rows in product((4, 16, 64, 256), (1, 2, 4, 16, 64)):
        yield Case(channels, (rows, 64), channels, (3, 3))
        yield Case(channels, (rows, 64), channels, (1, 1))
        yield Case(channels, (16 * rows,), channels, (3,))
        yield Case(channels, (16 * rows,), channels, (1,))
        for kernel in ((3, 3, 3), (3, 1, 1), (1, 1, 1)):
            yield Case(channels, (5, rows, 48), channels, kernel)
    for channels, rows in product((16, 64), (2, 8)):
        for stride, dilation, groups in ((2, 1, 1), (1, 2, 1), (1, 1, 4), (1, 1, channels)):
            yield Case(channels, (rows, 64), channels, (3, 3), stride, dilation, groups)
            yield Case(channels, (5, rows, 48), channels, (3, 3, 3), stride, dilation, groups)
    for channels, out in ((3, 64), (64, 3), (4, 512), (512, 4), (32, 32), (128, 128), (320, 320), (512, 512)):
        yield Case(channels, (2, 64), out, (3, 3))
        yield Case(channels, (5, 2, 48), out, (3, 3, 3))
        yield from (Case(channels, (rows, 128), out, (1, 1)) for rows in (8, 32, 128, 512))


def least(*contestants: Callable[[], object]) -> list[float]:
    """Seconds of each, taking turns."""
    best, stop = [float("inf")] * len(contestants), time.perf_counter() + SECONDS
    for turn in range(1000):
        for i, run in enumerate(contestants):
            started = time.perf_counter()
            run()
            best[i] = min(best[i], time.perf_counter() - started)
        if turn > 3 and time.perf_counter() > stop:
            break
    return best


def is_chosen(x: Tensor, case: Case, weight: Tensor) -> bool:
    """Whether distpatch calls oneDNN itself, and not torch's function."""
    called = []

    def func(*args: object) -> Tensor:
        called.append(args)
        return x

    convolve(func, x, weight, None, *case.how, case.groups)
    return not called


@app.command()
def main(threads: Annotated[int, typer.Option(min=1)] = 1) -> None:
    """Torch's kernel against oneDNN, over sizes, channels, strides, dilations and groups."""
    torch.set_num_threads(threads)
    torch.empty((32 << 20) - (64 << 10), dtype=torch.uint8)  # as lazy/deferred_ops.py: pages are kept
    console, about, wrong = wide_console(), machine(), []
    console.print(said(about, f"{threads} threads"))
    headings = (
        "sizes",
        "kernel",
        "stride",
        "dilation",
        "groups",
        "torch's",
        "MFLOP",
        "ms",
        "ms of oneDNN",
        "x",
        "chosen",
    )
    shown = markdown_table("convolutions that torch does not give to oneDNN", "channels", *headings)
    for case in cases():
        x = torch.randn(1, case.channels, *case.sizes)
        weight = torch.randn(case.out, case.channels // case.groups, *case.kernel)
        stride, padding, dilation = case.how
        backend = conv_backend(x.shape, weight.shape, stride, padding, dilation, case.groups)
        func = CONVOLUTIONS[len(case.sizes) - 1]
        with torch.inference_mode():
            result = func(x, weight, None, stride, padding, dilation, case.groups)
            of_torch, of_onednn = least(
                lambda: func(x, weight, None, stride, padding, dilation, case.groups),  # noqa: B023
                lambda: torch.mkldnn_convolution(x, weight, None, padding, stride, dilation, case.groups),  # noqa: B023
            )
            chosen = is_chosen(x, case, weight)
        if not backend.startswith("Slow"):
            continue
        if of_torch / of_onednn > 1.1 and not chosen:
            wrong.append(of_torch / of_onednn)
        elif chosen and of_onednn > 1.1 * of_torch:
            wrong.append(of_onednn / of_torch)
        flop = 2 * result.numel() * prod(weight.shape[1:])
        what = (case.sizes, case.kernel, case.stride, case.dilation, case.groups)
        took = (f"{flop / 1e6:.2f}", f"{1e3 * of_torch:.3f}", f"{1e3 * of_onednn:.3f}", f"{of_torch / of_onednn:.2f}")
        shown.add_row(
            f"{case.channels} to {case.out}", *map(str, what), backend, *took, "oneDNN" if chosen else "torch"
        )
    console.print(shown)
    console.print(f"{len(wrong)} chosen wrongly by more than a tenth, at worst {max(wrong, default=1):.2f}")


if __name__ == "__main__":
    app()
