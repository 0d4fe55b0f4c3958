"""What the plug-ins of servers meet: vLLM-Omni 0.30 and SGLang 0.5.23, installed, or stand-ins written down from them.

``SERVERS`` names a folder into which both are installed without what they depend on (``make serving-check``); what is
missing of that is replaced by mocks.
"""

from __future__ import annotations

import enum
import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any, ClassVar
from unittest.mock import MagicMock

import torch
import torch.distributed as dist
from diffusers import AutoencoderKL, AutoencoderKLWan
from torch import Tensor, nn

SERVERS = os.environ.get("SERVERS", "")
OMNI = "vllm_omni.diffusion.distributed"
SGLANG = "sglang.multimodal_gen"
LOADER = f"{SGLANG}.runtime.loader.component_loaders.vae_loader"
STATE = f"{SGLANG}.runtime.distributed.parallel_state"


def vllm_omni() -> None:
    """Put its modules in place, once a process."""
    if f"{OMNI}.autoencoders" in sys.modules:
        return
    if SERVERS:
        _installed("vllm_omni", "diffusion diffusion/distributed diffusion/distributed/autoencoders")
        sys.meta_path.append(_Mocks("vllm omegaconf aenum janus cache_dit pynvml vllm_omni.platforms".split()))
        _module(f"{OMNI}.parallel_state", get_world_group=lambda: types.SimpleNamespace(device_group=dist.group.WORLD))
        return
    _module(f"{OMNI}.autoencoders.distributed_vae_executor", DistributedVaeMixin=Mixin)
    _module(f"{OMNI}.autoencoders.autoencoder_kl", DistributedAutoencoderKL=KL)
    _module(f"{OMNI}.autoencoders.autoencoder_kl_wan", DistributedAutoencoderKLWan=Wan)


def sglang() -> None:
    """Put its modules in place, and a loader that returns what a test gives it."""
    if SGLANG not in sys.modules:
        if SERVERS:
            _installed("sglang", "multimodal_gen srt")
            sys.meta_path.append(
                _Mocks(
                    "sgl_kernel flashinfer fastapi uvicorn av remote_pdb outlines xgrammar cache_dit IPython starlette "
                    "torchvision sentencepiece compressed_tensors gguf imageio_ffmpeg interegular llguidance openai tiktoken tvm_ffi".split()
                )
            )
        else:
            _module(f"{SGLANG}.runtime.platforms.plugins", HookRegistry=Hooks, HookType=HookType)
            _module(f"{SGLANG}.configs.models.vaes.base", should_use_spatial_shard_parallel_decode=lambda *_: True)
            _module(LOADER, VAELoader=type("VAELoader", (), {}))
            _module(STATE)
            _module(f"{SGLANG}.runtime.distributed", get_decode_parallel_group_coordinator=lambda: _state()._VAE_DECODE)
    loader = importlib.import_module(LOADER).VAELoader
    loader.load = lambda self, path, args, component, *_: (args, 0.0)


def sglang_models() -> Iterator[Any]:
    """What its loader may return, with random weights: Wan and FLUX as SGLang has them, where it is installed."""
    torch.manual_seed(0)
    yield SglangVAE()
    if SERVERS:
        configs, vaes = f"{SGLANG}.configs.models.vaes", f"{SGLANG}.runtime.models.vaes"
        wan = importlib.import_module(f"{configs}.wanvae")
        small = {"base_dim": 8, "z_dim": 4, "dim_mult": (1, 2), "num_res_blocks": 1, "temperal_downsample": (True,)}
        latent = {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4}
        sizes = {"scale_factor_temporal": 2, "scale_factor_spatial": 2}
        config = wan.WanVAEConfig(arch_config=wan.WanVAEArchConfig(**small, **latent, **sizes), load_encoder=False)
        yield importlib.import_module(f"{vaes}.wanvae").AutoencoderKLWan(config)


def decode_on(group: Any) -> None:
    """Have SGLang decode on these ranks."""
    _state()._VAE_DECODE = types.SimpleNamespace(
        device_group=group, world_size=group.size(), rank_in_group=group.rank()
    )


def _state() -> Any:
    return importlib.import_module(STATE)


def _module(name: str, **names: Any) -> None:
    """A module of these names, and the packages around it."""
    module = types.ModuleType(name)
    module.__dict__.update(names)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    while parent:
        if parent not in sys.modules:
            sys.modules[parent] = types.ModuleType(parent)
            sys.modules[parent].__path__ = []
        setattr(sys.modules[parent], last, sys.modules[name])
        name = parent
        parent, _, last = name.rpartition(".")


def _installed(package: str, subpackages: str) -> None:
    """Packages whose ``__init__`` is left out: they import a whole server."""
    sys.path.insert(0, SERVERS)
    for name in ("", *subpackages.split()):
        _module(".".join([package, *name.split("/")]).rstrip("."))
        sys.modules[".".join([package, *name.split("/")]).rstrip(".")].__path__ = [f"{SERVERS}/{package}/{name}"]


class _Mocks(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of these packages, where nothing else has them: every name is a class or a mock."""

    def __init__(self, packages: list[str]) -> None:
        self.packages = packages

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if any(name == package or name.startswith(f"{package}.") for package in self.packages):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Mocked(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__path__ = []


class _Mocked(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        value = (
            _AnyClass(name, (), {"__init_subclass__": classmethod(lambda cls, **_: None)})
            if name[0].isupper()
            else MagicMock()
        )
        setattr(self, name, value)
        return value


class _AnyClass(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock()


class Executor:
    """As ``DistributedVaeExecutor``, which cuts a picture into tiles for its ranks."""

    def __init__(self) -> None:
        self.group = dist.group.WORLD
        self.world_size, self.rank = dist.get_world_size(self.group), dist.get_rank(self.group)
        self.parallel_size, self.parallel_mode = 1, "tile"

    def set_parallel_size(self, parallel_size: int, mode: str = "tile") -> None:
        self.parallel_size, self.parallel_mode = parallel_size, mode

    def execute(self, *_: Any, **__: Any) -> Any:
        raise AssertionError("cut into tiles")


class Mixin:
    """As ``DistributedVaeMixin``."""

    def init_distributed(self) -> None:
        self.distributed_executor = Executor()

    def set_parallel_size(self, parallel_size: int, mode: str = "tile") -> None:
        self.distributed_executor.set_parallel_size(parallel_size, mode=mode)

    def is_distributed_enabled(self) -> bool:
        return self.distributed_executor.parallel_size > 1 and dist.is_initialized() and bool(self.use_tiling)


class KL(Mixin, AutoencoderKL):
    """As ``DistributedAutoencoderKL``."""

    def decode(self, z: Tensor, return_dict: bool = True, *args: Any, **kwargs: Any) -> Any:
        if not self.is_distributed_enabled():
            return super().decode(z, return_dict=return_dict, *args, **kwargs)  # noqa: B026 - as there
        return self.distributed_executor.execute(z)


class Wan(Mixin, AutoencoderKLWan):
    """As ``DistributedAutoencoderKLWan``."""

    chunk_value_range: ClassVar = (-1.0, 1.0)

    def tiled_decode(self, z: Tensor, return_dict: bool = True) -> Any:
        return self.distributed_executor.execute(z)

    def decode_with_chunks(self, z: Tensor, *, on_chunk: Callable[[Tensor], None]) -> None:
        self.distributed_executor.execute(z)


class HookType(enum.Enum):
    AFTER = "after"
    REPLACE = "replace"


class Hooks:
    """As ``HookRegistry``: hooks on functions and methods by their dotted names, applied when all are known."""

    hooks: ClassVar[list[tuple[str, Callable[..., Any], HookType]]] = []

    @classmethod
    def register(cls, target: str, hook: Callable[..., Any], hook_type: HookType = HookType.AFTER) -> None:
        cls.hooks.append((target, hook, hook_type))

    @classmethod
    def apply_hooks(cls) -> None:
        while cls.hooks:
            target, hook, kind = cls.hooks.pop()
            module, *names = target.split(".")
            owner = sys.modules[module]
            for name in names[:-1]:
                owner = getattr(owner, name)
            setattr(owner, names[-1], hook if kind is HookType.REPLACE else cls._after(getattr(owner, names[-1]), hook))

    @staticmethod
    def _after(function: Callable[..., Any], hook: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*args: Any, **kwargs: Any) -> Any:
            result = function(*args, **kwargs)
            changed = hook(result, *args, **kwargs)
            return result if changed is None else changed

        return hooked


class SglangVAE(nn.Module):
    """As SGLang's ``ParallelTiledVAE``: tensors in, tensors out, frames to ``on_frames`` as they are finished."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv3d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv3d(8, 3, 3, padding=1))
        self.use_tiling = self.use_parallel_decode = True

    def decode(self, z: Tensor, on_frames: Callable[[Tensor], None] | None = None) -> Tensor:
        if self.use_tiling:
            raise AssertionError("cut into tiles")
        frames: Tensor = self.body(z)
        for one in frames.split(1, 2) if on_frames is not None else ():
            on_frames(one)
        return frames
