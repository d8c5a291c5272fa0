"""The doctor: what it finds on hosts that lack something, and files that it writes and the launcher takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from piper_hpc.config.schema import ClusterConfig
from piper_hpc.doctor import host, slurm, write
from piper_hpc.doctor.__main__ import main
from piper_hpc.doctor.finding import Finding

LOCAL = ClusterConfig(name="here")
SLURM = ClusterConfig(name="there", scheduler="slurm", partition="gpu", nodes=4)
SINFO = """cpu 10 64 256000 2-00:00:00 (null)
gpu 16 64 512000 12:00:00 gpu:a100:4(S:0-1)
debug 2 64 512000 30:00 gpu:4
broken line
"""


def state(found: list[Finding], subject: str) -> str:
    (one,) = (each for each in found if each.subject == subject)
    assert one.state == "ok" or one.mend, "what is not well says how to mend it"
    return one.state


def test_this_machine_can_train(tmp_path: Path) -> None:
    found = host.examine(LOCAL, tmp_path / "runs")
    assert {state(found, subject) for subject in ("Python", "torch", "runs")} == {"ok"}
    assert not (tmp_path / "runs").exists() and not list(tmp_path.iterdir()), "looking leaves nothing behind"


def test_a_torch_without_the_devices_back_end_is_found() -> None:
    found = list(host.torch_build(replace(LOCAL, device="xpu")))
    assert found[0].state == "failed" and "xccl" in found[0].mend


def test_names_and_interfaces_that_lead_nowhere_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.socket, "gethostname", lambda: "no-such-host.invalid")
    assert state(list(host.names(SLURM)), "host name") == "failed"
    monkeypatch.setattr(host.socket, "gethostname", lambda: "localhost")
    assert state(list(host.names(SLURM)), "host name") == "warning"
    assert state(list(host.names(LOCAL)), "host name") == "ok"
    named = replace(SLURM, environment={"GLOO_SOCKET_IFNAME": "hsn0", "NCCL_SOCKET_IFNAME": "lo"})
    found = list(host.interfaces(named))
    assert state(found, "GLOO_SOCKET_IFNAME") == "failed" and state(found, "NCCL_SOCKET_IFNAME") == "ok"


def test_runs_that_compute_nodes_would_not_see_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "_file_system", lambda place: "tmpfs")
    assert state(list(host.files(SLURM, tmp_path)), "runs") == "failed"
    assert state(list(host.files(LOCAL, tmp_path)), "runs") == "ok"


def with_commands(folder: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """A PATH with these commands alone before the system's, each a shell script."""
    for name, text in scripts.items():
        command = folder / name
        command.write_text(f"#!/bin/sh\n{text}\n")
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")


QUIET = dict.fromkeys(slurm.COMMANDS, "exit 0")


def test_a_slurm_that_answers_is_well_and_one_that_does_not_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = QUIET | {
        "scontrol": "echo 'SLURM_VERSION = 25.11.4'", "sinfo": "echo gpu up 12:00:00 16", "sacct": "exit 1"
    }  # fmt: skip
    with_commands(tmp_path, monkeypatch, **answers)
    found = slurm.examine(SLURM, {})
    assert [each.state for each in found] == ["ok", "ok", "warning"]
    assert found[0].found == "25.11.4" and "16 nodes, limit 12:00:00" in found[1].found
    assert state(slurm.examine(replace(SLURM, partition="nosuch"), {}), "partition") == "failed"
    assert state(slurm.examine(replace(SLURM, nodes=17), {}), "partition") == "failed"
    with_commands(tmp_path, monkeypatch, scontrol="echo gone >&2; exit 1")
    assert state(slurm.examine(SLURM, {}), "Slurm") == "failed"


def test_nodes_that_do_not_answer_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = json.dumps(Finding("torch", "ok", "2.13", where="n1").document())
    with_commands(tmp_path, monkeypatch, **QUIET | {"srun": f"echo noise; echo '{told}'"})
    found = slurm.on_nodes(SLURM, {}, tmp_path / "runs")
    assert [each.where for each in found] == ["n1", ""]
    assert state(found, "compute nodes") == "failed" and "1 of 4" in found[1].found


def test_partitions_are_read_from_sinfo() -> None:
    gpu, debug, cpu = write.partitions(SINFO)
    assert (gpu.name, gpu.gpus, gpu.gpu, gpu.nodes, gpu.limit_min) == ("gpu", 4, "a100", 16, 720)
    assert (debug.limit_min, debug.gpus, cpu.gpus, cpu.limit_min) == (30, 4, 0, 2880)
    assert write.minutes("infinite") == 1440


@pytest.mark.slow  # a launch
def test_files_that_are_written_make_a_dry_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The ten minutes of a newcomer: the doctor writes, the launcher shows what it would submit."""
    with_commands(tmp_path, monkeypatch, sinfo=f"cat <<'E'\n{SINFO}E")
    site = tmp_path / "a site"
    assert main(["--write", str(site / "mysite.yaml")]) == 0
    assert main(["--write", str(site / "mysite.yaml")]) == 2, "what is there is not replaced"
    assert main(["--write", str(tmp_path / "x.yaml"), "--partition", "nosuch"]) == 2
    work = tmp_path / "work"
    work.mkdir()
    ended = subprocess.run(
        [sys.executable, "-m", "piper_hpc.launch", "cluster=mysite", "task=microbench", "dry_run=true"],
        cwd=work, env=os.environ | {"PIPER_CONF": str(site)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    for line in ("--partition=gpu", "--gpus-per-node=4", "--cpus-per-task=16", "--nodes=2"):
        assert f"#SBATCH {line}\n" in ended.stdout
    assert "2 nodes, 8 ranks" in ended.stdout and "cluster=mysite submit=false" in ended.stdout


def test_a_mistake_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["on=moon"]) == 2 and "on=nodes" in capsys.readouterr().err
    assert main(["cluster.qoss=x"]) == 2
    assert main(["--write", "mysite.toml"]) == 2
