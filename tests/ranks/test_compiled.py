"""Cases of the tables of rules once more, inside what torch.compile has compiled."""

from __future__ import annotations

import pytest

from tests.support.compiled_cases import check_compiled, chosen
from tests.support.mesh_cases import Case

ALWAYS = frozenset(
    {
        "index_writes: changed views",
        "index_writes: moved view",
        "index_writes: changed data",
        "normalization: channels_last",
        "shape: merged, softmax",
    }
)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "one"), chosen(ALWAYS))
def test_case_compiled(name: str, one: Case) -> None:
    check_compiled(name, one)
