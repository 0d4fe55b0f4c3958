"""Ranks that a program of one process calls: exact, told of what changes, and started anew after one has died."""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import distpatch
from distpatch import DistPatchError, RankError
from distpatch.local.packed import State, pack
from tests.procs.served import Cores, Deadly, Net
from tests.support.oracle import random_tensor
from tests.support.zoo.models import tiny_kl

ROOT = Path(__file__).parents[2]
X = random_tensor((1, 3, 21, 16))


@pytest.fixture(scope="module")
def ranks() -> Iterator[distpatch.LocalGroup]:
    with distpatch.local_group(2, device="cpu", threads=1) as group:
        yield group


def net() -> Net:
    torch.manual_seed(0)
    return Net().double().eval()


def check(ranks: distpatch.LocalGroup, model: nn.Module, x: Tensor = X, **kwargs: Any) -> None:
    with torch.no_grad():
        expected = model(x, **kwargs)
    found = ranks(model, x, **kwargs)
    assert found.keys() == expected.keys()
    for key, value in found.items():
        assert value.dtype == expected[key].dtype
        torch.testing.assert_close(value, expected[key], rtol=1e-10, atol=1e-10)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity") or (os.cpu_count() or 1) < 2, reason="no cores to share")
def test_a_rank_stays_on_its_share_of_the_cores(ranks: distpatch.LocalGroup) -> None:
    found, here = ranks(Cores().eval(), X).tolist(), sorted(os.sched_getaffinity(0))
    assert found == (here[: len(here) // 2] if len(here) == os.cpu_count() else here)


def test_values(ranks: distpatch.LocalGroup) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    check(ranks, model)
    check(ranks, model, random_tensor((2, 3, 8, 5)), gain=2.0)
    assert not distpatch.model.convert.is_converted(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    vae = tiny_kl()
    latents = random_tensor((1, 4, 6, 5))
    with torch.no_grad():
        expected = vae.decode(latents).sample
    picture = ranks.decode(vae, latents).sample
    assert type(ranks.decode(vae, latents)) is type(vae.decode(latents))
    torch.testing.assert_close(picture, expected, rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        mean = vae.encode(picture).latent_dist.mean
    torch.testing.assert_close(ranks.encode(vae, picture).latent_dist.mean, mean, rtol=1e-10, atol=1e-10)


def test_what_changes_is_sent(ranks: distpatch.LocalGroup) -> None:
    """And nothing else: a call of the same model sends its arguments only, and weights are shared."""
    model = net()
    check(ranks, model)
    sent = ranks._sent
    check(ranks, model)
    assert ranks._sent == sent
    with torch.no_grad():
        model.last.weight.mul_(3)
    check(ranks, model)
    model.last.weight.data.mul_(2)
    check(ranks, model)
    assert ranks._sent == sent
    model.last.weight.data = model.last.weight.data * 2
    check(ranks, model)
    model.offset.data.fill_(2)  # which counts no version
    check(ranks, model)
    model.offset.data.copy_(torch.tensor([0.0, 4, 2]).view(3, 1, 1))
    check(ranks, model)
    model.offset.data.copy_(model.offset.flip(0))
    check(ranks, model)
    model.offset += 1
    check(ranks, model)
    model.scale = 0.5
    check(ranks, model)
    model.last = nn.Conv2d(8, 2, 1).double().eval()
    model.offset = torch.ones(2, 1, 1).double()
    check(ranks, model)
    model.load_state_dict({key: torch.ones_like(value) for key, value in model.state_dict().items()})
    check(ranks, model)
    assert ranks._sent == sent + 7
    other = copy.deepcopy(model)
    check(ranks, other)
    del model
    gc.collect()
    check(ranks, other)
    assert len(ranks._known) <= 2


@pytest.mark.parametrize("shared", [False, True], ids=["ranks on GPUs", "ranks on the CPU"])
def test_what_is_written_to_weights(shared: bool) -> None:
    """Ranks with GPUs have copies of weights that the caller has on the CPU; those on the CPU see them."""
    model = net()
    state = State(pack(model, "a net"), shared=shared)
    assert state.is_of(pack(model, "a net"))
    for write in (
        lambda w: w.mul_(2),
        lambda w: w.data.mul_(2),
        lambda w: w.data.copy_(w.flip(0)),
        lambda w: w.data.view(-1)[3:4].add_(1e-12),
        lambda w: w.detach().numpy().fill(3),
    ):
        with torch.no_grad():
            write(model.last.weight)
        assert state.is_of(pack(model, "a net")) == shared
        state = State(pack(model, "a net"), shared=shared)
    model.last.weight.data = model.last.weight.data.clone()
    assert not state.is_of(pack(model, "a net"))


def test_arguments_are_copied(ranks: distpatch.LocalGroup) -> None:
    """What a model writes to them stays with each rank."""
    model, x, gain = net(), X.clone(), torch.ones(1).double()
    model.doubles_its_gain = True
    with torch.no_grad():
        expected = model(x, gain.clone())
    for _ in range(2):
        torch.testing.assert_close(ranks(model, x, gain=gain), expected, rtol=1e-10, atol=1e-10)
    assert torch.equal(x, X) and gain.item() == 1


def test_random_numbers_are_the_callers(ranks: distpatch.LocalGroup) -> None:
    model = net()
    model.noisy = True
    torch.manual_seed(7)
    with torch.no_grad():
        expected = [model(X)["y"], model(X)["y"]]
    torch.manual_seed(7)
    for value in expected:
        torch.testing.assert_close(ranks(model, X)["y"], value, rtol=1e-10, atol=1e-10)


def test_what_a_model_raises(ranks: distpatch.LocalGroup) -> None:
    """Its own error, with where it was raised; and the ranks go on."""
    model = net()
    with pytest.raises(RuntimeError, match="expected input.*to have 3 channels") as raised:
        ranks(model, random_tensor((1, 4, 8, 8)))
    assert "on rank " in str(raised.value.__cause__) and "conv2d" in str(raised.value.__cause__)
    with pytest.raises(AttributeError, match="upscale"):
        ranks.call(model, "upscale", X)
    check(ranks, model)


BAD = [
    (lambda: net().train(), "is in training mode"),
    (lambda: SimpleNamespace(), "not a SimpleNamespace"),
    (lambda: distpatch.convert_model(net()), "is converted"),
    (lambda: locked(net()), "cannot be sent"),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_refused(ranks: distpatch.LocalGroup, make: Any, message: str) -> None:
    with pytest.raises(DistPatchError, match=message):
        ranks(make(), X)
    check(ranks, net())


def locked(model: Any) -> Any:
    model.lock = threading.Lock()
    return model


def test_too_little_shared_memory(ranks: distpatch.LocalGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=1, f_frsize=512))
    with pytest.raises(DistPatchError, match="of shared memory.*--shm-size"):
        ranks(net(), X)
    monkeypatch.undo()
    check(ranks, net())


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies(ranks: distpatch.LocalGroup, rank: int) -> None:
    """Between calls or in one: a named error, and the next call starts new ones."""
    model = net()
    check(ranks, model)
    ranks._processes[rank].kill()
    with pytest.raises(RankError, match=rf"process of rank {rank} of 2 .*SIGKILL in Net.forward"):
        ranks(model, X)
    check(ranks, model)
    slow = Deadly().eval()
    with pytest.raises(RankError, match=r"process of rank 1 of 2 .*SIGKILL in Deadly.forward"):
        ranks(slow, X)
    check(ranks, model)


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux: /proc/net lists what listens")
def test_what_listens(ranks: distpatch.LocalGroup) -> None:
    """The store of the caller and gloo of the ranks: on 127.0.0.1 and nowhere else."""
    check(ranks, net())
    held: dict[str, int] = {}
    assert ranks._store is not None
    store = f"{ranks._store.port:04X}"  # this process may have others of other tests
    for process in (process.pid for process in ranks._processes):
        links = [os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir() if link.is_symlink()]
        held |= {link[8:-1]: process for link in links if link.startswith("socket:[")}
    lines = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    heard = [(held.get(line[9]), *line[1].split(":")) for line in lines if line[3] == "0A"]
    listening = [(process, address) for process, address, port in heard if process or port == store]
    assert {process for process, _ in listening} == {None, *(process.pid for process in ranks._processes)}
    assert {address for _, address in listening} == {"0100007F"}, listening


def test_sizes() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        distpatch.local_group(0, device="cpu")
    with pytest.raises(ValueError, match="got None; say how many"):
        distpatch.local_group(device="cpu")
    with pytest.raises(ValueError, match="no choice of output"):
        distpatch.local_group(2, device="cpu", output="shard")
    group = distpatch.local_group(2, device="cpu")
    group.close()
    with pytest.raises(DistPatchError, match="it is closed"):
        group(net(), X)


PROGRAM = """
import os, torch, distpatch
class Twice(torch.nn.Module):  # defined here, where no other process can import it
    def forward(self, x):
        return torch.nn.functional.max_pool2d(x, 3, 1, 1) * 2
net, x = Twice().eval(), torch.rand(1, 1, 9, 5)
ranks = distpatch.local_group(2, device="cpu")
assert torch.equal(ranks(net, x), net(x))
print("equal", [process.pid for process in ranks._processes])
"""


def gone(pids: list[int]) -> bool:
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
                return False
        except (FileNotFoundError, ProcessLookupError):
            continue
    return True


@pytest.mark.slow
def test_plain_program(tmp_path: Path) -> None:
    """Without a guard around its main part; and its ranks end with it."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(program)], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("equal"), done.stderr
    assert gone(eval(done.stdout.removeprefix("equal")))


@pytest.mark.slow
def test_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    import nbclient
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    cells = [nbformat.v4.new_code_cell(part) for part in PROGRAM.split("net, x", 1)]
    cells[1].source = "net, x" + cells[1].source
    notebook = nbformat.v4.new_notebook(cells=cells)
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    assert notebook.cells[1].outputs[0].text.startswith("equal")
