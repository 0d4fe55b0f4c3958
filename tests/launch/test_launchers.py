"""The launchers: one host, a real Slurm of one node, two network namespaces as two hosts, the Kubernetes manifest."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
HERE = Path(__file__).parent
IS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT),
    "PYTHON": sys.executable,
    "TORCHRUN": f"{sys.executable} -m torch.distributed.run",
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An autoencoder and latents."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model")
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(path)
    torch.save(torch.randn(1, 4, 9, 6), path / "latents.pt")
    return path


def decode(folder: Path, output: Path) -> list[str]:
    """The command of all launchers here: decode on all ranks, and compare with one."""
    files = [str(path) for path in (folder, folder / "latents.pt", output)]
    return ["-m", "distpatch", "decode", *files, "--check", "--json"]


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env={**ENVIRONMENT, **env}, capture_output=True, text=True, timeout=200)


def assert_exact(output: str, ranks: int) -> None:
    numbers = json.loads(output[output.index("{") : output.rindex("}") + 1])
    assert numbers["ranks"] == ranks and numbers["messages"] > 0 and numbers["error"] < 1e-5


@pytest.mark.slow
def test_one_host(folder: Path, tmp_path: Path) -> None:
    done = run(str(LAUNCH / "one_host.sh"), *decode(folder, tmp_path / "a.png"), PROCESSES="2")
    assert done.returncode == 0, done.stderr
    assert_exact(done.stdout, 2)
    assert (tmp_path / "a.png").stat().st_size > 0


@pytest.fixture
def slurm() -> Iterator[str]:
    """The configuration of a Slurm whose only node is this machine."""
    missing = [tool for tool in ("slurmctld", "slurmd", "sbatch", "munged") if shutil.which(tool) is None]
    if missing or not IS_ROOT:
        pytest.skip(f"needs root, slurm-wlm and munge (apt-get install slurm-wlm munge); missing: {missing}")
    with tempfile.TemporaryDirectory(prefix="slurm", dir="/tmp") as where:
        script = str(HERE / "slurm.sh")
        try:
            subprocess.run([script, "start", where], check=True, timeout=60)
            yield f"{where}/slurm.conf"
        finally:
            subprocess.run([script, "stop", where], check=True, timeout=60)


@pytest.mark.slow
def test_slurm(folder: Path, tmp_path: Path, slurm: str) -> None:
    """Two tasks of one job; everything else the script finds in the job."""
    log = tmp_path / "log"
    options = [f"--output={log}", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0"]
    script = str(LAUNCH / "slurm.sbatch")
    done = run("sbatch", "--parsable", *options, script, *decode(folder, tmp_path / "a.png"), SLURM_CONF=slurm)
    assert done.returncode == 0, done.stderr
    state = "PENDING"
    deadline = time.monotonic() + 200
    while state in {"PENDING", "RUNNING", "COMPLETING"} and time.monotonic() < deadline:
        time.sleep(0.3)  # sbatch --wait looks every few seconds only
        job = run("scontrol", "show", "--oneliner", "job", done.stdout.strip(), SLURM_CONF=slurm).stdout
        state = job.partition("JobState=")[2].split()[0]
    assert state == "COMPLETED", log.read_text() if log.exists() else job
    assert_exact(log.read_text(), 2)


@pytest.fixture
def hosts() -> Iterator[list[list[str]]]:
    """How to run a command on each of two hosts that see each other over a network, and nothing else."""
    if not IS_ROOT or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    name, script = f"dp{os.getpid()}", str(HERE / "hosts.sh")
    made = subprocess.run([script, "start", name], capture_output=True, text=True, timeout=60)
    if made.returncode != 0:
        pytest.skip(f"no network namespaces here: {made.stderr}")
    yield [["ip", "netns", "exec", f"{name}-{host}"] for host in "ab"]
    subprocess.run([script, "stop", name], check=True, timeout=60)


@pytest.mark.slow
def test_two_hosts(folder: Path, tmp_path: Path, hosts: list[list[str]]) -> None:
    """The same line on both, which meet at the first one's address."""
    command = [str(LAUNCH / "several_hosts.sh"), *decode(folder, tmp_path / "a.png")]
    environment = {**ENVIRONMENT, "HOSTS": "2", "RENDEZVOUS": "10.77.0.1:29500", "PROCESSES": "1"}
    environment["RES_OPTIONS"] = "timeout:1 attempts:1"  # torch looks the hosts' names up, and there is nobody to ask
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*host, *command], cwd=ROOT, env=environment, **pipes) for host in reversed(hosts)]
    outcomes = [process.communicate(timeout=200) for process in started]
    assert [process.returncode for process in started] == [0, 0], outcomes
    assert_exact("".join(stdout for stdout, _ in outcomes), 2)  # rank 0 is on one of them


def test_hosts_say_what_is_missing() -> None:
    done = run(str(LAUNCH / "several_hosts.sh"), "train.py")
    assert done.returncode != 0 and "set HOSTS to the number of hosts" in done.stderr


def test_kubernetes_manifest() -> None:
    """Valid by the schema of Kubernetes, and its numbers of hosts and GPUs agree."""
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    for resource in (service, job):
        kubernetes_validate.validate(resource, kubernetes_validate.latest_version(), strict=True)
    spec = job["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    options = dict(option[2:].split("=", 1) for option in container["args"] if option.startswith("--"))
    assert spec["completions"] == spec["parallelism"] == int(options["nnodes"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == int(options["nproc_per_node"])
    name = job["metadata"]["name"]
    assert options["master_addr"] == f"{name}-0.{pod['subdomain']}" and pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert int(options["master_port"]) == container["ports"][0]["containerPort"]
    claimed = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claimed
    assert spec["completionMode"] == "Indexed" and spec["backoffLimit"] == 0


def test_an_invalid_manifest_would_be_found() -> None:
    _, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    job["spec"]["completionMode"] = 2
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)


@pytest.mark.parametrize("script", [*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"], ids=lambda path: path.name)
def test_scripts_parse(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    assert os.access(script, os.X_OK)
