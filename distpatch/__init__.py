"""Multi-GPU distributed patch convolution for PyTorch.

>>> vae = distpatch.convert_model(vae, torch.distributed.group.WORLD)

runs a convolutional model on all ranks of a group: activations are sharded along height, halo rows move
point to point, and the result is the one of a single device, to rounding.
"""

from distpatch.convert import convert_model, restore_model
from distpatch.errors import DistPatchError, LayoutError, RankError, UnsupportedOpError
from distpatch.group import warmup
from distpatch.layout import RowLayout
from distpatch.rules.own import register_pointwise
from distpatch.rules.registry import register_rule
from distpatch.save import save_image, save_video, to_memmap
from distpatch.selftest import SelfTest, self_test
from distpatch.tensor import PatchTensor, gather, shard
from distpatch.trace import Trace, trace

__version__ = "0.1.0"

__all__ = [
    "DistPatchError",
    "LayoutError",
    "PatchTensor",
    "RankError",
    "RowLayout",
    "SelfTest",
    "Trace",
    "UnsupportedOpError",
    "convert_model",
    "gather",
    "register_pointwise",
    "register_rule",
    "restore_model",
    "save_image",
    "save_video",
    "self_test",
    "shard",
    "to_memmap",
    "trace",
    "warmup",
]
