"""The study for people: tables on the terminal, the same as a Markdown section, and one JSON document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from math import isinf
from typing import Any

from piper_hpc.studies.frontier_all_to_all.study import (
    CROSSING,
    FIG_8,
    LATENCIES_S,
    VARIANTS,
    Constant,
    Machine,
    PaperComparison,
    Point,
    Sensitivity,
)

SCHEMA_VERSION = 1
Row = list[str]

TITLE = "The all-to-all family on a simulated Frontier"
INTRODUCTION = """\
Simulated, not measured: the formulas of `resource_model/all_to_all.py` on the links of `conf/cluster/frontier.yaml`, at
the sizes of Fig 8 of arXiv 2605.05049. Every rank sends equally to all; a rank's messages go one after the other; all
ranks of a node send at once and share its four NICs; no congestion, no incast, no software but a latency a message and
a copy between levels. V0 runs HALO's three phases one after the other; V1 and V2 overlap phase 1 with phase 2, and
differ in which is issued first, which such a model cannot tell apart. Deduplicated columns are a dispatch of routed
rows of as many bytes (256 experts, 8 a token, uniform), which the paper's equal-split benchmark has no counterpart
of."""

READING = (
    "HALO wins by fewer messages, so below a size per rank that grows with the nodes and with the latency a_i between "
    "them; above it flat wins, because HALO moves nearly all bytes once more inside the node and copies them twice. At "
    "the bytes per pair at which Fig 8's axes begin (16 kB) the model has HALO ahead at every number of nodes.",
    "The third level (switch of four nodes) is worth its extra pass only at the smallest sizes: the links file gives a "
    "switch no lower latency and no higher rate than any other node, so all that it saves is messages.",
    "Deduplication by node moves HALO's crossover up where few nodes hold many of a token's experts (16 and 32 nodes); "
    "from 64 nodes on, eight choices nearly always fall on eight nodes, and there is little to spare. Deduplication "
    "between ranks (flat dedup) spares next to nothing at any of these sizes.",
)


def disagreements(beside: Sequence[PaperComparison], found: Sequence[Sensitivity]) -> list[str]:
    """Where the paper's ratios and the model's part, and what is not known."""
    highest = max(beside, key=lambda each: min(each.annotated))
    lowest = min(beside, key=lambda each: max(each.annotated))
    first, last = (max(each.most for each in found if each.latency_s == at) for at in (LATENCIES_S[0], LATENCIES_S[-1]))
    return [
        f"{highest.nodes} nodes: the paper prints {min(highest.annotated):.1f} to {max(highest.annotated):.1f}, the "
        f"model's largest is {highest.most:.1f}. Fewer messages cannot give it: with eight ranks a node, two levels "
        f"send an eighth of them, and the model needs {time_text(highest.needed_s[0])} a message to come near, at the "
        "least size. Whatever made the vendor's exchange slow there (congestion, a change of protocol, outliers of the "
        "kind that X-MoE reports on Frontier) is not in the model, which cannot confirm that panel.",
        f"{lowest.nodes} nodes: the paper's {max(lowest.annotated):.1f} is the lowest panel, while the model gives "
        "nearly all panels the same ratio at the same bytes per pair. A ratio that jumps with the number of nodes and "
        "falls again does not follow from latencies and bytes.",
        "Large sizes: the paper's axes reach 4.3 GB a rank, where the model has flat ahead. Were the annotated ratios "
        "those of the largest size, flat would have reached only the share of the link's rate in the last column. The "
        "paper does not say at which sizes they hold, so neither is refuted.",
        "Below 16 nodes the paper finds both comparable; that is not studied here.",
        "The latency decides, and is the library's own constant for its tuning, not a measurement: with "
        f"{time_text(LATENCIES_S[0])} HALO's best ratio is {first:.1f}, with {time_text(LATENCIES_S[-1])} {last:.1f}. "
        "`task=microbench cluster=frontier` would settle it.",
    ]


def size_text(size: float) -> str:
    """Bytes in MB of 1e6."""
    return f"{size / 1e6:,.1f}"


def time_text(seconds: float | None) -> str:
    """A latency."""
    if seconds is None:
        return "none"
    return f"{seconds * 1e6:,.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:,.2f} ms"


def crossover_text(size: float | None) -> str:
    """Below which size a variant wins."""
    if size is None:
        return "never"
    return "always" if isinf(size) else size_text(size)


def size_rows(points: Sequence[Point]) -> tuple[Row, list[Row]]:
    """Milliseconds of every variant at every size, HALO's ratio over flat, and who wins."""
    names = [variant.name for variant in VARIANTS]
    head = ["nodes", "MB a rank", "kB a pair", *names, "flat / HALO", "wins, equal splits", "wins, routed rows"]
    rows = [
        [
            str(point.nodes), size_text(point.buffer_bytes), f"{point.pair_bytes / 1e3:,.0f}",
            *(f"{point.seconds[name] * 1e3:,.2f}" for name in names),
            f"{point.speedup('HALO V1, V2'):.2f}", point.best(dedup=False), point.best(dedup=True),
        ]
        for point in points
    ]  # fmt: skip
    return head, rows


def beside_rows(beside: Sequence[PaperComparison]) -> tuple[Row, list[Row]]:
    """The paper's ratios and the model's."""
    head = ["nodes", "paper, annotated", "model, largest", "model, least"]
    head += [f"a_i needed at the {place} size" for place in ("least", "middle", "most")] + [
        "or flat's share of the link"
    ]
    rows = [
        [
            str(each.nodes), ", ".join(f"{ratio:.2f}" for ratio in each.annotated),
            f"{each.most:.2f}", f"{each.least:.2f}",
            *(time_text(needed) for needed in each.needed_s), f"{each.flat_share:.0%}",
        ]
        for each in beside
    ]  # fmt: skip
    return head, rows


def sensitivity_rows(found: Sequence[Sensitivity]) -> tuple[Row, list[Row]]:
    """HALO's best ratio, and below which size variants beat flat, by latency between nodes."""
    head = ["a_i", "nodes", "flat / HALO, best", *(f"{name} beats flat below, MB" for name in CROSSING)]
    rows = [
        [
            time_text(each.latency_s), str(each.nodes), f"{each.most:.2f}",
            *(crossover_text(each.crossover_bytes[name]) for name in CROSSING),
        ]
        for each in found
    ]  # fmt: skip
    return head, rows


def constant_rows(constants: Sequence[Constant]) -> tuple[Row, list[Row]]:
    """Every assumption with its source."""
    return ["constant", "value", "source"], [
        [each.name, f"{each.value:.4g} {each.unit}".strip(), each.source] for each in constants
    ]


def sections(
    on: Machine, points: Sequence[Point], beside: Sequence[PaperComparison], found: Sequence[Sensitivity]
) -> list[tuple[str, Row, list[Row], Sequence[str]]]:
    """Headings, each with its table and the text below it."""
    return [
        ("Constants", *constant_rows(on.constants), ()),
        ("Milliseconds of one exchange", *size_rows(points), READING),
        ("Beside the paper's Fig 8", *beside_rows(beside), disagreements(beside, found)),
        ("How much hangs on the latency between nodes", *sensitivity_rows(found), ()),
    ]


def markdown(parts: Sequence[tuple[str, Row, list[Row], Sequence[str]]]) -> str:
    """The whole study as a page."""
    lines = [
        f"# {TITLE}",
        "",
        "Written by `python -m piper_hpc.studies.frontier_all_to_all --markdown FILE`.",
        "",
        INTRODUCTION,
        "",
    ]
    for heading, head, rows, text in parts:
        lines += [f"## {heading}", "", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", *(f"- {line}" for line in text), ""] if text else [""]
    return "\n".join(lines)


def document(
    on: Machine, points: Sequence[Point], beside: Sequence[PaperComparison], found: Sequence[Sensitivity]
) -> dict[str, Any]:
    """The answer to `--json`. What does not exist is null; a crossover beyond all sizes is the word always."""
    return {
        "schema_version": SCHEMA_VERSION,
        "simulated": True,
        "constants": [asdict(each) for each in on.constants],
        "panels": [asdict(panel) for panel in FIG_8],
        "points": [
            asdict(point) | {"best_equal_splits": point.best(dedup=False), "best_routed_rows": point.best(dedup=True)}
            for point in points
        ],
        "beside_paper": [asdict(each) for each in beside],
        "sensitivity": [
            asdict(each)
            | {"crossover_bytes": {k: "always" if v and isinf(v) else v for k, v in each.crossover_bytes.items()}}
            for each in found
        ],
        "reading": list(READING),
        "disagreements": disagreements(beside, found),
    }
