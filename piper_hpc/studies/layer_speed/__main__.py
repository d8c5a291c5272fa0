"""The speed of one layer, forward and backward, beside `transformers` and a dense product of the experts' FLOPs.

    python -m piper_hpc.studies.layer_speed [--dtypes float32] [--parts experts] [--seconds 3] [--profile] [--json]

All are timed in turn in one run, with the same weights; a table says how many times faster this layer is, and which
share of the dense product's speed each reaches; with --profile also which share of its time is in matrix products, of
which both call the same. Exit codes: 0 the bar is met, 1 it is missed, 2 a mistake in what was
asked.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

import torch
from rich.console import Console

from piper_hpc.studies.command import MET, MISSED, NO_ANSWER, parser_of
from piper_hpc.studies.layer_speed.measure import time_shape
from piper_hpc.studies.layer_speed.points import DTYPES, GAIN, LEAST, PARTS, SHAPES, SLOW_SHARE, Timed, Verdict, judge
from piper_hpc.studies.tables import table

COLUMNS = ("part", "type", "d x f, experts, k, tokens", "ours", "theirs", "times", "of dense", "theirs")
PROFILED = ("products", "theirs")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = parser_of("layer_speed", __doc__)
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--shapes", type=int, default=len(SHAPES), help="how many of the shapes, the first ones")
    parser.add_argument("--seconds", type=float, default=3.0, help="for each shape (default 3)")
    parser.add_argument("--profile", action="store_true", help="also the share of matrix products in each layer's time")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    chosen = parser.parse_args(arguments)
    if problem := _problem(chosen.dtypes.split(","), chosen.parts.split(","), chosen.shapes):
        print(f"error: {problem}", file=sys.stderr)
        return NO_ANSWER
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    timed = [
        time_shape(shape, dtype, part, device, chosen.seconds, profiled=chosen.profile)
        for part in chosen.parts.split(",")
        for dtype in chosen.dtypes.split(",")
        for shape in SHAPES[: chosen.shapes]
    ]
    verdict = judge(timed)
    if chosen.json:
        print(json.dumps({"points": [asdict(one) for one in timed], "verdict": asdict(verdict)}, indent=2))
    else:
        _show(timed, verdict, device)
    return MET if verdict.met else MISSED


def _problem(dtypes: Sequence[str], parts: Sequence[str], shapes: int) -> str:
    for name, given, known in (("--dtypes", dtypes, DTYPES), ("--parts", parts, PARTS)):
        if unknown := [one for one in given if one not in known]:
            return f"{name} {unknown[0]}: must be of {', '.join(known)}; this works: {name} {known[0]}"
    if not 1 <= shapes <= len(SHAPES):
        return f"--shapes {shapes}: must be 1 to {len(SHAPES)}; this works: --shapes {len(SHAPES)}"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed; this works: pip install 'transformers>=5.0,<6'"
    return ""


def _show(timed: Sequence[Timed], verdict: Verdict, device: torch.device) -> None:
    console = Console() if sys.stdout.isatty() else Console(width=120)
    rows = []
    for one in timed:
        shape = one.shape
        sizes = f"{shape.hidden} x {shape.expert_ffn}, {shape.experts}, {shape.top_k}, {shape.tokens}"
        times = (f"{1e3 * one.ours_s:.1f} ms", f"{1e3 * one.theirs_s:.1f} ms", f"{one.gain:.2f}")
        shares = (one.our_share, one.their_share, one.our_products, one.their_products)
        rows.append((one.part, one.dtype, sizes, *times, *(f"{share:.2f}" for share in shares if share is not None)))
    columns = COLUMNS + (PROFILED if timed[0].our_products is not None else ())
    console.print(table(columns, rows))
    gain = "at no point" if verdict.gain is None else f"{verdict.gain:.2f} times"
    console.print(
        f"on {device}: {gain} as fast (geometric mean, at least {GAIN}) where transformers is below "
        f"{SLOW_SHARE:.0%} of the dense product; least {verdict.least:.2f} (at least {LEAST}): "
        f"{'met' if verdict.met else 'missed'}",
        highlight=False,
    )


if __name__ == "__main__":
    sys.exit(main())
