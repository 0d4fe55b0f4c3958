"""Tensors sharded along several dims, each over an axis of a mesh; and along another dim than the height alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import distpatch
from distpatch import DistPatchError, LayoutError, RankError
from distpatch.lazy.row_patches import in_patches
from distpatch.tensor.patch_tensor import axes_in
from tests.support.mesh_cases import GATHERS, Case, Shape, chosen, everything
from tests.support.oracle import H, case, mesh_of, random_tensor
from tests.support.threads import rank_outcomes, run_ranks
from tests.support.zoo.models import tiny_kl, tiny_unet

ALWAYS = frozenset(
    {
        "pooling: max, ties",
        "pooling: max to 1, ties",
        "normalization: layer_norm of the width",
        "normalization: group_norm of frames",
        "creation: alpha_dropout",
        "creation: bernoulli_ of rows",
        "tensor_surface: module hooks",
        "index_writes: increased",
        "shape: merged, softmax",
        "shape: merged, written to in order",
        "own_functions: operator on merged rows",
        "unfold: 3x3",
        "unfold: fold 3x3",
    }
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("mesh", "name", "one"), chosen(ALWAYS))
def test_case_on_mesh(mesh: Shape, name: str, one: Case) -> None:
    one(meshes=[mesh], p2p=None, gathers=GATHERS.get(name.partition(":")[0], "").split())


def volume(dim: int, *sizes: int) -> tuple[int, ...]:
    """(1, C, D, H, W) with the rows along one dim."""
    shape = [1, *sizes]
    shape[dim] = H
    return tuple(shape)


def causal(x: Tensor, w: Tensor) -> Tensor:
    return F.conv3d(F.pad(x, (1, 1, 1, 1, 2, 0), mode="replicate"), w)


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).unflatten(2, x.shape[2:])


OF_VOLUMES: dict[str, tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]] = {
    "conv": (lambda x, w: F.conv3d(x, w, padding=1, stride=(1, 2, 1)), ((6, 4, 3, 3, 3),)),
    "transposed": (lambda x, w: F.conv_transpose3d(x, w, stride=2, padding=1), ((4, 3, 4, 3, 4),)),
    "causal padding": (causal, ((3, 4, 3, 3, 3),)),
    "group norm": (lambda x, w, b: F.group_norm(x, 2, w, b), ((4,), (4,))),
    "layer norm": (lambda x: F.layer_norm(x, x.shape[-1:]), ()),
    "max pool": (lambda x: F.max_pool3d(x, 3, 2, 1, return_indices=True), ()),
    "mean": (lambda x: F.adaptive_avg_pool3d(x, (2, 2, 3)), ()),
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.0), ()),
    "trilinear": (lambda x: F.interpolate(x, size=(5, 6, 7), mode="trilinear"), ()),
    "attention": (attention, ()),
}


@pytest.mark.parametrize("dim", [-1, -3])
@pytest.mark.parametrize("name", OF_VOLUMES)
def test_along_another_dim_alone(name: str, dim: int) -> None:
    """The width, or the frames or depth, over a group."""
    fn, weights = OF_VOLUMES[name]
    case(fn, volume(dim, 4, 4, 5, 6), *weights, dim=dim, heights=(7, 2))()


@pytest.mark.filterwarnings("ignore:distpatch has no sharded rule")
@pytest.mark.parametrize("name", OF_VOLUMES)
def test_three_axes(name: str) -> None:
    fn, weights = OF_VOLUMES[name]
    gathers = {"attention": {"reshape"}}.get(name, set())
    meshes = [(2, 1, 2), (2, 2, 2)] if everything.on else [(2, 2, 2)]
    case(fn, (1, 4, 4, H, 6), *weights, heights=(5,), meshes=meshes, dims=(-3, -2, -1), gathers=gathers)()


def results(model: Any, method: str, x: Tensor, *args: Any) -> list[Tensor | None]:
    """The output, and the gradients of the input and of all weights."""
    leaf = x.clone().requires_grad_()
    out = getattr(model, method)(leaf, *args)
    out = out.latent_dist.mean if method == "encode" else out.sample
    (out * random_tensor(tuple(out.shape), seed=3)).sum().backward()
    return [out.detach(), leaf.grad, *(p.grad for p in model.parameters())]


def same_on_mesh(build: Callable[[], nn.Module], mesh: Shape, method: str, *args: Any, **options: Any) -> None:
    model = build()
    expected = results(copy.deepcopy(model), method, *args)

    def body(rank: int) -> list[Tensor | None]:
        mine = copy.deepcopy(model)
        distpatch.convert_model(mine, mesh_of(mesh), **{"dim": (-2, -1), "fallback": "error", **options})
        with torch.no_grad():
            out = getattr(mine, method)(*args)
        found = results(mine, method, *args)
        torch.testing.assert_close(
            out.latent_dist.mean if method == "encode" else out.sample, found[0], rtol=1e-10, atol=1e-10
        )
        return found

    for found in run_ranks(int(np.prod(mesh)), body, keep=True):
        for got, right in zip(found, expected, strict=True):
            assert (got is None) == (right is None)
            if got is not None and right is not None:
                torch.testing.assert_close(got, right, rtol=1e-9, atol=1e-10 * max(right.abs().max().item(), 1.0))


MESHES: list[Shape] = [(2, 2), (2, 3), (1, 4), (4, 1)]


@pytest.mark.parametrize("mesh", MESHES)
def test_autoencoder(mesh: Shape) -> None:
    """Attention included; decoded from 5 x 6 latents, which no mesh of these shares out evenly."""
    same_on_mesh(lambda: tiny_kl(channels=(8, 16)), mesh, "decode", random_tensor((1, 4, 5, 6)))


def test_encoder_of_another_order() -> None:
    """The first axis of the mesh along the width, the second along the height."""
    same_on_mesh(
        lambda: tiny_kl(channels=(8, 16)),
        (2, 2),
        "encode",
        random_tensor((1, 3, 14, 10)),
        dim=(-1, -2),
        fallback="allow",
    )


def test_unet() -> None:
    same_on_mesh(tiny_unet, (2, 2), "forward", random_tensor((1, 3, 10, 12)), torch.tensor(3), fallback="allow")


def rows_of(x: distpatch.PatchTensor) -> Tensor:
    return list(axes_in(x))[-1].local


PICTURE = random_tensor((1, 3, 13, 10), dtype=torch.float32).sigmoid()


def test_rows_that_are_distributed_already() -> None:
    def body(rank: int) -> None:
        mesh, dims = mesh_of((2, 3)), (-2, -1)
        x = distpatch.shard(PICTURE, mesh, dim=dims)
        own = rows_of(x)
        assert own.shape == (1, 3, 7 - (rank > 2), 4 - (rank % 3 > 0))
        for bounds in (None, [(0, 7, 13), (0, 4, 7, 10)]):
            assert torch.equal(
                distpatch.gather(distpatch.PatchTensor.from_local(own, mesh, dim=dims, bounds=bounds)), PICTURE
            )
        with pytest.raises(LayoutError, match="the ranks at place 1 of axis 1 of the mesh hold"):
            distpatch.PatchTensor.from_local(own[..., : 2 + (rank == 1)], mesh, dim=dims)
        with pytest.raises(LayoutError, match="each axis of the mesh has a dim of its own"):
            distpatch.shard(PICTURE, mesh, dim=(-2, 2))
        with pytest.raises(LayoutError, match="one axis of a mesh each; got 2 axes"):
            distpatch.shard(PICTURE, mesh, dim=(-3, -2, -1))

    run_ranks(6, body, keep=True)


def test_rows_in_parts_stay_sharded() -> None:
    """What is computed a few columns of the outer axis at a time, such as queries, is put together as it is sharded."""

    def body(rank: int) -> None:
        rows = distpatch.shard(PICTURE, mesh_of((2, 2)), dim=(-2, -1)).local
        with torch.no_grad():
            made = in_patches(lambda lo, hi: rows.narrow(3, lo, hi - lo) * 2, (0, rows.shape[3]), 2, 3)
        assert isinstance(made, distpatch.PatchTensor) and made.row_layout == rows.row_layout
        assert torch.equal(distpatch.gather(made), 2 * distpatch.gather(rows))

    run_ranks(4, body, keep=True)


@pytest.mark.filterwarnings("ignore:distpatch has no sharded rule for reshape")
def test_files(tmp_path: Path) -> None:
    """Each rank writes its own part; tokens, whose rows are blocks on both axes, too."""

    def body(rank: int) -> None:
        x = distpatch.shard(PICTURE, mesh_of((2, 2)), dim=(-2, -1))
        assert np.array_equal(distpatch.to_memmap(x, tmp_path / "a.npy"), PICTURE.numpy())
        assert np.array_equal(distpatch.to_memmap(x.flatten(2), tmp_path / "b.npy"), PICTURE.flatten(2).numpy())
        for name in ("a.png", "a.tif"):
            distpatch.save_image(x, tmp_path / name)

    run_ranks(4, body, keep=True)
    import tifffile
    from PIL import Image

    right = (PICTURE[0] * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), right)
    assert np.array_equal(tifffile.imread(tmp_path / "a.tif"), right)


def test_file_that_cannot_be_written(tmp_path: Path) -> None:
    def body(rank: int) -> None:
        x = distpatch.shard(PICTURE, mesh_of((2, 2)), dim=(-2, -1))
        with pytest.raises(DistPatchError, match="could not be written"):
            distpatch.save_image(x, tmp_path / "none" / "a.png")
        with pytest.raises(LayoutError, match="would write to one file"):
            distpatch.to_memmap(x.mean(-1), tmp_path / "a.npy")

    run_ranks(4, body, keep=True)


@pytest.mark.filterwarnings("ignore:distpatch has no sharded rule for reshape")
def test_parts_in_checkpoints() -> None:
    """What each rank writes covers the tensor once."""

    def body(rank: int) -> list[Any]:
        mesh = mesh_of((2, 2))
        x = distpatch.shard(PICTURE, mesh, dim=(-2, -1), bounds=[(0, 4, 13), (0, 0, 10)])
        both = x, x.flatten(2)
        return [
            [(item.index.offset, t.__get_tensor_shard__(item.index)) for item in t.__create_write_items__("x", None)]
            for t in both
        ]

    ranks = run_ranks(4, body, keep=True)
    for which, right in enumerate((PICTURE, PICTURE.flatten(2))):
        found = torch.full_like(right, torch.nan)
        for parts in ranks:
            for offset, rows in parts[which]:
                place = found[tuple(slice(at, at + n) for at, n in zip(offset, rows.shape, strict=True))]
                assert which == 1 or place.isnan().all()  # tokens of no ranks are the same on all of an axis
                place.copy_(rows)
        assert torch.equal(found, right)


class Broken(nn.Module):
    def forward(self, x: Tensor, who: int, rank: int) -> Tensor:
        y = x.mean(-1, keepdim=True)
        if rank == who:
            raise ValueError("on purpose")
        return x - y.mean(-2, keepdim=True)


def test_a_rank_that_raises_is_named_on_all() -> None:
    """On those too that share no axis with it; the next call works."""

    def body(rank: int) -> str:
        model = distpatch.convert_model(Broken(), init_device_mesh("cpu", (2, 2)), dim=(-2, -1))
        x = random_tensor((1, 2, 5, 6))
        try:
            model(x, 3, rank)
            message = "nothing"
        except (RankError, ValueError) as error:
            message = str(error)
        torch.testing.assert_close(model(x, -1, rank), Broken()(x, -1, rank))
        return message

    outcomes = rank_outcomes(4, body)
    assert outcomes[3] == "on purpose"
    for message in outcomes[:3]:
        assert "rank 3" in message and "on purpose" in message and "4 ranks of the mesh" in message


def test_a_rank_that_raises_in_a_backward_pass() -> None:
    """Whoever shares an axis with it fails, and so those that share one with these."""
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)).double()

    def body(rank: int) -> str:
        model = distpatch.convert_model(copy.deepcopy(net), init_device_mesh("cpu", (2, 2)), dim=(-2, -1))
        x = random_tensor((1, 2, 6, 6)).requires_grad_()

        def fail(*_: Any) -> None:
            if rank == 3:
                raise ValueError("on purpose")

        hook = model[1].register_full_backward_hook(fail)
        with pytest.raises((RankError, ValueError)) as error:
            model(x).sum().backward()
        hook.remove()
        torch.testing.assert_close(model(x), net(x))
        return str(error.value)

    assert all("on purpose" in message for message in run_ranks(4, body))


def test_parts_that_do_not_fit_are_found_out() -> None:
    """A rule that shards rows over the inner axis by how many the outer rank has: the next call says so on all ranks."""

    class Wrong(nn.Module):
        def forward(self, x: Tensor, wrong: bool = True) -> Tensor:
            bounds = (0, 2, 4) if wrong and x.rank else (0, 3, 4)  # type: ignore[attr-defined]
            other = distpatch.RowLayout(2, bounds)
            x.comm.sends_parts("test", other)  # type: ignore[attr-defined]
            return x * 2

    def body(rank: int) -> None:
        model = distpatch.convert_model(Wrong(), init_device_mesh("cpu", (2, 2)), dim=(-2, -1))
        x = random_tensor((1, 2, 4, 6))
        model(x)
        with pytest.raises(RankError, match="axis 1 of the mesh had different parts of one tensor"):
            model(x)
        assert torch.equal(model(x, False), 2 * x)
        model(x, False)

    run_ranks(4, body)


def test_what_is_refused() -> None:
    def body(rank: int) -> None:
        mesh = mesh_of((2, 2))
        for option in (
            {"compile": True},
            {"policy": "auto"},
            {"weights": "measured"},
            {"shard": {"input": -1}},
            {"attention": "ring"},
        ):
            with pytest.raises(ValueError, match="is for one dim"):
                distpatch.convert_model(nn.Conv2d(3, 3, 3), mesh, dim=(-2, -1), **option)
        with pytest.raises(LayoutError, match="rows are sharded over one mesh axis"):
            distpatch.convert_model(nn.Conv2d(3, 3, 3), mesh)
        with pytest.raises(LayoutError, match="rows are sharded over one mesh axis"):
            distpatch.read_shard(PICTURE, mesh)
        model = distpatch.convert_model(nn.Identity(), mesh, dim=(-3, -1))
        with pytest.raises(LayoutError, match="is out of range for an argument of shape"):
            model(PICTURE)

    run_ranks(4, body, keep=True)


def test_compiled() -> None:
    """torch.compile leaves the model as it is; a compiled module inside is refused by name."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Conv2d(3, 3, 3), nn.SiLU()), random_tensor((1, 3, 5, 6), dtype=torch.float32)

    def body(rank: int) -> None:
        model = distpatch.convert_model(copy.deepcopy(net), mesh_of((1, 1)), dim=(-2, -1))
        torch.testing.assert_close(torch.compile(model, backend="eager")(x), net(x))
        inside = copy.deepcopy(net)
        inside[0].compile(backend="eager")
        with pytest.raises(Exception, match="sharded along several dims, and cannot enter what torch.compile"):
            distpatch.convert_model(inside, mesh_of((1, 1)), dim=(-2, -1))(x)

    run_ranks(1, body)
