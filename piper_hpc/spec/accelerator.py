"""One device: figures of its data sheet, and the shares of them that kernels reach."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Efficiency:
    """Shares of the data sheet that kernels reach, and the time that none of it explains.

    gemm, grouped_gemm, attention_forward, attention_backward: of the peak rate; memory: of the memory's bandwidth, by
    streaming kernels; link: tier -> share of the link's bandwidth that collectives reach. gemm_edge: a product of
    depth k takes 1 + edge / k times as long as an endless one. launch_s: seconds that every kernel takes
    beyond its work: launch, ramps, and the host's own work where the device waits for it. step_host_s: the same of a
    whole step.
    framework_bytes: memory that no tensor gets: context, kernels' workspaces, communicators (M_fw of arXiv 2605.05049).
    spread: half of the 90 % interval of each of these by name, as a share of it. tied: name -> the name of the one
    that it equals by construction, so that the two are off together.
    fitted_on: ids of the published rows that they were fitted on; sources: name -> public source; assumed: name ->
    why it was set so, where nobody published it and no row shows it. measured: names of those that were measured on the
    cluster itself; their links have the measured rate already, so that their share is 1.
    """

    gemm: float
    grouped_gemm: float
    attention_forward: float
    attention_backward: float
    memory: float
    gemm_edge: float = 0.0
    launch_s: float = 0.0
    step_host_s: float = 0.0
    framework_bytes: float = 0.0
    link: Mapping[str, float] = field(default_factory=dict)
    spread: Mapping[str, float] = field(default_factory=dict)
    fitted_on: tuple[str, ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)
    assumed: Mapping[str, str] = field(default_factory=dict)
    tied: Mapping[str, str] = field(default_factory=dict)
    measured: tuple[str, ...] = ()

    def link_share(self, tier: str) -> float:
        """Share of a tier's bandwidth: its own, else that of the scale-up links (pair, node) or of the network."""
        kind = "node" if tier in ("pair", "node") else "system"
        return self.link.get(tier, self.link.get(kind, 1.0))


@dataclass(frozen=True)
class Accelerator:
    """A device's published figures, FLOP/s by dtype, bytes, bytes per second; and its efficiency.

    best_flops: the best matrix product that anyone measured, by dtype. `Efficiency.gemm` is of bfloat16 products.
    compute_units: 0 where products are not tiled over units of equal size (a CPU). published: whether a data sheet says
    what it is; else measurements alone do, in one dtype.
    """

    name: str
    peak_flops: Mapping[str, float]
    memory_bytes: int
    memory_bytes_per_s: float
    compute_units: int
    efficiency: Efficiency
    best_flops: Mapping[str, float] = field(default_factory=dict)
    published: bool = True

    def relative_share(self, dtype: str) -> float:
        """How much less of their peak the best products of `dtype` reach than those of bfloat16; 1 where not known."""
        best, peak = self.best_flops, self.peak_flops
        if dtype not in best or "bfloat16" not in best:
            return 1.0
        return best[dtype] / peak[dtype] / (best["bfloat16"] / peak["bfloat16"])
