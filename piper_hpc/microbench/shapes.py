"""The shapes that are measured, as data: one grid for CPU ranks that train small models, one for accelerators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

KIB = 1024
MIB = 1024 * KIB

Shape = dict[str, int]


@dataclass(frozen=True)
class Grid:
    """Shapes of each compute operator and message sizes of each exchange, in ascending order of work; grouped products
    are so at each number of rows an expert.

        compute: operator -> shapes, the keyword arguments of its builder in `operators.py`;
        messages: exchange -> bytes, `p2p` of one message, `all_to_all` and `all_reduce` of one rank's whole buffer;
    arrival_skew: seconds that ranks would compute before they meet, were there no meetings;
    overhead: bytes of a message that is under way while ranks compute.
    """

    compute: dict[str, tuple[Shape, ...]]
    messages: dict[str, tuple[int, ...]]
    arrival_skew: tuple[float, ...]
    overhead: tuple[int, ...]


def _grouped(rows_per_expert: int, *weights: tuple[int, int, int]) -> Iterator[Shape]:
    """Weights [experts, hidden, ffn], every expert with as many rows: a product of few rows is far from its best."""
    for experts, hidden, ffn in weights:
        yield {"experts": experts, "tokens": rows_per_expert * experts, "hidden": hidden, "ffn": ffn}


_CPU_ATTENTION: tuple[Shape, ...] = (
    {"batch": 1, "heads": 4, "sequence": 64, "head_dim": 32},
    {"batch": 4, "heads": 4, "sequence": 64, "head_dim": 32},
    {"batch": 4, "heads": 4, "sequence": 128, "head_dim": 32},
    {"batch": 4, "heads": 4, "sequence": 256, "head_dim": 32},
    {"batch": 2, "heads": 8, "sequence": 512, "head_dim": 64},
)

_GPU_ATTENTION: tuple[Shape, ...] = (
    {"batch": 1, "heads": 16, "sequence": 1024, "head_dim": 128},
    {"batch": 1, "heads": 32, "sequence": 2048, "head_dim": 128},
    {"batch": 1, "heads": 32, "sequence": 4096, "head_dim": 128},
    {"batch": 2, "heads": 32, "sequence": 8192, "head_dim": 128},
)

_CPU_ROWS: tuple[Shape, ...] = (
    {"tokens": 64, "hidden": 64, "experts": 8, "top_k": 2},
    {"tokens": 256, "hidden": 128, "experts": 8, "top_k": 2},
    {"tokens": 2048, "hidden": 256, "experts": 8, "top_k": 2},
)

_GPU_ROWS: tuple[Shape, ...] = (
    {"tokens": 1024, "hidden": 1024, "experts": 64, "top_k": 8},
    {"tokens": 4096, "hidden": 2048, "experts": 64, "top_k": 8},
    {"tokens": 8192, "hidden": 4096, "experts": 64, "top_k": 8},
)

CPU = Grid(
    compute={
        "gemm": (
            {"m": 64, "n": 64, "k": 64},
            {"m": 256, "n": 64, "k": 64},
            {"m": 256, "n": 128, "k": 128},
            {"m": 1024, "n": 128, "k": 128},
            {"m": 1024, "n": 256, "k": 256},
            {"m": 1024, "n": 512, "k": 512},
        ),
        "grouped_gemm": (
            *_grouped(16, (4, 64, 128), (8, 128, 256), (16, 256, 256)),
            *_grouped(64, (4, 64, 128), (4, 128, 256), (4, 256, 512)),
            *_grouped(512, (2, 64, 128), (4, 128, 256), (4, 256, 512)),
        ),
        "attention_forward": _CPU_ATTENTION,
        "attention_backward": _CPU_ATTENTION,
        "elementwise": (
            {"elements": 4 * KIB},
            {"elements": 32 * KIB},
            {"elements": 256 * KIB},
            {"elements": MIB},
            {"elements": 4 * MIB},
        ),
        "activation": ({"elements": 4 * KIB}, {"elements": 64 * KIB}, {"elements": MIB}),
        "norm": ({"tokens": 64, "hidden": 64}, {"tokens": 512, "hidden": 128}, {"tokens": 2048, "hidden": 512}),
        "router": (
            {"tokens": 64, "experts": 8, "top_k": 2},
            {"tokens": 512, "experts": 8, "top_k": 2},
            {"tokens": 4096, "experts": 8, "top_k": 2},
        ),
        "dispatch_rows": _CPU_ROWS,
        "combine_rows": _CPU_ROWS,
        "gather": ({"rows": 128, "hidden": 64}, {"rows": 512, "hidden": 128}, {"rows": 4096, "hidden": 256}),
        "sort": ({"values": 128}, {"values": 1024}, {"values": 16384}),
        "adamw": (
            {"parameters": 16 * KIB, "tensors": 8},
            {"parameters": 256 * KIB, "tensors": 8},
            {"parameters": 1 * MIB, "tensors": 8},
            {"parameters": 4 * MIB, "tensors": 8},
        ),
        "host_op": ({"operations": 64}, {"operations": 256}, {"operations": 1024}),
    },
    messages={
        "p2p": (KIB, 32 * KIB, 256 * KIB, 2 * MIB),
        "all_to_all": (KIB, 32 * KIB, 256 * KIB, 2 * MIB),
        "all_reduce": (KIB, 64 * KIB, 512 * KIB, 4 * MIB),
        "all_gather": (KIB, 64 * KIB, 512 * KIB, 4 * MIB),
    },
    arrival_skew=(4e-4, 1.5e-3, 5e-3, 1.5e-2, 6e-2, 0.24),
    overhead=(KIB, 64 * KIB, 512 * KIB),
)

GPU = Grid(
    compute={
        "gemm": (
            {"m": 512, "n": 1024, "k": 1024},
            {"m": 2048, "n": 2048, "k": 2048},
            {"m": 4096, "n": 4096, "k": 4096},
            {"m": 8192, "n": 4096, "k": 4096},
            {"m": 8192, "n": 8192, "k": 8192},
        ),
        "grouped_gemm": (
            *_grouped(128, (8, 1024, 1024), (16, 2048, 1024), (16, 4096, 2048)),
            *_grouped(512, (8, 2048, 1024), (8, 4096, 1536), (16, 4096, 2048)),
            *_grouped(4096, (4, 2048, 1024), (8, 4096, 1536), (16, 4096, 2048)),
        ),
        "attention_forward": _GPU_ATTENTION,
        "attention_backward": _GPU_ATTENTION,
        "elementwise": (
            {"elements": MIB},
            {"elements": 8 * MIB},
            {"elements": 32 * MIB},
            {"elements": 128 * MIB},
        ),
        "activation": ({"elements": MIB}, {"elements": 16 * MIB}, {"elements": 128 * MIB}),
        "norm": (
            {"tokens": 1024, "hidden": 1024},
            {"tokens": 8192, "hidden": 2048},
            {"tokens": 16384, "hidden": 8192},
        ),
        "router": (
            {"tokens": 4096, "experts": 64, "top_k": 8},
            {"tokens": 16384, "experts": 64, "top_k": 8},
            {"tokens": 65536, "experts": 64, "top_k": 8},
        ),
        "dispatch_rows": _GPU_ROWS,
        "combine_rows": _GPU_ROWS,
        "gather": ({"rows": 8192, "hidden": 1024}, {"rows": 32768, "hidden": 2048}, {"rows": 65536, "hidden": 4096}),
        "sort": ({"values": 8192}, {"values": 65536}, {"values": 524288}),
        "adamw": (
            {"parameters": MIB, "tensors": 8},
            {"parameters": 16 * MIB, "tensors": 16},
            {"parameters": 128 * MIB, "tensors": 32},
        ),
        "host_op": ({"operations": 64}, {"operations": 256}, {"operations": 1024}),
    },
    messages={
        "p2p": (64 * KIB, MIB, 8 * MIB, 64 * MIB),
        "all_to_all": (64 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB),
        "all_reduce": (64 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB),
        "all_gather": (64 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB),
    },
    arrival_skew=(3e-4, 3e-3, 1e-2, 3e-2),
    overhead=(64 * KIB, MIB, 16 * MIB),
)


def grid_for(device_type: str) -> Grid:
    """The grid for a torch device type: `cpu`, or anything else for accelerators."""
    return CPU if device_type == "cpu" else GPU
