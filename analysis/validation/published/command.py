"""The command `python -m analysis.validate published`."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

from rich.console import Console

from analysis.validation.published.judge import judge
from analysis.validation.published.report import document, show
from analysis.validation.published.rows import SHIPPED, load, runs

LOG_WIDTH = 120
"""Columns of a table that goes to a file."""


def add(commands: Any, tolerance: Any) -> None:
    """Add the sub-command to a parser's; `tolerance` reads its percentage."""
    published = commands.add_parser("published", help="compare the resource model with published runs")
    published.add_argument("--rows", default=str(SHIPPED), metavar="FILE.csv", help="default: the shipped public rows")
    published.add_argument("--json", action="store_true", help="print one JSON document")
    published.add_argument(
        "--tolerance", type=tolerance, metavar="PCT", help="exit with 1 where the mean time error of all runs is larger"
    )


def run(chosen: argparse.Namespace) -> bool:
    """Judge every row and print the answer; False where the tolerance is exceeded. Raises UsageError for bad rows."""
    from analysis.validation.published.predict import predict

    answer = document(judge(runs(load(chosen.rows)), predict), chosen.rows)
    mean = answer["summary"]["time"]["mean_abs_error_pct"]
    passed = chosen.tolerance is None or (mean is not None and mean <= chosen.tolerance)
    if chosen.json:
        json.dump(answer, sys.stdout, indent=2)
        print()
    else:
        console = Console()
        if not console.is_terminal:
            console.width = LOG_WIDTH
        show(answer, console)
        if chosen.tolerance is not None:
            told = "no run has a time error" if mean is None else f"mean time error {mean:.1f} %"
            verdict = "[  OK  ]" if passed else "[ FAIL ]"
            console.print(f"{verdict} {told} (tolerance {chosen.tolerance:g} %)", markup=False, highlight=False)
    return passed
