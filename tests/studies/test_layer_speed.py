"""The layer beside transformers': the same numbers, every column of the table, and what the bar asks."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers")

from piper_hpc.studies.layer_speed import __main__ as study
from piper_hpc.studies.layer_speed.points import GAIN, SHAPES, Shape, Timed, judge

SMALL = Shape(64, 32, 8, 2, 64)


def timed(ours_s: float, theirs_s: float, dense_s: float) -> Timed:
    return Timed(SMALL, "float32", "experts", ours_s, theirs_s, dense_s)


def test_the_mean_is_over_points_where_the_other_is_slow_and_the_least_over_all():
    verdict = judge([timed(1.0, 1.5, 1.0), timed(1.0, GAIN**2 / 1.5, 0.1), timed(1.0, 0.97, 0.9)])
    assert verdict.gain == pytest.approx(GAIN) and verdict.least == pytest.approx(0.96) and verdict.met
    assert not judge([timed(1.0, 0.94, 0.9)]).met
    assert judge([timed(1.0, 1.0, 0.9)]).gain is None


def test_dense_flops_are_those_of_the_experts():
    """Forward and backward of three matrices, 2 FLOPs a number and row: 3 * 2 * 3 rows d f."""
    assert SMALL.flops == 3 * 2 * 3 * 64 * 2 * 64 * 32
    assert {shape.experts for shape in SHAPES} >= {8, 128}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_parts_are_timed_with_equal_results(dtype, monkeypatch, capsys):
    monkeypatch.setattr(study, "SHAPES", (SMALL,))
    code = study.main(["--shapes", "1", "--seconds", "0.01", "--dtypes", dtype, "--profile", "--json"])
    document = json.loads(capsys.readouterr().out)
    assert code in (0, 1) and [point["part"] for point in document["points"]] == ["experts", "block"]
    assert all(point[f"{name}_s"] > 0 for point in document["points"] for name in ("ours", "theirs", "dense"))
    assert all(0 < point[f"{name}_products"] < 1 for point in document["points"] for name in ("our", "their"))


def test_what_was_asked_wrongly_is_told(capsys):
    assert study.main(["--parts", "attention"]) == 2
    assert "--parts attention: must be of experts, block" in capsys.readouterr().err
