"""One thread a rank, and the number of oracle comparisons at the end of the session."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.oracle", "tests.strict", "tests.models", "tests.chains")
torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, max_examples=100, derandomize=True, print_blob=True)
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.environ.get("CHAINS", "2000")), database=None, print_blob=True
)
settings.load_profile("suite")


# A warning fails a test, but not one that a dependency gives for its own code.
WARNINGS = ["error", "ignore::DeprecationWarning", "ignore::FutureWarning:(torch|diffusers|transformers).*"]


def pytest_configure(config: pytest.Config) -> None:
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from tests import chains, oracle

    terminalreporter.write_line(f"oracle: {oracle.compared} sharded runs compared with the unsharded one")
    for header, lines in oracle.notes.items():
        for line in (header, *lines):
            terminalreporter.write_line(line)
    if chains.count.compared:
        terminalreporter.write_line(f"random chains: {chains.count}")


def pytest_sessionfinish() -> None:
    from tests import threads

    threads.close_kept()
