"""Models of diffusers that the commands load: a folder, or the id of one on the hub."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import nn

ID = re.compile(r"[\w.-]+/[\w.-]+")  # of the hub: owner/name


@dataclass(frozen=True)
class Located:
    """The class of a model of diffusers, and where its files are: ``source`` is a folder or an id."""

    found: type[Any]
    source: str
    subfolder: str | None
    on_hub: bool

    def with_weights(self, dtype: torch.dtype) -> nn.Module:
        """Ready to run. Of the hub safetensors are taken and nothing else."""
        where = {"use_safetensors": True} if self.on_hub else {"local_files_only": True}
        try:
            model: nn.Module = self.found.from_pretrained(
                self.source, subfolder=self.subfolder, torch_dtype=dtype, **where
            )
        except (OSError, ValueError, RuntimeError) as error:
            raise typer.BadParameter(f"{self}: cannot load a {self.found.__name__}: {one_line(error)}") from error
        return model.eval().requires_grad_(False)

    def build(self, dtype: torch.dtype) -> nn.Module:
        """On the meta device, from its config: no weights are read."""
        with torch.device("meta"):
            model: nn.Module = self.found.from_config(self.found.load_config(self.source, subfolder=self.subfolder))
        return in_dtype(model.eval().requires_grad_(False), dtype)

    def __str__(self) -> str:
        return f"{self.source}/{self.subfolder}" if self.subfolder else self.source


def locate(model: Path) -> Located:
    """The model that a folder's config.json names, or its ``vae``'s; the same of an id on the hub.

    Raises ``typer.BadParameter`` where it is neither, or no model of the installed diffusers.
    """
    if model.is_dir():
        subfolder = None if (model / "config.json").is_file() else "vae"
        config = model / (subfolder or "") / "config.json"
        if not config.is_file():
            raise typer.BadParameter(f"{model}: no config.json in it or in its vae folder; save_pretrained writes one")
        return Located(_class_of(config), str(model), subfolder, on_hub=False)
    if not ID.fullmatch(str(model)):
        raise typer.BadParameter(f"{model}: there is no such folder")
    subfolder, path = _config_on_hub(str(model))
    return Located(_class_of(path), str(model), subfolder, on_hub=True)


def _config_on_hub(name: str) -> tuple[str | None, Path]:
    """Where the config of a model on the hub is, and its copy in the cache."""
    hub, errors = needed("huggingface_hub"), needed("huggingface_hub.errors")
    problem: Exception | None = None
    for subfolder in (None, "vae"):
        try:
            return subfolder, Path(hub.hf_hub_download(name, "config.json", subfolder=subfolder))
        except (errors.HfHubHTTPError, OSError, ValueError) as error:  # a file that is not cached is an OSError
            problem = error
    raise typer.BadParameter(
        f"{name}: there is no such folder, and no model of this name in the hub's cache or within reach: "
        f"{one_line(problem)} Without a network, give the folder that save_pretrained wrote"
    ) from problem


def _class_of(config: Path) -> type[Any]:
    try:
        name = json.loads(config.read_text()).get("_class_name")
    except ValueError as error:
        raise typer.BadParameter(f"{config}: not JSON: {error}") from error
    diffusers = needed("diffusers")
    found = getattr(diffusers, str(name), None)
    if not (isinstance(found, type) and issubclass(found, diffusers.ModelMixin)):
        raise typer.BadParameter(f"{config}: diffusers {diffusers.__version__} has no model {name!r} (_class_name)")
    return found


def in_dtype(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another dtype; diffusers' own ``to`` warns of weights to be kept in fp32, and there are none."""
    return nn.Module.to(model, dtype)


def factor_of(model: Any) -> int | None:
    """How many rows of a picture one row of its latents stands for; None where the model does not say."""
    config = getattr(model, "config", {})
    for name in ("spatial_compression_ratio", "scale_factor_spatial", "spatial_scale_factor"):
        value = config.get(name) or vars(model).get(name)
        if isinstance(value, int):
            return value
    blocks = next((config[name] for name in ("block_out_channels", "down_block_out_channels") if name in config), None)
    return None if blocks is None else 2 ** (len(blocks) - 1)


def one_line(error: BaseException | None) -> str:
    """What an error says, its line breaks as spaces."""
    return " ".join(str(error).split())


def needed(name: str) -> Any:
    """A library of the extra; raises ``typer.BadParameter`` that says how to get it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise typer.BadParameter(f"this needs {name.partition('.')[0]}: pip install 'distpatch[cli]'") from error
