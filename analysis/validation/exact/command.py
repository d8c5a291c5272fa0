"""The command `python -m analysis.validate exact`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Console

from analysis.validation.exact.cases import Case, cases

SCHEMA_VERSION = 1

TRANSFORMERS_COUNTS_COMMAND = "make test ARGS=tests/spec/test_transformers_counts.py"
"""Counts against `transformers` build its models with torch, which this package does not import: they are a test."""


def add(commands: Any) -> None:
    """Add the sub-command to a parser's."""
    exact = commands.add_parser("exact", help="check every figure that arithmetic alone decides")
    exact.add_argument("--json", action="store_true", help="print one JSON document")


def run(chosen: argparse.Namespace) -> bool:
    """Check every case and print the answers; False where one does not hold."""
    answers = cases()
    if chosen.json:
        json.dump(document(answers), sys.stdout, indent=2)
        print()
    else:
        show(answers, Console())
    return all(case.holds for case in answers)


def document(answers: Sequence[Case]) -> dict[str, Any]:
    """The answer to `--json`."""
    failed = sum(not case.holds for case in answers)
    return {
        "schema_version": SCHEMA_VERSION,
        "cases": [asdict(case) | {"holds": case.holds} for case in answers],
        "summary": {"cases": len(answers), "failed": failed},
        "passed": failed == 0,
        "counts_against_transformers": TRANSFORMERS_COUNTS_COMMAND,
    }


def show(answers: Sequence[Case], console: Console) -> None:
    """Every case under its source, and how many hold."""

    def line(text: str) -> None:
        console.print(text, highlight=False, soft_wrap=True)

    line(f"[bold]{'':46}{'must give':>17} {'model gives':>17}[/]")
    for (id, source, unit, tolerance), group in groupby(answers, lambda case: case.heading):
        line(f"[bold]{id}[/] {source}: {unit}, {tolerance}")
        for case in group:
            verdict = "[green]  OK[/]" if case.holds else "[red]FAIL[/]"
            line(f"{verdict} {case.what:<40} {_figure(case.expected):>17} {_figure(case.given):>17}")
    held = sum(case.holds for case in answers)
    line(f"{held} of {len(answers)} cases hold")
    line(f"counts of whole models against `transformers`, exact: {TRANSFORMERS_COUNTS_COMMAND}")


def _figure(value: float) -> str:
    """Integers whole, others to six digits."""
    return f"{value:,}" if isinstance(value, int) else f"{value:,.6g}"
