"""Run under torchrun with two processes, from an empty folder: every Python block of the pages, each on what it needs.

A block gets new names, but for those of the pages in ``CONTINUED``, which are one program each. What is not here is stood in for: GPUs,
eight ranks, large models.
"""

from __future__ import annotations

import contextlib
import functools
import re
import subprocess
import sys
import textwrap
import time
import traceback
import types
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tifffile
import torch
import torch.distributed as dist
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderKLWan
from monai.networks.nets.segresnet import SegResNet
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard

import distpatch
from distpatch.model.convert import is_converted
from tests.launch.pages import ROOT, pages

sys.path.insert(0, str(ROOT / "torchrun_examples"))  # examples import each other, as programs do

from pipeline import demo_pipeline, prompt_of

CONTINUED = ("docs/own-functions.md",)
ONE_RANK = ("docs/notebooks.md", "docs/planning.md")  # programs of one process
FRESH = "docs/torch-changes.md"  # of a process in which nothing was imported before
BLOCK = re.compile(r"^( *)```python\n(.*?)^ *```$", re.DOTALL | re.MULTILINE)
CONVERT, LOCAL_GROUP, MESH = distpatch.convert_model, distpatch.local_group, dist.device_mesh.init_device_mesh


def blocks(path: str) -> Iterator[tuple[int, str]]:
    """The line at which each block of a page begins, and its code."""
    text = (ROOT / path).read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        yield text.count("\n", 0, found.start()) + 1, textwrap.dedent(found[2])


def with_blocks() -> list[str]:
    """Every page of the repository that has a block."""
    return [page for page in (str(path.relative_to(ROOT)) for path in pages()) if any(blocks(page))]


class Net(nn.Module):
    """A model of a few layers, with blocks as FSDP2 is given them."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = torch.relu(block(x))
        return x


class Tokens(nn.Module):
    """A transformer of tokens as far as its arguments go."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, hidden_states: Tensor, img_ids: Tensor) -> Tensor:
        inner: Tensor = self.inner(hidden_states)
        return inner + img_ids


def small_vae(**_: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
    ).eval()


def given(page: str) -> dict[str, Any]:
    """What a block finds, beside what it makes itself. The same on all ranks."""
    torch.manual_seed(0)
    group, x = dist.group.WORLD, torch.randn(1, 3, 12, 8)
    names: dict[str, Any] = {
        **{"torch": torch, "F": F, "Tensor": Tensor, "dist": dist, "distpatch": distpatch, "h5py": h5py},
        **{
            "group": group,
            "tensor": x,
            "x": x,
            "picture": x,
            "image": x,
            "rows": x.tensor_split(2, 2)[dist.get_rank()],
            "part": x.tensor_split(2, 3)[dist.get_rank()],  # on a mesh of 1 x 2
        },
        **{"model": Net(), "net": Net().eval(), "weight": torch.randn(4, 3, 3, 3), "bias": torch.randn(4)},
        **{"vae": small_vae(), "latents": torch.randn(1, 4, 8, 8), "f": torch.relu, "AutoencoderKL": small_vae},
        **{
            "transformer": Tokens(),
            "my_kernel": lambda x: x * 2,
            "my_function": lambda x, weight: x,
            "criterion": F.mse_loss,
        },
    }
    if page == "docs/video.md":
        small = {"base_dim": 8, "z_dim": 16, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [True]}
        names |= {"wan": AutoencoderKLWan(**small).eval(), "clip_latents": torch.randn(1, 16, 2, 8, 8)}
        names["wan"].use_feature_cache = True
    if page == "docs/pipelines.md":
        pipe = demo_pipeline()
        pipe.transformer = types.SimpleNamespace(enable_parallelism=lambda config: None)
        names |= {"pipe": pipe, "generator": torch.Generator().manual_seed(0), "ContextParallelConfig": dict}
        names["prompt"] = {**prompt_of(None, "grass"), "height": 16, "width": 16}
    if page == "docs/displaced.md":
        names |= displaced_names(names["latents"])
    if page == "docs/results.md":
        names |= result_files()
    if page == "docs/start.md":
        names["AutoencoderKL"] = AutoencoderKL
    if page == "docs/training.md":
        names |= {"latents": distpatch.shard(x, group), "fully_shard": fully_shard}
        names["init_device_mesh"] = dist.device_mesh.init_device_mesh
    if page == "distpatch/rules/README.md":
        names["rule"] = lambda function: lambda body: body
    if page in {"tests/README.md", "CONTRIBUTING.md"}:  # cases run on ranks that are threads, and in other tests
        names |= {"case": lambda *given, **more: None, "H": 7, "Mine": None, "between": None}
        names["using"] = lambda make: contextlib.nullcontext()
    return names


def displaced_names(latents: Tensor) -> dict[str, Any]:
    """A pipeline that takes a prompt as text, and one of DistriFusion's kind."""
    pipe = demo_pipeline()
    call = {**prompt_of(None, "grass"), "height": 16, "width": 16}
    pipe.__class__ = type(
        "Prompted",
        (type(pipe),),
        {"__call__": lambda self, prompt, **more: type(self).__mro__[1].__call__(self, **call, **more)},
    )
    pipe.set_progress_bar_config(disable=True)
    unet = CONVERT(demo_pipeline().unet, dist.group.WORLD)
    return {
        **{"pipe": pipe, "prompt": "a lighthouse", "unet": unet, "pipeline": types.SimpleNamespace(vae=small_vae())},
        "distri_pipeline": lambda prompt, output_type: types.SimpleNamespace(images=latents),
        "comm_manager": types.SimpleNamespace(clear=lambda: None),
    }


def result_files() -> dict[str, Any]:
    """The files of that page, and a net and a clip that fit them."""
    if dist.get_rank() == 0:
        draw = np.random.default_rng(0)
        tifffile.imwrite("slide.tif", draw.integers(0, 255, (16, 12, 3), np.uint8))
        for name in ("scan1", "mask1", "scan2", "mask2"):
            np.save(f"{name}.npy", draw.random((8, 6, 5), np.float32))
        with h5py.File("scan.h5", "w") as file:
            file["image"] = draw.random((8, 6, 5), np.float32)
    dist.barrier()
    group = dist.group.WORLD
    net = CONVERT(nn.Sequential(nn.Conv3d(1, 1, 3, padding=1)), group)
    flat = CONVERT(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1)), group)
    clip = distpatch.shard(torch.rand(1, 3, 2, 16, 16), group)
    image = distpatch.shard(torch.rand(1, 3, 16, 16), group)
    volumes = {"volume": torch.randn(1, 1, 8, 8, 8), "segresnet": SegResNet(blocks_down=(1, 1), blocks_up=(1,))}
    return {"net": lambda x: (flat if x.ndim == 4 else net)(x), "clip": clip, "image": image, **volumes}


def stand_in() -> None:
    """GPUs, eight ranks, and a group that is there already; a model may be converted anew without being restored."""

    def convert_model(model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        if is_converted(model):
            distpatch.restore_model(model)
        return CONVERT(model, *args, **kwargs)

    distpatch.convert_model = convert_model
    distpatch.local_group = functools.partial(LOCAL_GROUP, 2, device="cpu", threads=1)
    dist.init_process_group = dist.destroy_process_group = lambda *args, **kwargs: None
    dist.device_mesh.init_device_mesh = lambda device, shape, **names: MESH("cpu", (1, 2), **names)
    torch.cuda.set_device = lambda device: None
    nn.Module.cuda = lambda self, device=None: self


def run(page: str, line: int, code: str, names: dict[str, Any]) -> dict[str, Any]:
    """A block as a module of its own; the names that it leaves."""
    module = types.ModuleType(f"{Path(page).stem}_{line}".replace("-", "_"))
    vars(module).update(names)
    sys.modules[module.__name__] = module
    exec(compile("\n" * line + code, str(ROOT / page), "exec"), vars(module))
    return vars(module)


def main() -> None:
    dist.init_process_group("gloo")
    destroy = dist.destroy_process_group
    torch.set_num_threads(1)
    stand_in()
    warnings.filterwarnings("ignore", message="no sharded rule")
    done, failed = 0, 0
    for page in sys.argv[1:] or with_blocks():
        names = given(page)
        for line, code in blocks(page):
            before = names if page in CONTINUED else given(page)
            started = time.perf_counter()
            alone = page in ONE_RANK or "save_pretrained" in code
            try:
                if page == FRESH and dist.get_rank() == 0:
                    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
                elif page != FRESH and (not alone or dist.get_rank() == 0):
                    names = run(page, line, code, before)
            except Exception:
                failed += 1
                print(f"FAILED {page}:{line}", traceback.format_exc(), flush=True)
            done += 1
            dist.barrier()
            if dist.get_rank() == 0:  # one rank: lines of two would run into one another
                print(f"{time.perf_counter() - started:5.1f} s {page}:{line}", flush=True)
    if dist.get_rank() == 0:
        print(f"{done} blocks", flush=True)
    destroy()
    raise SystemExit(failed > 0)


if __name__ == "__main__":
    main()
