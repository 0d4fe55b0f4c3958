"""Every spatial autoencoder of diffusers in a small config, with random weights, and inputs by height.

How they are run and compared stands in autoencoder_runs.py.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

from diffusers.models import autoencoders

from tests.support.zoo.autoencoder import Autoencoder
from tests.support.zoo.image_autoencoders import IMAGES
from tests.support.zoo.video_autoencoders import VIDEOS

# Of diffusers.models.autoencoders, what has no image rows: sound, and the coordinates of proteins.
NOT_SPATIAL = {
    *("AutoencoderKLKVAEAudio", "AutoencoderKLLTX2Audio", "AutoencoderKLMiniMaxH3Audio", "AutoencoderOobleck"),
    *("AutoencoderSAME", "Cosmos3AVAEAudioTokenizer", "LongCatAudioDiTVae", "MMAudioVAE", "MMAudioVocoder"),
    *("MiniMaxMusic3Vocoder", "RFD4ProteinaAutoencoder"),
}
AUTOENCODERS: dict[str, Autoencoder] = {**IMAGES, **VIDEOS}


def spatial_classes() -> Iterator[str]:
    for name, cls in vars(autoencoders).items():
        if inspect.isclass(cls) and name not in NOT_SPATIAL:
            yield name
