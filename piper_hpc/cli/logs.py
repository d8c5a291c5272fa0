"""The logs of a run's ranks, one or all in one stream, as they stand and as they grow."""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from piper_hpc.runs import RunFolder

BLOCK_BYTES = 1 << 20
"""What is read and shown at once."""
POLL_S, FILE_S = 0.5, 1e-3
"""Between looks: at least, and for each file. A look costs one listing of a folder and one stat a file, and a read of
those alone that grew: at most a thousand stats a second, so that 4,096 ranks are looked at every four seconds."""
ALL, BATCH = "all", "batch"
_RANK_LOG = re.compile(r"rank-(\d+)\.log")
_BATCH_LOG = re.compile(r"slurm-.+\.out|supervisor\.log")


def whose_log(word: str) -> str:
    """The value of --rank: a number, ALL or BATCH. Raises ArgumentTypeError."""
    if word in (ALL, BATCH):
        return word
    if not word.isdecimal():
        raise argparse.ArgumentTypeError(f"{word!r} is no rank: give a number, {ALL} or {BATCH}")
    return str(int(word))


@dataclass
class Tail:
    """A log that is read to its end again and again; label: before each of its lines, if there is one."""

    path: Path
    label: str = ""
    read_bytes: int = 0
    rest: bytes = field(default=b"")
    """A last line that has no newline yet."""

    def more(self, size_bytes: int) -> Iterator[str]:
        """Whole lines, by blocks, of a file that is `size_bytes` long; nothing where it has not grown."""
        if size_bytes < self.read_bytes:  # it was written anew
            self.read_bytes, self.rest = 0, b""
        if size_bytes == self.read_bytes:
            return
        with self.path.open("rb") as file:
            file.seek(self.read_bytes)
            while self.read_bytes < size_bytes and (block := file.read(BLOCK_BYTES)):
                self.read_bytes += len(block)
                whole, newline, self.rest = (self.rest + block).rpartition(b"\n")
                if newline:
                    yield self._labelled(whole + newline)

    def last(self) -> str:
        """The last line although it has no newline: nobody will end it."""
        rest, self.rest = self.rest, b""
        return self._labelled(rest + b"\n") if rest and self.label else rest.decode(errors="replace")

    def _labelled(self, lines: bytes) -> str:
        text = lines.decode(errors="replace")
        if not self.label:
            return text
        return "".join(f"{self.label}{line}\n" for line in text.split("\n")[:-1])


class Tails:
    """Logs of a run: of one rank or of ALL in the newest attempt, or the BATCH script's, or a local supervisor's.

    Later attempts and ranks whose log comes later are found as they come. Lines of one rank keep their order; between
    ranks the order is of the looks, within a look that of the ranks.
    """

    def __init__(self, run: RunFolder, whose: str) -> None:
        self._run, self._whose = run, whose
        self._attempt = run.newest_attempt()
        self._tails: dict[str, Tail] = {}
        self._sizes: dict[str, int] = {}

    def found(self) -> bool:
        """Whether there is a log; looks for new ones."""
        self._look()
        return bool(self._tails)

    def others(self) -> str:
        """Which logs there are instead."""
        batch = [BATCH] if self._batch() else []
        ranks = sorted(map(int, Tails(self._run, ALL)._ranks()))
        several = [f"ranks {ranks[0]} to {ranks[-1]}"] if len(ranks) > 1 else [f"rank {rank}" for rank in ranks]
        return ", ".join(several + batch) or "none yet"

    def pause_s(self) -> float:
        """How long to wait before the next look."""
        return max(POLL_S, FILE_S * len(self._tails))

    def news(self) -> Iterator[str]:
        """What came since the last look, in whole lines; of an earlier attempt, once a later began, all of it."""
        newest = self._run.newest_attempt()
        if self._whose != BATCH and newest != self._attempt:
            yield from self.all_there_is()
            self._attempt, self._tails = newest, {}
            yield f"-- attempt {newest} --\n"
        self._look()
        yield from self._grown()

    def all_there_is(self) -> Iterator[str]:
        """What is left, with last lines that have no newline."""
        self._look()
        yield from self._grown()
        yield from filter(None, (tail.last() for tail in self._tails.values()))

    def document(self) -> dict[str, Any]:
        """`path` and `text` of one log; of several `logs`, with `rank` (null for the batch script's) and `attempt`."""
        self._look()
        logs = [
            {
                "rank": int(name) if name.isdecimal() else None,
                "attempt": self._attempt,
                "path": str(tail.path),
                "text": tail.path.read_text(errors="replace"),
            }
            for name, tail in self._tails.items()
        ]
        if self._whose in (ALL, BATCH):
            return {"logs": logs}
        return {key: logs[0][key] if logs else None for key in ("path", "text")}

    def _grown(self) -> Iterator[str]:
        for name, tail in self._tails.items():
            yield from tail.more(self._sizes[name])

    def _look(self) -> None:
        """Find logs that are new, and how long each is now."""
        found = self._batch() if self._whose == BATCH else self._ranks()
        for name, path in found.items():
            self._sizes[name] = path.stat().st_size
        new = {
            name: Tail(path, f"rank {name} | " if self._whose == ALL else "")
            for name, path in found.items()
            if name not in self._tails
        }
        if new:
            self._tails = dict(sorted((self._tails | new).items(), key=lambda item: item[0].zfill(9)))

    def _ranks(self) -> dict[str, Path]:
        """The logs that are asked for, by the rank's number."""
        folder = self._run.logs / f"attempt-{self._attempt}"
        if self._whose.isdecimal():
            path = folder / f"rank-{self._whose}.log"
            return {self._whose: path} if path.exists() else {}
        named = ((_RANK_LOG.fullmatch(name), name) for name in _names(folder))
        return {match[1]: folder / name for match, name in named if match}

    def _batch(self) -> dict[str, Path]:
        """What a job prints outside its ranks: its batch script's output, or the supervisor's on this machine."""
        return {name: self._run.logs / name for name in _names(self._run.logs) if _BATCH_LOG.fullmatch(name)}


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def follow_logs(tails: Tails, ended: Callable[[], bool], show: Callable[[str], None]) -> None:
    """Show logs as they grow until the run has ended, and then what is left."""
    while True:
        over = ended()  # before the look: what was written before the end is then read
        for text in tails.news():
            show(text)
        if over:
            break
        time.sleep(tails.pause_s())
    for text in tails.all_there_is():
        show(text)


def print_now(text: str) -> None:
    """Print without waiting for more."""
    sys.stdout.write(text)
    sys.stdout.flush()
