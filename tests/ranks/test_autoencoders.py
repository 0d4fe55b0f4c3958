"""Every autoencoder of diffusers, converted as it is: no adapter, no fallback, the results of one device.

All heights on 2, 3 and 4 ranks: ``make autoencoders``. Here are the odd ones and those of fewer rows than ranks.
"""

from __future__ import annotations

import re

import pytest
import torch

from tests.support import oracle
from tests.support.mesh_cases import everything
from tests.support.threads import rank_outcomes
from tests.support.zoo.autoencoder_runs import compare, is_accepted, result_of
from tests.support.zoo.autoencoders import AUTOENCODERS, spatial_classes
from tests.support.zoo.models import on_ranks

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
CALLS = [(name, call) for name, entry in AUTOENCODERS.items() for call in entry.calls]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # of diffusers and of flex_attention without compiler


def heights(name: str, call: str) -> tuple[int, ...]:
    """An odd number of latent rows, and as few as the model takes."""
    entry = AUTOENCODERS[name]
    if call == "decode" or entry.scale == 1:
        return {"AutoencoderRAE": (4, 1), "LTX2VideoDiffusionDecoderModel": (3,)}.get(name, (5, 2))
    return (3 * entry.scale, (3 if name == "AutoencoderKLMiniMaxH3" else 2) * entry.scale)


def test_no_class_is_forgotten() -> None:
    assert set(spatial_classes()) == {entry.cls for entry in AUTOENCODERS.values()}


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_as_on_one_device(name: str, call: str) -> None:
    cases = [(call, rows) for rows in heights(name, call)]
    result = compare(name, cases[:1], world=2) if call == "forward" else compare(name, cases, world=3)
    assert result.fallbacks == 0
    assert result.error <= TOLERANCE[AUTOENCODERS[name].dtype]
    oracle.compared += result.runs


@pytest.mark.skipif(not everything.on, reason="nets on meshes run with --meshes")
@pytest.mark.parametrize(("name", "call"), CALLS)
def test_on_a_mesh(name: str, call: str) -> None:
    result = compare(name, [(call, heights(name, call)[0])], world=4, mesh=(2, 2))
    assert result.error <= TOLERANCE[AUTOENCODERS[name].dtype]
    assert not result.fallbacks
    oracle.compared += result.runs


REFUSED = [
    ("AutoencoderKL", "encode", 5, "conv2d: an input of shape .* is smaller than the kernel"),
    ("AutoencoderDC", "encode", 5, "pixel_unshuffle makes one of each 2"),
    ("AutoencoderKLHunyuanVideo15", "encode", 6, "is invalid for input of size"),
    ("AutoencoderKLCosmos", "encode", 28, "broadcast"),
    ("AutoencoderKLLTX2Video", "decode", 1, "pad of .* rows in mode 'reflect' is too large for 1 rows"),
    ("AutoencoderKLWan 2.2", "encode", 17, "must be divisible by patch_size"),
]


@pytest.mark.parametrize(("name", "call", "rows", "message"), REFUSED)
def test_heights_that_the_model_refuses(name: str, call: str, rows: int, message: str) -> None:
    """The same error on every rank, at once."""
    assert not is_accepted(name, call, rows)
    model = AUTOENCODERS[name].build()
    for error in rank_outcomes(3, on_ranks(model, lambda converted, rank: result_of(converted, name, call, rows))):
        assert isinstance(error, (RuntimeError, ValueError))
        assert re.search(message, str(error)), error
