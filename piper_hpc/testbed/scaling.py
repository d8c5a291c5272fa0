"""A machine and a model of conf/ at the size of the testbed: the same ratio of communication to compute time. Pure.

A row that goes to an expert of `matrices` matrices [hidden, expert_ffn] costs 2 matrices hidden expert_ffn FLOP and
hidden bytes_per_value bytes each way, so that

    FLOP per dispatched byte      q = 2 matrices expert_ffn / bytes_per_value          whatever the hidden size,
    communication : compute       c = (F / B) / q      F: FLOP/s that a rank achieves; B: bytes/s that one rank gets

The scaled machine has the F' of a rank under its CPU quota, as measured. Its links are shaped to B' = F' / (c q').
"""

from __future__ import annotations

from dataclasses import dataclass

from piper_hpc.spec import reach_probability
from piper_hpc.testbed.options import MIB, Options

LEAST_FFN = 512
"""Narrower products no longer reach a CPU's rate, and their experts would be bound by memory instead."""
HIDDEN, LAYERS, SEQUENCE, SEQUENCES_PER_RANK = 256, 2, 128, 4
HEAD_DIM = 64
CHOICES_PER_TOKEN = 4
"""Experts of the scaled model, as a multiple of top_k: enough that few tokens choose two of one rank's."""
FULL_BYTES, BYTES_SCALED = 2, 4  # bfloat16 there, float32 here
PROCESS_MIB = 1024
"""What a rank's process needs beside its model: the interpreter, torch, and buffers of its connections."""
SLOWEST_MBIT, FASTEST_MBIT = 1.0, 100_000.0


@dataclass(frozen=True)
class FullMachine:
    """A machine of conf/cluster. Rates are of one rank while all of its node send; flops_per_s is what it achieves.

    node: between ranks of a node; nic: to the nearest other node; system: to the farthest. sources: key -> evidence.
    """

    name: str
    ranks_per_node: int
    memory_bytes: float
    flops_per_s: float
    bytes_per_s: dict[str, float]
    latency_s: dict[str, float]
    sources: dict[str, str]


@dataclass(frozen=True)
class Layer:
    """What of a model its MoE layer and its size depend on; `lacking`: facts that the executor has no part for."""

    name: str
    layers: int
    hidden: int
    experts: int
    top_k: int
    expert_ffn: int
    matrices: int
    bytes_per_value: int
    lacking: tuple[str, ...] = ()

    @property
    def flops_per_byte(self) -> float:
        """FLOPs per dispatched byte, one way: q above."""
        return 2 * self.matrices * self.expert_ffn / self.bytes_per_value

    @property
    def flops_per_row(self) -> float:
        """FLOPs of the forward of one token at one expert: 2 matrices hidden expert_ffn."""
        return 2.0 * self.matrices * self.hidden * self.expert_ffn

    @property
    def expert_parameters(self) -> float:
        """Parameters of the experts of all layers."""
        return float(self.layers * self.experts * self.matrices * self.hidden * self.expert_ffn)


@dataclass(frozen=True)
class Row:
    """One quantity there and here: `kept`, `scaled` with what a rank computes, or `not kept`, with the reason."""

    quantity: str
    named: str
    scaled: str
    outcome: str
    note: str = ""


def balance(flops_per_s: float, bytes_per_s: float, flops_per_byte: float) -> float:
    """Communication time over compute time of a row that crosses a link one way, a ratio: c = (F / B) / q above."""
    return flops_per_s / bytes_per_s / flops_per_byte


def link_bytes_per_s(flops_per_s: float, flops_per_byte: float, wanted: float) -> float:
    """Bytes/s that one rank of `flops_per_s` must get of a link, so that its balance is `wanted`: B' = F' / (c q')."""
    return flops_per_s / (wanted * flops_per_byte)


def shrink(full: Layer, ranks: int) -> Layer:
    """The layer at testbed size: top_k and expert_ffn stay (at least 512), hidden, layers and experts shrink."""
    experts = min(full.experts, -(-CHOICES_PER_TOKEN * full.top_k // ranks) * ranks)
    return Layer(
        name=f"{full.name}_scaled",
        layers=min(full.layers, LAYERS),
        hidden=min(full.hidden, HIDDEN),
        experts=experts,
        top_k=full.top_k,
        expert_ffn=max(full.expert_ffn, LEAST_FFN),
        matrices=full.matrices,
        bytes_per_value=BYTES_SCALED,
    )


def expert_ranks(experts: int, ranks: int) -> int:
    """The largest expert-parallel degree that divides both."""
    return next(ep for ep in range(min(experts, ranks), 0, -1) if experts % ep == 0 and ranks % ep == 0)


@dataclass(frozen=True)
class Scaling:
    """A scaled machine: rates of one rank by kind of link, and what they are scaled from.

    flops_per_s: of a rank under its quota, measured; wanted: communication over compute, by kind of link.
    """

    machine: FullMachine
    full: Layer
    layer: Layer
    flops_per_s: float
    wanted: dict[str, float]
    bytes_per_s: dict[str, float]
    limited: tuple[str, ...]

    def rates_mbit(self, options: Options) -> dict[str, float]:
        """Of the devices that are shaped: a node's loopback and its link serve all its ranks, an uplink a rack's."""
        ranks = {"node": options.ranks_per_node, "nic": options.ranks_per_node}
        ranks["rack"] = options.ranks_per_node * -(-options.nodes // options.racks)
        kinds = {"node": "node", "nic": "nic", "rack": "system"}
        return {kind: round(self.bytes_per_s[of] * ranks[kind] * 8e-6, 1) for kind, of in kinds.items()}

    def memory_mib(self) -> int:
        """A process, and as much for its model as the device has for the named one, parameter for parameter."""
        share = self.layer.expert_parameters / self.full.expert_parameters
        return PROCESS_MIB + round(self.machine.memory_bytes * share * BYTES_SCALED / FULL_BYTES / MIB)

    def model(self) -> dict[str, int | str]:
        """A file of conf/model for `task=train`."""
        layer, heads = self.layer, max(1, self.layer.hidden // HEAD_DIM)
        return {
            "name": layer.name, "layers": layer.layers, "hidden": layer.hidden, "heads": heads, "kv_heads": heads,
            "experts": layer.experts, "top_k": layer.top_k, "expert_ffn": layer.expert_ffn, "vocab": 256,
            "matrices_per_expert": layer.matrices,
        }  # fmt: skip

    def overrides(self, options: Options) -> list[str]:
        """Of `python -m piper_hpc.launch`, beside the model: every rank holds experts, and has tokens enough."""
        ep = expert_ranks(self.layer.experts, options.ranks)
        return [
            "cluster=testbed", f"cluster.nodes={options.nodes}", f"cluster.ranks_per_node={options.ranks_per_node}",
            "parallelism=single", f"parallelism.ep={ep}", f"parallelism.dp={options.ranks // ep}",
            f"parallelism.micro_batch={SEQUENCES_PER_RANK}", f"train.sequence={SEQUENCE}",
            f"train.global_batch={options.ranks * SEQUENCES_PER_RANK}",
        ]  # fmt: skip


def scale(machine: FullMachine, full: Layer, options: Options, flops_per_s: float) -> Scaling:
    """The machine at the size of `options`, whose ranks reach `flops_per_s`, measured in the scaled layer's shapes."""
    layer = shrink(full, options.ranks)
    wanted = {
        kind: balance(machine.flops_per_s, rate, full.flops_per_byte) for kind, rate in machine.bytes_per_s.items()
    }
    rates, limited = {}, []
    for kind, target in wanted.items():
        rate = link_bytes_per_s(flops_per_s, layer.flops_per_byte, target)
        shaped = min(max(rate, SLOWEST_MBIT * 125e3), FASTEST_MBIT * 125e3 / options.ranks)
        if shaped != rate:
            limited.append(f"{kind}: {rate * 8e-6:.3g} Mbit/s a rank cannot be shaped, {shaped * 8e-6:.3g} is set")
        rates[kind] = shaped
    return Scaling(machine, full, layer, flops_per_s, wanted, rates, tuple(limited))


RATE = "the rate that it needs cannot be shaped"
KEPT, SCALED, LOST = "kept", "scaled", "not kept"
KINDS = {"node": "inside a node", "nic": "to the next node", "system": "to the farthest node"}


def table(scaling: Scaling, options: Options) -> list[Row]:
    """Every quantity there and here, kept or not, with the reason."""
    machine, full, layer = scaling.machine, scaling.full, scaling.layer
    wider = f"; experts are at least {LEAST_FFN} wide" if layer.expert_ffn != full.expert_ffn else ""
    rows = [
        Row("a rank achieves, FLOP/s", f"{machine.flops_per_s:.3g}", f"{scaling.flops_per_s:.3g}", SCALED),
        Row(
            "FLOP per dispatched byte", f"{full.flops_per_byte:.0f}", f"{layer.flops_per_byte:.0f}", SCALED,
            f"{layer.bytes_per_value} bytes a value in place of {full.bytes_per_value}{wider}",
        ),
    ]  # fmt: skip
    for kind, text in KINDS.items():
        # One rack has no uplink: its farthest node is like the next.
        built = "nic" if kind == "system" and options.racks == 1 else kind
        there, here = machine.bytes_per_s[kind], scaling.bytes_per_s[built]
        has, per_byte = balance(scaling.flops_per_s, here, layer.flops_per_byte), scaling.flops_per_s / here
        kept = abs(has / scaling.wanted[kind] - 1) < 0.01
        rows += [
            Row(f"bytes/s of a rank {text}", f"{there:.3g}", f"{here:.3g}", SCALED),
            Row(f"FLOP per byte {text}", f"{machine.flops_per_s / there:.0f}", f"{per_byte:.0f}", SCALED),
            _row(f"communication : compute {text}", f"{scaling.wanted[kind]:.3f}", f"{has:.3f}", kept, RATE),
        ]
    longer = layer.flops_per_row / scaling.flops_per_s / (full.flops_per_row / machine.flops_per_s)
    wanted_s = machine.latency_s["nic"] * longer
    rows += [
        _row("experts a token (top_k)", full.top_k, layer.top_k),
        _row("expert_ffn", full.expert_ffn, layer.expert_ffn, note="narrower ones are bound by memory"),
        _row("experts", full.experts, layer.experts, note=_left(full, layer, options.nodes)),
        _row("hidden", full.hidden, layer.hidden, note="no part in the ratio; router and norms weigh more"),
        _row("layers", full.layers, layer.layers, note="the ratio is one layer's"),
        _row("ranks a node", machine.ranks_per_node, options.ranks_per_node, note="each has the share it has there"),
        Row(
            "memory of a rank, GiB", f"{machine.memory_bytes / 2**30:.1f}", f"{options.memory_mib / 1024:.2f}", LOST,
            f"{PROCESS_MIB} MiB are the process's own, the rest is scaled with the parameters",
        ),
        Row(
            "latency of a message, s", f"{machine.latency_s['nic']:.2g}", "the host's", LOST,
            f"{wanted_s:.2g} s would keep it: only bandwidth is shaped",
        ),
        Row(
            "links inside a node", "one a pair of devices", "one loopback", LOST,
            "all ranks of a node share it, and copy with their CPU quota; bursts of 512 KiB pass unshaped",
        ),
    ]  # fmt: skip
    rows += [Row(fact, "yes", "no", LOST, "the executor lacks it") for fact in full.lacking]
    rows += [Row("rate of a link", "", "", LOST, text) for text in scaling.limited]
    return rows


def _row(quantity: str, named: object, scaled: object, kept: bool | None = None, note: str = "") -> Row:
    kept = named == scaled if kept is None else kept
    return Row(quantity, str(named), str(scaled), KEPT if kept else LOST, "" if kept else note)


def _left(full: Layer, layer: Layer, nodes: int) -> str:
    there, here = (rows_left(nodes, of.experts, of.top_k) for of in (full, layer))
    return f"deduplication between {nodes} nodes leaves {here:.3f} of rows, not {there:.3f}"


def rows_left(nodes: int, experts: int, top_k: int) -> float:
    """Share r(N) of rows between `nodes` nodes that deduplication leaves, uniform routing; see reach_probability."""
    nodes = min(nodes, experts)
    return float(nodes * reach_probability(experts / nodes, experts, top_k) / top_k)
