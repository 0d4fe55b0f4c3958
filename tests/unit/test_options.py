"""Options that an operator of a compiled graph carries as a text."""

from __future__ import annotations

import pytest

from distpatch.tensor.options import Options

PACKED = {
    "default": Options(),
    "weights": Options(weights=(1.0, 1 / 3)),
    "attention": Options(attention="ring"),
    "others": Options("auto", False, fallback="error", min_numel=7, workspace_bytes=1 << 20, weights=(2.5,)),
}


@pytest.mark.parametrize("options", PACKED.values(), ids=PACKED)
def test_packed(options: Options) -> None:
    assert Options.unpacked(options.packed) == options


def test_weights_of_any_sequence_are_alike() -> None:
    assert Options(weights=[1, 2]) == Options(weights=(1.0, 2.0))  # type: ignore[arg-type]
    assert str(Options(weights=range(1, 3))) == str(Options(weights=(1.0, 2.0)))  # type: ignore[arg-type]
