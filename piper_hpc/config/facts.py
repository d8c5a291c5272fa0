"""`python -m piper_hpc.config.facts`: facts of clusters and devices that are older than a year, to be compared again.

A fact is as old as its source where that has a date in parentheses, else as the file's `checked`. Sites change queues,
modules and pages; a data sheet or a paper stays as it was printed, and so counts by `checked`. Exit code 0 whatever is
found: that a year has passed is no fault of a change.
"""

from __future__ import annotations

import argparse
import calendar
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

import yaml

from piper_hpc.paths import data_folder

GROUPS = ("cluster", "accelerator")
OLD = timedelta(days=365)
PRINTED = re.compile(r"data ?sheet|white paper|brief|arXiv", re.IGNORECASE)
_DATE = re.compile(r"(?<![\w.])(20\d\d)(?:-(0[1-9]|1[0-2])(?:-(0[1-9]|[12]\d|3[01]))?)?(?![\w.])")


@dataclass(frozen=True)
class DatedFact:
    """One key of a file, where its value is from, and when that was so. file: below conf/."""

    file: str
    key: str
    known: date
    source: str


def facts_of(file: str, checked: str | date | None, sources: Mapping[str, str]) -> Iterator[DatedFact]:
    """The facts of one document with the dates of their sources; none of a document without `checked`."""
    if checked is None:
        return
    last = date.fromisoformat(str(checked))
    for key, source in sources.items():
        dates = [] if PRINTED.search(source) else list(_dates(source))
        yield DatedFact(file, key, max(dates, default=last), source)


def _dates(source: str) -> Iterator[date]:
    """Every date in a source's parentheses; a month or a year alone counts by its last day."""
    for year, month, day in _DATE.findall(" ".join(re.findall(r"\(([^)]*)\)", source))):
        whole = int(month or 12)
        yield date(int(year), whole, int(day or calendar.monthrange(int(year), whole)[1]))


def shipped() -> list[DatedFact]:
    """All facts of `conf/cluster` and `conf/accelerator`."""
    found: list[DatedFact] = []
    for path in (path for group in GROUPS for path in sorted((data_folder("conf") / group).glob("*.yaml"))):
        document: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
        found += facts_of(f"{path.parent.name}/{path.name}", document.get("checked"), document.get("sources") or {})
    return found


def old(facts: Iterable[DatedFact], today: date) -> list[DatedFact]:
    """Those that are older than a year, the oldest first."""
    return sorted((fact for fact in facts if today - fact.known > OLD), key=lambda fact: (fact.known, fact.file))


def lines(facts: Iterable[DatedFact]) -> list[str]:
    """One line for each source of a file, with the keys that rest on it."""
    keys: dict[tuple[str, date, str], list[str]] = {}
    for fact in facts:
        keys.setdefault((fact.file, fact.known, fact.source), []).append(fact.key)
    return [f"{known}  {file}  {', '.join(its)}: {source}" for (file, known, source), its in keys.items()]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; always exit code 0."""
    parser = argparse.ArgumentParser(
        prog="python -m piper_hpc.config.facts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.parse_args(arguments)
    every = shipped()
    found = old(every, date.today())
    if found:
        print("\n".join(lines(found)))
        print(f"warning: {len(found)} of {len(every)} facts are older than a year; compare them with their sources")
    else:
        print(f"none of {len(every)} facts is older than a year")
    return 0


if __name__ == "__main__":
    sys.exit(main())
