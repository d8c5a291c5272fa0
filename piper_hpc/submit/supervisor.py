"""The parent of a local run's ranks: starts them, ends all when one dies, cleans up, records the outcome.

It stands where submitit's own local controller would, which lets the others wait for a dead peer until the limit. It
imports what takes longest once and forks the ranks: two cores start four ranks in half the time.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from multiprocessing.process import BaseProcess
from types import FrameType

from piper_hpc.runs import RunFolder, Status, attempts
from piper_hpc.runtime import memory_kills, quota, scratch
from piper_hpc.runtime.rank import RankEnvironment, local_variables
from piper_hpc.submit.outcome import failure_status
from piper_hpc.submit.process import die_with_parent, local_job, name_process

GRACE_S = 3.0
"""How long peers of a dead rank may take to leave their own word."""
POLL_S = 0.05
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
PRELOADED = ("torch", "torch.distributed.pipelining", "piper_hpc.tasks")
"""Imported before the ranks are forked. None of it may start threads or touch an accelerator."""


class Stopped(Exception):
    """The supervisor was asked to stop."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(number).name)


def _start(run: RunFolder, ranks: int, work: str, attempt: int) -> list[BaseProcess]:
    for module in PRELOADED:
        importlib.import_module(module)
    fork, supervisor = multiprocessing.get_context("fork"), os.getpid()
    processes: list[BaseProcess] = [
        fork.Process(target=_rank, args=(run, rank, ranks, supervisor, work, attempt), name=f"rank {rank}")
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return processes


def _rank(run: RunFolder, rank: int, ranks: int, supervisor: int, work: str, attempt: int) -> None:
    """A rank's process, with the rank's log as its output."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    die_with_parent(parent=supervisor)
    name_process(f"piper rank {rank}")
    os.environ |= local_variables(rank, ranks, str(supervisor))
    with run.log(attempt, rank).open("ab") as log:
        for stream in (sys.stdout, sys.stderr):
            os.dup2(log.fileno(), stream.fileno())
            stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    pkgutil.resolve_name(work)(str(run.path))


def _watch(processes: list[BaseProcess]) -> dict[int, int]:
    """Wait until all ranks end, or until one fails and its peers had time to speak. Returns exit codes by rank."""
    deadline = None
    while True:
        codes = {rank: process.exitcode for rank, process in enumerate(processes)}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        if len(ended) == len(processes) or (deadline is not None and time.monotonic() > deadline):
            return ended
        if deadline is None and any(ended.values()):
            deadline = time.monotonic() + GRACE_S
        time.sleep(POLL_S)


def _end(processes: list[BaseProcess]) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def supervise(run: RunFolder, ranks: int, work: str) -> int:
    """Run the ranks to their end; returns 0 when all succeeded. work: `module:function`, called with the run's path."""
    processes: list[BaseProcess] = []
    codes: dict[int, int] = {}
    stopped = None
    # Ranks find the attempt by the same key.
    attempt = attempts.claim(run, RankEnvironment.read(local_variables(0, ranks, str(os.getpid()))).rendezvous_id, "")
    kills = memory_kills.counted()
    try:
        processes = _start(run, ranks, work, attempt)
        codes = _watch(processes)
    except Stopped as reason:
        stopped = str(reason)
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _end(processes)
        with contextlib.suppress(OSError):  # a child of a killed rank may hold its group for a moment longer
            quota.remove_tree(run.run_id)  # the ranks made them, see piper_hpc.worker
        scratch.remove_left(run_id=run.run_id)
    status = run.status()
    if not status.ended:
        if stopped is not None:
            # SIGINT is a cancel; SIGTERM comes from the kernel when the launcher is gone.
            why = f"the launcher that waited for it ended ({stopped})"
            lost = Status("failed", attempt, "launcher_lost", why, status.step)
            cancelled = Status("cancelled", attempt, None, "cancelled", status.step)
            run.write_status(lost if stopped == "SIGTERM" else cancelled)
        else:
            run.write_status(failure_status(run, status, codes, memory_kills.since(kills)))
    return 0 if run.status().state == "completed" else 1


def main() -> int:
    """Entry of the supervisor's process."""
    parser = argparse.ArgumentParser(prog="piper_hpc.submit.supervisor", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--work", default="piper_hpc.worker:work", metavar="MODULE:FUNCTION")
    parser.add_argument("--dies-with-launcher", type=int, metavar="PID")
    arguments = parser.parse_args()
    run = RunFolder(arguments.run)
    run.take_umask()
    for number in STOP_SIGNALS:
        signal.signal(number, _stop)
    try:
        if not run.job():  # the launcher writes the same, unless it was killed before it could
            run.write_job(local_job(os.getpid()))
        if arguments.dies_with_launcher:
            die_with_parent(signal.SIGTERM, arguments.dies_with_launcher)
    except Stopped as stopped:
        run.write_status(Status("failed", 0, "launcher_lost", f"the launcher ended before the run began ({stopped})"))
        return 1
    return supervise(run, arguments.ranks, arguments.work)


if __name__ == "__main__":
    sys.exit(main())
