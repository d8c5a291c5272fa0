"""What every rank of a submitted job does around its task: a log of its own, and a classified reason where it fails."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from piper_hpc.runs import Failure, RunFolder
from piper_hpc.runtime.rank import RankEnvironment
from piper_hpc.runtime.scratch import private_tmp
from piper_hpc.spec import SpecError

LEAVE_S = 4.0
"""How long a rank that is asked to end may take to leave word."""


def run_as_rank(run: RunFolder, task: Callable[[RunFolder, RankEnvironment], None]) -> None:
    """Call `task` as the rank that the environment names.

    An exception leaves a classified reason in the run's logs, then ends the rank with exit code 1.
    """
    rank_env = RankEnvironment.read()
    # Sites and submitit warn of a time limit or a preemption with them; their default would end the rank as a failure.
    # Training hears the first, see piper_hpc.tasks.train.
    for warning in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(warning, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_soon)
    run.take_umask()
    _log_to(run.log(rank_env.attempt, rank_env.rank))
    try:
        with private_tmp(run.run_id, rank_env.task):
            task(run, rank_env)
    except Exception as error:
        from piper_hpc.runtime.failures import classify, one_line_reason

        trace = traceback.format_exc()
        failure_class = "config" if isinstance(error, SpecError) else classify(error)
        failure = Failure(rank_env.rank, failure_class, one_line_reason(error), trace, time.time())
        run.write_failure(failure, rank_env.attempt)
        print(trace, file=sys.stderr, flush=True)
        # Threads of a broken process group may never join.
        os._exit(1)


def _leave_soon(number: int, frame: FrameType | None) -> None:
    """End this process by the signal after LEAVE_S, or at once where it comes again.

    With it srun ends the peers of a rank that failed: in that time they find out whom they lost, and leave word of it.
    """
    signal.signal(number, signal.SIG_DFL)
    timer = threading.Timer(LEAVE_S, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()


def _log_to(path: Path) -> None:
    """Send everything this process prints to its own log, also what libraries print from C.

    Logs are named after the scheduler's tasks: where ranks are packed, the manifest tells which is which.
    """
    with path.open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
