"""Multi-GPU distributed patch convolution for PyTorch.

>>> vae = distpatch.convert_model(vae, torch.distributed.group.WORLD)

runs a convolutional model on all ranks of a group: activations are sharded along height, halo rows move
point to point, and the result is the one of a single device, to rounding.
"""

from distpatch.comm.communicator import warmup
from distpatch.comm.self_test import SelfTest, self_test
from distpatch.diffusion.displaced import POLICIES as DISPLACED_POLICIES
from distpatch.diffusion.displaced import displaced, synchronize
from distpatch.diffusion.guidance import guidance_mesh, split_guidance
from distpatch.diffusion.pipeline import enable, parallelize_pipeline
from distpatch.diffusion.video_stream import VideoStream
from distpatch.errors import DistPatchError, LayoutError, RankError, UnsupportedOpError
from distpatch.layout.mesh_shapes import MeshChoice, choose_mesh
from distpatch.layout.rows import RowLayout
from distpatch.local.group import LocalGroup, local_group
from distpatch.model.convert import convert_model
from distpatch.model.patch_conv_layers import (
    PatchConv2d,
    patch_conv1d,
    patch_conv2d,
    patch_conv3d,
    patch_conv_transpose1d,
    patch_conv_transpose2d,
    patch_conv_transpose3d,
)
from distpatch.model.restore import restore_model, restore_torch
from distpatch.planning.calibrate import calibrate
from distpatch.planning.fake_run import plan, smallest_plan
from distpatch.planning.hardware import Device, Link
from distpatch.planning.report import Plan
from distpatch.planning.scaling import Scaling, scaling
from distpatch.profiling.live_memory import LivePeak
from distpatch.profiling.trace import Trace, trace
from distpatch.read import LocalRows, ShardedDataset, read_shard
from distpatch.rules.core.registry import register_rule
from distpatch.rules.elementwise.register_pointwise import register_pointwise
from distpatch.save import save_image, save_video, to_memmap
from distpatch.tensor.patch_tensor import PatchTensor, gather, shard

__version__ = "0.1.0"

__all__ = [
    "DISPLACED_POLICIES",
    "Device",
    "DistPatchError",
    "LayoutError",
    "Link",
    "LivePeak",
    "LocalGroup",
    "LocalRows",
    "MeshChoice",
    "PatchConv2d",
    "PatchTensor",
    "Plan",
    "RankError",
    "RowLayout",
    "Scaling",
    "SelfTest",
    "ShardedDataset",
    "Trace",
    "UnsupportedOpError",
    "VideoStream",
    "calibrate",
    "choose_mesh",
    "convert_model",
    "displaced",
    "enable",
    "gather",
    "guidance_mesh",
    "local_group",
    "parallelize_pipeline",
    "patch_conv1d",
    "patch_conv2d",
    "patch_conv3d",
    "patch_conv_transpose1d",
    "patch_conv_transpose2d",
    "patch_conv_transpose3d",
    "plan",
    "read_shard",
    "register_pointwise",
    "register_rule",
    "restore_model",
    "restore_torch",
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
