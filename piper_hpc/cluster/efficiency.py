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


def path_of(name: str) -> Path:
    """The file of the efficiency `name`."""
    return data_folder("conf") / "efficiency" / f"{name}.yaml"


def read(name: str) -> dict[str, Any]:
    """The file's content."""
    return dict(yaml.safe_load(path_of(name).read_text(encoding="utf-8")))


def load(name: str) -> Efficiency:
    """The efficiency `name`; ValueError where a constant has neither a source nor rows that it was fitted on."""
    return resolve(read(name), name)


def resolve(document: Mapping[str, Any], name: str) -> Efficiency:
    """From a file's content: `constants`, and those `carried` over from other files with the rows they saw there.

    Keys of links are `link.node` and `link.system`.
    """
    constants: dict[str, float] = {key: float(value) for key, value in document["constants"].items()}
    fitted: dict[str, list[str]] = dict(document.get("fitted", {}))
    sources: dict[str, str] = dict(document.get("sources", {}))
    for key in constants:
        if not (sources.get(key) or fitted.get(key)):
            raise ValueError(
                f"conf/efficiency/{name}.yaml: {key} has neither a source nor fitted rows; "
                f"give sources.{key}, or fit it with `python -m analysis.fit {name}`"
            )
    for key, file in document.get("carried", {}).items():
        other = read(file)
        constants[key] = float(other["constants"][key])
        fitted[key] = other.get("fitted", {}).get(key, [])
        sources[key] = f"conf/efficiency/{file}.yaml"
    spread = document.get("spread", {})
    return Efficiency(
        **{key: value for key, value in constants.items() if not key.startswith("link.")},
        link={key.removeprefix("link."): value for key, value in constants.items() if key.startswith("link.")},
        spread={key: float(spread.get(key, UNKNOWN_SPREAD)) for key in constants} | {"model": float(spread["model"])},
        fitted_on=tuple(sorted({row for rows in fitted.values() for row in rows})),
        sources=sources,
    )
