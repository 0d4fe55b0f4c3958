"""Imported before diffusers: names the operators of a torchvision whose binary does not load.

A peer's environment may hold the torch of a CPU and the torchvision of a GPU. Nothing here calls its operators, but
its import fails where they are not even named, and that of diffusers and timm with it.
"""

from __future__ import annotations

import importlib.util

import torch

MISSING = ("nms", "qnms")
names = torch.library.Library("torchvision", "FRAGMENT")

if importlib.util.find_spec("torchvision") is not None:
    try:
        import torchvision
    except RuntimeError:
        for name in MISSING:
            names.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision
    assert torchvision
