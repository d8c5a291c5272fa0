"""When a run saves and leaves before its end, by the job's end time and by signals; and why, once it has."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

from piper_hpc.runtime.slurm import address
from piper_hpc.submit.evidence import printed, read_file, taken_by
from piper_hpc.submit.payload import ENDING
from piper_hpc.submit.scheduler import JobFacts, job_facts, nodes_down
from piper_hpc.submit.script import SIGNAL_S
from piper_hpc.tasks.context import Context

STOP_SIGNAL = signal.SIGUSR1
"""What asks a run to end after the step it is in, with a checkpoint: Slurm sends it before a time limit and to a job
that is to be preempted, users with `scancel --signal=USR1 JOB`."""
EARLY_S = 60.0
"""How much earlier than asked Slurm may send it (sbatch(1), --signal)."""
LOOK_AGAIN_S = 60.0
PRINTED_S = 1.0
"""How long what Slurm prints of a job's end may take to reach its output."""


@dataclass(frozen=True)
class Left:
    """Why training ended before its last step. failure_class: of what the run goes on after (`timeout`, `preempted`);
    None where somebody asked for the end. state: `pending` where Slurm has the job start again by itself."""

    reason: str
    failure_class: str | None = None
    state: str = "completed"


class Leaving:
    """One rank's part in the decision; the first one of a job of Slurm's also looks at the clock."""

    def __init__(self, *, job_id: str | None, margin_s: float, causes: Callable[[str], Sequence[str]] = tuple) -> None:
        """job_id: of Slurm's, on the rank that looks at the clock; margin_s: how much earlier than needed it leaves;
        causes: why Slurm ended the job, as the file of its output has it by now."""
        self._causes, self._restarts = causes, int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        self._asked, self._job_id, self._margin_s = Event(), job_id, margin_s
        self._end_s, self._looked_s = self._job_end_s(), time.time()
        self._by_time = False
        signal.signal(STOP_SIGNAL, lambda number, frame: self._asked.set())

    @staticmethod
    def of(context: Context) -> Leaving:
        """Of this rank; from now on SIGUSR1 asks for an end."""
        cluster = context.experiment.cluster
        watches = context.is_first and cluster.scheduler == "slurm"
        job_id = context.rank_env.job_id if watches else None
        run, attempt = context.run, context.rank_env.attempt

        def causes(output: str) -> Sequence[str]:
            """Of a script that was submitted by hand, which prints elsewhere, those of attempts before it too."""
            in_folder = Path(output).is_relative_to(run.logs) or not Path(output).is_file()
            return (printed(run, attempt) if in_folder else read_file(Path(output))).causes

        return Leaving(job_id=job_id, margin_s=cluster.leave_margin_s, causes=causes)

    def _facts(self) -> JobFacts | None:
        return None if self._job_id is None else job_facts(self._job_id, address(os.environ))

    def _job_end_s(self) -> float | None:
        facts = self._facts()
        return None if facts is None else facts.end_s

    def asked(self, needed_s: float) -> bool:
        """Whether this rank asks to end; needed_s: what one more step and a checkpoint take."""
        if self._asked.is_set() or ENDING.asked.is_set():
            return True
        now_s = time.time()
        if self._end_s is None or now_s + needed_s + self._margin_s < self._end_s:
            return False
        if now_s - self._looked_s > LOOK_AGAIN_S:  # it may have been given more time meanwhile
            self._end_s, self._looked_s = self._job_end_s() or self._end_s, now_s
        self._by_time = now_s + needed_s + self._margin_s >= self._end_s
        return self._by_time

    def _taken(self, facts: JobFacts) -> tuple[str | None, str]:
        """Class and words of why Slurm took the job, to start it again by itself."""
        nodes = os.environ.get("SLURM_JOB_NODELIST", facts.nodes)  # what is down is no longer among the job's
        if down := nodes_down(nodes, address(os.environ)):
            return "node_fail", ", ".join(f"{node} is {word}" for node, word in down.items())
        deadline = time.monotonic() + PRINTED_S
        while (found := taken_by(self._causes(facts.output))) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return found or (None, "requeued in Slurm")

    def why(self, done: int, steps: int) -> Left:
        """Why training ended after `done` of `steps` steps, on the first rank."""
        far = f"{done} of {steps} steps are done"
        by_signal = Left(f"asked by {STOP_SIGNAL.name} to stop: {far}")
        now_s, facts = time.time(), self._facts()
        if self._by_time and self._end_s is not None:
            return Left(f"left {self._end_s - now_s:.0f} s before the time limit: {far}", "timeout")
        if facts is None:
            return by_signal
        if facts.restarts > self._restarts:
            failure_class, how = self._taken(facts)
            return Left(f"{how}: {far}", failure_class, state="pending")
        if facts.state == "CANCELLED" or (facts.state == "COMPLETING" and facts.reason != "TimeLimit"):
            return Left(f"cancelled in Slurm: {far}", state="cancelled")
        if facts.preempted:
            return Left(f"preempted: {far}", "preempted")
        limit_s = SIGNAL_S + EARLY_S + self._margin_s
        if facts.reason == "TimeLimit" or (facts.end_s is not None and facts.end_s - now_s < limit_s):
            return Left(f"warned of the time limit by {STOP_SIGNAL.name}: {far}", "timeout")
        return by_signal
