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


def _newest(recorded: dict[str, Any]) -> dict[str, Any]:
    entries: list[dict[str, Any]] = recorded.get("entries") or [{}]
    return max(entries, key=lambda entry: entry.get("record_id", 0))


def entered_s(recorded: dict[str, Any]) -> float | None:
    """When the newest of `collectives` was entered, Unix; None where there is none."""
    made_ns = _newest(recorded).get("time_created_ns")
    return made_ns / 1e9 if made_ns else None


def last_collective(recorded: dict[str, Any]) -> str:
    """The newest of `collectives`, in words; empty where there is none."""
    newest = _newest(recorded)
    if not newest:
        return ""
    group = " ".join(newest.get("process_group", [])[1:])
    number = newest.get("p2p_seq_id" if newest.get("is_p2p") else "collective_seq_id")
    return f"{newest.get('profiling_name')} number {number} of group {group}"
