"""What a comparison says of each strategy beside the others, as predicted and as measured; and the bars. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import exp, log
from statistics import median
from typing import Any

from piper_hpc.runs import RunFolder
from piper_hpc.spec import Layout
from piper_hpc.studies.headline.links import Links, ceiling
from piper_hpc.studies.headline.resident import CPU, MEASURED, PREDICTED, TRAINED, TRIED, Asked
from piper_hpc.studies.headline.strategies import FLAT, MACHINE, OURS, PAPER, STRATEGIES, XMOE
from piper_hpc.studies.jobs import ASKED, asked_of

REACHED_SHARE = 0.75
"""Of exchange in the step of `a`, which links are slowed down to."""
OF_CEILING, OVER_XMOE, NO_HARM = 0.85, 1.1, 0.97
HALF = 0.5
LOSS = 1e-3
"""Most that losses may differ by, of each other: their sums are added in other orders, and float32 has seven digits."""
CROSSINGS = (2.0, 3.5)
"""The paper's claim, arXiv 2605.05049: 2 to 3.5 times the MFU of X-MoE."""
Pair = tuple[str, str]
PAIRS: tuple[Pair, ...] = ((OURS, FLAT), (PAPER, XMOE), (OURS, XMOE), (PAPER, FLAT), (XMOE, FLAT))


@dataclass(frozen=True)
class Entry:
    """One strategy at one point: the best of its settings as tried. Seconds are medians over repeats.

    steps_s: by repeat; share: of dispatch and combine in the step; wire_s, cpu_s: of exchange, a rank's bytes over its
    links' rates, and CPU seconds; bubble: of the step; peak_bytes: of the fullest rank. trained_s, trained_share: the
    same with the router's own routing, once.
    """

    strategy: str
    layout: Layout
    all_to_all: str
    setting: int
    tried: int
    predicted_s: float
    steps_s: tuple[float, ...]
    share: float
    bubble: float
    wire_s: float
    cpu_s: float | None
    peak_bytes: int
    losses: tuple[float, ...]
    trained_s: float
    trained_share: float
    trained_losses: tuple[float, ...]

    @property
    def step_s(self) -> float:
        """Median over repeats."""
        return median(self.steps_s)


@dataclass(frozen=True)
class Point:
    """One slowdown of the links between nodes, routing balanced. left: rho."""

    slowdown: float
    left: float
    entries: dict[str, Entry]

    @property
    def share(self) -> float | None:
        """s: of exchange in the step of `a`."""
        return self.entries[FLAT].share if FLAT in self.entries else None

    @property
    def ceiling(self) -> float | None:
        """C(s)."""
        return None if self.share is None else ceiling(self.share, self.left)

    def faster(self, pair: Pair) -> float | None:
        """Steps of the second over those of the first, the median over repeats; None where one was not measured."""
        first, second = (self.entries.get(key) for key in pair)
        if first is None or second is None:
            return None
        return median(slow / fast for fast, slow in zip(first.steps_s, second.steps_s, strict=True))

    def trained_faster(self, pair: Pair) -> float | None:
        """The same with the router's own routing."""
        first, second = (self.entries.get(key) for key in pair)
        return None if first is None or second is None else second.trained_s / first.trained_s

    def predicted_faster(self, pair: Pair) -> float | None:
        """The same of predictions."""
        first, second = (self.entries.get(key) for key in pair)
        return None if first is None or second is None else second.predicted_s / first.predicted_s

    @property
    def losses_differ(self) -> float:
        """Largest relative difference between two strategies' losses of one step."""
        steps = zip(*(entry.losses + entry.trained_losses for entry in self.entries.values()), strict=True)
        return max(max(losses) / min(losses) - 1 for losses in steps)


@dataclass(frozen=True)
class Bar:
    """One that a point, or all of them, must meet."""

    name: str
    found: str
    asked: str
    met: bool


def point_of(run: RunFolder) -> Point | None:
    """What a run measured; None where it has not the rows."""
    rows = run.measurements()
    measured = [row for row in rows if row["operator"] == MEASURED]
    if not measured or not (run.path / ASKED).exists():
        return None
    asked = Asked(**asked_of(run.path))
    links = Links(asked.node_bytes_per_s, asked.nic_bytes_per_s)
    compared = {row["strategy"] for row in measured}
    entries = {key: _entry(key, rows, links) for key in STRATEGIES if key in compared}
    return Point(asked.slowdown, links.left(MACHINE), entries)


def _entry(key: str, rows: Sequence[dict[str, Any]], links: Links) -> Entry:
    mine = [row for row in rows if row["operator"].startswith("headline/") and row["strategy"] == key]
    measured = [row for row in mine if row["operator"] == MEASURED]
    setting = measured[0]["setting"]
    (prediction,) = (row for row in mine if row["operator"] == PREDICTED and row["setting"] == setting)
    (tried,) = (row for row in mine if row["operator"] == TRIED and row["setting"] == setting)
    (trained,) = (row for row in mine if row["operator"] == TRAINED)
    cpu = [row["cpu_s"] for row in mine if row["operator"] == CPU]
    return Entry(
        strategy=key,
        layout=Layout(**prediction["layout"] | {"stage_layers": tuple(prediction["layout"]["stage_layers"])}),
        all_to_all=", ".join(prediction["all_to_all"]),
        setting=setting,
        tried=sum(row["operator"] == TRIED for row in mine),
        predicted_s=prediction["step_time_s"],
        steps_s=tuple(row["step_time_s"] for row in measured),
        share=median(map(_share, measured)),
        bubble=median(row["terms"]["bubble_s"] / row["step_time_s"] for row in measured),
        wire_s=median(links.wire_s(row["payload_bytes"], MACHINE.ranks) for row in measured),
        cpu_s=cpu[0] if cpu else None,
        peak_bytes=max(tried["peak_memory_bytes"]),
        losses=tuple(measured[0]["losses"]),
        trained_s=trained["step_time_s"],
        trained_share=_share(trained),
        trained_losses=tuple(trained["losses"]),
    )


def _share(row: dict[str, Any]) -> float:
    terms = row["terms"]
    return float((terms["dispatch_s"] + terms["combine_s"]) / row["step_time_s"])


def crossing(points: Sequence[Point], pair: Pair, level: float, *, predicted: bool) -> float | None:
    """The slowdown at which a pair's ratio first passes `level`, between two points on log axes; None where none."""

    def ratio(point: Point) -> float | None:
        return point.predicted_faster(pair) if predicted else point.faster(pair)

    known = [(point.slowdown, value) for point in points if (value := ratio(point)) is not None]
    if known and known[0][1] >= level:
        return known[0][0]
    for (low, before), (high, after) in pairwise(known):
        if before < level <= after:
            at = log(level / before) / log(after / before)
            return exp(log(low) + at * log(high / low))
    return None


def bars(points: Sequence[Point]) -> list[Bar]:
    """Of every point, then of all."""
    made: list[Bar] = []
    for point in points:
        at = f"links / {point.slowdown:g}"
        ours = point.faster((OURS, FLAT))
        if ours is not None and point.ceiling is not None:
            least = OF_CEILING * point.ceiling
            made.append(_least(f"{at}: ours over flat, of the ceiling {point.ceiling:.2f}", ours, least))
        over = point.faster((OURS, XMOE))
        if over is not None and point.entries[XMOE].share >= HALF:
            made.append(_least(f"{at}: ours over X-MoE's, which exchanges half its step", over, OVER_XMOE))
        for key in point.entries:
            against = point.faster((OURS, key)) if key != OURS else None
            if against is not None:
                made.append(_least(f"{at}: ours over {key}", against, NO_HARM))
        differ = point.losses_differ
        made.append(Bar(f"{at}: losses differ by at most", f"{differ:.1e}", f"<= {LOSS:g}", differ <= LOSS))
    shares = [point.share for point in points if point.share is not None]
    if shares:
        made.append(_least("largest share of exchange in the step of flat", max(shares), REACHED_SHARE))
    return made


def _least(name: str, value: float, least: float) -> Bar:
    return Bar(name, f"{value:.2f}", f">= {least:.2f}", value >= least)
