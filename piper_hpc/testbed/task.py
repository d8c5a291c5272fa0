"""What Slurm runs around a task: places it into its rank's control group, and removes the group afterwards.

Called by slurmd and slurmstepd as `python -S -m piper_hpc.testbed.task WHEN CPU_SHARE MEMORY_BYTES PERIOD_US RANKS`,
with Slurm's variables in the environment. What the task prolog prints is Slurm's way to set a task's variables.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time

from piper_hpc.runtime import quota

GROUP = "testbed"


def job_group() -> str:
    return f"{GROUP}/{os.environ['SLURMD_NODENAME']}/job{os.environ['SLURM_JOB_ID']}"


def task_group() -> str:
    return f"{job_group()}/step{os.environ['SLURM_STEP_ID']}_task{os.environ['SLURM_PROCID']}"


def core_index() -> int:
    """Index of this rank's core, modulo cores: ranks of one node, and first ranks of neighbouring nodes, differ."""
    return int(os.environ["SLURMD_NODENAME"].removeprefix("n")) + int(os.environ["SLURM_LOCALID"])


def end_job() -> None:
    """End what a job left in its groups, then remove them: the next job finds the devices free."""
    deadline = time.monotonic() + 5.0
    while (left := quota.processes(job_group())) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    quota.remove_tree(job_group())


def main() -> int:
    when, cpu_share, memory_bytes, period_us, ranks = sys.argv[1:]
    if when != "epilog" and "SLURM_STEP_ID" not in os.environ:
        return 0  # the batch script itself: no rank, and it only waits for its steps
    if when == "task_prolog":
        group = quota.create(task_group(), float(cpu_share), int(memory_bytes), period_us=int(period_us))
        pid = int(os.environ["SLURM_TASK_PID"])
        group.enter(pid)
        if quota.fits_one_core_each(int(ranks), float(cpu_share)):
            quota.pin_to_core(core_index(), pid)
        print("export GLOO_SOCKET_IFNAME=eth0")
    elif when == "task_epilog":
        # A child that outlives its task stays in its group until the job ends.
        with contextlib.suppress(OSError):
            quota.remove_tree(task_group(), timeout_s=0.2)
    else:
        end_job()
    return 0


if __name__ == "__main__":
    sys.exit(main())
