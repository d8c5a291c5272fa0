"""Where this rank stands: the step, and what it does in it, for the failure that says so where it goes no further."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


@dataclass
class Place:
    """step: from 0, None before the first; what: `forward and backward passes` and the like."""

    step: int | None = None
    what: str = "setting up"

    def __str__(self) -> str:
        return self.what if self.step is None else f"{self.what} of step {self.step}"


HERE = Place()


def at(what: str, step: int | None = None) -> None:
    """This rank begins `what`; step: where a new one begins."""
    HERE.what = what
    if step is not None:
        HERE.step = step


def collectives() -> dict[str, Any]:
    """The flight recorder's last collectives of this process, newest last; empty where torch keeps none."""
    if not dist.is_available():
        return {}
    from torch._C import _distributed_c10d

    found: dict[str, Any] = json.loads(_distributed_c10d._dump_fr_trace_json())  # type: ignore[attr-defined]
    return found


def last_collective(recorded: dict[str, Any]) -> str:
    """The newest of `collectives`, in words; empty where there is none."""
    entries = recorded.get("entries") or []
    if not entries:
        return ""
    newest = max(entries, key=lambda entry: entry.get("record_id", 0))
    group = " ".join(newest.get("process_group", [])[1:])
    number = newest.get("p2p_seq_id" if newest.get("is_p2p") else "collective_seq_id")
    return f"{newest.get('profiling_name')} number {number} of group {group}"
