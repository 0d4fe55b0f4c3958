"""``convert_model``: the model stays itself, on any kind of group, and can be restored."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import distpatch
from distpatch import DistPatchError, LayoutError
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import run_ranks
from tests.support.zoo.models import on_ranks, tiny_kl

SMALL = (8, 16)  # channels of a two-level autoencoder
Z = (1, 4, 7, 5)


def decoded(model: Any, shape: tuple[int, ...] = Z) -> Tensor:
    with torch.no_grad():
        return model.decode(random_tensor(shape)).sample


def test_the_model_stays_itself() -> None:
    model = tiny_kl(channels=SMALL)

    def facts(model: nn.Module) -> dict[str, Any]:
        return {
            "class": type(model),
            "modules": [(name, type(module), set(vars(module))) for name, module in model.named_modules() if name],
            "state": {name: tensor.data_ptr() for name, tensor in model.state_dict().items()},
            "parameters": [id(parameter) for parameter in model.parameters()],
            "config": model.config,
            "methods": {name: getattr(type(model), name) for name in ("forward", "encode", "decode")},
        }

    def body(rank: int) -> None:
        own = copy.deepcopy(model)
        before, attributes = facts(own), dict(vars(own))
        assert distpatch.convert_model(own, dist.group.WORLD) is own
        assert facts(own) == before
        assert own.decode.__name__ == "decode" and own.decode.__doc__ == type(own).decode.__doc__
        assert isinstance(own, type(model)) and not own.training
        decoded(own)
        assert facts(own) == before
        assert distpatch.restore_model(own) is own
        assert vars(own) == attributes and list(vars(own)) == list(attributes)
        assert_same(decoded(own), right, 0.0, "restored")

    right = decoded(model)
    run_ranks(2, body)


def test_state_dict_goes_in_and_out() -> None:
    """Weights loaded after the conversion are the ones that count, and saved under the same keys."""
    model, other = tiny_kl(channels=SMALL), tiny_kl(channels=SMALL)
    for parameter in other.parameters():
        nn.init.normal_(parameter, std=0.1)

    def body(model: Any, rank: int) -> Tensor:
        model.load_state_dict(other.state_dict())
        assert list(model.state_dict()) == list(other.state_dict())
        return decoded(model)

    for result in run_ranks(2, on_ranks(model, body)):
        assert_same(result, decoded(other), 1e-11, "image")


def test_hooks_are_called() -> None:
    """On submodules with the sharded activations; on the model around its conversion or inside it."""
    model, x = tiny_kl(channels=SMALL), random_tensor((1, 3, 14, 10))

    def body(model: Any, rank: int) -> list[str]:
        seen: list[str] = []
        conv = model.decoder.conv_in
        model.register_forward_pre_hook(lambda module, args: seen.append("before"))
        model.register_forward_hook(lambda module, args, out: seen.append("after"))
        conv.register_forward_pre_hook(lambda module, args: seen.append(f"conv_in {tuple(args[0].shape)}"))
        conv.register_forward_hook(lambda module, args, out: out * 0)
        out = model(x).sample
        assert out.shape == x.shape
        zeroed = model.decode(random_tensor(Z)).sample
        assert torch.equal(zeroed, model.decode(random_tensor(Z, seed=1)).sample), "the hook's result counts"
        return seen

    for seen in run_ranks(2, on_ranks(model, body)):
        assert seen[:3] == ["before", "conv_in (1, 4, 7, 5)", "after"]


def test_gradient_hooks_of_parameters() -> None:
    """Each parameter's hooks see the whole gradient once a backward."""
    model, z = tiny_kl(channels=SMALL), random_tensor(Z)

    def run(model: Any, rank: int = 0) -> dict[str, list[Tensor]]:
        seen: dict[str, list[Tensor]] = {}
        for name, parameter in model.decoder.named_parameters():
            parameter.register_post_accumulate_grad_hook(
                lambda p, name=name: seen.setdefault(name, []).append(p.grad.clone())
            )
        for _ in range(2):
            (model.decode(z).sample * random_tensor((1, 3, 14, 10), seed=2)).sum().backward()
        return seen

    results = run_ranks(2, on_ranks(model, run))
    for name, right in run(model).items():
        for result in results:
            assert len(result[name]) == len(right) == 2
            for value, wanted in zip(result[name], right, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-9, atol=1e-9)


def test_converted_twice() -> None:
    model = distpatch.convert_model(tiny_kl(channels=SMALL))
    with pytest.raises(distpatch.DistPatchError, match="converted already"):
        distpatch.convert_model(model)
    distpatch.restore_model(model)
    with pytest.raises(distpatch.DistPatchError, match="not converted"):
        distpatch.restore_model(model)


@pytest.mark.parametrize(
    "options", [{"splits": 0}, {"splits": "many"}, {"output": "all"}, {"fallback": "never"}, {"dim": "height"}], ids=str
)
def test_options_out_of_range(options: dict[str, Any]) -> None:
    model = tiny_kl(channels=SMALL)
    attributes = dict(vars(model))
    with pytest.raises(ValueError, match=next(iter(options))):
        distpatch.convert_model(model, **options)
    assert vars(model) == attributes
    with pytest.raises(TypeError, match="nn.Module"):
        distpatch.convert_model(model.decode)


class Nested(nn.Module):
    """Its forward calls its encode and decode, through ``self``."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 4, 3, 2, 1)
        self.up = nn.Conv2d(4, 3, 3, 1, 1)

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        assert not isinstance(x, nn.Parameter)
        return {"latents": self.down(x)}

    def decode(self, z: Tensor, *, scale: float = 2.0) -> tuple[Tensor, str]:
        return self.up(F.interpolate(z, scale_factor=scale)), "decoded"

    def forward(self, batch: dict[str, Any]) -> list[Any]:
        sharded = isinstance(batch["image"], distpatch.PatchTensor)
        latents = self.encode(batch["image"])["latents"]
        image, note = self.decode(latents, scale=2.0)
        return [image, note, batch["label"], sharded, isinstance(image, distpatch.PatchTensor)]


def test_copies_and_pickles_of_a_converted_model_are_refused() -> None:
    model = distpatch.convert_model(tiny_kl(channels=SMALL), splits=2)
    for duplicate in (copy.deepcopy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())):
        with pytest.raises(DistPatchError, match="can be neither copied"):
            duplicate(model)
    torch.save(model.state_dict(), io.BytesIO())
    copied = copy.deepcopy(distpatch.restore_model(model))
    assert_same(decoded(copied), decoded(model), 0.0, "copied")


def test_tiling_is_refused() -> None:
    model = tiny_kl(channels=SMALL)
    model.enable_tiling()
    with pytest.raises(LayoutError, match=r"AutoencoderKL is set to work in tiles.*disable_tiling\(\)"):
        distpatch.convert_model(model, splits=2)
    assert "forward" not in vars(model)
    model.disable_tiling()
    distpatch.convert_model(model, splits=2)
    model.enable_tiling()
    with pytest.raises(LayoutError, match="tiles"):
        decoded(model)
    distpatch.convert_model(distpatch.restore_model(model), splits=2, tiled=True)
    decoded(model)


def test_nested_calls_and_containers() -> None:
    """Entry points that call each other shard once; only what is image-like is sharded."""
    model = Nested().double()
    batch = {"image": random_tensor((1, 3, 9, 6)), "label": torch.tensor([3])}
    right = model(batch)[0].detach()

    def body(model: Any, rank: int) -> None:
        with distpatch.trace() as t:
            image, note, label, inside, still_inside = model(batch)
        assert (note, inside, still_inside) == ("decoded", True, True)
        assert label is batch["label"]
        assert type(image) is Tensor
        assert_same(image.detach(), right, 1e-12, "image")
        assert sum(record.op == "output" for record in t.records) == 1
        latents = model.encode(batch["image"])["latents"]
        assert type(latents) is Tensor
        again, _ = model.decode(latents, scale=2.0)
        assert_same(again.detach(), right, 1e-12, "image")

    run_ranks(3, on_ranks(model, body))


def test_a_subclass_instance_attribute_is_restored() -> None:
    """A forward that was set on the instance before is called, and is there again afterwards."""
    model = Nested().double()
    original = model.forward
    model.forward = lambda batch: [original(batch)[0] * 2]
    replaced = vars(model)["forward"]
    batch = {"image": random_tensor((1, 3, 8, 6)), "label": 0}
    right = model(batch)[0]
    distpatch.convert_model(model)
    assert_same(model(batch)[0].detach(), right.detach(), 1e-12, "image")
    distpatch.restore_model(model)
    assert vars(model)["forward"] is replaced


def test_output_stays_sharded() -> None:
    """``output="shard"``: rows stay where they are, and can go into the next converted model."""
    model = tiny_kl(channels=SMALL)
    x = random_tensor((1, 3, 18, 10))

    def body(model: Any, rank: int) -> tuple[Tensor, Tensor, int]:
        with torch.no_grad():
            latents = model.encode(x).latent_dist.mode()
            assert isinstance(latents, distpatch.PatchTensor)
            assert latents.shape == (1, 4, 9, 5)
            assert latents.group is dist.group.WORLD
            with distpatch.trace() as t:
                image = model.decode(latents).sample
            assert isinstance(image, distpatch.PatchTensor)
        assert "output" not in {record.op for record in t.records}
        return distpatch.gather(latents), distpatch.gather({"image": [image]})["image"][0], len(image.local[0, 0])

    with torch.no_grad():
        right_latents = model.encode(x).latent_dist.mode()
        right_image = model.decode(right_latents).sample
    results = run_ranks(3, on_ranks(model, body, output="shard"))
    assert [rows for _, _, rows in results] == [6, 6, 6]
    for latents, image, _ in results:
        assert_same(latents, right_latents, 1e-11, "latents")
        assert_same(image, right_image, 1e-11, "image")


def test_output_on_rank_0_only() -> None:
    model = tiny_kl(channels=SMALL)

    def body(model: Any, rank: int) -> Tensor | None:
        return model.decode(random_tensor(Z)).sample

    first, *others = run_ranks(3, on_ranks(model, body, output="rank0"))
    assert others == [None, None]
    assert_same(first, decoded(model), 1e-11, "image")
    assert not first.requires_grad, "its backward would wait for ranks that have nothing to call it on"


# Groups of any kind: bodies that return this rank's group for the model, or None for a non-member.
def subgroup(*ranks: int) -> Callable[[int], Any]:
    def make(rank: int) -> Any:
        group = dist.new_group(list(ranks))
        return group if rank in ranks else None

    return make


def mesh_axis(rank: int) -> Any:
    mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("data", "rows"))
    return mesh["rows"]


def knows_more_groups(rank: int) -> Any:
    for _ in range(rank):
        dist.new_group([rank], use_local_synchronization=True)
    return dist.group.WORLD


GROUPS: dict[str, Callable[[int], Any]] = {
    "ranks 1 and 3": subgroup(1, 3),
    "ranks 3, 2 and 0": subgroup(3, 2, 0),
    "rank 2 alone": subgroup(2),
    "1-D mesh": lambda rank: DeviceMesh("cpu", torch.arange(4)),
    "axis of a 2-D mesh": mesh_axis,
    "ranks that know different numbers of groups": knows_more_groups,
}


@pytest.mark.parametrize("make", GROUPS.values(), ids=GROUPS)
def test_groups(make: Callable[[int], Any]) -> None:
    """The group's ranks share the work; a collective of the user's own in between is not disturbed."""
    model = tiny_kl(channels=SMALL)
    right = decoded(model)

    def body(rank: int) -> Tensor | None:
        group = make(rank)
        if group is None:
            return None
        own = distpatch.convert_model(copy.deepcopy(model), group, fallback="error")
        result = decoded(own)
        numbers = torch.tensor([1.0])
        dist.all_reduce(numbers, group=group.get_group() if isinstance(group, DeviceMesh) else group)
        assert_same(decoded(own), result, 0.0, "second call")
        return result

    results = [result for result in run_ranks(4, body) if result is not None]
    assert results
    for result in results:
        assert_same(result, right, 1e-11, "image")


def test_two_groups_at_once() -> None:
    """Ranks 0, 1 and ranks 2, 3 run different pictures side by side."""
    model = tiny_kl(channels=SMALL)

    def body(rank: int) -> Tensor:
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        own = distpatch.convert_model(copy.deepcopy(model), groups[rank // 2], fallback="error")
        with torch.no_grad():
            return own.decode(random_tensor(Z, seed=rank // 2)).sample

    results = run_ranks(4, body)
    with torch.no_grad():
        for rank, result in enumerate(results):
            right = model.decode(random_tensor(Z, seed=rank // 2)).sample
            assert_same(result, right, 1e-11, f"image of rank {rank}")


def test_two_models_share_a_group() -> None:
    """And are called in turn, each with its own options."""
    first, second = tiny_kl(channels=SMALL), Nested().double()
    batch = {"image": random_tensor((1, 3, 8, 6)), "label": 0}

    def body(rank: int) -> tuple[Tensor, Tensor, Tensor]:
        a = distpatch.convert_model(copy.deepcopy(first), dist.group.WORLD)
        b = distpatch.convert_model(copy.deepcopy(second), dist.group.WORLD, dim=-1, splits=2)
        return decoded(a), b(batch)[0].detach(), decoded(a)

    for result in run_ranks(2, body):
        assert_same(result[0], decoded(first), 1e-11, "first")
        assert_same(result[1], second(batch)[0].detach(), 1e-11, "second")
        assert torch.equal(result[0], result[2])
