"""The tasks that the ranks of a job run: training, micro-benchmarks, profiling. `TASKS` names them as `task=` does.

Each returns, on the first rank, why it ended before its last step; None where it came to the end.
"""

from __future__ import annotations

from collections.abc import Callable

from piper_hpc.tasks import microbench, profile, train
from piper_hpc.tasks.context import Context
from piper_hpc.tasks.leaving import Left

TASKS: dict[str, Callable[[Context], Left | None]] = {
    "train": train.run,
    "microbench": microbench.run,
    "profile": profile.run,
}
