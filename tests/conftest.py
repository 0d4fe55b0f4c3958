"""One thread a rank, and the number of oracle comparisons at the end of the session."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite(
    "tests.support.oracle", "tests.support.transports.late", "tests.support.zoo.models", "tests.support.chains.chain"
)
torch.set_num_threads(1)
settings.register_profile("suite", deadline=None, max_examples=100, derandomize=True, print_blob=True)
settings.register_profile(
    "fuzz", deadline=None, max_examples=int(os.environ.get("CHAINS", "2000")), database=None, print_blob=True
)
settings.load_profile("suite")


# A warning fails a test, but not one that a dependency gives for its own code.
WARNINGS = ["error", "ignore::DeprecationWarning", "ignore::FutureWarning:(torch|diffusers|transformers).*"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--forced", action="store_true", help="lazy rows of any size, three patches (tests/support/forced.py)"
    )
    parser.addoption(
        "--staged", action="store_true", help="all tensors go through other memory (tests/support/transports/staged.py)"
    )
    parser.addoption("--meshes", action="store_true", help="all cases and nets on meshes (tests/support/mesh_cases.py)")
    parser.addoption("--compiled", action="store_true", help="all cases compiled (tests/support/compiled_cases.py)")
    parser.addoption("--nccl", action="store_true", help="over a simulated NCCL (tests/support/transports/nccl.py)")


def pytest_configure(config: pytest.Config) -> None:
    from tests.support import compiled_cases, forced
    from tests.support.mesh_cases import everything
    from tests.support.transports import nccl, staged

    if config.getoption("--meshes"):
        everything.on = True
    if config.getoption("--compiled"):
        compiled_cases.every = 1
    if config.getoption("--forced"):
        forced.apply()
    if config.getoption("--staged"):
        staged.apply()
    if config.getoption("--nccl"):
        nccl.apply()
    for line in WARNINGS:
        config.addinivalue_line("filterwarnings", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    from tests.support import oracle

    found = _found()
    terminalreporter.write_line(f"oracle: {found['compared']} sharded runs compared with the unsharded one")
    for header, lines in oracle.notes.items():
        for line in (header, *sorted(lines)):
            terminalreporter.write_line(line)


def pytest_sessionfinish(session: pytest.Session) -> None:
    from tests.support import threads

    threads.close_kept()
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput.update(_found())


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What a worker of pytest-xdist has counted is counted here."""
    from tests.support import oracle

    found = getattr(node, "workeroutput", {})
    oracle.compared += found.get("compared", 0)
    for header, lines in found.get("notes", {}).items():
        oracle.notes.setdefault(header, []).extend(lines)


def _found() -> dict[str, Any]:
    from tests.support import oracle
    from tests.support.chains import chain as chains

    if chains.count.compared:
        oracle.notes["random chains:"] = [str(chains.count)]
    return {"compared": oracle.compared, "notes": oracle.notes}
