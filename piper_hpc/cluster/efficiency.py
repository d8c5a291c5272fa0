"""What kernels reach of a device, from conf/efficiency: every constant with its public source or the rows it saw."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from piper_hpc.paths import data_folder
from piper_hpc.spec import Efficiency

UNKNOWN_SPREAD = 0.15
"""Half of the 90 % interval, as a share, of a constant that was taken from elsewhere and not fitted on this device."""

CONSTANTS = (
    "gemm", "grouped_gemm", "attention_forward", "attention_backward", "memory", "gemm_edge", "launch_s", "step_host_s",
)  # fmt: skip


def path_of(name: str) -> Path:
    """The file of the efficiency `name`."""
    return data_folder("conf") / "efficiency" / f"{name}.yaml"


def load(name: str) -> Efficiency:
    """The efficiency `name`; ValueError where a constant has neither a source nor rows that it was fitted on."""
    return parse(yaml.safe_load(path_of(name).read_text(encoding="utf-8")), name)


def parse(document: Mapping[str, Any], name: str = "") -> Efficiency:
    """From a file's content."""
    sources, fitted, spread = document["sources"], document.get("fitted", {}), document.get("spread", {})
    values = {key: float(document[key]) for key in CONSTANTS if key in document}
    link = {tier: float(share) for tier, share in document.get("link", {}).items()}
    for key in (*values, *(f"link.{tier}" for tier in link)):
        if not (sources.get(key) or key in fitted):
            raise ValueError(
                f"conf/efficiency/{name}.yaml: {key} has neither a source nor fitted rows; "
                f"give sources.{key}, or fit it with `python -m analysis.fit {name}`"
            )
    return Efficiency(
        **values,
        link=link,
        spread={key: float(spread.get(key, UNKNOWN_SPREAD)) for key in (*values, *(f"link.{tier}" for tier in link))}
        | ({"model": float(spread["model"])} if "model" in spread else {}),
        fitted_on=tuple(sorted({row for rows in fitted.values() for row in rows})),
        sources=sources,
    )
