"""A plug-in of SGLang's diffusion server: autoencoders sharded by rows, without its tiles or its own sharded layers.

``pyproject.toml`` names ``register`` in the entry-point group ``sglang.multimodal_gen.plugins``; SGLang calls it in
each of its processes. Its interface is that of SGLang 0.5.23.
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from torch.distributed import ProcessGroup

from distpatch.serving.calls import SetAside, ShardedCalls, is_asked_for

LOADER = "sglang.multimodal_gen.runtime.loader.component_loaders.vae_loader.VAELoader.load"
OWN_LAYERS = "sglang.multimodal_gen.configs.models.vaes.base.should_use_spatial_shard_parallel_decode"
COMPONENTS = ("vae", "video_vae")

logger = logging.getLogger(__name__)


def register() -> None:
    """Have SGLang's autoencoders sharded as they are loaded; nothing without DISTPATCH_SERVING=1."""
    if not is_asked_for():
        return
    from sglang.multimodal_gen.runtime.platforms.plugins import HookRegistry, HookType

    HookRegistry.register(OWN_LAYERS, _never, HookType.REPLACE)
    HookRegistry.register(LOADER, _loaded, HookType.AFTER)


def _never(*_: Any, **__: Any) -> bool:
    """Whether a model gets layers that exchange rows themselves: it keeps those of one device."""
    return False


def _loaded(result: tuple[Any, float], loader: Any, path: str, args: Any, component: str, *_: Any, **__: Any) -> None:
    """After a component was loaded: the calls of an autoencoder of pictures or videos are sharded."""
    vae = result[0]
    if component not in COMPONENTS or not isinstance(vae, nn.Module):
        return
    aside = [SetAside(vae, "use_tiling", False)] if hasattr(vae, "use_tiling") else []
    ShardedCalls(vae, _decoding_ranks, -2, aside)
    logger.info("distpatch: %s (%s) is sharded by rows over the ranks that decode", component, type(vae).__name__)


def _decoding_ranks() -> ProcessGroup | None:
    from sglang.multimodal_gen.runtime.distributed import get_decode_parallel_group_coordinator

    group: ProcessGroup = get_decode_parallel_group_coordinator().device_group
    return group if group.size() > 1 else None
