"""Encoding and decoding on all ranks: what the sub-commands of that name share."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import distpatch
import launch
from distpatch.cli.session import Session

Call = Callable[[nn.Module, Tensor], Tensor]


def decoded(model: Any, latents: Tensor) -> Tensor:
    """The picture or clip; diffusers' autoencoders wrap it in an output class or a tuple."""
    output = model.decode(latents)
    return output.sample if hasattr(output, "sample") else output[0]


def encoded(model: Any, pixels: Tensor) -> Tensor:
    """The latents; of a distribution its mode."""
    output = model.encode(pixels)
    for name in ("latent", "latents"):
        if hasattr(output, name):
            return getattr(output, name)
    distribution = output.latent_dist if hasattr(output, "latent_dist") else output[0]
    return distribution.mode()


def takes_clips(model: nn.Module, part: str) -> bool:
    """Whether the first convolution of a model's part is over time too."""
    modules = getattr(model, part, model).modules()
    weights = (getattr(module, "weight", None) for module in modules)
    dims = next((w.ndim for w in weights if isinstance(w, Tensor) and w.ndim >= 4), 4)
    return dims == 5


def run(session: Session, model: nn.Module, call: Call, given: Tensor, what: str) -> tuple[Tensor, dict[str, Any]]:
    """Convert, call, restore: the sharded result, and what it took. Every rank calls it."""
    distpatch.convert_model(model, session.group, output="shard")
    with torch.inference_mode(), distpatch.trace() as sent, session.progress(model, what):
        started = time.perf_counter()
        result = call(model, given)
        if session.device.type == "cuda":
            torch.cuda.synchronize(session.device)
        seconds = time.perf_counter() - started
    distpatch.restore_model(model)
    return result, {
        "shape": list(result.shape),
        "seconds": seconds,
        "sent_bytes": sent.sent_bytes,
        "messages": sent.messages,
        "fallbacks": sum(fallback.count for fallback in sent.fallbacks),
    }


def difference(session: Session, model: nn.Module, call: Call, given: Tensor, result: Tensor) -> float | None:
    """The largest difference of a sharded result from one process, over its largest value; on rank 0."""
    whole = distpatch.gather(result)

    def compare() -> float:
        with torch.inference_mode(), session.progress(model, "one process"):
            alone = call(model, given)
        return ((alone.double() - whole.double()).abs().max() / alone.double().abs().max()).item()

    return launch.on_rank0(session.group, compare)


def summary(numbers: dict[str, Any], what: str, path: Any) -> str:
    """One line a result, as a person reads it."""
    shape = " x ".join(map(str, numbers["shape"]))
    text = f"{what} {shape} in {numbers['seconds']:.2f} s on {numbers['ranks']} rank(s) of {numbers['device']}: {path}"
    if numbers["fallbacks"]:
        text += f"\n{numbers['fallbacks']} operation(s) were gathered: no sharded rule"
    if numbers.get("error") is not None:
        text += f"\nLargest difference from one process: {numbers['error']:.1e} of the largest value"
    return text
