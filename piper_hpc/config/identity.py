"""What a configuration is, apart from how it is run: two commands that mean the same training have one identity."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf

OPERATIONAL = frozenset(
    (
        *("runs", "runs_mode", "dry_run", "submit", "wait", "format", "tracking", "sweep"),
        *("data.cache", "plan.save", "plan.trace", "plan.export", "plan.export_file", "task.candidates"),
        *(f"cluster.{key}" for key in ("account", "qos", "reservation", "exclude", "requeue", "time_min", "template")),
        *(f"cluster.{key}" for key in ("wants", "limits", "jobs_queued", "jobs_running", "sources", "checked")),
        *("cluster.switch_wait_min", "cluster.comm_timeout_s"),
    )
)
"""Keys and groups of them that say where a record goes, who may queue, and how long one waits: no result hangs on
them. A partition, a constraint and the environment may be other hardware, and count."""


def identity(config: DictConfig | Mapping[str, Any]) -> str:
    """SHA-256 over the resolved configuration without its operational keys: 16 hexadecimal digits."""
    plain: Any = OmegaConf.to_container(config, resolve=True) if isinstance(config, DictConfig) else dict(config)
    meant = json.dumps(_without(plain, ""), sort_keys=True, default=str)
    return hashlib.sha256(meant.encode()).hexdigest()[:16]


def _without(group: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    kept = {}
    for key, value in group.items():
        name = f"{prefix}{key}"
        if name not in OPERATIONAL:
            kept[str(key)] = _without(value, f"{name}.") if isinstance(value, Mapping) else value
    return kept
