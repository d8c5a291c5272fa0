"""The parent of a local run's ranks: starts them, ends all when one dies, cleans up, records the outcome.

It stands where submitit's own local controller would, which lets the others wait for a dead peer until the limit.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import time
from types import FrameType

from piper_hpc.runs import RunFolder, Status
from piper_hpc.runtime import quota
from piper_hpc.submit.outcome import failure_status
from piper_hpc.submit.process import die_with_parent, local_job

GRACE_S = 3.0
"""How long peers of a dead rank may take to leave their own word."""
POLL_S = 0.05
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """The supervisor was asked to stop."""


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(number).name)


def _start(run: RunFolder, ranks: int, command: list[str]) -> list[subprocess.Popen[bytes]]:
    processes = []
    for rank in range(ranks):
        environment = os.environ | {
            # The protocol by which submitit's job environment finds its place.
            "SUBMITIT_EXECUTOR": "local",
            "SUBMITIT_LOCAL_JOB_ID": str(os.getpid()),
            "SUBMITIT_LOCAL_NTASKS": str(ranks),
            "SUBMITIT_LOCAL_JOB_NUM_NODES": "1",
            "SUBMITIT_LOCAL_NODEID": "0",
            "SUBMITIT_LOCAL_GLOBALID": str(rank),
            "SUBMITIT_LOCAL_LOCALID": str(rank),
        }
        with run.log(0, rank).open("ab") as log:
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    preexec_fn=die_with_parent,
                )
            )
    return processes


def _watch(processes: list[subprocess.Popen[bytes]]) -> dict[int, int]:
    """Wait until all ranks end, or until one fails and its peers had time to speak. Returns exit codes by rank."""
    deadline = None
    while True:
        codes = {rank: process.poll() for rank, process in enumerate(processes)}
        ended = {rank: code for rank, code in codes.items() if code is not None}
        if len(ended) == len(processes) or (deadline is not None and time.monotonic() > deadline):
            return ended
        if deadline is None and any(ended.values()):
            deadline = time.monotonic() + GRACE_S
        time.sleep(POLL_S)


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait()


def supervise(run: RunFolder, ranks: int, command: list[str]) -> int:
    """Run the ranks to their end; returns 0 when all succeeded."""
    processes: list[subprocess.Popen[bytes]] = []
    codes: dict[int, int] = {}
    stopped = None
    try:
        processes = _start(run, ranks, command)
        codes = _watch(processes)
    except Stopped as reason:
        stopped = str(reason)
    finally:
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        _end(processes)
        with contextlib.suppress(OSError):  # a child of a killed rank may hold its group for a moment longer
            quota.remove_tree(run.run_id)  # the ranks made them, see piper_hpc.worker
    status = run.status()
    if not status.ended:
        if stopped is not None:
            # SIGINT is a cancel; SIGTERM comes from the kernel when the launcher is gone.
            lost = Status(
                "failed", 0, "launcher_lost", f"the launcher that waited for it ended ({stopped})", status.step
            )
            run.write_status(lost if stopped == "SIGTERM" else Status("cancelled", 0, None, "cancelled", status.step))
        else:
            run.write_status(failure_status(run, status, codes))
    return 0 if run.status().state == "completed" else 1


def main() -> int:
    """Entry of the supervisor's process."""
    parser = argparse.ArgumentParser(prog="piper_hpc.submit.supervisor", description=__doc__)
    parser.add_argument("run")
    parser.add_argument("--ranks", type=int, required=True)
    parser.add_argument("--dies-with-launcher", type=int, metavar="PID")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    run = RunFolder(arguments.run)
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
    return supervise(run, arguments.ranks, arguments.command)


if __name__ == "__main__":
    sys.exit(main())
