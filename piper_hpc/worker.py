"""What every rank runs: `work(run)` reads the run's configuration, sets the rank up, and calls the task.

`srun python -m piper_hpc.worker RUN` starts it, in jobs of the launcher and by hand, see sbatch_templates/; a study
names a function of its own in place of the task.
"""

from __future__ import annotations

import gc
import os
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from piper_hpc.runs import RunFolder, Status, attempts
from piper_hpc.runtime.rank import RankEnvironment
from piper_hpc.spec import QUOTA_PERIOD_US
from piper_hpc.submit.by_hand import is_pool_step, job_around
from piper_hpc.submit.going_on import close_before, go_on, new_steps
from piper_hpc.submit.payload import run_as_rank

if TYPE_CHECKING:
    import torch

    from piper_hpc.tasks.context import Context
    from piper_hpc.tasks.leaving import Left


def work(run_path: str) -> None:
    """Run the task of the run in `run_path` as the rank that the environment names, see `run_as_rank`."""
    run_as_rank(RunFolder(run_path), run_task)


def run_task(run: RunFolder, rank_env: RankEnvironment, task: Callable[[Context], Left | None] | None = None) -> None:
    """Set the rank up, and call `task`, or the one that the run's configuration names."""
    from piper_hpc.config import check_experiment

    configured = check_experiment(run.config())
    if configured.task.name == "microbench" and configured.task.backend == "mpi":
        from piper_hpc.runtime import mpi

        mpi.load()  # before torch: see there

    with _nothing_collected():
        from piper_hpc.cluster.placement import rank_order
        from piper_hpc.runtime import network, quota
        from piper_hpc.runtime.group import device_of, lower_gloo_receiver_priority, process_group
        from piper_hpc.tasks import TASKS
        from piper_hpc.tasks.context import Context
        from piper_hpc.tasks.network import NetworkWatch

    device = device_of(
        configured.cluster.device, rank_env.local_rank, scheduled=configured.cluster.scheduler == "slurm"
    )
    store_folder = run.path / "rendezvous"
    cluster, layout, order = configured.cluster, configured.layout, None
    if cluster.fabric is not None and device.type == "cuda" and rank_env.local_rank == 0:
        network.ask_library(os.environ)
    if layout is not None and layout.placement == "pack":
        order = partial(rank_order, layout=layout, cluster=cluster)
        if cluster.domains == "measured":
            rank_env = _with_measured_switches(rank_env, store_folder / "measuring", device, cluster.comm_timeout_s)
    with process_group(rank_env, store_folder, device, cluster.comm_timeout_s, order) as rank_env:
        context = Context.gather(configured, run, rank_env, device)
        if context.machine.cpu_share is not None:
            # From here on this rank is a device of its own; its imports were free to use any core.
            group = f"{run.run_id}/rank{rank_env.rank}"
            quota.create(group, context.machine.cpu_share, period_us=QUOTA_PERIOD_US).enter()
            if quota.fits_one_core_each(rank_env.ranks, context.machine.cpu_share):
                quota.pin_to_core(rank_env.local_rank)
                lower_gloo_receiver_priority()
        if context.is_first:
            close_before(run, rank_env.attempt)
            run.write_manifest(run.manifest() | {"job": context.facts()})
            run.write_status(Status("running", rank_env.attempt))
        watch = NetworkWatch.start(context)
        left = (TASKS[configured.task.name] if task is None else task)(context)
        found = watch.record()
        if context.is_first:
            manifest = run.manifest()
            run.write_manifest(manifest | {"job": manifest["job"] | {"network": found}})
    # Only now nothing of this rank can fail any more.
    if not context.is_first:
        return
    status = run.status()
    if left is None:
        run.write_status(replace(status, state="completed"))
    elif left.state == "pending" or (left.failure_class is not None and is_pool_step()):
        # Slurm has the job start again, or the sweep goes on with what its pool could not finish.
        taken = Status("failed", rank_env.attempt, left.failure_class, left.reason, status.step)
        attempts.close(run, rank_env.attempt, taken, new_steps=new_steps(run, rank_env.attempt))
        run.write_status(Status("pending", rank_env.attempt, None, left.reason, status.step))
    elif left.failure_class is None:
        run.write_status(replace(status, state=left.state, reason=left.reason))
    else:
        go_on(run, Status("failed", rank_env.attempt, left.failure_class, left.reason, status.step))


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """No collection of garbage meanwhile, and none ever among what there is afterwards: what modules make stays, and to
    look through it again and again takes a third of their import."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _with_measured_switches(
    rank_env: RankEnvironment, store_folder: Path, device: torch.device, timeout_s: float
) -> RankEnvironment:
    """This rank's place with domains that messages between all nodes show, in place of Slurm's switches."""
    import torch.distributed as dist

    from piper_hpc.cluster.domains import paths_from_message_times
    from piper_hpc.runtime.group import process_group
    from piper_hpc.runtime.pairs import time_pairs

    with process_group(rank_env, store_folder, device, timeout_s):
        nodes: list[str] = [""] * rank_env.ranks
        dist.all_gather_object(nodes, rank_env.node)
        paths = paths_from_message_times(time_pairs(nodes, device))
    return replace(rank_env, switches=paths[list(dict.fromkeys(nodes)).index(rank_env.node)])


def main(arguments: Sequence[str]) -> None:
    """The command; it is started on every rank."""
    if len(arguments) not in (1, 2):
        sys.exit("usage: python -m piper_hpc.worker RUN_FOLDER [MODULE:FUNCTION]")
    run, rank_env = RunFolder(arguments[0]), RankEnvironment.read()
    # Of a run that was prepared outside its job only the job itself knows: record it, so that Slurm can be asked.
    if rank_env.rank == 0 and (is_pool_step() or run.job().get("id") != rank_env.job_id):
        run.write_job(job_around())
    with _nothing_collected():
        todo = pkgutil.resolve_name(arguments[1]) if len(arguments) == 2 else work
    todo(arguments[0])


if __name__ == "__main__":
    main(sys.argv[1:])
