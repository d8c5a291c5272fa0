"""Facts of one device from conf/accelerator, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from piper_hpc.paths import data_folder


@dataclass(frozen=True)
class DeviceFacts:
    """What data sheets say of one device; a figure that is not public is left out, or None.

    peak_flops, mamf_flops: by dtype, FLOP/s, dense: the theoretical peak, and the best matrix product that anyone
    measured (maximum achievable). memory_bytes: what the driver reports where that is known, else what is printed.
    efficiency: what kernels reach, as the file has it; empty where nothing was fitted or published.
    """

    name: str
    checked: str
    compute_units: int | None
    peak_flops: Mapping[str, float]
    memory_bytes: int
    memory_bytes_per_s: float | None
    mamf_flops: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    efficiency: Mapping[str, Any] = field(default_factory=dict)

    def mamf_source(self, dtype: str) -> str:
        """Where the best measured matrix product of `dtype` is from."""
        return self.sources.get(f"mamf_flops.{dtype}") or self.sources.get("mamf_flops", "")


def names() -> list[str]:
    """Devices that there is a file of."""
    return sorted(path.stem for path in (data_folder("conf") / "accelerator").glob("*.yaml"))


def facts(name: str) -> DeviceFacts:
    """The facts of device `name`. Raises ValueError where there is no file of it."""
    if name not in names():
        raise ValueError(f"accelerator={name}: must be one of {', '.join(names())}, for example h100")
    document = yaml.safe_load((data_folder("conf") / "accelerator" / f"{name}.yaml").read_text(encoding="utf-8"))
    for key in ("peak_flops", "mamf_flops"):
        document[key] = {dtype: rate for dtype, rate in document[key].items() if rate is not None}
    return DeviceFacts(**{**document, "memory_bytes": int(document["memory_bytes"])})
