"""A plan at the terminal: no degree is cut at any width, one row a shape, and two lines for what is rejected."""

from __future__ import annotations

import io
import re
from dataclasses import replace
from functools import cache

import pytest
from rich.console import Console

from piper_hpc.cli.plan import show
from piper_hpc.config import Experiment
from piper_hpc.config.workload import AS_SET
from piper_hpc.planner import Plan, plan
from tests.planner import machines
from tests.presets import experiment
from tests.resource_model import clusters

SET = {"sequence": AS_SET, "global_batch": AS_SET}


@cache
def found(executor: str) -> Plan:
    if executor == "piper":
        return plan(clusters.TINY, clusters.cluster(), machines.WORKLOAD, candidates=20)
    return plan(machines.MOE, machines.cluster(), machines.WORKLOAD, axes=machines.SMALL, executor=executor)


def asked(*overrides: str) -> Experiment:
    return experiment("task=plan", *overrides)


def shown(one: Plan, width: int, *overrides: str, source: dict[str, str] = SET) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    show(one, asked(*overrides), source, console)
    assert isinstance(console.file, io.StringIO)
    assert console.width == width
    return console.file.getvalue().splitlines()


def rows(lines: list[str]) -> list[str]:
    """Of the first table: from below its head to the line of counts."""
    head = next(index for index, line in enumerate(lines) if line.startswith("layout "))
    end = next(index for index, line in enumerate(lines) if "layouts fit" in line)
    return lines[head + 1 : end]


@pytest.mark.parametrize("executor", ["piper", "megatron"])
@pytest.mark.parametrize("width", [30, 80, 120, 200])
def test_every_degree_is_whole_at_every_width(executor: str, width: int):
    one = found(executor)
    lines = shown(one, width)
    assert "…" not in "".join(lines)
    for row, prediction in zip(rows(lines), one.shapes, strict=True):
        layout = prediction.layout
        degrees = dict(re.findall(r"\b(ep|etp|tp|cp|dp)(\d+)\b", row))
        assert (int(degrees["ep"]), int(degrees["dp"])) == (layout.ep, layout.dp)
        assert (int(degrees.get("tp", 1)), int(degrees.get("cp", 1))) == (layout.tp, layout.cp)
        assert re.search(rf"\bpp{layout.pp}(x{layout.vpp})?\b", row)
        cells = [float(word.replace(",", "")) for word in row.split() if re.fullmatch(r"[\d.,]+", word)]
        # At thirty columns nothing but degrees is left, and the row wraps.
        assert width == 30 or any(cell == pytest.approx(1e3 * prediction.step_time_s, rel=1e-3) for cell in cells)
        assert len(row) <= width or width < 80


def test_a_narrow_terminal_says_what_it_leaves_out():
    narrow, wide = (shown(found("megatron"), width) for width in (60, 200))
    at = next(index for index, line in enumerate(narrow) if line.startswith("layout "))
    missing = narrow[at - 1].split("too narrow for: ")[1].split(", ")
    whole = next(line for line in wide if line.startswith("layout "))
    assert {"bubble", "free", "tokens/s"} <= set(missing)
    for head in missing:
        assert head not in narrow[at] and head in whole
    assert "too narrow" not in " ".join(wide)


def test_an_uneven_split_is_told_from_the_even_one():
    one = found("piper")
    split = replace(one.shapes[0], layout=replace(one.shapes[0].layout, stage_layers=(3, 1)))
    lines = shown(replace(one, shapes=[one.shapes[0], split]), 200)
    first = next(number for number, line in enumerate(lines) if "stage_layers" in line)
    assert " even " in lines[first + 1] and " 3+1 " in lines[first + 2]


def test_one_row_a_shape_and_its_shades_on_request():
    one = found("megatron")
    shapes = rows(shown(one, 200))
    shades = rows(shown(one, 200, "plan.shades=true"))
    assert len(shapes) == len(one.shapes) < len(shades) == len(one.candidates) == 20
    best = f"{1e3 * one.candidates[0].step_time_s:.3f}"
    assert best in shapes[0] and best in shades[0]
    assert (
        len({row.split("dp")[0][4:] for row in shapes}) == len(shapes) > len({row.split("dp")[0][4:] for row in shades})
    )


def test_what_is_rejected_takes_two_lines_unless_nothing_is_left():
    kept = replace(found("megatron"), rejected=found("megatron").rejected | {"Eq 10: x": 7, "Eq 11: y": 1})
    excluded, rest = [line for line in shown(kept, 80) if "Eq " in line and "Eq 10: its" not in line]
    assert excluded.startswith("rejected ") and "7: Eq 10: x; 1: Eq 11: y" in excluded
    others = {reason: count for reason, count in kept.rejected.items() if not reason.startswith(("Eq 10", "Eq 11"))}
    assert rest.startswith(f"{sum(others.values()):,} combinations are no layouts: ")
    assert all(reason.split(":")[0] in rest for reason in others)
    none = replace(kept, candidates=[], shapes=[], pareto=[], limits=None)
    assert len([line for line in shown(none, 80) if line.startswith("rejected ")]) == len(kept.rejected)


def test_the_workload_and_the_head_room_are_told():
    own = {"sequence": "model.sequence, of x", "global_batch": "8 for each of 8 ranks"}
    lines = shown(replace(found("piper"), memory_headroom=0.08), 80, source=own)
    assert lines[1:3] == [
        "sequence: model.sequence, of x",
        "global_batch: 8 for each of 8 ranks; train.sequence, train.global_batch set others",
    ]
    assert any("(8 % are kept free, plan.memory_headroom)" in line for line in lines)
    assert not any("set others" in line or "kept free" in line for line in shown(found("piper"), 80))
