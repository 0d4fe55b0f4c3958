"""Multi-GPU distributed patch convolution for PyTorch.

>>> vae = distpatch.convert_model(vae, torch.distributed.group.WORLD)

runs a convolutional model on all ranks of a group: activations are sharded along height, halo rows move
point to point, and the result is the one of a single device, to rounding.
"""

from distpatch.calibrate import calibrate
from distpatch.convert import convert_model
from distpatch.costs import Device, Link
from distpatch.displaced import displaced, synchronize
from distpatch.errors import DistPatchError, LayoutError, RankError, UnsupportedOpError
from distpatch.group import warmup
from distpatch.guidance import guidance_mesh, split_guidance
from distpatch.layout import RowLayout
from distpatch.patched import (
    PatchConv2d,
    patch_conv1d,
    patch_conv2d,
    patch_conv3d,
    patch_conv_transpose1d,
    patch_conv_transpose2d,
    patch_conv_transpose3d,
)
from distpatch.pipeline import parallelize_pipeline
from distpatch.planner import plan, smallest_plan
from distpatch.plans import Plan
from distpatch.restore import restore_model
from distpatch.rules.own import register_pointwise
from distpatch.rules.registry import register_rule
from distpatch.save import save_image, save_video, to_memmap
from distpatch.scaling import Scaling, scaling
from distpatch.selftest import SelfTest, self_test
from distpatch.tensor import PatchTensor, gather, shard
from distpatch.trace import Trace, trace

__version__ = "0.1.0"

__all__ = [
    "Device",
    "DistPatchError",
    "LayoutError",
    "Link",
    "PatchConv2d",
    "PatchTensor",
    "Plan",
    "RankError",
    "RowLayout",
    "Scaling",
    "SelfTest",
    "Trace",
    "UnsupportedOpError",
    "calibrate",
    "convert_model",
    "displaced",
    "gather",
    "guidance_mesh",
    "parallelize_pipeline",
    "patch_conv1d",
    "patch_conv2d",
    "patch_conv3d",
    "patch_conv_transpose1d",
    "patch_conv_transpose2d",
    "patch_conv_transpose3d",
    "plan",
    "register_pointwise",
    "register_rule",
    "restore_model",
    "save_image",
    "save_video",
    "scaling",
    "self_test",
    "shard",
    "smallest_plan",
    "split_guidance",
    "synchronize",
    "to_memmap",
    "trace",
    "warmup",
]
