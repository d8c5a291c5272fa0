"""What shared experts hide: medians and shares from known numbers, and how the command ends."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from piper_hpc.comm.factory import DispatcherFactory
from piper_hpc.comm.hierarchy import Places
from piper_hpc.runs import RunFolder
from piper_hpc.studies.command import MET, MISSED, NO_ANSWER
from piper_hpc.studies.shared_overlap.__main__ import found_of, main
from piper_hpc.studies.shared_overlap.resident import OPERATOR, POINTS, Point, Row, layer_of, measured
from tests.processes import run_ranks

FLAT, DEDUP = POINTS[0], POINTS[-1]


def rows(point: Point, *taken: Row) -> list[dict[str, Any]]:
    return [
        {"operator": OPERATOR, "repeat": turn, "point": asdict(point)} | asdict(row) for turn, row in enumerate(taken)
    ]


def test_what_is_hidden_is_taken_pair_by_pair_and_judged_by_what_can_be() -> None:
    taken = [Row(1.0, 0.9, 0.5, 0.2), Row(2.0, 1.8, 0.5, 0.4), Row(9.0, 8.7, 0.5, 0.6)]
    found, waited = found_of([*rows(FLAT, *taken), *rows(DEDUP, Row(3.0, 2.0, 1.0, 4.0)), {"operator": "gemm"}])
    assert found.point == FLAT and found.row == Row(2.0, 1.8, 0.5, 0.4)
    assert found.hidden_s == pytest.approx(0.2) and found.share == pytest.approx(0.5)
    assert waited.share == pytest.approx(1.0), "no more can be hidden than the shared expert takes"


def test_a_run_is_shown_again_and_judged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for on_s, code in ((0.85, MET), (0.95, MISSED)):
        run = RunFolder.create(tmp_path)
        run.write_manifest({})
        for row in rows(FLAT, Row(1.0, on_s, 0.5, 0.2)):
            run.append_measurement(row)
        assert main(["--show", str(run.path)]) == code
        assert "| flat | 256 |" in (run.path / "report.md").read_text()
    empty = RunFolder.create(tmp_path)
    empty.write_manifest({})
    assert main(["--show", str(empty.path)]) == NO_ANSWER
    assert main(["--repeats", "0"]) == NO_ANSWER
    assert "--repeats 15" in capsys.readouterr().err


def on_this_rank(point: Point) -> Row:
    ranks = dist.get_world_size()
    context: Any = SimpleNamespace(device=torch.device("cpu"), rank_env=SimpleNamespace(ranks=ranks))
    factory = DispatcherFactory(Places(tuple(range(ranks)), (0,) * ranks), range(ranks), timedelta(seconds=30))
    layer = layer_of(context, point, factory)
    return [measured(point, layer) for _ in range(2)][-1]


@pytest.mark.processes
@pytest.mark.parametrize("point", [FLAT, DEDUP], ids=lambda point: point.algorithm)
def test_ranks_find_the_same_means(point: Point) -> None:
    small = replace(point, width=64, tokens=64)
    first, second = run_ranks(2, on_this_rank, small)
    assert first == second
    assert min(first.off_s, first.on_s, first.shared_s) > 0 and first.wait_s >= 0
