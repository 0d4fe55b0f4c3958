from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.procs.pool import Pool


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()
