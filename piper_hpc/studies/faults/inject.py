"""The faults: each starts a training, hurts it at a random moment, and says by which class it must be known then."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from piper_hpc.runs import Status
from piper_hpc.runs.checkpoints import newest
from piper_hpc.runs.folder import OWN_END
from piper_hpc.runtime import slurm
from piper_hpc.studies.faults.scene import EVERY, STEPS, TWO_NODES, Missed, Scene
from piper_hpc.submit.outcome import AWAITED, observe
from piper_hpc.testbed import outages

LONG = 3 * STEPS
"""Steps of a training that does not fit a minute."""
ODD = (
    "sleep 60",
    "echo 'slurm_load_jobs error: Unable to contact' >&2; exit 1",
    "echo '|||'",
    "head -c 900 /dev/urandom",
)
"""What squeue does where it is odd."""


@dataclass(frozen=True)
class Fault:
    """hurt: starts the training, does the harm and mends it, and says when it was. classes: one of them is how the
    first attempt ends; empty where the training must not notice. resumed: it ends there, in `state`, and goes on by
    `jobs resume` alone, with these words. repeats: the most steps that may be trained twice. alone: it
    harms more than its own training. steps: of the training."""

    hurt: Callable[[Scene], str]
    classes: tuple[str, ...]
    resumed: tuple[str, ...] | None = None
    state: str = "failed"
    repeats: int = 2 * EVERY
    alone: bool = False
    steps: int = STEPS


def rank_killed(scene: Scene) -> str:
    """SIGKILL for a rank."""
    scene.start(*TWO_NODES)
    when, rank = scene.wait_for_a_moment(), scene.draw.randrange(2)
    scene.rank(rank).kill()
    return f"rank {rank}, {when}"


def rank_stopped(scene: Scene) -> str:
    """SIGSTOP for a rank: it hangs."""
    scene.start(*TWO_NODES)
    when, rank = scene.wait_for_a_moment(), scene.draw.randrange(2)
    process = scene.rank(rank)
    process.suspend()
    scene.until(lambda: "state" in scene.run.attempt(0) or scene.ended(), 180, "it is noticed")
    about = scene.run.attempt(0)
    reason = about.get("reason") or scene.run.status().reason or ""
    if f"rank {rank} did not come to the " not in reason:
        raise Missed(f"rank {rank} hung, and the reason is: {reason}")
    if not list(scene.run.logs.glob("attempt-0/*.flight.json")):
        raise Missed("no flight recorder's dump is in the folder")
    return f"rank {rank}, {when}"


def slurmd_killed(scene: Scene) -> str:
    """SIGKILL for the slurmd of one of the job's nodes."""
    scene.start(*TWO_NODES)
    when, rank = scene.wait_for_a_moment(), scene.draw.randrange(2)
    node = scene.node_of(rank)
    outages.kill_node_daemon(scene.testbed, node)
    try:
        scene.until(lambda: scene.requeued() or scene.ended(), 60, "Slurm requeues the job")
        time.sleep(2.0)
    finally:
        outages.start_node_daemon(scene.testbed, node)
    return f"{node}, {when}"


def link_cut(scene: Scene) -> str:
    """The link of one of the job's nodes, for longer than ranks wait for one another."""
    scene.start(*TWO_NODES)
    when, rank = scene.wait_for_a_moment(), scene.draw.randrange(2)
    node = scene.node_of(rank)
    outages.cut_link(node)
    try:
        scene.until(lambda: bool(scene.run.failures(0)) or scene.ended(), 60, "a rank gives up")
        time.sleep(scene.draw.uniform(0.0, 3.0))
    finally:
        outages.mend_link(node)
    return f"{node}, {when}"


def signalled(scene: Scene) -> str:
    """`scancel --signal=USR1`: a user asks for the end."""
    scene.start(*TWO_NODES)
    when = scene.wait_for_a_moment()
    scene.slurm("scancel", "--signal=USR1", scene.job)
    return when


def preempted(scene: Scene) -> str:
    """A job of a higher partition takes the nodes."""
    scene.start(*TWO_NODES)
    when = scene.wait_for_a_moment()
    nodes = str(len(scene.testbed.nodes))
    words = ("--partition=urgent", f"--nodes={nodes}", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    job = scene.slurm("sbatch", "--parsable", *words).strip()
    scene.until(
        lambda: "RUNNING" in scene.slurm("squeue", "-h", "-t", "all", "-j", job, "-o", "%T"), 60, "it is preempted"
    )
    scene.until(lambda: "RUNNING" not in scene.state_of(job), 60, "the other job ends")
    return when


def time_limit(scene: Scene) -> str:
    """A time limit that the whole training does not fit: it saves and leaves by itself."""
    margin_s, how = scene.draw.uniform(8.0, 16.0), scene.draw.choice(("requeue", "chain"))
    words = ("cluster.time_min=1", f"cluster.leave_margin_s={margin_s:.1f}", f"cluster.go_on={how}")
    scene.start(*TWO_NODES, *words, f"train.steps={LONG}")
    scene.until(lambda: "state" in scene.run.attempt(0) or scene.ended(), 180, "it leaves")
    return f"a minute, {margin_s:.0f} s kept free, {how}"


def disk_full(scene: Scene) -> str:
    """No room for the next checkpoint in the file system of the run."""
    with small_disk(Path(scene.runs)):
        scene.start(*TWO_NODES)
        when = scene.wait_for_a_moment(before=STEPS - 10)
        ballast, left = Path(scene.runs) / "ballast", scene.draw.randint(2, 12) << 20
        # An old checkpoint that is removed just now must not make room after all.
        scene.until(lambda: _fill(ballast, left) or scene.ended(), 60, "it ends")
        status = scene.end()
        found = scene.left_over()
        whole = newest(scene.run.checkpoints)
        if found or whole is None:
            raise Missed(f"{status.failure_class}; left over: {found}; the newest whole checkpoint: {whole}")
        ballast.unlink()
        scene.resume()
        scene.end()
        scene.take_off_disk()
    return f"{left >> 20} MiB left, {when}"


def _fill(ballast: Path, left_bytes: int) -> bool:
    """Make a file so large that this much is left of its file system; False."""
    there = os.statvfs(ballast.parent)
    surplus = there.f_bavail * there.f_frsize - left_bytes
    with ballast.open("ab") as file, contextlib.suppress(OSError):
        if surplus > 0:
            os.posix_fallocate(file.fileno(), file.tell(), surplus)
    return False


def torn_checkpoint(scene: Scene) -> str:
    """The newest checkpoint loses the end of a file, and a rank is killed."""
    scene.start(*TWO_NODES, "train.checkpoint_keep=3")
    when = scene.wait_for_a_moment(after_step=2 * EVERY + 1)
    path = newest(scene.run.checkpoints)
    assert path is not None
    file = sorted(path.glob("*.safetensors"))[scene.draw.randrange(2)]
    os.truncate(file, scene.draw.randrange(file.stat().st_size))
    scene.rank(scene.draw.randrange(2)).kill()
    return f"{path.name}/{file.name}, {when}"


def checkpoint_cut(scene: Scene) -> str:
    """All ranks are killed while a checkpoint is written."""
    scene.start(*TWO_NODES)
    when = scene.wait_for_a_moment()
    processes = [scene.rank(0), scene.rank(1)]
    done = scene.steps() // EVERY
    scene.until(lambda: scene.steps() >= (done + 1) * EVERY or scene.ended(), 30, "a checkpoint begins")
    time.sleep(scene.draw.uniform(0.0, 0.1))
    for process in processes:
        process.kill()
    return when


def torn_jsonl(scene: Scene) -> str:
    """Rank 0 is killed, and the last row of metrics is cut off in its middle."""
    scene.start(*TWO_NODES)
    when = scene.wait_for_a_moment()
    scene.rank(0).kill()
    path = scene.run.path / "metrics.jsonl"
    last = len(path.read_bytes().splitlines(keepends=True)[-1])
    os.truncate(path, path.stat().st_size - scene.draw.randrange(1, last))
    return f"rank 0, {when}"


def slurmctld_restarted(scene: Scene) -> str:
    """slurmctld is killed, and started again after a while."""
    scene.start(*TWO_NODES)
    when, gap_s = scene.wait_for_a_moment(), scene.draw.uniform(0.5, 6.0)
    outages.kill_controller()
    try:
        time.sleep(gap_s)
    finally:
        outages.start_controller(scene.testbed)
    return f"for {gap_s:.1f} s, {when}"


def squeue_odd(scene: Scene) -> str:
    """Who looks gets no answer of squeue, or one that makes no sense."""
    scene.start(*TWO_NODES)
    when = scene.wait_for_a_moment()
    kind = scene.draw.choice(ODD)
    for _ in range(3):
        with odd_commands(kind):
            seen = observe(scene.run)
        if seen.state not in ("running", "completed"):
            raise Missed(f"the observer took it for {seen.state} {seen.failure_class}")
    return f"`{kind.split(';')[0][:30]}`, {when}"


def late_status(scene: Scene) -> str:
    """The record's end comes later than Slurm's word of it."""
    scene.start(*TWO_NODES)
    moved = scene.run.path.with_name(f"{scene.run.run_id}-late")
    scene.until(lambda: scene.run.said_its_end(), 120, "it ends")
    scene.until(lambda: not scene.slurm("squeue", "-h", "-j", scene.job).strip(), 30, "Slurm knows")
    own, status = (scene.run.path / OWN_END), (scene.run.path / "status.json")
    kept, text = own.read_text(), status.read_text()
    moved.write_text(kept)
    own.unlink()
    status.write_text(text.replace('"completed"', '"running"'))
    seen = observe(scene.run)
    late_s = scene.draw.uniform(0.0, 3.0)
    time.sleep(late_s)
    own.write_text(moved.read_text())
    moved.unlink()
    if (seen.state, seen.reason) != ("running", AWAITED):
        raise Missed(f"before its record came it was taken for {seen.state} {seen.failure_class} {seen.reason}")
    return f"{late_s:.1f} s"


def memory_limit(scene: Scene) -> str:
    """A rank's memory limit comes down to less than it needs."""
    scene.start("cluster.nodes=1", "cluster.ranks_per_node=2")
    when, rank = scene.wait_for_a_moment(), scene.draw.randrange(2)
    process = scene.rank(rank)
    outages.limit_memory(process.pid)
    return f"rank {rank}, {when}"


FAULTS: dict[str, Fault] = {
    "rank killed": Fault(rank_killed, ("killed",)),
    "rank stopped": Fault(rank_stopped, ("hang",)),
    "slurmd killed": Fault(slurmd_killed, ("node_fail",), alone=True),
    "link cut": Fault(link_cut, ("hang", "comm", "node_fail", "killed"), alone=True),
    "signal": Fault(signalled, ("completed",), resumed=(), state="completed", repeats=0),
    "preempted": Fault(preempted, ("preempted",), repeats=0, alone=True),
    "time limit": Fault(time_limit, ("timeout",), repeats=0, steps=LONG),
    "disk full": Fault(disk_full, ("disk_full",)),
    "torn checkpoint": Fault(torn_checkpoint, ("killed",), repeats=3 * EVERY),
    "checkpoint cut": Fault(checkpoint_cut, ("killed",)),
    "torn JSONL": Fault(torn_jsonl, ("killed",)),
    "slurmctld restarted": Fault(slurmctld_restarted, (), repeats=0, alone=True),
    "odd squeue": Fault(squeue_odd, (), repeats=0, alone=True),
    "late status": Fault(late_status, (), repeats=0),
    "memory limit": Fault(memory_limit, ("oom",), resumed=()),
}
"""By name, in the order in which seeds take turns."""


@contextmanager
def small_disk(folder: Path, mib: int = 160) -> Iterator[None]:
    """A file system of its own at `folder`, in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={mib}m,mode=700", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@contextmanager
def odd_commands(script: str) -> Iterator[None]:
    """squeue does this instead, for this process, which waits for no answer longer than a second."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "squeue"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        with patch.object(slurm, "TIMEOUT_S", 1.0), patch.dict(os.environ, PATH=f"{folder}:{os.environ['PATH']}"):
            yield


def ends_as(fault: Fault, scene: Scene) -> Status:
    """The run's end, gone on by `jobs resume` where it must be."""
    status = scene.end()
    if fault.resumed is not None:
        if status.state != fault.state or (status.failure_class or status.state) not in fault.classes:
            raise Missed(f"it ended as {status.state} {status.failure_class}: {status.reason}")
        scene.resume(*fault.resumed)
        status = scene.end()
    return status
