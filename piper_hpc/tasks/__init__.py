"""The tasks that the ranks of a job run: training, micro-benchmarks, profiling. `TASKS` names them as `task=` does."""

from __future__ import annotations

from collections.abc import Callable

from piper_hpc.tasks import microbench, profile, train
from piper_hpc.tasks.context import Context

TASKS: dict[str, Callable[[Context], None]] = {
    "train": train.run,
    "microbench": microbench.run,
    "profile": profile.run,
}
