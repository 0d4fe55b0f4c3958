"""Random chains of operations on random layouts give what the unsharded run gives: 100 in the suite, 2,000 by
``make fuzz``. What it has found stands in test_regressions.py."""

from __future__ import annotations

import random

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.support.chains import FAMILIES, draw_chain
from tests.support.chains import chain as chains


@pytest.mark.slow
@settings(suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate])
@given(st.integers(0, 2**62))
def test_random_chain(seed: int) -> None:
    """A failing one is shown as code, with the fewest steps that fail."""
    chain = draw_chain(random.Random(seed))
    try:
        chains.compare(chain)
    except Exception as error:
        raise AssertionError(f"to be kept in test_regressions.py: {chains.reduced(chain)}") from error
    if chains.count.compared % 100 == 0:
        print(chains.count, flush=True)


def test_a_chain_is_drawn_the_same_from_the_same_seed() -> None:
    assert str(draw_chain(random.Random(3))) == str(draw_chain(random.Random(3)))


def test_a_mismatch_is_found_and_shown_as_code() -> None:
    """A step that sees a rank's own rows is not what the unsharded run does."""
    wrong = chains.Chain(2, (chains.Input((2, 3), 0, (0, 1, 2)),), ("x = x * getattr(x, 'local', x).shape[0]",))
    with pytest.raises(AssertionError, match=r"Chain\(2, \(Input\(\(2, 3\), 0, \(0, 1, 2\)\),\), "):
        chains.compare(wrong)
    assert chains.reduced(wrong.then([], "x = x * 2")) == wrong


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_drawn(family: str) -> None:
    rng = random.Random(0)
    assert any(step for _ in range(3) for step in draw_chain(rng, (family,)).steps)
