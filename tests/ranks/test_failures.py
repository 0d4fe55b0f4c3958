"""What goes wrong ends in a named error on every rank concerned, soon, and leaves a usable model."""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

import distpatch
from tests.support.oracle import assert_same, random_tensor
from tests.support.threads import rank_outcomes, run_ranks
from tests.support.zoo.models import tiny_kl

TIMEOUT = 1.5  # seconds that a rank waits for another
Z = (1, 4, 7, 5)
MODEL = tiny_kl(channels=(8, 16))


def converted(**options: Any) -> Any:
    return distpatch.convert_model(copy.deepcopy(MODEL), dist.group.WORLD, **options)


def decode(model: Any, shape: tuple[int, ...] = Z) -> Tensor:
    with torch.no_grad():
        return model.decode(random_tensor(shape)).sample


def failure(call: Callable[[], Any]) -> BaseException | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def errors_then_right(bad: Callable[[Any, int], Any], world: int = 3) -> list[BaseException | None]:
    """The error of every rank in a bad call; a proper call after it must give the right result."""
    together = threading.Barrier(world, timeout=30)

    def body(rank: int) -> tuple[BaseException | None, Tensor]:
        model = converted()
        decode(model)
        error = failure(lambda: bad(model, rank))
        together.wait()
        return error, decode(model)

    started = time.monotonic()
    results = run_ranks(world, body, timeout=TIMEOUT)
    assert time.monotonic() - started < 12 * TIMEOUT
    for _, image in results:
        assert_same(image, decode(MODEL), 1e-11, "the call after the error")
    return [error for error, _ in results]


def assert_all(errors: list[BaseException | None], kind: type[Exception], *words: str) -> None:
    """Every rank has an error of this kind that says all of this."""
    for rank, error in enumerate(errors):
        assert type(error) is kind, f"rank {rank}: {error!r}"
        for word in words:
            assert word in str(error), f"rank {rank} does not say {word!r}: {error}"


def test_different_shapes() -> None:
    errors = errors_then_right(lambda model, rank: decode(model, (1, 4, 7 + (rank == 1), 5)))
    assert_all(errors, distpatch.RankError, "called differently", "rank 1", "(1, 4, 8, 5)", "(1, 4, 7, 5)")


def test_different_dtypes() -> None:
    def bad(model: Any, rank: int) -> None:
        model.decode(random_tensor(Z, dtype=torch.float32 if rank == 2 else torch.float64))

    assert_all(errors_then_right(bad), distpatch.RankError, "called differently", "float32", "float64")


def test_different_methods() -> None:
    def bad(model: Any, rank: int) -> None:
        if rank == 0:
            model.encode(random_tensor((1, 3, 14, 10)))
        else:
            decode(model)

    assert_all(errors_then_right(bad), distpatch.RankError, "AutoencoderKL.encode", "AutoencoderKL.decode")


def test_gradients_on_one_rank_only() -> None:
    """Without this the backward of that rank would wait for the others."""

    def bad(model: Any, rank: int) -> None:
        with torch.set_grad_enabled(rank == 0):
            model.decode(random_tensor(Z))

    assert_all(errors_then_right(bad), distpatch.RankError, "called differently", "with gradients")


@pytest.mark.parametrize("kind", ["convolution", "transposed", "pooling", "resize", "unfold"])
def test_backward_of_nothing_but_halos(kind: str) -> None:
    """Of frozen weights no gradient is summed: the halo's own exchange says whom a failing rank has to tell."""
    layer: nn.Module = {
        "convolution": nn.Conv2d(2, 2, 3, padding=1),
        "pooling": nn.MaxPool2d(3, 1, 1),
        "resize": nn.Upsample(scale_factor=2, mode="bilinear"),
        "transposed": nn.ConvTranspose2d(2, 2, 3, padding=1),
        "unfold": nn.Unfold(3, padding=1),
    }[kind]
    net = nn.Sequential(nn.Identity(), layer).double().requires_grad_(False)

    def body(rank: int) -> str:
        group = dist.group.WORLD
        model = distpatch.convert_model(copy.deepcopy(net), group, output="shard", liveness=None)
        x = random_tensor((1, 2, 9, 5))
        rows = distpatch.shard(x, group).local.clone().requires_grad_()

        def fail(gradient: Tensor) -> None:
            if rank == 1:
                raise ValueError("on purpose")

        out = model(distpatch.PatchTensor.from_local(rows, group))
        out.local.register_hook(fail)
        with pytest.raises((distpatch.RankError, ValueError)) as error:
            out.local.sum().backward()
        torch.testing.assert_close(distpatch.gather(model(x)), net(x))
        return str(error.value)

    assert all("on purpose" in message for message in run_ranks(3, body))


BAD_ARGUMENTS: dict[str, tuple[Tensor, str]] = {
    "3 dims": (random_tensor((4, 7, 5)), "(4, 7, 5)"),
    "integers": (torch.ones(Z, dtype=torch.long), "torch.int64"),
}


@pytest.mark.parametrize(("argument", "word"), BAD_ARGUMENTS.values(), ids=BAD_ARGUMENTS)
def test_nothing_to_shard(argument: Tensor, word: str) -> None:
    errors = errors_then_right(lambda model, rank: model.decode(argument))
    assert_all(errors, distpatch.LayoutError, "AutoencoderKL.decode", "no argument can be sharded", word)


def test_bad_argument_on_one_rank_only() -> None:
    def bad(model: Any, rank: int) -> None:
        model.decode(random_tensor((4, 7, 5) if rank == 1 else Z))

    errors = errors_then_right(bad)
    assert all(isinstance(error, distpatch.DistPatchError) for error in errors), errors
    assert all("(4, 7, 5)" in str(error) for error in errors)


@pytest.mark.parametrize("dim", [1, -5, 4])
def test_dim_out_of_range(dim: int) -> None:
    def body(rank: int) -> None:
        model = converted(dim=dim)
        with pytest.raises(distpatch.LayoutError, match=rf"dim={dim} .*\(1, 4, 7, 5\)"):
            decode(model)

    run_ranks(2, body, timeout=TIMEOUT)


def test_a_rank_that_comes_late() -> None:
    """The others give up and name it; it is told so as it arrives."""

    def bad(model: Any, rank: int) -> None:
        if rank == 1:
            time.sleep(1.6 * TIMEOUT)
        decode(model)

    assert_all(errors_then_right(bad), distpatch.RankError, "AutoencoderKL.decode", "rank(s) [1] of 3 did not")


def test_a_rank_that_never_comes() -> None:
    """The ranks that call are told who is missing. Calls are matched by their number, so the absent one
    is told at its next call, and never gets rows of the others' next picture."""
    together = threading.Barrier(3, timeout=30)

    def body(rank: int) -> tuple[BaseException | None, Tensor]:
        model = converted()
        if rank == 2:
            together.wait()
        error = failure(lambda: decode(model))
        if rank != 2:
            together.wait()
        return error, decode(model)

    results = run_ranks(3, body, timeout=TIMEOUT)
    assert_all([error for error, _ in results], distpatch.RankError, "rank(s) [2] of 3 did not")
    for _, image in results:
        assert_same(image, decode(MODEL), 1e-11, "image")


class Fails(Exception):
    """An error of the model's own, such as a full memory, on one rank."""


def test_a_rank_that_fails_inside() -> None:
    """The others wait for rows that never come: they are told which rank failed, and of what."""

    def bad(model: Any, rank: int) -> None:
        def fail(module: nn.Module, args: Any) -> None:
            raise Fails("out of memory")

        if rank == 1:
            handle = model.decoder.mid_block.resnets[1].register_forward_pre_hook(fail)
        try:
            decode(model)
        finally:
            if rank == 1:
                handle.remove()

    first, failed, last = errors_then_right(bad)
    assert isinstance(failed, Fails)
    assert_all([first, last], distpatch.RankError, "rank 1 raised Fails: out of memory")


def test_an_error_of_every_rank_inside() -> None:
    """The same error on all ranks is the model's own; nobody waits."""

    def bad(model: Any, rank: int) -> None:
        model.decode(random_tensor((1, 3, 7, 5)))  # three channels for four

    errors = errors_then_right(bad)
    assert all(isinstance(error, RuntimeError) and "channels" in str(error) for error in errors), errors


def test_unsupported_operation_inside() -> None:
    class Median(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.median(x)

    def body(rank: int) -> None:
        model = distpatch.convert_model(Median(), dist.group.WORLD, fallback="error")
        for _ in range(2):
            with pytest.raises(distpatch.UnsupportedOpError, match="median"):
                model(random_tensor(Z))

    run_ranks(2, body, timeout=TIMEOUT)


def test_not_a_member() -> None:
    def body(rank: int) -> None:
        group = dist.new_group([0, 2])
        model = copy.deepcopy(MODEL)
        if rank == 1:
            attributes = dict(vars(model))
            for use in (
                lambda: distpatch.convert_model(model, group),
                lambda: distpatch.shard(random_tensor(Z), group),
                lambda: distpatch.warmup(group),
            ):
                with pytest.raises(distpatch.RankError, match="not a member"):
                    use()
            assert vars(model) == attributes
        else:
            assert_same(decode(distpatch.convert_model(model, group)), decode(MODEL), 1e-11, "image")

    run_ranks(3, body, timeout=TIMEOUT)


def test_mesh_of_two_dimensions() -> None:
    def body(rank: int) -> None:
        mesh = DeviceMesh("cpu", torch.arange(4).view(2, 2), mesh_dim_names=("data", "rows"))
        with pytest.raises(distpatch.LayoutError, match="2-D mesh"):
            distpatch.convert_model(copy.deepcopy(MODEL), mesh)

    run_ranks(4, body, timeout=TIMEOUT)


def test_closed_group() -> None:
    """A model whose group was destroyed says so, and can be restored and used."""

    def body(rank: int) -> None:
        group = dist.new_group([0, 1])
        model = distpatch.convert_model(copy.deepcopy(MODEL), group)
        decode(model)
        dist.barrier()
        dist.destroy_process_group(group)
        with pytest.raises(distpatch.RankError, match="closed"):
            decode(model)
        with pytest.raises(distpatch.RankError, match="closed"):
            distpatch.shard(random_tensor(Z), group)
        assert_same(decode(distpatch.restore_model(model)), decode(MODEL), 0.0, "image")

    run_ranks(2, body, timeout=TIMEOUT)


@pytest.mark.parametrize("change", ["weights", "shapes", "options", "class"])
def test_different_models(change: str) -> None:
    """Ranks with other weights would each compute rows of another picture; the model stays unconverted."""

    def body(rank: int) -> None:
        model, options = copy.deepcopy(MODEL), {}
        if rank == 1 and change == "weights":
            model.decoder.conv_out.bias.data[0] += 1e-3
        elif rank == 1 and change == "shapes":
            model = tiny_kl(channels=(8, 8))
        elif rank == 1 and change == "options":
            options = {"splits": 2}
        elif rank == 1:
            model = nn.Sequential(model)
        attributes = dict(vars(model))
        with pytest.raises(distpatch.RankError, match="called differently"):
            distpatch.convert_model(model, dist.group.WORLD, **options)
        assert vars(model) == attributes
        own = converted()
        assert_same(decode(own), decode(MODEL), 1e-11, "image")

    run_ranks(2, body, timeout=TIMEOUT)


def test_a_rank_that_does_not_convert() -> None:
    def body(rank: int) -> None:
        if rank == 1:
            time.sleep(1.6 * TIMEOUT)
            return
        model = copy.deepcopy(MODEL)
        attributes = dict(vars(model))
        with pytest.raises(distpatch.RankError, match=r"rank\(s\) \[1\] of 2 did not"):
            distpatch.convert_model(model, dist.group.WORLD)
        assert vars(model) == attributes

    run_ranks(2, body, timeout=TIMEOUT)


def test_sharded_over_another_group() -> None:
    def body(rank: int) -> None:
        model = converted()
        other = dist.new_group([0, 1])
        with pytest.raises(distpatch.LayoutError, match="another group"):
            model.decode(distpatch.shard(random_tensor(Z), other))
        assert_same(decode(model), decode(MODEL), 1e-11, "image")

    run_ranks(2, body, timeout=TIMEOUT)


def test_the_harness_names_the_rank() -> None:
    """A body that fails on one rank fails the test at once, although the others wait for it."""

    def body(rank: int) -> None:
        if rank == 1:
            raise Fails("on purpose")
        dist.all_reduce(torch.ones(1))

    started = time.monotonic()
    with pytest.raises(Fails) as caught:
        run_ranks(3, body)
    assert "rank 1 of 3" in "".join(getattr(caught.value, "__notes__", ["rank 1 of 3"]))
    assert time.monotonic() - started < 5
    outcomes = rank_outcomes(2, lambda rank: 1 // rank)
    assert isinstance(outcomes[0], ZeroDivisionError) and outcomes[1] == 1
