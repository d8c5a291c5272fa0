"""Measured rows on the terminal: nccl-tests' columns as rows come, and what was fitted to them at the end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from piper_hpc.spec import DISPATCH_COMBINE

Row = Mapping[str, Any]


def _header(names: str, units: str, widths: str) -> str:
    """Two lines of column names and units; widths as in a format, negative for columns that start at the left."""
    rows = []
    for words in (names.split("|"), units.split("|")):
        cells = (
            f"{word:<{-width}}" if width < 0 else f"{word:>{width}}"
            for word, width in zip(words, map(int, widths.split()), strict=True)
        )
        rows.append("# " + " ".join(cells))
    return "\n".join(rows)


EXCHANGE = _header(
    "operation|size|count|type|time|p99|algbw|busbw|#wrong",
    "|(B)|(elements)||(us)|(us)|(GB/s)|(GB/s)|",
    "-24 11 10 9 11 11 8 8 6",
)
COMPUTE = _header(
    "operation|shape|type|median|max|TFLOP/s|best|#wrong",
    "|||(us)|(us)|(median)||",
    "-40 -42 9 11 11 8 8 6",
)
DISPATCH = _header(
    "algorithm|load|bytes/rank|type|ranks|time|p95|algbw|#wrong",
    "||(B)|||(us)|(us)|(GB/s)|",
    "-16 -6 11 9 6 11 11 8 6",
)


def line(row: Row) -> tuple[str, str]:
    """(header, line) of one row: exchanges, dispatches and compute have columns of their own."""
    wrong = row.get("wrong", 0 if row["correct"] else "yes")
    if row["operator"] == DISPATCH_COMBINE:
        size, rate = row["logical_bytes_per_rank"], row["logical_bytes_per_rank"] / row["median_s"] / 1e9
        name = row["algorithm"] + (f" c{row['chunks']}" if row.get("chunks") else "")
        return DISPATCH, (
            f"  {name:<16} {row['workload']:<6} {size:>11} {row['dtype']:>9} {row['group']['ranks']:>6} "
            f"{1e6 * row['median_s']:>11.1f} {1e6 * row['p95_s']:>11.1f} {rate:>8.3f} {wrong:>6}"
        )
    if "busbw_bytes_per_s" in row:
        name = ("" if row.get("backend", "torch") == "torch" else f"{row['backend']}:") + row["operator"]
        text = (
            f"  {name:<24} {row['work']:>11.0f} {row['shape'].get('elements', ''):>10} {row['dtype']:>9} "
            f"{1e6 * row['median_s']:>11.1f} {1e6 * row.get('p99_s', row['max_s']):>11.1f} "
            f"{row['work'] / row['median_s'] / 1e9:>8.3f} {row['busbw_bytes_per_s'] / 1e9:>8.3f} {wrong:>6}"
        )
        return EXCHANGE, text + (f"  refused: {row['refused']}" if row.get("refused") else "")
    shape = " ".join(f"{key}={value}" for key, value in row["shape"].items() if value)
    name = row["operator"] + (f"/{row['part']}" if "part" in row else "")
    flops = row["unit"] == "flops"
    median, best = (f"{row['work'] / row[key] / 1e12:.4f}" for key in ("median_s", "min_s")) if flops else ("", "")
    return COMPUTE, (
        f"  {name:<40} {shape:<42} {row['dtype']:>9} {1e6 * row['median_s']:>11.1f} {1e6 * row['max_s']:>11.1f} "
        f"{median:>8} {best:>8} {wrong:>6}"
    )


class LiveTable:
    """Hands out each row once, with a header wherever the kind of row changes."""

    def __init__(self) -> None:
        self._shown = 0
        self._header = ""

    def lines(self, rows: Sequence[Row]) -> Iterator[str]:
        """Lines for the rows that are new; rows of a resumed run are not told again."""
        for row in rows[self._shown :]:
            if "resumed_from" in row:
                continue
            header, text = line(row)
            if header != self._header:
                self._header = header
                yield header
            yield text
        self._shown = len(rows)


def summary(rows: Sequence[Row], job: Mapping[str, Any]) -> list[str]:
    """What a run measured, took over, refused and left out, and what its calibration became."""
    taken, refused = (sum(bool(row.get(key)) for row in rows) for key in ("resumed_from", "refused"))
    words = [f"{len(rows)} rows" + (f", {taken} of them taken over from {_sources(rows)}" if taken else "")]
    if refused:
        words.append(f"{refused} rows refused by their link's counters, not used")
    wrong = sum(not row["correct"] and not row.get("refused") for row in rows)
    if wrong:
        words.append(f"{wrong} rows with wrong values, not used")
    left_out = job.get("left_out", {})
    if left_out:
        cell, reason = next(iter(left_out.items()))
        words.append(f"{len(left_out)} cells left out, for example {cell}: {reason}; all in manifest.json")
    return words + list(job.get("calibration", []))


def _sources(rows: Iterable[Row]) -> str:
    return ", ".join(sorted({row["resumed_from"] for row in rows if "resumed_from" in row}))


def fitted(job: Mapping[str, Any]) -> list[str]:
    """The fits of this run, one line each, with 90 % intervals."""
    lines = []
    for fit in job.get("fits", []):
        terms = ", ".join(
            f"{name} {term['value']:.3g} [{term['low']:.3g}, {term['high']:.3g}]" for name, term in fit["terms"].items()
        )
        where = f"{fit['least']:.3g} to {fit['most']:.3g} {fit['unit']}"
        name = fit["operator"] if fit["backend"] == "torch" else f"{fit['backend']}:{fit['operator']}"
        lines.append(f"fit {name} ({where}, {fit['points']} points, {100 * fit['error']:.1f} % off): {terms}")
    return lines
