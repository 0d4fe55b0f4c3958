"""Which ranks' processes run: those of this host by their state, others by the signs of life that they give."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from distpatch.comm import processes
from distpatch.comm.processes import FARTHER, Process, Processes

OWN, PEER, OTHER = Process("here", 1, "10"), Process("here", 2, "20"), Process("there", 1, "10")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(processes, "time", clock)
    return clock


@pytest.fixture
def state(monkeypatch: pytest.MonkeyPatch) -> dict[int, tuple[str, str]]:
    """What /proc says of each process: state and start."""
    states = {1: ("R", "10"), 2: ("S", "20")}
    monkeypatch.setattr(processes, "_stat", lambda pid: states.get(pid, ("", "")))
    return states


@pytest.mark.parametrize("runs", ["R", "S", "D", "I"])
def test_one_that_runs(clock: Clock, state: dict[int, tuple[str, str]], runs: str) -> None:
    """However long it computes, or waits for its disk."""
    state[2] = (runs, "20")
    ranks = Processes([OWN, PEER], 0)
    for _ in range(3):
        assert ranks.gone(1.0) == {}
        clock.now += 3600


@pytest.mark.parametrize("ended", [("Z", "20"), ("X", "20"), ("", ""), ("R", "21")], ids=str)
def test_one_that_has_ended(state: dict[int, tuple[str, str]], ended: tuple[str, str]) -> None:
    """A zombie, none, or another one of the same number; whatever the patience is."""
    state[2] = ended
    assert Processes([OWN, PEER], 0).gone(None) == {1: "has ended (process 2)"}


@pytest.mark.parametrize("stopped", ["T", "t"])
def test_one_that_is_stopped(clock: Clock, state: dict[int, tuple[str, str]], stopped: str) -> None:
    ranks = Processes([OWN, PEER], 0)
    state[2] = (stopped, "20")
    assert ranks.gone(1.0) == {}
    clock.now += 0.9
    assert ranks.gone(1.0) == {}
    clock.now += 0.2
    assert ranks.gone(1.0) == {1: "is stopped (process 2)"}
    assert ranks.gone(None) == {}


def test_one_that_went_on_in_between(clock: Clock, state: dict[int, tuple[str, str]]) -> None:
    """The time that it is stopped is counted anew; and so it is when nobody has waited for a while."""
    ranks = Processes([OWN, PEER], 0)
    for after in (lambda: state.update({2: ("R", "20")}) or ranks.gone(1.0), ranks.listen_anew):
        state[2] = ("T", "20")
        assert ranks.gone(1.0) == {}
        clock.now += 0.9
        after()
        state[2] = ("T", "20")
        assert ranks.gone(1.0) == {}
        clock.now += 0.9
        assert ranks.gone(1.0) == {}
        ranks.listen_anew()


def test_ranks_of_one_process(state: dict[int, tuple[str, str]]) -> None:
    """Threads: there is no other process to look at, and none to listen to."""
    ranks = Processes([OWN, OWN], 0)
    assert (ranks.here, ranks.elsewhere) == ({}, [])


def test_all_ranks_of_other_hosts_are_listened_to() -> None:
    """Those that see a stopped process may not be waiting, and say nothing of it."""
    ranks = [OWN, PEER, OTHER, Process("third", 7, "1")]
    assert [Processes(ranks, rank).elsewhere for rank in range(4)] == [[2, 3], [2, 3], [0, 1, 3], [0, 1, 2]]
    assert set(Processes(ranks, 0).here) == {1}


def test_where_no_host_is_known(state: dict[int, tuple[str, str]]) -> None:
    """No /proc: nobody is looked at, all are listened to."""
    unknown = [Process("", 1, ""), Process("", 2, "")]
    state.clear()
    ranks = Processes(unknown, 0)
    assert ranks.gone(1.0) == {} and ranks.elsewhere == [1]


def test_silence(clock: Clock) -> None:
    ranks, sign = Processes([OWN, OTHER], 0), ["1"]
    silent = lambda: ranks.silent(lambda ranks: sign, 1.0)  # noqa: E731
    assert silent() == {}
    clock.now += FARTHER - 0.1
    assert silent() == {}
    sign[0] = "2"
    assert silent() == {}
    clock.now += FARTHER - 0.1
    assert silent() == {}
    clock.now += 0.2
    assert list(silent()) == [1] and "no sign of life" in silent()[1]


def test_silence_while_nobody_listened(clock: Clock) -> None:
    """A rank that begins to wait after an hour of work hears of the others first."""
    ranks = Processes([OWN, OTHER], 0)
    assert ranks.silent(lambda ranks: ["1"], 1.0) == {}
    clock.now += 3600
    ranks.listen_anew()
    assert ranks.silent(lambda ranks: ["1"], 1.0) == {}
    assert ranks.silent(lambda ranks: ["1"], None) == {}


def test_one_of_several_is_silent(clock: Clock) -> None:
    ranks, signs = Processes([OWN, OTHER, Process("third", 7, "1")], 0), ["1", "1"]
    assert ranks.silent(lambda ranks: signs, 1.0) == {}
    clock.now += FARTHER + 0.1
    signs[0] = "2"
    assert list(ranks.silent(lambda ranks: signs, 1.0)) == [2]


def test_no_sign_at_all(clock: Clock) -> None:
    """A rank that has never given one."""
    ranks = Processes([OWN, OTHER], 0)
    assert ranks.silent(lambda ranks: [""], 1.0) == {}
    clock.now += FARTHER + 0.1
    assert list(ranks.silent(lambda ranks: [""], 1.0)) == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_real_processes() -> None:
    """This one runs; one that was killed has ended, reaped or not."""
    own = Process.own()
    assert own.pid == os.getpid() and own.host and own.started
    child = subprocess.Popen(["sleep", "60"])
    peer = Process(own.host, child.pid, processes._stat(child.pid)[1])
    ranks = Processes([own, peer], 0)
    assert ranks.gone(1.0) == {}
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert processes._stat(child.pid)[0] == "Z" and 1 in ranks.gone(1.0)
    child.wait()
    assert 1 in ranks.gone(1.0)
