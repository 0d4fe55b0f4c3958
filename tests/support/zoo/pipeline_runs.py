"""Whole pipelines on one device, and by ``parallelize_pipeline`` on ranks that are threads."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import distpatch
from tests.support.threads import run_ranks
from tests.support.zoo.pipeline import Run
from tests.support.zoo.pipelines import PIPELINES
from tests.support.zoo.transformer_pipelines import TRANSFORMER_PIPELINES

ALL_PIPELINES: dict[str, Run] = {**PIPELINES, **TRANSFORMER_PIPELINES}


@dataclass
class Picture:
    """What one rank has: the picture, and what it sent between the last denoiser's end and the decoder's first operation.

    ``latent_bytes``: of the latents as the decoder takes them, on all ranks together.
    """

    picture: Tensor
    whole: distpatch.Trace
    kinds: set[str] = field(default_factory=set)
    ops: set[str] = field(default_factory=set)
    sent_bytes: int = 0
    latent_bytes: int = 0


@dataclass
class Comparison:
    """``error``: the largest difference of any rank over the largest value; bytes: of all ranks."""

    error: float
    same_bits: bool
    sent_bytes: int
    latent_bytes: int
    kinds: set[str]
    ops: set[str]
    fallbacks: list[str]


def watched(run: Run, pipe: Any, **options: Any) -> Picture:
    """The pipeline's call on this rank."""
    own = distpatch.parallelize_pipeline(pipe, **options)
    marks = {}
    with distpatch.trace() as t:

        def denoised(*_: Any) -> None:
            marks["denoised"] = len(t.records)

        def decoding(module: Any, args: Any) -> None:
            marks.setdefault("decoding", len(t.records))
            marks.setdefault("latents", args[0].numel() * args[0].element_size())

        for name in own.denoisers:
            forward = getattr(own, name).forward
            getattr(own, name).forward = lambda *a, forward=forward, **k: (forward(*a, **k), denoised())[0]
        own.vae.decoder.register_forward_pre_hook(decoding)
        picture = run(own)
    between = t.records[marks["denoised"] : marks["decoding"]]
    sent = sum(record.sent_bytes for record in between)
    kinds, ops = {record.kind for record in between}, {record.op for record in between}
    return Picture(picture, t, kinds, ops, sent, marks["latents"])


def compare(name: str, worlds: list[int], timeout: float = 60, **options: Any) -> dict[int, Comparison]:
    """By number of ranks."""
    run = ALL_PIPELINES[name]
    pipe = run.build()
    expected = run(copy.deepcopy(pipe))
    assert expected.isfinite().all() and expected.std() > 1e-3, f"{name}: a picture that shows nothing"
    found = {}
    for world in worlds:
        ranks = run_ranks(world, lambda rank: watched(run, copy.deepcopy(pipe), **options), timeout=timeout)
        largest = max(float((rank.picture - expected).abs().max()) for rank in ranks)
        found[world] = Comparison(
            error=largest / float(expected.abs().max()),
            same_bits=all(torch.equal(rank.picture, ranks[0].picture) for rank in ranks),
            sent_bytes=sum(rank.sent_bytes for rank in ranks),
            latent_bytes=ranks[0].latent_bytes,
            kinds=set().union(*(rank.kinds for rank in ranks)),
            ops=set().union(*(rank.ops for rank in ranks)),
            fallbacks=[fallback.op for rank in ranks for fallback in rank.whole.fallbacks],
        )
    return found
