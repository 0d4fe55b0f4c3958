"""Nets of pictures that the commands call: of transformers by folder or hub id, and programs in a file.

A program (``torch.export.save``, ``torch.jit.save``) is code, and runs as such: SECURITY.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor, nn

from distpatch.cli.models import ID, in_dtype, needed, one_line

EXPORTED, SCRIPTED = (".pt2",), (".pt", ".ts")


@dataclass(frozen=True)
class Net:
    """Where a net is, and the class of transformers that opens folders of its kind (``AutoModelFor...``)."""

    model: Path
    auto: str

    @property
    def is_program(self) -> bool:
        return self.model.suffix.lower() in (*EXPORTED, *SCRIPTED) and not self.model.is_dir()

    def with_weights(self, dtype: torch.dtype, device: torch.device) -> nn.Module:
        """Ready to run. Raises ``typer.BadParameter`` where it cannot be loaded."""
        if self.is_program:
            return _program(self.model, dtype, device)
        local = self._check_folder()
        where = {"local_files_only": True} if local else {"use_safetensors": True}
        transformers = needed("transformers")
        transformers.utils.logging.disable_progress_bar()  # one a rank
        try:
            model: nn.Module = getattr(transformers, self.auto).from_pretrained(
                str(self.model), dtype=dtype, trust_remote_code=False, **where
            )
        except (OSError, ValueError, RuntimeError, ImportError) as error:
            raise typer.BadParameter(f"{self.model}: no {self.auto} can be loaded: {one_line(error)}") from error
        return model.eval().requires_grad_(False)

    def build(self, dtype: torch.dtype) -> Callable[[], nn.Module] | None:
        """What makes it on the meta device, from its config; None for a program, whose file holds its weights."""
        if self.is_program:
            return None

        def built() -> nn.Module:
            self._check_folder()
            transformers = needed("transformers")
            try:
                config = transformers.AutoConfig.from_pretrained(str(self.model), trust_remote_code=False)
                with torch.device("meta"):
                    model: nn.Module = getattr(transformers, self.auto).from_config(config)
            except (OSError, ValueError, ImportError) as error:
                raise typer.BadParameter(f"{self.model}: no {self.auto} can be built: {one_line(error)}") from error
            return in_dtype(model.eval().requires_grad_(False), dtype)

        return built

    def values(self) -> dict[str, Any]:
        """How the model's preprocessor_config.json makes numbers of bytes; nothing where there is none."""
        if self.is_program:
            return {}
        self._check_folder()
        transformers = needed("transformers")
        try:
            found, _ = transformers.ImageProcessingMixin.get_image_processor_dict(str(self.model))
        except OSError:
            return {}
        return {name: found[name] for name in PREPARED if name in found}

    def _check_folder(self) -> bool:
        """Whether it is a folder, and not an id."""
        if not self.model.is_dir() and not ID.fullmatch(str(self.model)):
            raise typer.BadParameter(f"{self.model}: there is no such folder, and programs end in .pt2, .pt or .ts")
        return self.model.is_dir()


PREPARED = ("do_rescale", "rescale_factor", "do_normalize", "image_mean", "image_std", "do_flip_channel_order")


def prepared(pixels: Tensor, how: dict[str, Any]) -> Tensor:
    """Bytes (B, 3, H, W) as a net takes them: in [0, 1], or as ``how`` (``Net.values``) says."""
    if how.get("do_rescale", True):
        pixels = pixels * how.get("rescale_factor", 1 / 255)
    if how.get("do_normalize", False):
        mean, std = (torch.tensor(how[name], device=pixels.device).view(1, -1, 1, 1) for name in PREPARED[3:5])
        pixels = (pixels - mean) / std
    return pixels.flip(1) if how.get("do_flip_channel_order", False) else pixels


def _program(path: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    if not path.is_file():
        raise typer.BadParameter(f"{path}: there is no such file")
    if dtype != torch.float32:
        raise typer.BadParameter(f"{path}: a program computes in the dtype that it was saved with: leave out --dtype")
    try:
        if path.suffix.lower() in EXPORTED:
            from torch.export.passes import move_to_device_pass

            return move_to_device_pass(torch.export.load(path), device).module()
        program: nn.Module = torch.jit.load(path, map_location=device)
        return program.eval()
    except Exception as error:  # whatever torch raises for a broken file
        raise typer.BadParameter(f"{path}: cannot be loaded as a program: {one_line(error)}") from error
