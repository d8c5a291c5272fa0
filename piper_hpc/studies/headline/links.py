"""A site's links, scaled to what a rank computes here and slowed between nodes, and what they allow. Pure.

With s the share of its step that expert parallelism over all ranks spends in exchange, rho what is left of an exchange
that stays inside a node, and b the bubble of the pipeline that keeps it there, the step is shorter by

    gain = (1 - b) / (1 - s + rho s)        ceiling C(s): b = 0
"""

from __future__ import annotations

from dataclasses import dataclass

from piper_hpc.spec import ModelSpec
from piper_hpc.testbed.options import Options, flag
from piper_hpc.testbed.scaling import BYTES_SCALED, FullMachine, Layer, balance, link_bytes_per_s


@dataclass(frozen=True)
class Links:
    """Bytes/s of one rank while all of its node send, one way: to the other ranks of its node, and beyond."""

    node_bytes_per_s: float
    nic_bytes_per_s: float

    def flags(self, options: Options) -> tuple[str, ...]:
        """Of `python -m piper_hpc.testbed up`: a node's ranks share its link, a rack's its uplink."""
        of_rack = options.ranks_per_node * -(-options.nodes // options.racks)
        shared = {
            "node_mbit_per_s": self.node_bytes_per_s * options.ranks_per_node,
            "nic_mbit_per_s": self.nic_bytes_per_s * options.ranks_per_node,
            "rack_mbit_per_s": self.nic_bytes_per_s * of_rack,
        }
        rates = tuple(word for key, rate in shared.items() for word in (flag(key), f"{rate * 8e-6:.1f}"))
        return (*rates, flag("period_us"), str(options.period_us))

    def left(self, options: Options) -> float:
        """rho: seconds of an even exchange among the ranks of a node over those of one among all ranks."""
        inside = (options.ranks_per_node - 1) / options.ranks_per_node / self.node_bytes_per_s
        near = (options.ranks_per_node - 1) / options.ranks / self.node_bytes_per_s
        far = (options.ranks - options.ranks_per_node) / options.ranks / self.nic_bytes_per_s
        return inside / max(near, far)

    def wire_s(self, payload_bytes: dict[str, float], ranks: int) -> float:
        """Seconds that the busier of a rank's links needs for its share of the bytes that all ranks sent, by level."""
        inside = payload_bytes["node"]
        outside = sum(payload_bytes.values()) - inside
        return max(inside / self.node_bytes_per_s, outside / self.nic_bytes_per_s) / ranks


def layer_of(model: ModelSpec) -> Layer:
    """What of a model that is trained here its exchange depends on."""
    return Layer(model.name, model.layers, model.hidden, model.experts, model.top_k, model.expert_ffn, 3, BYTES_SCALED)


def scaled(machine: FullMachine, named: Layer, here: Layer, flops_per_s: float, slowdown: float) -> Links:
    """Links with communication over compute of `machine` with the layer `named`, for ranks that reach `flops_per_s` in
    the layer `here`; those between nodes slower by `slowdown`. See piper_hpc.testbed.scaling."""

    def rate(link: str) -> float:
        wanted = balance(machine.flops_per_s, machine.bytes_per_s[link], named.flops_per_byte)
        return link_bytes_per_s(flops_per_s, here.flops_per_byte, wanted)

    return Links(rate("node"), rate("nic") / slowdown)


def ceiling(share: float, left: float) -> float:
    """C(s) above."""
    return 1 / (1 - share + left * share)
