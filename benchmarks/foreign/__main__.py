"""Nets and filters of other libraries, converted, against one device: a table of docs/models.md.

    python -m benchmarks.foreign --install          # the libraries, in an environment of their own: out/foreign/
    python -m benchmarks.foreign                    # all of them; --only NAME for some
    python -m benchmarks.foreign --library kornia

Random weights, fp64 where a net can; ranks are threads over gloo. Compared are the outputs and the gradient of the
first input, on each number of ranks. A net that fails on one device is named, not compared.
"""

from __future__ import annotations

import argparse
import copy
import subprocess
import sys
import venv
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import distpatch
from benchmarks.foreign.medical import medical_nets
from benchmarks.foreign.nets import LIBRARIES, Foreign
from tests.support.threads import run_ranks

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "out" / "foreign"
LIBRARIES |= {"monai": medical_nets}
PACKAGES = """
numpy pillow pyyaml huggingface_hub safetensors tqdm packaging scipy einops matplotlib pandas tensorly tensorly-torch
ruamel.yaml configmypy zencfg opt_einsum h5py zarr wandb lightning lightly torchmetrics shapely geopandas rasterio
rtree pyproj jsonargparse lightning-utilities torch_geometric pytorch_msssim monai expecttest pytest
""".split()
# Their own pins ask for a torch or a numpy that others exclude.
PINNED = """
torchvision==0.28.0 timm==1.0.31 segmentation_models_pytorch==0.6.0 kornia==0.9.0 kornia_rs==0.2.0
neuraloperator==2.0.0 torchgeo==0.8.1 compressai==1.2.8
""".split()
PATIENCE_S = 60.0  # that a rank waits for the others


def install() -> None:
    """The libraries beside the torch that runs this, which is not downloaded again where pip has it."""
    venv.create(FOLDER, with_pip=True)
    pip = [str(FOLDER / "bin" / "pip"), "install", "--quiet"]
    release = torch.__version__.partition("+")[0]
    subprocess.run([*pip, f"torch=={release}", *PACKAGES], check=True)
    subprocess.run([*pip, "--no-deps", *PINNED], check=True)


def without_torchvision_kernels() -> None:
    """torchvision's Python imports beside a torch that its kernels were not built for; no net here calls them."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    globals()["_kept"] = library


@dataclass
class Row:
    """What became of one net."""

    library: str
    name: str
    shape: str
    error: float = 0.0
    fallbacks: Counter[str] = field(default_factory=Counter)
    problem: str = ""
    remark: str = ""
    right: bool = False

    def __str__(self) -> str:
        gathered = ", ".join(f"{op}: {count}" for op, count in sorted(self.fallbacks.items())) or "0"
        error = self.problem or f"{self.error:.0e}{'; ' if self.remark else ''}{self.remark}"
        return f"| {self.library} | {self.name} | {self.shape} | {error} | {gathered} |"


def _tensors(result: Any) -> Iterator[Tensor]:
    """Those of a result: of containers, and of the attributes of objects."""
    if isinstance(result, Tensor):
        yield result
        return
    parts = result.values() if isinstance(result, Mapping) else result if isinstance(result, (list, tuple)) else None
    for part in vars(result).values() if parts is None and hasattr(result, "__dict__") else parts or ():
        yield from _tensors(part)


def randomised(model: nn.Module) -> nn.Module:
    """Weights that are zero or one at first would hide what follows them."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point() and tensor.numel() > 1 and bool((tensor == tensor.flatten()[0]).all()):
            tensor.data += torch.rand(tensor.shape, generator=generator).to(tensor) * 0.1
    return model.eval()


class Case:
    """One net with its inputs, and what is compared: results, and the gradient of the first input."""

    def __init__(self, entry: Foreign) -> None:
        torch.manual_seed(0)
        self.call = entry.call
        self.dtype = torch.float64 if entry.double else torch.float32
        self.tolerance = 1e-9 if entry.double else 1e-5
        self.inputs = [torch.randn(shape, dtype=self.dtype) for shape in entry.shapes]
        self.model = randomised(entry.build()).to(self.dtype if entry.double else None)
        self.expected = self.outputs(self.model)
        self.weights = [torch.randn(t.shape, dtype=t.dtype) for t in self.expected if t.is_floating_point()]
        self.grad = self.gradient(self.model)

    def outputs(self, model: nn.Module, first: Tensor | None = None) -> list[Tensor]:
        inputs = [self.inputs[0] if first is None else first, *self.inputs[1:]]
        with torch.set_grad_enabled(first is not None):
            result = self.call(model, *inputs)
        return [t for t in _tensors(result) if t.is_floating_point() or t.dtype == torch.bool]

    def loss(self, outputs: list[Tensor]) -> Tensor:
        floating = [t for t in outputs if t.is_floating_point()]
        return sum(((t * w).sum() for t, w in zip(floating, self.weights, strict=True)), torch.zeros(()))

    def gradient(self, model: nn.Module) -> Tensor | None:
        leaf = self.inputs[0].clone().requires_grad_()
        loss = self.loss(self.outputs(model, leaf))
        return torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else None

    def slope(self, step: float = 1e-6) -> tuple[Tensor, float]:
        """A direction, and how the loss changes along it on one device, by finite differences."""
        along = torch.randn_like(self.inputs[0])
        ends = [self.loss(self.outputs(self.model, self.inputs[0] + s * along)).item() for s in (step, -step)]
        return along, (ends[0] - ends[1]) / (2 * step)

    def run(self, world: int) -> tuple[list[Tensor], Tensor | None, Counter[str]]:
        """Results, gradient and gathered operations of rank 0; the others have the same bits."""

        def body(rank: int) -> tuple[list[Tensor], Tensor | None, Counter[str]]:
            mine = distpatch.convert_model(copy.deepcopy(self.model).eval(), dist.group.WORLD, fallback="allow")
            with distpatch.trace() as t:
                outputs = self.outputs(mine)
            counted: Counter[str] = Counter()
            for record in t.fallbacks:
                counted[record.op] += record.count
            return outputs, self.gradient(mine), counted

        return run_ranks(world, body, timeout=PATIENCE_S)[0]


def measure(entry: Foreign, worlds: list[int]) -> Row:
    row = Row(entry.library, entry.name, " and ".join(" ".join(map(str, shape)) for shape in entry.shapes))
    try:
        case = Case(entry)
    except Exception as error:
        row.problem = f"fails on one device: {_line(error)}"[:160]
        return row
    for world in worlds:
        try:
            outputs, grad, gathered = case.run(world)
        except Exception as error:
            row.problem = f"on {world} ranks {_line(error)}"[:300]
            return row
        row.fallbacks |= gathered
        row.error = max(row.error, *map(relative, outputs, case.expected))
        if grad is not None and case.grad is not None:
            wrong = relative(grad, case.grad)
            if wrong > case.tolerance and entry.double:
                along, slope = case.slope()
                if abs((grad * along).sum().item() - slope) < 1e-5 * abs(slope):
                    row.remark = "torch's own gradient is wrong on one device, by finite differences; this one is right"
                    continue
            row.error = max(row.error, wrong)
    row.right = row.error < case.tolerance
    return row


def relative(value: Tensor, right: Tensor) -> float:
    """The largest difference over the largest value."""
    if value.shape != right.shape:
        return float("inf")
    if not right.numel():
        return 0.0
    value, right = value.detach().double(), right.detach().double()
    return ((value - right).abs().max() / right.abs().max().clamp(min=1e-30)).item()


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".replace("\n", " ").replace("|", "/")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--library", action="append", choices=list(LIBRARIES))
    parser.add_argument("--only", default="", help="nets whose name contains this")
    parser.add_argument("--worlds", type=int, nargs="+", default=[2, 3])
    arguments = parser.parse_args()
    python = FOLDER / "bin" / "python"
    if arguments.install:
        install()
        return
    if python.exists() and Path(sys.prefix) != FOLDER:
        sys.exit(subprocess.call([str(python), "-m", "benchmarks.foreign", *sys.argv[1:]], cwd=ROOT))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    without_torchvision_kernels()
    print("| library | net | input | largest error | gathered |\n|---|---|---|---|---|")
    rows = []
    for library in arguments.library or LIBRARIES:
        try:
            entries = LIBRARIES[library]()
        except Exception as error:
            print(f"| {library} | | | cannot be imported: {type(error).__name__}: {str(error)[:200]} | |", flush=True)
            continue
        for entry in entries:
            if arguments.only in entry.name:
                rows.append(measure(entry, arguments.worlds))
                print(rows[-1], flush=True)
    right = [row for row in rows if row.right]
    whole = [row for row in right if not row.fallbacks]
    print(
        f"\n{len(rows)} nets and filters; on {', '.join(map(str, arguments.worlds))} ranks {len(right)} give values "
        "and gradients of one device (difference over the largest value below 1e-9 in fp64, 1e-5 in fp32), "
        f"{len(whole)} of them without one operation gathered."
    )


if __name__ == "__main__":
    main()
