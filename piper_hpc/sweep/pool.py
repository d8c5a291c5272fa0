"""`python -m piper_hpc.sweep.pool SWEEP GROUP`: what each task of a pool does in its job.

It takes a point of the shared list, runs it as a step, and takes the next while its predicted time fits what is left of
the job. A point that hangs is ended, and one that fails has failed: the pool goes on. What it held when its job was
taken away is free again for whoever finds it gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from piper_hpc.runs import RecordError, RunFolder, Status
from piper_hpc.runs.sweeps import Claim, SweepFolder, SweepPoint
from piper_hpc.runtime.slurm import ask
from piper_hpc.submit.outcome import failure_status
from piper_hpc.sweep.owner import Owner, gone, this_process
from piper_hpc.sweep.steps import LocalStarter, SlurmStarter, Starter, Step

INTERRUPTED = 130
POLL_S = 0.5
STALL_STEPS = 10
"""Predicted steps without one that was taken, after which a point hangs."""
MOST_CLAIMS = 8
"""Times that a point is taken up: one that takes its nodes down would do so for ever."""
TAKEN = ("timeout", "preempted", "node_fail")
"""Classes of a run that its job's end cut off, or that left before it: such a point has not failed, and another job
goes on with it."""
MARGIN = 1.15
"""Predicted times are multiplied by it before they are held against what is left of a job."""


class Left:
    """Which points of a group may be taken, by their claims."""

    def __init__(self, sweep: SweepFolder, group: int | None, me: Owner | None = None) -> None:
        self._sweep, self._me = sweep, me
        self._points = [one for one in sweep.points() if one.state == "new" and group in (None, one.group)]
        self._known: dict[tuple[int, int], Claim] = {}

    def look(self) -> tuple[list[tuple[SweepPoint, int]], list[SweepPoint]]:
        """Points that nobody holds, each with the number of its next claim, and points that somebody works at."""
        claims = self._sweep.claims(self._known)
        newest = {one.index: claims[one.index][-1] for one in self._points if one.index in claims}
        held = [claim for claim in newest.values() if not claim.end]
        lost = {claim.index for claim, is_gone in zip(held, self._gone(held), strict=True) if is_gone}
        free, busy = [], []
        for point in self._points:
            claim = newest.get(point.index)
            if claim is None or (point.index in lost and claim.attempt + 1 < MOST_CLAIMS):
                free.append((point, 0 if claim is None else claim.attempt + 1))
            elif not claim.end and point.index not in lost:
                busy.append(point)
        return free, busy

    def _gone(self, held: list[Claim]) -> list[bool]:
        return gone((claim.owner for claim in held), self._me)


@dataclass(frozen=True)
class Rules:
    """Of when a point hangs: start_s without a sign of life before its first step and after its last; stall_s, and
    STALL_STEPS predicted steps, between them."""

    start_s: float
    stall_s: float


class Pool:
    """Drains a group of a sweep. tell: called every now and then while a point runs; log: with a line on each."""

    def __init__(
        self,
        sweep: SweepFolder,
        group: int | None,
        starter: Starter,
        rules: Rules,
        tell: Callable[[], None] = lambda: None,
        log: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self._sweep, self._starter, self._rules, self._tell, self._log = sweep, starter, rules, tell, log
        self._me = this_process()
        self._left = Left(sweep, group, self._me)
        self._overhead_s: float | None = None
        self.stopping = False
        self.was_left = False
        """Whether a point saved and left before the end of the job."""

    def drain(self) -> bool:
        """Work until nothing is left that fits; True where no point is left, with anybody."""
        while not self.stopping:
            free, busy = self._left.look()
            if not free:
                return not busy
            taken = self._take(free)
            if taken is None:
                return False
            self._run(*taken)
        return False

    def _take(self, free: list[tuple[SweepPoint, int]]) -> tuple[SweepPoint, Claim] | None:
        left_s = self._starter.left_s()
        for point, attempt in free:
            if left_s is not None and self._needed_s(point) > left_s:
                continue
            owner = self._me | {"time_s": time.time()}
            if self._sweep.claim(point.index, attempt, owner):
                return point, Claim(point.index, attempt, owner, {})
        return None

    def _needed_s(self, point: SweepPoint) -> float:
        """Of a point whose time is not predicted, as long as nothing is known: none."""
        if point.total_s is None or point.step_time_s is None or point.steps is None:
            return 0.0
        if self._overhead_s is None:
            return MARGIN * point.total_s
        return MARGIN * (self._overhead_s + point.steps * point.step_time_s)

    def _run(self, point: SweepPoint, claim: Claim) -> None:
        run = self._sweep.run(point)
        assert run is not None, "a new point has a run"
        if run.status().ended:  # of an owner before this one, whose job was taken away
            run.write_status(Status("pending", run.status().attempt))
        self._log(f"point {point.index}: {run.run_id}")
        hangs = None
        try:
            hangs = self._watch(run, point, self._starter.start(run))
        except Exception as error:  # a full disk, a bad record: this point's, not the pool's
            run.write_status(Status("failed", 0, "error", f"the pool could not run it: {error}"))
        status = run.status()
        left = status.failure_class in TAKEN or (status.state == "pending" and status.reason is not None)
        # At a warning alone: where this process is ended too, as by scancel, Slurm decides what becomes of the job.
        self.was_left = self.was_left or (left and not self.stopping)
        if left or (not status.ended and hangs is None and (self.stopping or self._starter.is_ending())):
            self.stopping = True
            return  # the claim stays open: whoever finds this job gone goes on with the point
        if hangs is not None:
            run.write_status(Status("failed", max(status.attempt, run.newest_attempt()), "hang", hangs, status.step))
        elif not status.ended:
            run.write_status(failure_status(run, status))
        status = run.status()
        ended_s = time.time()
        self._learn(run, ended_s - claim.owner["time_s"])
        end = {"time_s": ended_s, **{key: asdict(status)[key] for key in ("state", "failure_class", "reason")}}
        self._sweep.end_claim(claim, end)
        self._log(f"point {point.index}: {status.state} {status.failure_class or ''}".rstrip())
        self._tell()

    def _watch(self, run: RunFolder, point: SweepPoint, step: Step) -> str | None:
        """Wait for a step's end; why it was ended, if it had to be."""
        before = seen = self._signs(run)
        since = time.monotonic()
        while not step.ended():
            try:
                self._tell()
                time.sleep(POLL_S)
            except KeyboardInterrupt:  # of a sweep on this machine; its claim stays open
                step.kill()
                raise
            now = self._signs(run)
            if now != seen:
                seen, since = now, time.monotonic()
            # What an owner before this one left is no step of this start.
            limit_s = (
                self._limit_s(run, point) if seen["metrics.jsonl"] != before["metrics.jsonl"] else self._rules.start_s
            )
            silent_s = time.monotonic() - since
            if silent_s > limit_s and not self.stopping:
                step.kill()
                rows = run.metrics()
                where = f"after step {rows[-1]['step']}" if rows else "before its first step"
                return f"no sign of life for {silent_s:.0f} s {where}, of {limit_s:.0f} s that it had"
        return None

    def _limit_s(self, run: RunFolder, point: SweepPoint) -> float:
        """How long a run that takes steps may be silent now."""
        with suppress(RecordError):
            rows = run.metrics()
            between = rows and point.steps is not None and rows[-1]["step"] + 1 < point.steps
            if between:
                predicted_s = point.step_time_s or float((run.prediction() or {}).get("step_time_s", 0.0))
                return max(self._rules.stall_s, STALL_STEPS * predicted_s)
        return self._rules.start_s

    @staticmethod
    def _signs(run: RunFolder) -> dict[str, int]:
        """What grows while a run lives: bytes by file."""
        sizes = {"metrics.jsonl": 0, "measurements.jsonl": 0}
        for name in sizes:
            with suppress(OSError):
                sizes[name] = (run.path / name).stat().st_size
        return sizes

    def _learn(self, run: RunFolder, took_s: float) -> None:
        """What start and end of a point take here: the least seen, as a first one may have measured operators."""
        with suppress(RecordError, KeyError, TypeError):
            rows = run.metrics()
            if rows and run.status().state == "completed":
                own_s = took_s - sum(row["step_time_s"] for row in rows)
                self._overhead_s = own_s if self._overhead_s is None else min(self._overhead_s, own_s)


def rules_of(document: Mapping[str, Any]) -> Rules:
    """As the sweep's document has them."""
    return Rules(float(document["start_s"]), float(document["stall_s"]))


def main(words: list[str]) -> int:
    """The command."""
    sweep, group = SweepFolder(Path(words[0])), None if words[1] == "all" else int(words[1])
    sweep.take_umask()
    document, me = sweep.document(), this_process()
    in_slurm = me["scheduler"] == "slurm"
    starter: Starter = LocalStarter()
    if in_slurm and group is not None:
        starter = SlurmStarter(document["groups"][group]["container"], me["id"])
    pool = Pool(sweep, group, starter, rules_of(document))

    def stop(number: int, frame: FrameType | None) -> None:
        pool.stopping = True  # the steps are told by Slurm itself

    signal.signal(signal.SIGTERM, stop)
    for warning in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)
    try:
        is_over = pool.drain()
    except KeyboardInterrupt:  # jobs cancel, of a sweep on this machine
        return INTERRUPTED
    if pool.was_left and in_slurm:
        # Warned of its end, as at a preemption. Slurm starts again what it takes, but not what ends by itself before.
        ask(["scontrol", "requeue", me["id"]], {})
    if is_over and in_slurm:
        # Tasks that still wait would find nothing.
        ask(["scancel", "--state=PENDING", os.environ["SLURM_ARRAY_JOB_ID"]], {})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
