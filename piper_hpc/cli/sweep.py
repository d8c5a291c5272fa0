"""What a run's record says of the sweep (`-m`) that it is one point of."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode

from piper_hpc.runs import RecordError, RunFolder


def sweep_point(command: Sequence[str] = sys.argv) -> dict[str, Any] | None:
    """`sweep` of the manifest of the run that Hydra composes now; None outside a sweep.

    command: the words of the launch, which tell what was swept from what was only set.
    """
    hydra = HydraConfig.get()
    if hydra.mode != RunMode.MULTIRUN:
        return None
    return {
        "name": Path(hydra.sweep.dir).name,
        "index": int(hydra.job.num),
        "axes": axes(command, list(hydra.overrides.task)),
    }


def axes(command: Sequence[str], point: Sequence[str]) -> dict[str, Any]:
    """The keys and groups that `command` gives several values, each with its value in the overrides `point`."""
    parser = OverridesParser.create()

    def parsed(words: Sequence[str]) -> list[Any]:
        overrides = []
        for word in words:
            try:
                overrides.append(parser.parse_override(word))
            except HydraException:  # a flag, or its value
                continue
        return overrides

    swept = {override.key_or_group for override in parsed(command) if override.is_sweep_override()}
    return {
        override.key_or_group: override.value()
        for override in parsed(point)
        if override.key_or_group in swept and not override.is_sweep_override()
    }


def runs_of(runs: Sequence[RunFolder], name: str) -> list[RunFolder]:
    """The runs of the sweep `name`, in its order; a run whose manifest cannot be read is of none."""
    points = []
    for run in runs:
        with suppress(RecordError):
            sweep = run.manifest().get("sweep") or {}
            if sweep.get("name") == name:
                points.append((sweep["index"], run))
    return [run for _, run in sorted(points, key=lambda point: point[0])]
