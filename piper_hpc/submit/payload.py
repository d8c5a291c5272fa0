"""What every rank of a submitted job does around its task: a log of its own, and a classified reason where it fails."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType

from piper_hpc.runs import ECHOES, Failure, RunFolder, attempts
from piper_hpc.runtime import memory_kills
from piper_hpc.runtime.rank import RankEnvironment
from piper_hpc.runtime.scratch import private_tmp

LEAVE_S = 4.0
"""How long a rank that is asked to end may take to leave word."""


class Ending:
    """What SIGTERM does to this rank: it ends by the signal after LEAVE_S, or at once where it comes again; unless by
    then all ranks have agreed to leave together, see `stay`.

    With it srun ends the peers of a rank that failed: in that time they find out whom they lost, and leave word of it.
    """

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None
        self.asked = threading.Event()
        self.last_word: Callable[[], None] = lambda: None

    def on_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal's handler."""
        signal.signal(number, signal.SIG_DFL)
        self.asked.set()
        self._timer = threading.Timer(LEAVE_S, self._end, (number,))
        self._timer.daemon = True
        self._timer.start()

    def _end(self, number: int) -> None:
        try:
            self.last_word()
        finally:
            os.kill(os.getpid(), number)

    def stay(self) -> None:
        """All ranks leave by themselves now: no signal but SIGKILL ends this one sooner."""
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if self._timer is not None:
            self._timer.cancel()


ENDING = Ending()
"""Of this process."""


def run_as_rank(run: RunFolder, task: Callable[[RunFolder, RankEnvironment], None]) -> None:
    """Call `task` as the rank that the environment names, in the attempt of the run that its job began.

    An exception leaves a classified reason in the run's logs, then ends the rank with exit code 1.
    """
    rank_env = RankEnvironment.read()
    # Sites and submitit warn of a time limit or a preemption with them; their default would end the rank as a failure.
    # Training hears the first, see piper_hpc.tasks.leaving.
    for warning in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, ENDING.on_signal)
    run.take_umask()
    rank_env = replace(rank_env, attempt=_attempt(run, rank_env))
    _log_to(run.log(rank_env.attempt, rank_env.rank))
    faulthandler.register(signal.SIGTERM, all_threads=False, chain=True)  # where a rank stands that does not come
    kills = memory_kills.counted()
    ENDING.last_word = lambda: _tell_of_memory(run, rank_env, kills)
    try:
        with private_tmp(run.run_id, rank_env.task):
            task(run, rank_env)
    except Exception as error:
        # Threads of a broken process group may never join.
        try:
            _leave_word(run, rank_env, error, kills)
        finally:
            os._exit(1)


def _attempt(run: RunFolder, rank_env: RankEnvironment) -> int:
    key = rank_env.rendezvous_id  # with Slurm's own count of requeues: only ranks that start together have it
    if rank_env.task == 0:
        printed = run.logs / f"slurm-{rank_env.job_id}.out"  # a requeued job goes on in the same file
        return attempts.claim(run, key, rank_env.job_id, printed.stat().st_size if printed.exists() else 0)
    return attempts.joined(run, key, rank_env.ranks)


def _leave_word(run: RunFolder, rank_env: RankEnvironment, error: Exception, kills: Mapping[str, int]) -> None:
    from piper_hpc.runtime.failures import classify, one_line_reason
    from piper_hpc.runtime.progress import HERE, collectives, entered_s, last_collective

    trace, failure_class = traceback.format_exc(), classify(error)
    evidence, last_s = [f"rank {rank_env.rank} was at {HERE}"], None
    if failure_class in ECHOES:
        with contextlib.suppress(Exception):  # it adds to what is known, and takes nothing away
            recorded = collectives()
            last_s = entered_s(recorded)
            if last := last_collective(recorded):
                evidence.append(f"rank {rank_env.rank}'s last collective was {last}")
            (run.attempt_logs(rank_env.attempt) / f"rank-{rank_env.rank}.flight.json").write_text(json.dumps(recorded))
    evidence += memory_kills.since(kills, rank_env.node)
    failure = Failure(
        rank_env.rank,
        failure_class,
        one_line_reason(error),
        trace,
        time.time(),
        node=rank_env.node,
        evidence=tuple(evidence),
        step=HERE.step,
        entered_s=last_s,
    )
    print(trace, file=sys.stderr, flush=True)
    run.write_failure(failure, rank_env.attempt)


def _tell_of_memory(run: RunFolder, rank_env: RankEnvironment, kills: Mapping[str, int]) -> None:
    """What a rank knows that is ended with its peers before it missed one: that its node lacked memory, if it did."""
    if seen := memory_kills.since(kills, rank_env.node):
        reason = "it was ended before it missed a peer"
        failure = Failure(rank_env.rank, "comm", reason, "", time.time(), node=rank_env.node, evidence=seen)
        run.write_failure(failure, rank_env.attempt)


def _log_to(path: Path) -> None:
    """Send everything this process prints to its own log, also what libraries print from C.

    Logs are named after the scheduler's tasks: where ranks are packed, the manifest tells which is which.
    """
    with path.open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
