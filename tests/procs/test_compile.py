"""torch.compile(fullgraph=True): the same values, no graph break, nothing compiled twice for a shape."""

from __future__ import annotations

import pytest
import torch

from tests.procs import compiling
from tests.procs.pool import Pool
from tests.support.oracle import assert_same

SIZES = {"decoder": [(1, 7, 4), (1, 6, 4)], "unet": [(1, 6, 4), (1, 10, 4)]}


def check(pool: Pool, world: int, kind: str, way: str, backend: str, grads: bool = False, sizes: int = 2) -> None:
    dtype, tolerance = (torch.float64, 1e-11) if backend == "aot_eager" else (torch.float32, 1e-5)
    right = compiling.values(0, kind, "", "", dtype, SIZES[kind][:sizes], grads)
    for rank, found in enumerate(
        pool.run(world, compiling.values, kind, way, backend, dtype, SIZES[kind][:sizes], grads, timeout=240)
    ):
        for size, mine, wanted in zip(SIZES[kind], found, right):
            for value, plain in zip(mine, wanted, strict=True):
                scale = 1 if plain is None else plain.abs().max().clamp(min=1)
                mine_scaled = None if value is None else value / scale
                assert_same(mine_scaled, None if plain is None else plain / scale, tolerance, f"{size} on rank {rank}")


@pytest.mark.slow
@pytest.mark.parametrize("way", ["converted", "sharded"])
@pytest.mark.parametrize("kind", ["decoder", "unet"])
@pytest.mark.parametrize("world", [1, 2])
def test_aot_eager(pool: Pool, world: int, kind: str, way: str) -> None:
    check(pool, world, kind, way, "aot_eager", sizes=2 if way == "converted" else 1)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["decoder", "unet"])
@pytest.mark.parametrize("world", [1, 2])
def test_inductor(pool: Pool, world: int, kind: str) -> None:
    check(pool, world, kind, "converted", "inductor", sizes=1)


@pytest.mark.slow
@pytest.mark.parametrize("way", ["inside", "option"])
def test_a_module_of_a_converted_model(pool: Pool, way: str) -> None:
    check(pool, 2, "decoder", way, "aot_eager", sizes=1)


def test_a_compiled_call_sends_what_an_eager_one_does(pool: Pool) -> None:
    """The halo of a convolution comes with the moments of the norm before it in either."""
    for eager, compiled in pool.run(2, compiling.rounds, timeout=120):
        assert compiled == eager and len(eager) > 9


@pytest.mark.parametrize(("world", "height"), [(2, 7), (3, 4)])
def test_changes_between_a_norm_and_a_convolution(pool: Pool, world: int, height: int) -> None:
    """Halo rows that came with the moments are not those that a changed tensor has."""
    for found in pool.run(world, compiling.changed_between, height, timeout=240):
        for name, compiled, right in found:
            assert_same(compiled, right, 1e-10, name)


def test_two_graphs(pool: Pool) -> None:
    """What stands between them is sharded, in channels_last; a row of it, and rows that had to move, are copies, which may be read."""
    for messages, value, right in pool.run(2, compiling.in_two_graphs, timeout=60):
        assert "graph_break" in messages[0] and "zero_ writes to the result of select" in messages[1]
        assert_same(value, right, 1e-12, "picture")


def test_displaced_steps_between_compiled_calls(pool: Pool) -> None:
    for results in pool.run(2, compiling.steps_between_compiled_calls, timeout=60):
        for result in results:
            assert_same(result, results[-1], 1e-12, "picture")


@pytest.mark.slow
def test_gradients(pool: Pool) -> None:
    check(pool, 2, "decoder", "converted", "aot_eager", grads=True, sizes=1)


def test_a_model_of_tokens(pool: Pool) -> None:
    for results in pool.run(2, compiling.tokens_by_name, timeout=120):
        for result in results:
            assert_same(result, results[0], 1e-12, "tokens")


@pytest.mark.parametrize(("dim", "backend"), [(-2, "inductor"), (-1, "aot_eager")])
def test_training_on_pixels_and_text(pool: Pool, dim: int, backend: str) -> None:
    """Along the width tokens are in blocks, and joined with the text's where they are."""
    for plain, sharded in pool.run(2, compiling.pixels_and_text, dim, backend, timeout=120):
        for result, right in zip(sharded, plain, strict=True):
            assert_same(result, right, 1e-12, "tokens")


def test_ranks_called_differently(pool: Pool) -> None:
    for message, difference in pool.run(2, compiling.called_differently, timeout=60):
        assert "called differently" in message and "rank 1: Sequential.forward ((1, 3, 7, 4)" in message
        assert difference.abs().max() < 1e-6


def test_a_function_of_ones_own(pool: Pool) -> None:
    """distpatch replaces ``autograd.Function.apply``; compiled models without it do not see that."""
    (grad,) = pool.run(1, compiling.a_function_of_ones_own)
    assert_same(grad, torch.full((3,), 3.0), 0, "gradient")


@pytest.mark.parametrize("leaf", [False, True])
def test_gradients_across_a_border_are_refused(pool: Pool, leaf: bool) -> None:
    (message,) = pool.run(1, compiling.gradients_across, leaf)
    assert "Compile an entry point of the converted model" in message
