"""`plan.export`: which projects, the file that is written, and that it is read back before it is."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from piper_hpc.planner.export import megatron, megatron_reader, torchtitan, torchtitan_reader
from piper_hpc.planner.export.choice import KEY, Choice, Reading, Written
from piper_hpc.planner.export.vocabulary import MEGATRON, TORCHTITAN, Vocabulary
from piper_hpc.planner.search import Plan
from piper_hpc.spec import ModelSpec, Problem, SpecError

FILE_KEY = "plan.export_file"


@dataclass(frozen=True)
class Target:
    """A project that plans are written for. file: its name where none is given.

    write: SpecError names what the project cannot say; read: ValueError for what it does not document.
    """

    vocabulary: Vocabulary
    file: str
    write: Callable[[Choice], Written]
    read: Callable[[str, ModelSpec, int], Reading]


TARGETS = {
    "megatron": Target(MEGATRON, "megatron.sh", megatron.write, megatron_reader.read),
    "torchtitan": Target(TORCHTITAN, "torchtitan.toml", torchtitan.write, torchtitan_reader.read),
}
"""By the value of `plan.export`."""


def check_file(target: str, name: str | None, working_directory: Path) -> Path:
    """The file that is written at the end. SpecError where it cannot be, before a long search.

    A file that is there already is kept: it may have been edited by hand.
    """
    given = name or TARGETS[target].file
    path = working_directory / given
    works = f"{FILE_KEY}=best{Path(TARGETS[target].file).suffix}"
    if path.exists():
        what = "is a folder" if path.is_dir() else "is there already: an exported plan replaces no other file"
        raise SpecError(Problem(FILE_KEY, given, what, works))
    if not path.parent.is_dir():
        rule = f"must lie in a folder that exists, and {path.parent} does not"
        raise SpecError(Problem(FILE_KEY, given, rule, works))
    if not os.access(path.parent, os.W_OK):
        raise SpecError(Problem(FILE_KEY, given, "must lie in a folder that you may write to", works))
    return path


def compose(plan: Plan, model: ModelSpec, target: str) -> str:
    """The best layout as the arguments of `target`. SpecError names what the project has no argument for.

    The text is read back by its documented names, and must say what was meant.
    """
    choice = Choice.of(plan, model, target)
    written = TARGETS[target].write(choice)
    read = TARGETS[target].read(written.text, model, choice.layout.ranks)
    if read != written.says:
        raise RuntimeError(f"{KEY}={target}: the text reads as {read}, and was to say {written.says}")
    return written.text


def write(text: str, path: Path) -> None:
    """Write the text. SpecError where that fails, or where somebody else has written the file meanwhile."""
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise SpecError(Problem(FILE_KEY, str(path), f"cannot be written: {error.strerror}", f"{KEY}=null")) from error
