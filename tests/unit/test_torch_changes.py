"""What distpatch replaces in torch, and when: in processes of their own, in which nothing was imported before."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

HELD = '''
import sys
import torch
from torch.nn.attention import flex_attention as module
from torch.nn.attention.flex_attention import flex_attention

def held():
    """What is replaced, under every name that this process has for it."""
    return {
        "apply": torch.autograd.Function.apply,
        "inherited": torch.autograd.Function.__dict__.get("apply"),
        "flex": module.flex_attention,
        "by name": flex_attention,
        "backward": torch.autograd._engine_run_backward,
        "function": torch.jit.ScriptFunction.__call__,
        "method": torch._C.ScriptMethod.__call__,
    }

def changed():
    return {name for name, value in held().items() if value != before[name]}

before = held()
everything = {"apply", "inherited", "flex", "by name", "backward", "function", "method"}
import distpatch
import distpatch.rules
assert not changed(), changed()
x = torch.ones(1, 2, 4, 4)
'''


def run(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "what",
    [
        "distpatch.convert_model(torch.nn.Conv2d(2, 2, 1))",
        "y = distpatch.shard(x, None)",
        "y = distpatch.PatchTensor.from_local(x, None, bounds=(0, 4))",
        "distpatch.patch_conv2d(x, torch.ones(2, 2, 1, 1), splits=2)",
    ],
)
def test_from_the_first_sharded_tensor_on(what: str) -> None:
    run(
        f"{HELD}{what}\nassert changed() == everything, changed()\ny = None\ndistpatch.restore_torch()\nassert not changed(), changed()"
    )


def test_a_function_that_was_imported_by_name() -> None:
    """Its module is the program itself; the rule runs, on rows."""
    run(
        HELD
        + """
q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
right = flex_attention(q, k, v)
rows = distpatch.shard(q, None)
with distpatch.trace() as seen:
    result = flex_attention(rows, k, v)
assert type(result) is distpatch.PatchTensor and not seen.fallbacks, seen.fallbacks
torch.testing.assert_close(distpatch.gather(result), right)
"""
    )


def test_apply_that_was_taken_before() -> None:
    """Wherever it is held, the gradient of a sharded argument is there."""
    run(
        """
import functools
import torch

class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad

class Holder:
    of_class = Twice.apply
    static = staticmethod(Twice.apply)

    def __init__(self):
        self.twice = Twice.apply

def closed_over(f):
    return lambda x: f(x)

def by_default(x, f=Twice.apply):
    return f(x)

twice, holder, listed, named, closure = Twice.apply, Holder(), [Twice.apply], {"twice": Twice.apply}, closed_over(Twice.apply)
fixed, partial = (Twice.apply,), functools.partial(Twice.apply)
"""
        + HELD.replace("before", "as_it_was")
        + """
for restored in (False, True):
    y = distpatch.shard(x, None)
    held = holder.twice, holder.of_class, holder.static, listed[0], named["twice"], closure, by_default, fixed[0], partial
    for f in (twice, *held, Twice.apply):
        leaf = x.clone().requires_grad_()
        distpatch.gather(f(distpatch.shard(leaf, None))).sum().backward()
        assert leaf.grad is not None and leaf.grad.eq(2).all(), f
    del f, y, held
    distpatch.restore_torch()
    assert twice == holder.twice == listed[0] == named["twice"] == Twice.apply
"""
    )


def test_apply_that_cannot_be_replaced() -> None:
    """It is told, by the name of the class."""
    run(
        """
import warnings, torch, distpatch

class Twice(torch.autograd.Function):
    pass

class Thrice(torch.autograd.Function):
    pass

def local():
    taken, also = Thrice.apply, Twice.apply
    with warnings.catch_warnings(record=True) as caught:
        distpatch.shard(torch.ones(1, 2, 4, 4), None)
    return [str(warning.message) for warning in caught]

(message,) = local()
assert message.startswith("Thrice.apply, Twice.apply was taken"), message
"""
    )


def test_sharded_tensors_keep_the_changes() -> None:
    """They would meet torch's own functions; what is sharded later brings the changes back."""
    run(
        HELD
        + """
y = distpatch.shard(x, None)
try:
    distpatch.restore_torch()
except distpatch.DistPatchError as error:
    assert "(1, 2, 4, 4)" in str(error)
else:
    raise AssertionError("restored")
assert changed() == everything
del y
distpatch.restore_torch()
assert not changed()
model = distpatch.convert_model(torch.nn.Conv2d(2, 2, 1))
distpatch.restore_torch()
model(x).sum().backward()
assert changed() == everything
"""
    )


def test_what_somebody_else_has_replaced() -> None:
    """Before: it is called. After: it stays."""
    run(
        HELD
        + """
calls = []
def other(*args, **kwargs):
    calls.append(1)
    return before["flex"](*args, **kwargs)
module.flex_attention = other
y = distpatch.shard(x, None)
assert module.flex_attention is not other
module.flex_attention(x, x, x)
assert calls == [1]
del y
distpatch.restore_torch()
assert module.flex_attention is other
y = distpatch.shard(x, None)
last = module.flex_attention = lambda *args: None
del y
distpatch.restore_torch()
assert module.flex_attention is last
"""
    )


def test_the_page() -> None:
    text = (Path(__file__).parents[2] / "docs" / "torch-changes.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    run(code)
