"""What an analytical prediction rests on: every constant with its value and where it is from."""

from __future__ import annotations

from typing import Any

from piper_hpc.resource_model.analytical.device import Device
from piper_hpc.spec import Accelerator, ClusterSpec, Efficiency, Execution

SHARES = ("gemm", "grouped_gemm", "attention_forward", "attention_backward", "memory")
"""Constants of an Efficiency that are shares of a peak and that a calibration may give."""


def evidence(device: Device, cluster: ClusterSpec, execution: Execution) -> dict[str, Any]:
    """What the prediction rests on: every constant with its value and its source."""
    accelerator = device.accelerator
    efficiency = accelerator.efficiency
    return {
        "source": _source(accelerator, cluster),
        "measured": bool(efficiency.measured),
        "measured_at": cluster.calibration.measured_at if efficiency.measured else "",
        "peak_flops": device.peak_flops,
        "recipe": device.recipe.name,
        "accelerator": accelerator.name,
        "execution": execution.name,
        "fitted_on": list(efficiency.fitted_on),
        "sources": dict(efficiency.sources),
        "assumed": dict(efficiency.assumed),
        "constants": _constants(efficiency, cluster),
    }


def _source(accelerator: Accelerator, cluster: ClusterSpec) -> str:
    sheet = f"conf/accelerator/{accelerator.name}.yaml and what kernels reach of it" if accelerator.published else ""
    if not accelerator.efficiency.measured:
        return sheet
    return f"{cluster.calibration.source}{', else ' if sheet else ''}{sheet}"


def _constants(efficiency: Efficiency, cluster: ClusterSpec) -> dict[str, dict[str, Any]]:
    """Shares of the device's peaks, the seconds of a launch (time_s), and links, each with its source."""

    def source(name: str) -> str:
        known = efficiency.sources.get(name) or efficiency.assumed.get(name)
        return known or ("data sheet" if name.startswith("link.") else "fitted to published rows")

    def entry(name: str, **values: float) -> dict[str, Any]:
        return {**values, "measured": name in efficiency.measured, "source": source(name)}

    found = {name: entry(name, share=getattr(efficiency, name)) for name in SHARES}
    found["launch"] = entry("launch_s", time_s=efficiency.launch_s)
    for tier, link in cluster.links.items():
        name = f"link.{tier}"
        rate = link.bytes_per_s * efficiency.link_share(tier)
        found[name] = entry(name, latency_s=link.latency_s, bytes_per_s=rate)
    return found
