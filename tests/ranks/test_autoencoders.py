"""Every autoencoder of diffusers, converted as it is: no adapter, no fallback, the results of one device.

All heights on 2, 3 and 4 ranks: ``make autoencoders``. Here are the odd ones and those of fewer rows than ranks.
"""

from __future__ import annotations

import pytest
import torch

from tests import oracle
from tests.autoencoder_runs import compare
from tests.autoencoders import AUTOENCODERS, spatial_classes

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
    result = compare(name, [(call, rows) for rows in heights(name, call)], world=2 if call == "forward" else 3)
    assert result.fallbacks == 0
    assert result.error <= TOLERANCE[AUTOENCODERS[name].dtype]
    oracle.compared += result.runs
