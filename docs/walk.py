"""The files and functions that one convolution goes through: what docs/walk.md shows.

    torchrun --nproc_per_node=2 docs/walk.py > docs/walk.md    # or: make walk

Rank 0 notes every function of distpatch at its first call; the convolution runs twice before, so that plans are cached.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

import distpatch

PACKAGE = Path(distpatch.__file__).parent
SHAPE = (1, 64, 128, 512)  # 16 MiB: large enough to be deferred, and of a row that torch has one kernel for
NAMELESS = ("<lambda>", "<genexpr>", "<listcomp>", "<dictcomp>", "<setcomp>", "<module>")


def walk(call: Callable[[], object]) -> dict[str, list[str]]:
    """Functions by file, both in the order of their first calls."""
    found: dict[str, list[str]] = {}

    def note(frame: FrameType, event: str, arg: Any) -> None:
        path, name = Path(frame.f_code.co_filename), frame.f_code.co_name
        if event == "call" and path.is_relative_to(PACKAGE) and name not in NAMELESS:
            functions = found.setdefault(str(path.relative_to(PACKAGE)), [])
            if name not in functions:
                functions.append(name)

    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(None)
    return found


def page(title: str, found: dict[str, list[str]]) -> None:
    print(f"\n## {title}: {len(found)} files\n")
    for index, (file, functions) in enumerate(found.items(), 1):
        print(f"{index}. `{file}`: {', '.join(functions)}")


@torch.no_grad()
def main() -> None:
    dist.init_process_group("gloo")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(64, 64, 3, 3, generator=generator)
    model = torch.nn.Identity()  # its conversion alone opens a region with lazy=True or False
    walks = {}
    for lazy in (False, True):
        held: list[Any] = []

        def keep(module: Any, args: Any, result: Any, held: list[Any] = held) -> None:
            held.append(result)

        hook = model.register_forward_hook(keep)
        distpatch.convert_model(model, dist.group.WORLD, lazy=lazy, splits=2, output="shard")
        x = model(torch.randn(SHAPE, generator=generator))
        for _ in range(2):
            F.conv2d(F.silu(x), weight, padding=1).local.sum()
        kind = "Deferred" if lazy else "Eager"
        results: list[Any] = []
        inputs = F.silu(x)
        walks[f"{kind}: the call"] = walk(lambda x=inputs, out=results: out.append(F.conv2d(x, weight, padding=1)))
        if lazy:
            walks[f"{kind}: its rows are read"] = walk(lambda out=results: out[0].local)
        hook.remove()
        distpatch.restore_model(model)
    if dist.get_rank() == 0:
        print("# One convolution, file by file\n")
        print("Made by `torchrun --nproc_per_node=2 docs/walk.py > docs/walk.md` (`make walk`): rank 0 of 2, in the")
        print("order of first calls. The input is `silu(x)`: with `lazy=True` it does not exist when it is convolved.")
        print(f"It has the shape {SHAPE}, in float32. On a CPU a smaller one also goes through")
        print("`torch_utils/convolution_kernel.py`, which chooses a kernel by the size of each patch.")
        for title, found in walks.items():
            page(title, found)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
