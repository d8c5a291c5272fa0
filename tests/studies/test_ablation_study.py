"""`make ablation`: pairs that differ in one part, layouts that train, and gains from known numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from piper_hpc.runs import RunFolder
from piper_hpc.spec.executor import missing_of_layout
from piper_hpc.spec.rules import layout_problems
from piper_hpc.studies.ablation.__main__ import MET, MISSED, NO_ANSWER, main
from piper_hpc.studies.ablation.resident import MEASURED, PREDICTED
from piper_hpc.studies.ablation.show import NOT_USED, Measured, gain_cells
from piper_hpc.studies.ablation.variants import (
    BASES,
    HALO,
    MIGRATION,
    OVER_ALL,
    OVERLAP,
    PARTS,
    SCHEDULE,
    SKEWED,
    Variant,
    alone,
    taken_away,
    variants,
)
from piper_hpc.studies.headline.strategies import MACHINE, MODEL


def test_variants_train_and_are_told_apart() -> None:
    found = variants()
    assert len({variant.name for variant in found}) == len(found) > 15
    for variant in found:
        assert variant.layout.ranks == MACHINE.ranks
        assert not list(layout_problems(MODEL, variant.layout, variant.workload)), variant.name
        assert not list(missing_of_layout(variant.layout)), variant.name
        assert (variant.routing == SKEWED) == (float(variant.workload.routing.load(variant.layout.ep)) > 1.5)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("part", PARTS)
def test_a_pair_differs_in_one_part(base: str, part: str) -> None:
    for pair in (alone(base, part), taken_away(base, part)):
        if pair is None:
            assert part == OVERLAP or (part == SCHEDULE and base == OVER_ALL)
            continue
        without, with_part = pair
        assert with_part.parts - without.parts - {OVERLAP} == {part} - {OVERLAP} and without.parts <= with_part.parts
        assert part in with_part.parts and part not in without.parts
        assert {without.routing, with_part.routing} == {with_part.routing}
        assert (with_part.routing == SKEWED) == (part == MIGRATION)


def test_without_overlap_halo_does_one_phase_after_the_other() -> None:
    pair = taken_away(OVER_ALL, OVERLAP)
    assert pair is not None and pair[1].sequential is None
    sequential = pair[0].sequential
    assert sequential is not None and (sequential.chunks, sequential.overlap) == (1, "none")
    assert Variant(OVER_ALL, frozenset({HALO, OVERLAP})).sequential is None


def rows(*, loss: float = 0.0) -> list[dict[str, Any]]:
    """Every part makes a step a tenth quicker, and is said to make it a fifth quicker."""
    made: list[dict[str, Any]] = []
    for variant in variants():
        parts, off = len(variant.parts), loss * (HALO in variant.parts)
        if variant.sequential is None:
            made.append({"operator": PREDICTED, "variant": variant.name, "step_time_s": 2 / 1.2**parts})
        for repeat in range(2):
            made.append(
                {"operator": MEASURED, "variant": variant.name, "repeat": repeat, "step_time_s": 2 / 1.1**parts}
                | {"rank_load": 1.0, "losses": [5.0, 4.0 + off]}
            )
    return made


def test_gains_are_ratios_of_steps() -> None:
    cells = {(part, base): (one, all_of_them) for part, base, one, all_of_them in gain_cells(Measured(rows()))}
    assert cells["dedup", OVER_ALL] == ("1.10 (1.20)", "1.10 (1.20)")
    assert cells[HALO, OVER_ALL][0] == "1.21 (1.44)"
    assert cells[OVERLAP, OVER_ALL] == (NOT_USED, "1.10 (-)")
    assert cells[SCHEDULE, OVER_ALL] == (NOT_USED, NOT_USED)
    assert cells[MIGRATION, "PP2xEP4"] == ("1.10 (1.20)", "1.10 (1.20)")
    assert cells["localised by the pipeline", "EP8 to PP2xEP4"] == ("1.00 (1.00)", "1.10 (1.20)")


def test_a_run_is_shown_again_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for loss, code in ((0.0, MET), (0.1, MISSED)):
        run = RunFolder.create(tmp_path)
        run.write_manifest({})
        for row in rows(loss=loss):
            run.append_measurement(row)
        assert main(["--show", str(run.path)]) == code
        assert "| dedup | EP8 |" in (run.path / "report.md").read_text()
    assert "PP2xEP4 + HALO" in capsys.readouterr().out
    empty = RunFolder.create(tmp_path)
    empty.write_manifest({})
    assert main(["--show", str(empty.path)]) == NO_ANSWER
    assert "make ablation" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--only", "nosuch"], ["--repeats", "0"], ["--slowdown", "0"]])
def test_nothing_to_measure_is_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == NO_ANSWER
    assert "--only EP8 --repeats 1" in capsys.readouterr().err
