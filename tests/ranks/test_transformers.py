"""Every diffusion transformer of diffusers, converted as it is: the results of one device, and of some the gradients.

On 2 and 3 ranks, all with their gradients: ``make transformers``. On 2 x 2, those of images and videos: ``--meshes``.
"""

from __future__ import annotations

import pytest
import torch

from tests.support import oracle
from tests.support.mesh_cases import everything
from tests.support.zoo.image_transformers import IMAGES
from tests.support.zoo.transformers_of_diffusers import TRANSFORMERS, classes, compare
from tests.support.zoo.video_transformers import VIDEOS

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
WITH_GRADIENTS = (
    "SD3Transformer2DModel",
    "HiDreamImageTransformer2DModel",
    "ZImageTransformer2DModel",
    "WanTransformer3DModel, image to video",
    "SkyReelsV2Transformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "QwenImageTransformer2DModel",
    "QwenImage21Transformer2DModel",
    "NucleusMoEImageTransformer2DModel, experts",
    "LTX2VideoTransformer3DModel",
    "MiniMaxH3Transformer3DModel",
)
OF_PICTURES = [name for name, entry in {**IMAGES, **VIDEOS}.items() if "shard" not in entry.options]
FORWARD_ALONE = {"AnyFlowFARTransformer3DModel", "Kandinsky6SRTransformer3DModel"}  # flex_attention on a CPU
GATHERED_ON_A_MESH = {  # tokens in order, by number or by mask
    "HiDreamImageTransformer2DModel": {"reshape", "add"},
    "HunyuanVideoTransformer3DModel, token replace": {"reshape"},
    "Kandinsky6SRTransformer3DModel": {"reshape"},
    "Lumina2Transformer2DModel": {"reshape"},
    "MochiTransformer3DModel": {"reshape"},
    "OmniGenTransformer2DModel": {"reshape"},
    "ZImageTransformer2DModel": {"repeat", "reshape"},
}
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")  # of diffusers


def test_no_class_is_forgotten() -> None:
    assert set(classes()) == {entry.cls for entry in TRANSFORMERS.values()}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_as_on_one_device(name: str) -> None:
    result = compare(name, world=3)
    assert result.error <= TOLERANCE[TRANSFORMERS[name].dtype]
    assert tuple(result.gathered) == TRANSFORMERS[name].gathered
    oracle.compared += 1


@pytest.mark.parametrize("name", WITH_GRADIENTS)
def test_gradients_of_one_device(name: str) -> None:
    result = compare(name, world=2, backward=True)
    assert max(result.error, result.gradient) <= TOLERANCE[TRANSFORMERS[name].dtype]
    oracle.compared += 1


@pytest.mark.skipif(not everything.on, reason="nets on meshes run with --meshes")
@pytest.mark.parametrize("name", OF_PICTURES)
def test_on_a_mesh(name: str) -> None:
    result = compare(name, world=4, mesh=(2, 2), backward=name not in FORWARD_ALONE)
    assert max(result.error, result.gradient) <= TOLERANCE[TRANSFORMERS[name].dtype]
    assert set(result.gathered) == GATHERED_ON_A_MESH.get(name, set())
    oracle.compared += 1
