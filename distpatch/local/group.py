"""All GPUs of this host for a program of one process, such as a notebook or a server: ranks that wait for calls.

Each rank is a process of its own, started without the caller's ``__main__``. Models and arguments go there in shared
memory; a call runs on all ranks as under torchrun, and its result comes back from rank 0.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from distpatch.errors import DistPatchError, RankError
from distpatch.local.packed import State, check_room, pack
from distpatch.local.worker import Failure, random_state, set_random_state
from distpatch.model.convert import is_converted
from distpatch.torch_utils.tree import map_tensors


class LocalGroup:
    """Processes of this host that wait for calls (``local_group``). ``close`` ends them, as does leaving ``with``."""

    def __init__(self, size: int, device: torch.device, threads: int, timeout: timedelta, options: dict[str, Any]):
        self.size, self.device, self.threads, self.timeout, self.options = size, device, threads, timeout, options
        self._lock = threading.Lock()
        self._known: weakref.WeakKeyDictionary[nn.Module, tuple[int, State]] = weakref.WeakKeyDictionary()
        self._sent = 0
        self._processes: list[subprocess.Popen[bytes]] = []
        self._pipes: list[Connection] = []
        self._store: TCPStore | None = None
        self._closed = False

    def __enter__(self) -> LocalGroup:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``model(*args, **kwargs)``, computed by all ranks."""
        return self.call(model, "forward", *args, **kwargs)

    def encode(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``model.encode(*args, **kwargs)``, computed by all ranks."""
        return self.call(model, "encode", *args, **kwargs)

    def decode(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """``model.decode(*args, **kwargs)``, computed by all ranks."""
        return self.call(model, "decode", *args, **kwargs)

    def call(self, model: nn.Module, method: str, *args: Any, **kwargs: Any) -> Any:
        """A method of a model, computed by all ranks without gradients; the result is on the device of the arguments.

        Random numbers are those that the caller would have drawn. Arguments are copied. The ranks keep the model, and
        what a call leaves in its buffers and attributes stays there; it is sent again when anything of the caller's
        has changed: weights, mode, attributes. Raises what the model raises there; ``RankError`` where a rank's process
        ended (the next call starts new ones); ``DistPatchError`` for a model that is converted or in training mode,
        cannot be pickled, or is larger than the shared memory.
        """
        if not isinstance(model, nn.Module) or is_converted(model):
            raise DistPatchError(
                f"local_group: it converts models itself; give a plain nn.Module, not a {type(model).__name__}"
                + (" that is converted: distpatch.restore_model" if isinstance(model, nn.Module) else "")
            )
        if any(module.training for module in model.modules()):
            raise DistPatchError(
                f"local_group: {type(model).__name__} is in training mode, and what training changes would stay with "
                "the ranks: call model.eval() first, or train under torchrun"
            )
        what = f"{type(model).__name__}.{method}"
        with self._lock:
            packed, given = pack(model, what), pack((args, kwargs, self.options), what)
            self._start()
            known = self._known.pop(model, None)
            fresh = None if known is not None and known[1].is_of(packed) else packed.shared
            self._sent += fresh is not None
            number = known[0] if known and fresh is None else self._sent
            alive = [number, *(other for other, _ in self._known.values())]
            home = next((t.device for t in given.tensors), torch.device("cpu"))
            request = (method, number, fresh, given.shared, alive, random_state(home))
            check_room([*given.tensors, *(fresh.tensors if fresh else [])], what)
            result, drawn = self._exchange([request] * self.size, what)
            set_random_state(drawn, home)
            if known is None or fresh is not None:
                known = number, State(packed, shared=self.device.type == "cpu")
            self._known[model] = known
        return map_tensors(lambda t: t.to(home), result.open())

    def close(self) -> None:
        """End the processes; a later call is refused."""
        self._closed = True
        self._end()

    def _start(self) -> None:
        if self._closed:
            raise DistPatchError("local_group: it is closed")
        if self._processes:
            return
        self._store = _store()
        try:
            for rank in range(self.size):
                self._start_one(rank, self._store.port)
            self._exchange([], "starting")
        except BaseException:
            self._end()
            raise

    def _start_one(self, rank: int, port: int) -> None:
        mine, theirs = socket.socketpair()
        command = f"from distpatch.local.worker import serve; serve({theirs.fileno()})"
        self._processes.append(
            subprocess.Popen(
                [sys.executable, "-c", command],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C is the caller's
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
            )
        )
        theirs.close()
        pipe = Connection(mine.detach())
        self._pipes.append(pipe)
        key = bytes(multiprocessing.current_process().authkey)  # for tensors that are shared
        pipe.send((key, rank, self.size, port, self.device.type, self.threads, self.timeout))

    def _exchange(self, requests: Sequence[Any], what: str) -> Any:
        """Send each rank its request, and take their answers; the result of rank 0."""
        answers: dict[int, Any] = {}
        try:
            for pipe, request in zip(self._pipes, requests):
                message = ForkingPickler.dumps(request)  # once a rank: what is shared can be taken once
                with suppress(BrokenPipeError):  # the process has ended, as will be seen
                    pipe.send_bytes(message)
            while len(answers) < self.size:
                for ready in wait([pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]):
                    rank = next(rank for rank, pipe in enumerate(self._pipes) if pipe is ready)
                    try:
                        answers[rank] = self._pipes[rank].recv()
                    except (EOFError, ConnectionError):
                        raise RankError(
                            f"local_group: {self._ended(rank)} in {what}; the next call starts new ones"
                        ) from None
        except BaseException:  # such as Ctrl-C: what is under way there cannot be left half
            self._end()
            raise
        failed = [answer for answer in answers.values() if isinstance(answer, Failure)]
        if failed:
            first = min(failed, key=lambda failure: isinstance(failure.error, RankError))
            first.error.__cause__ = DistPatchError(f"on rank {first.rank}:\n{first.traceback}")
            raise first.error
        return answers[0]

    def _ended(self, rank: int) -> str:
        process = self._processes[rank]
        with suppress(subprocess.TimeoutExpired):
            process.wait(5)
        code = process.returncode
        how = f"signal {signal.Signals(-code).name}" if code and code < 0 else f"exit code {code}"
        return f"the process of rank {rank} of {self.size} (pid {process.pid}) ended with {how}"

    def _end(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
        self._pipes, self._processes, self._store = [], [], None
        self._known.clear()


def _store() -> TCPStore:
    """Where the ranks meet, on a free port of 127.0.0.1; a store that opens its port itself listens to all networks."""
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    return TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def local_group(
    size: int | None = None,
    *,
    device: str | None = None,
    threads: int | None = None,
    timeout: timedelta = timedelta(minutes=10),
    **options: Any,
) -> LocalGroup:
    """Ranks on this host, for a program that torchrun did not start: a notebook, a server, a user interface.

    >>> with distpatch.local_group(8) as ranks:
    ...     picture = ranks.decode(vae, latents).sample

    ``size``: processes (None: one a GPU). ``device``: "cuda", a GPU each, or "cpu" (None: "cuda" where there is one).
    ``threads``: CPU threads of each (None: this host's cores, shared out). ``timeout``: how long one waits for another
    before it is an error. ``options``: those of ``convert_model``, but for ``output``.

    The processes start at the first call. The model and the arguments are put in shared memory, of which containers
    may have little (``--shm-size``). Classes that a notebook defines need ``cloudpickle``. Raises ``ValueError`` for a
    size that this host does not have.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpus = torch.cuda.device_count() if kind == "cuda" else None
    size = gpus if size is None else size
    if size is None or size < 1 or (gpus is not None and size > gpus):
        have = f"this host has {gpus} GPUs" if gpus is not None else "say how many ranks share this host's cores"
        raise ValueError(f"local_group: a number of ranks of at least 1, got {size}; {have}")
    if "output" in options:
        raise ValueError("local_group: results come from rank 0; there is no choice of output")
    threads = max((os.cpu_count() or 1) // size, 1) if threads is None else threads
    return LocalGroup(size, torch.device(kind), threads, timeout, options)
