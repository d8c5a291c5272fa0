"""One training on the testbed that is to be hurt: how it is started, watched, helped on its way, and looked over."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from piper_hpc.runs import RunFolder, Status
from piper_hpc.runs.checkpoints import SIDECAR
from piper_hpc.runtime import quota, scratch
from piper_hpc.submit.outcome import observe
from piper_hpc.testbed import network
from piper_hpc.testbed.state import Testbed

STEPS, EVERY = 24, 4
"""Of each training, and of its checkpoints."""
WORDS = (
    *("cluster=testbed", "cluster.calibration=off", "cluster.time_min=10", "cluster.comm_timeout_s=20"),
    *("train=smoke", f"train.steps={STEPS}", f"train.checkpoint_every={EVERY}", "train.timing=false"),
    "train.lr_schedule=constant",
    *("parallelism.pp=1", "parallelism.ep=2", "wait=false"),
)
TWO_NODES = ("cluster.nodes=2", "cluster.ranks_per_node=1")
START_S, END_S = 180.0, 600.0
LEFT_S = 60.0
"""How long a busy machine may take to end a job whose run has its end."""
LOOK_S = 0.05
ASK_S = 1.0


class Missed(Exception):
    """What should have come did not; the message is the row's remark."""


@dataclass
class Scene:
    """A training and the dice of its fault."""

    testbed: Testbed
    runs: Path
    draw: random.Random
    run: RunFolder = field(init=False)

    def start(self, *words: str) -> None:
        """Submit it. Raises Missed where the launcher refuses."""
        command = [sys.executable, "-m", "piper_hpc.launch", *WORDS, f"runs={self.runs}", "format=json", *words]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_S)
        if answer.returncode:
            raise Missed(f"the launcher ended with {answer.returncode}: {answer.stderr.strip()[-300:]}")
        self.run = RunFolder(json.loads(answer.stdout)["path"])

    def resume(self, *words: str) -> None:
        """`jobs resume`, as a user would."""
        command = [sys.executable, "-m", "piper_hpc.jobs", "resume", str(self.run.path), "wait=false", *words]
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_S)
        if answer.returncode:
            raise Missed(f"jobs resume ended with {answer.returncode}: {answer.stderr.strip()[-300:]}")

    @property
    def job(self) -> str:
        """Its id in Slurm."""
        return str(self.run.job()["id"])

    def slurm(self, *words: str) -> str:
        """What one of Slurm's commands prints."""
        environment = os.environ | self.testbed.environment
        answer = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=60)
        return answer.stdout

    def until(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        """Wait. Raises Missed after so many seconds."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                raise Missed(f"not within {seconds:.0f} s: {what}")
            time.sleep(LOOK_S)

    def steps(self) -> int:
        """Rows so far."""
        return len(self.run.metrics())

    def wait_for_a_moment(self, after_step: int = EVERY + 1, before: int = STEPS - 6) -> str:
        """Until a random moment of the training, once it has a whole checkpoint; when that was, in words."""
        step, part_s = self.draw.randint(after_step, before), self.draw.uniform(0.0, 0.4)
        self.until(lambda: self.steps() >= step or self.run.status().ended, START_S, f"step {step}")
        time.sleep(part_s)
        return f"{part_s:.2f} s after step {step}"

    def ended(self) -> bool:
        """Whether the record has an end."""
        return self.run.status().ended

    def requeued(self) -> bool:
        """Whether Slurm has taken the job back into its queue."""
        return "PENDING" in self.state_of(self.job)

    def state_of(self, job: str) -> str:
        """Slurm's word for a job, empty once it is forgotten."""
        return self.slurm("squeue", "--noheader", "--states=all", "--jobs", job, "--format", "%T").strip()

    def take_off_disk(self) -> None:
        """Copy the run to where its file system lies on, once its job is over."""
        self.until(lambda: not self.at_work(), LEFT_S, "the job is over")
        copy = self.runs.with_name(f"{self.runs.name}-kept") / self.run.run_id
        shutil.copytree(self.run.path, copy)
        self.run = RunFolder(copy)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank. Raises Missed where it is not there."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                works = "piper_hpc.worker" in words and words[0] != "srun"
                if works and process.environ().get("SLURM_PROCID") == str(number):
                    return process
        raise Missed(f"rank {number} has no process")

    def processes(self) -> list[psutil.Process]:
        """All that work for the run, by their command line."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            mine = self.run.run_id in " ".join(process.info["cmdline"] or ())
            if mine and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process)
        return found

    def node_of(self, number: int) -> str:
        """The node of a rank."""
        nodes: list[str] = self.run.manifest()["job"]["node_of_rank"]
        return nodes[number]

    def end(self, seconds: float = END_S) -> Status:
        """How the run ends. A job that was requeued does not wait for Slurm's two minutes. Raises Missed where it does
        not end."""
        asked_s = 0.0
        deadline = time.monotonic() + seconds
        while True:
            if (status := self.run.status()).ended:
                return status
            if time.monotonic() - asked_s > ASK_S:
                asked_s = time.monotonic()
                if (status := observe(self.run)).ended:
                    return status
                if "PENDING|BeginTime" in self.slurm("squeue", "--noheader", "--jobs", self.job, "--format", "%T|%r"):
                    self.slurm("scontrol", "update", f"JobId={self.job}", "StartTime=now")
            if time.monotonic() > deadline:
                raise Missed(f"it has not ended within {seconds:.0f} s: {status.state} {status.reason or ''}")
            time.sleep(4 * LOOK_S)

    def losses(self) -> dict[int, tuple[Any, Any]]:
        """Loss and gradient norm of every step, as it went last."""
        rows = sorted(self.run.metrics(), key=lambda row: row["attempt"])
        return {row["step"]: (row["loss"], row["grad_norm"]) for row in rows}

    def classes(self) -> list[str]:
        """How the attempts ended, in order, the last one's included: class, or state where there is none."""
        about = [self.run.attempt(number) for number in self.run.attempts()]
        earlier = [str(each.get("failure_class") or each.get("state")) for each in about[:-1]]
        status = self.run.status()
        return [*earlier, status.failure_class or status.state]

    def repeated(self) -> int:
        """Steps that were trained twice: what the fault cost."""
        return len(self.run.metrics()) - len(self.losses())

    def at_work(self) -> bool:
        """Whether its job, or a process of it, is there still."""
        return self.state_of(self.job) in ("RUNNING", "COMPLETING") or bool(self.processes())

    def groups(self) -> list[str]:
        """Control groups of its jobs' ranks."""
        jobs = {self.job, *(str(self.run.attempt(number).get("job_id")) for number in self.run.attempts())}
        return [
            str(path)
            for home in quota.controllers().values()
            for path in (home.root / quota.PARENT / "testbed").glob("n*/job*")
            if path.name.removeprefix("job") in jobs
        ]

    def left_over(self) -> list[str]:
        """Processes, ports, control groups and files that should be gone."""
        deadline = time.monotonic() + LEFT_S
        # The batch script has its say once the ranks are gone: the job's own end counts.
        while (self.at_work() or self.groups()) and time.monotonic() < deadline:
            time.sleep(0.2)
        found = [f"process {process.pid}" for process in self.processes()]
        for note in self.run.path.glob("rendezvous/*.json"):
            told = json.loads(note.read_text())
            if _listens(f"{network.PREFIX}{told['host']}", told["port"]):
                found.append(f"port {told['port']} on {told['host']}")
        found += self.groups()
        found += [str(path) for path in scratch.SHORT.glob(f"{scratch.PREFIX}{self.run.run_id}*")]
        hidden = (path for path in self.run.path.rglob(".*") if path.parent != self.run.batch)  # submitit keeps its own
        found += [f"draft {path}" for path in hidden]
        folders = self.run.checkpoints.glob("step-*")
        found += [f"{path.name} without {SIDECAR}" for path in folders if not (path / SIDECAR).exists()]
        return found


def _listens(space: str, port: int) -> bool:
    """Whether anything on a node does, on any of its addresses."""
    command = network.command_in(space, "ss", "-tlnH", f"sport = :{port}")
    return bool(subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip())
