"""Processes that wait for orders: contestants of one benchmark that never run at the same time."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

ROOT = Path(__file__).parents[2]
Answer = dict[str, Any]
PATIENCE_SECONDS = 60


class Crew:
    """The processes of one contestant, one a rank: idle in a blocking read until they are asked.

    Each runs ``module`` with ``config`` (JSON) as its argument, in the environment that torchrun would
    give it, with ``threads`` CPU threads; it answers ``ask`` by calling ``serve``. ``python``: another interpreter.
    """

    def __init__(
        self,
        module: str,
        config: Mapping[str, Any],
        ranks: int,
        threads: int,
        *,
        python: str = sys.executable,
        **env: str,
    ) -> None:
        common = {
            **os.environ,
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            **env,
        }
        command = [python, "-m", module, json.dumps({**config, "threads": threads})]
        self.processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]

    def ask(self, order: str, **details: Any) -> list[Answer]:
        """Give all ranks the same order at once; their answers, in rank order, when all are done."""
        line = json.dumps({"order": order, **details}) + "\n"
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.write(line)
            process.stdin.flush()
        return [self._answer(rank, order) for rank in range(len(self.processes))]

    def _answer(self, rank: int, order: str) -> Answer:
        process = self.processes[rank]
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"rank {rank} of {len(self.processes)} ended with code {process.wait()} at {order!r}")
        answer: Answer = json.loads(line)
        return answer

    def kill(self) -> None:
        """End all processes now, also those that wait for each other."""
        for process in self.processes:
            process.kill()

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
        for process in self.processes:
            assert process.stdin is not None
            process.stdin.close()  # the end of its orders
        for process in self.processes:
            try:
                process.wait(PATIENCE_SECONDS)
            except subprocess.TimeoutExpired:  # its work is done; only its end hangs
                process.kill()
                process.wait()


def serve(orders: Mapping[str, Callable[..., Answer]]) -> None:
    """A crew's process: obey orders from standard input until it ends.

    Answers own standard output; what anything else prints goes to standard error.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(orders[request.pop("order")](**request)) + "\n")
        answers.flush()


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
