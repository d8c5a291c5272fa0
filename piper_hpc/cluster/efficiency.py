"""Shares of a device's peaks that kernels reach, from conf/efficiency; each constant with its fitted rows or source."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from piper_hpc.paths import data_folder
from piper_hpc.spec import Efficiency

UNKNOWN_SPREAD = 0.15
"""Half of the 90 % interval, as a share, of a constant that was taken from elsewhere and not fitted on this device."""

ASSUMED_SPREAD = 0.3
"""The same of one that is assumed: twice as wide, as nothing was seen of it; what runtimes keep, 2 to 4 GB where 3 are
assumed, and attention kernels, 0.25 to 0.45 of the peak where 0.35 is, both span about that much."""

ORIGINS = ("fitted", "sources", "assumed", "carried")
"""Where a constant may be from; each is from exactly one."""


def path_of(name: str) -> Path:
    """The file of the efficiency `name`."""
    return data_folder("conf") / "efficiency" / f"{name}.yaml"


def read(name: str) -> dict[str, Any]:
    """The file's content."""
    return dict(yaml.safe_load(path_of(name).read_text(encoding="utf-8")))


def load(name: str) -> Efficiency:
    """The efficiency `name`; ValueError as `resolve` raises it. Read once for as long as its file stays as it is."""
    return _load(name, path_of(name).stat().st_mtime_ns)


@cache
def _load(name: str, changed_ns: int) -> Efficiency:
    return resolve(read(name), name)


def resolve(document: Mapping[str, Any], name: str) -> Efficiency:
    """From a file's content: `constants`, and those `carried` over from other files with the rows they saw there.

    Keys of links are `link.node` and `link.system`. A carried constant is no surer than in the file that it is from.
    Raises ValueError for a constant that is not in exactly one of ORIGINS, and for one that differs from what it is
    tied to.
    """
    constants: dict[str, float] = {key: float(value) for key, value in document["constants"].items()}
    origins: dict[str, dict[str, Any]] = {origin: dict(document.get(origin) or {}) for origin in ORIGINS}
    fitted, sources, assumed = origins["fitted"], origins["sources"], origins["assumed"]
    tied: dict[str, str] = dict(document.get("tied") or {})
    _check(constants, origins, tied, name)
    spread = {key: ASSUMED_SPREAD if key in assumed else UNKNOWN_SPREAD for key in constants}
    sources |= document.get("derived") or {}
    for key, file in origins["carried"].items():
        other = read(file)
        constants[key] = float(other["constants"][key])
        fitted[key] = other["fitted"].get(key, [])
        (assumed if key in other["assumed"] else sources)[key] = f"conf/efficiency/{file}.yaml"
        spread[key] = max(UNKNOWN_SPREAD, float(other["spread"].get(key, 0.0)))
    spread |= {key: float(value) for key, value in document["spread"].items()}
    own: dict[str, Any] = {key: value for key, value in constants.items() if not key.startswith("link.")}
    return Efficiency(
        **own,
        link={key.removeprefix("link."): value for key, value in constants.items() if key.startswith("link.")},
        spread=spread,
        fitted_on=tuple(sorted({row for rows in fitted.values() for row in rows})),
        sources=sources,
        assumed=assumed,
        tied=tied,
    )


def _check(
    constants: Mapping[str, float], origins: Mapping[str, Mapping[str, Any]], tied: Mapping[str, str], name: str
) -> None:
    for key in (*constants, *origins["carried"]):
        found = [origin for origin, of in origins.items() if of.get(key)]
        if len(found) != 1:
            raise ValueError(
                f"conf/efficiency/{name}.yaml: {key} is in {' and '.join(found) or 'none'} of {', '.join(ORIGINS)}; it "
                f"must be in exactly one: give sources.{key} alone, or fit it with "
                f"`python -m analysis.validation.fit {name}`"
            )
    for key, other in tied.items():
        value, expected = constants.get(key), constants.get(other)
        if value is None or value != expected:
            raise ValueError(
                f"conf/efficiency/{name}.yaml: {key}={value} is tied to {other}={expected} and must equal it; "
                f"set {key} to {expected}, or leave tied.{key} out"
            )
