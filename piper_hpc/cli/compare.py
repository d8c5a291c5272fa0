"""`python -m piper_hpc.jobs compare A B`: what changed between two runs, and what came of it."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.report.compare import BEYOND, Comparison, Difference, compare
from piper_hpc.report.load import UsageError
from piper_hpc.report.units import percent, quantity
from piper_hpc.runs import RunFolder, find, understood


def register(commands: Any, shared: argparse.ArgumentParser, pick: Callable[[Path, str], RunFolder]) -> None:
    """Add the command to those of `jobs`. pick: the run that a word names under a folder of runs."""
    command = commands.add_parser("compare", parents=[shared], help=show.__doc__, description=show.__doc__)
    command.set_defaults(action=lambda arguments, console: show(arguments, console, pick))
    command.add_argument("a", metavar="A", help="a run, as for `jobs status`")
    command.add_argument("b", metavar="B", help="another")


def show(arguments: argparse.Namespace, console: Console, pick: Callable[[Path, str], RunFolder]) -> int:
    """Two runs: what changed (configuration, environment, code), and which times differ by more than they repeat."""
    a, b = pick(arguments.runs, arguments.a), pick(arguments.runs, arguments.b)
    try:
        with understood(a):
            found = compare(a, b, find(arguments.runs))
    except UsageError as error:
        works = "two runs of task=train that took steps"
        raise ConfigError(Problem("RUN", f"{arguments.a} {arguments.b}", str(error), works)) from error
    if arguments.json:
        print(json.dumps(asdict(found), indent=2, default=str))
        return 0
    console.print(f"A {found.a}\nB {found.b}", highlight=False)
    for change in found.changes:
        told = f"{change.kind:<12} {change.key}: {_value(change.a)} -> {_value(change.b)}"
        console.print(told, highlight=False, markup=False, soft_wrap=True)
    if not found.changes:
        console.print("nothing changed in configuration, environment, machine or code", highlight=False)
    console.print(_table(found))
    console.print(noise_line(found), highlight=False, soft_wrap=True)
    return 0


def _value(value: Any) -> str:
    return "none" if value is None or value == "" else str(value)


def _table(found: Comparison) -> Table:
    shown = Table(box=None, header_style="dim", pad_edge=False)
    for name in ("", "A", "B", "B against A", "noise", ""):
        shown.add_column(name, justify="right" if name else "left", no_wrap=True)
    for one in found.differences:
        pct = "" if one.difference_pct is None else percent(one.difference_pct)
        verdict = "differs" if one.differs else ""
        style = "bold" if one.differs else ""
        shown.add_row(one.name, *_values(one), pct, f"± {one.noise_pct:.1f} %", verdict, style=style)
    return shown


def _values(one: Difference) -> tuple[str, str]:
    if one.key == "tokens_per_s":
        return f"{one.a:,.0f}", f"{one.b:,.0f}"
    unit = "bytes" if one.key.endswith("_bytes") else "s"
    return quantity(one.a, unit), quantity(one.b, unit)


def noise_line(found: Comparison) -> str:
    """What the noise rests on."""
    within = f"noise: {BEYOND:g} standard errors of the medians over steps"
    if found.repeat_pct is None:
        return (
            f"{within} alone. How well a run repeats is not known, as neither configuration ran twice; two runs of one "
            "often differ by more: launch each again"
        )
    others = f"{found.repeats} more of the same configurations" if found.repeats else "these two, of one configuration"
    return f"{within}, and how runs repeat: a step by {found.repeat_pct:.1f} % (one standard deviation; {others})"
