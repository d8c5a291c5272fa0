"""Facts of one device from conf/accelerator, each with its source."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import yaml

from piper_hpc.cluster import efficiency
from piper_hpc.paths import data_folder
from piper_hpc.spec import Accelerator, Efficiency


@dataclass(frozen=True)
class DeviceFacts:
    """What data sheets say of one device; a figure that is not public is left out, or None.

    peak_flops, mamf_flops: by dtype, FLOP/s, dense: the theoretical peak, and the best matrix product that anyone
    measured (maximum achievable). memory_bytes: what the driver reports where that is known, else what is printed.
    efficiency: the file of conf/efficiency that says what kernels reach; None where nothing was fitted or published.
    """

    name: str
    checked: str
    compute_units: int | None
    peak_flops: Mapping[str, float]
    memory_bytes: int
    memory_bytes_per_s: float | None
    mamf_flops: Mapping[str, float] = field(default_factory=dict)
    sources: Mapping[str, str] = field(default_factory=dict)
    efficiency: str | None = None

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


def load(name: str) -> Accelerator:
    """Device `name` with what kernels reach of it. ValueError where there is no file, or a figure is not public."""
    device = facts(name)
    if device.efficiency is None or "bfloat16" not in device.peak_flops:
        raise ValueError(
            f"accelerator={name}: its peak rate, memory bandwidth or efficiency is not public; measure it with "
            "`python -m piper_hpc.launch task=microbench`, or plan for accelerator=a100_80gb"
        )
    return build(device, efficiency.load(device.efficiency))


def build(device: DeviceFacts, reached: Efficiency) -> Accelerator:
    """The device of these facts, with what kernels reach of it. ValueError where a figure is not public."""
    if device.memory_bytes_per_s is None or device.compute_units is None:
        raise ValueError(f"accelerator={device.name}: memory bandwidth or compute units are not public")
    return Accelerator(
        name=device.name,
        peak_flops=device.peak_flops,
        memory_bytes=device.memory_bytes,
        memory_bytes_per_s=device.memory_bytes_per_s,
        compute_units=device.compute_units,
        efficiency=reached,
        best_flops=device.mamf_flops,
    )


def load_if_public(name: str | None) -> Accelerator | None:
    """Device `name`, or None where `name` is None or a figure that predictions need is not public."""
    try:
        return load(name) if name else None
    except ValueError:
        return None
