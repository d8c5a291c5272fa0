"""Hurt real trainings on the testbed, at random moments that seeds give, and see that they end or go on by themselves.

Each seed means one fault; kinds take turns. After it the run must have completed, by itself or by `jobs resume`, with
the losses of an undisturbed one bit for bit, no more trained twice than since the newest checkpoint, the right failure
class, and no process, port or file left over. Rows go to --out as they come: the same command goes on with the seeds
that lack.

    python -m piper_hpc.studies.faults --seeds 0:60
    python -m piper_hpc.studies.faults --seeds 0:15 --only "rank killed" --only "disk full"

Exit codes: 0 all as it must be, 1 something is not, 2 bad input or no answer.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from piper_hpc.studies.command import MET, MISSED, NO_ANSWER, parser_of
from piper_hpc.studies.faults.inject import FAULTS
from piper_hpc.studies.faults.judge import Losses, kind_of, try_one, undisturbed
from piper_hpc.studies.faults.scene import Missed
from piper_hpc.studies.faults.show import COLUMNS, cells, summary
from piper_hpc.studies.tables import markdown_table, table
from piper_hpc.studies.testbed import TestbedError, brought_up
from piper_hpc.testbed import state

FLAGS = ("--nodes", "4", "--ranks-per-node", "2", "--kill-wait-s", "30")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = parser_of("faults", __doc__)
    made.add_argument("--seeds", default="0:60", metavar="FROM:TO", help="one fault a seed, FROM to TO - 1")
    made.add_argument("--only", action="append", choices=list(FAULTS), help="seeds of this fault alone; repeatable")
    made.add_argument("--out", type=Path, default=Path("faults"), help="folder of rows and runs")
    made.add_argument("--as-it-is", action="store_true", help="on the testbed that is up")
    made.add_argument("--minutes", type=float, default=120.0, help="begin no fault after so many")
    made.add_argument("--beside", type=int, default=3, help="how many trainings at once, of faults that harm no other")
    made.add_argument("--keep", action="store_true", help="keep the runs of faults that went as they must, too")
    return made


def main(words: Sequence[str] | None = None) -> int:
    """The command."""
    asked, console = parser().parse_args(words), Console()
    try:
        first, last = (int(part) for part in asked.seeds.split(":"))
    except ValueError:
        print(f"--seeds {asked.seeds}: must be FROM:TO, for example --seeds 0:60", file=sys.stderr)
        return NO_ANSWER
    seeds = [seed for seed in range(first, last) if not asked.only or kind_of(seed) in asked.only]
    asked.out.mkdir(parents=True, exist_ok=True)
    try:
        with brought_up(() if asked.as_it_is else FLAGS):
            _try_all(seeds, asked, console)
    except (Missed, TestbedError) as error:
        print(f"no answer: {error}", file=sys.stderr)
        return NO_ANSWER
    rows = [row for row in _rows(asked.out) if row["seed"] in seeds]
    lines = [cells(row) for row in rows]
    console.print(table(COLUMNS, [list(map(escape, line)) for line in lines]))
    console.print(summary(rows, len(seeds)), highlight=False)
    (asked.out / "faults.md").write_text(markdown_table(COLUMNS, lines) + summary(rows, len(seeds)) + "\n")
    (asked.out / "faults.json").write_text(json.dumps({"seeds": asked.seeds, "rows": rows}, indent=1) + "\n")
    if len(rows) < len(seeds):
        return NO_ANSWER
    return MET if all(row["problem"] is None for row in rows) else MISSED


def _try_all(seeds: Sequence[int], asked: argparse.Namespace, console: Console) -> None:
    """Those that have no row yet; a row is appended once its fault is judged."""
    testbed, began_s = state.load(), time.monotonic()
    if testbed is None:
        raise Missed("the testbed is not up")
    done = {row["seed"] for row in _rows(asked.out)}
    reference = _reference(asked.out)
    todo = [seed for seed in seeds if seed not in done]
    longest = max((FAULTS[kind_of(seed)].steps for seed in todo), default=0)
    if reference is None or len(reference) < longest:
        reference = undisturbed(testbed, asked.out / "runs", longest)
        kept = {str(step): found for step, found in reference.items()}
        (asked.out / "reference.json").write_text(json.dumps(kept))

    def one(seed: int) -> None:
        if time.monotonic() - began_s > 60 * asked.minutes:
            return
        row = asdict(try_one(testbed, asked.out / "runs", seed, reference))
        with (asked.out / "rows.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
        console.print("  ".join(cells(row)), highlight=False, markup=False, soft_wrap=True)
        if row["problem"] is None and not asked.keep:
            for name in (f"seed-{seed}", f"seed-{seed}-kept"):
                shutil.rmtree(asked.out / "runs" / name, ignore_errors=True)

    with ThreadPoolExecutor(asked.beside) as pool:
        list(pool.map(one, [seed for seed in todo if not FAULTS[kind_of(seed)].alone]))
    for seed in todo:
        if FAULTS[kind_of(seed)].alone:
            one(seed)


def _rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / "rows.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return sorted(map(json.loads, lines), key=lambda row: row["seed"])


def _reference(folder: Path) -> Losses | None:
    path = folder / "reference.json"
    if not path.exists():
        return None
    return {int(step): tuple(found) for step, found in json.loads(path.read_text()).items()}


if __name__ == "__main__":
    sys.exit(main())
