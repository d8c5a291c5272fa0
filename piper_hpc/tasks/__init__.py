"""What a rank can do: each task wires the rooms below for one rank. `TASKS` names them as `task=` does."""

from __future__ import annotations

from collections.abc import Callable

from piper_hpc.tasks import microbench, profile, train
from piper_hpc.tasks.context import Context

TASKS: dict[str, Callable[[Context], None]] = {
    "train": train.run,
    "microbench": microbench.run,
    "profile": profile.run,
}
