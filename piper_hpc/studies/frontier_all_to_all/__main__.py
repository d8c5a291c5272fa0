"""`python -m piper_hpc.studies.frontier_all_to_all`: the all-to-all family on a simulated Frontier."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from piper_hpc.studies.frontier_all_to_all import show, study

USAGE_ERROR = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Exit codes: 0 done, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m piper_hpc.studies.frontier_all_to_all", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the study as a page")
    chosen = parser.parse_args(arguments)
    if chosen.markdown is not None and not chosen.markdown.parent.is_dir():
        rule = f"must lie in a folder that exists; this works: --markdown {chosen.markdown.name}"
        print(f"error: --markdown = {chosen.markdown}: {rule}", file=sys.stderr)
        return USAGE_ERROR
    on = study.machine()
    answers = (on, study.points(on), study.compare_with_paper(on), study.sensitivity(on))
    if chosen.markdown is not None:
        chosen.markdown.write_text(show.markdown(show.sections(*answers)))
    if chosen.json:
        print(json.dumps(show.document(*answers), indent=1))
        return 0
    console = Console()
    if not console.is_terminal:
        console.width = 200
    console.print(f"[bold]{show.TITLE}[/]\n{show.INTRODUCTION}\n", highlight=False)
    for heading, head, rows, text in show.sections(*answers):
        table = Table(*head, title=heading, title_justify="left", box=None, header_style="bold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
        for line in text:
            console.print(f"- {line}", highlight=False)
        console.print()
    return 0


if __name__ == "__main__":
    sys.exit(main())
