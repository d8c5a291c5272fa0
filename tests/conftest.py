"""How tests run beside each other: `make test` starts several workers (pytest-xdist), plain `pytest` runs in order.

Cores are few and many tests wait, so there is a worker more than cores. What goes together is a unit that one worker
takes as a whole: all tests on Slurm, which share one testbed; all that measure; every other file. Markers say what may
not meet, whoever has it (tests/turns.py):

- `slurm`: the testbed's ranks, whose quotas fill the cores and go before everything else.
- `untimed`, of those: nothing in it depends on how fast it runs, so that others' ranks may run beside it.
- `processes`: other ranks. They run beside each other, but not beside what is timed on Slurm.
- `alone`: it measures time, quotas or links, or its ranks spin while they wait. Nothing runs beside it.

`slow` says nothing of the kind: such tests run beside all others, and only `make quick` leaves them out.

Units are given out in this order: Slurm, which takes longest (its first test has the machine alone, as bringing the
testbed up does, while the others have hardly begun; what is untimed comes last, beside `processes`), beside it what
starts nothing, then `processes`, `alone` last.

`make test` runs of large matrices a covering part; the rest is marked `full` and is for `make test-all` (`--full`).
"""

from __future__ import annotations

import gc
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests import full
from tests.turns import Turns, rooms

# How long one example takes says what else the machine does.
settings.register_profile("beside others", deadline=None)
settings.register_profile("quick", deadline=None, max_examples=20)
settings.load_profile("beside others")

TURNS = pytest.StashKey[Turns]()
FOLDER = pytest.StashKey["tempfile.TemporaryDirectory[str]"]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the tests marked full as well: the whole of each matrix")


def pytest_configure(config: pytest.Config) -> None:
    gc.disable()  # what importing and collecting make stays: looking through it is a quarter of both
    full.ALL = config.getoption("full")
    # Hundreds of processes import this package; where none may keep what it compiled, each compiles all of it.
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    worker = getattr(config, "workerinput", None)
    if worker is not None:
        os.environ.pop("COLUMNS", None)  # of the session's terminal: what a command prints does not depend on it
        config.stash[TURNS] = Turns(Path(worker["turns"]))


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: Any) -> None:
    """Tell a worker where the locks of this session are."""
    if FOLDER not in node.config.stash:
        node.config.stash[FOLDER] = tempfile.TemporaryDirectory(prefix="piper-turns-")
    node.workerinput["turns"] = node.config.stash[FOLDER].name


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: one more than cores, for tests that wait, up to what units can use; `-n logical`: cores."""
    cores = len(os.sched_getaffinity(0))
    return cores if config.option.numprocesses == "logical" else min(cores + 1, 6)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("full"):
        config.hook.pytest_deselected(items=[item for item in items if _is(item, "full")])
        items[:] = [item for item in items if not _is(item, "full")]
    if getattr(config, "workerinput", None) is None:
        return
    size = Counter(item.path for item in items)
    # Tests on Slurm keep their order otherwise: those of the testbed itself take it down and up again.
    items.sort(key=lambda item: (_order(item), *((-size[item.path], item.path) if _order(item) else _turn(item))))
    if items and _is(items[0], "slurm"):
        items[0].add_marker("alone")  # it brings the testbed up, and that measures links
    for item in items:
        name = ("slurm", item.path.stem, f"{item.path.stem} (processes)", "alone")[_order(item)]
        item.add_marker(pytest.mark.xdist_group(name))


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    """Without groups every test is a unit, and each worker brings a testbed up: rather none runs."""
    gc.freeze()
    gc.enable()
    grouped = session.config.option.loadgroup if hasattr(session.config, "workerinput") else False
    if grouped and not all("@" in item.nodeid for item in session.items):
        raise pytest.UsageError("this pytest-xdist does not group tests under this pytest: pip install 'pytest<9.2'")


def _order(item: pytest.Item) -> int:
    return 0 if _is(item, "slurm") else 3 if _is(item, "alone") else 2 if _is(item, "processes") else 1


def _turn(item: pytest.Item) -> tuple[bool, bool]:
    return (_is(item, "untimed"), item.path.stem != "test_testbed")


def _is(item: pytest.Item, marker: str) -> bool:
    return item.get_closest_marker(marker) is not None


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Wait for the test's turn, outside of its time-out; what it has alone is kept for a next test of its kind."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)  # others use the cores: threads that wait for each other's core would spin on it
    turns = item.config.stash.get(TURNS, None)
    if turns is None:
        return (yield)
    turns.enter(rooms(item))
    try:
        return (yield)
    finally:
        if nextitem is None or rooms(nextitem) != rooms(item) or not any(rooms(item).values()):
            turns.leave()
