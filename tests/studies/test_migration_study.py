"""The migration study: planners on known loads, the bars of a measurement, and a short one on real ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from piper_hpc.cluster.calibration import save
from piper_hpc.runs import RunFolder, find
from piper_hpc.studies.migration import __main__ as study
from piper_hpc.studies.migration.__main__ import MISSED, NO_ANSWER, main
from piper_hpc.studies.migration.show import measured
from tests.finished_run import make_run, metrics_row
from tests.resource_model.clusters import cluster

STILL = {"planning_s": 0.001, "bytes": 0, "seconds": 0.0}
MOVE = {
    "imbalance": 2.0, "after": 1.1, "bound": 1.0, "gain_s": 0.3, "held": 1.0, "horizon_steps": 9.0, "moved": 4,
    "cost_s": 0.01, "migrated": True, "planning_s": 0.004, "bytes": 1 << 20, "seconds": 0.002,
}  # fmt: skip


def paired(*, gain_s: float = 0.25, after: float = 1.05, loss: float = 0.0, **move: Any) -> list[dict[str, Any]]:
    """Twelve steps of a second without and with migration, which moves after the sixth."""
    rows = []
    for step in range(12):
        common = {
            "operator": "migration",
            "step": step,
            "warmup": step < 2,
            "loss": 5.0 - step,
            "rank_load": [2.0, 1.5],
        }
        rows.append(common | {"variant": "staying", "step_time_s": 1.0, "migration": {"bytes": 0, "seconds": 0.0}})
        moved = step > 5
        rows.append(
            common
            | {"variant": "moving", "step_time_s": 1.0 - gain_s * moved, "loss": 5.0 - step + loss}
            | {"rank_load": [after, 1.0] if moved else [2.0, 1.5]}
            | {"migration": MOVE | move if step == 5 else STILL}
        )
    return rows


def test_a_migration_that_pays_meets_its_bars() -> None:
    found = measured("W2", paired())
    assert found.missed == []
    assert found.speed == pytest.approx(10 / (4.006 + 6 * 0.75 + 9 * 0.001))
    assert (found.before, found.after, found.bound) == (2.0, pytest.approx(1.05), 1.0)
    assert (found.migrations, found.bytes, found.gained_s) == (1, 1 << 20, pytest.approx(0.25))


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({"gain_s": -0.1}, "speed 0.94"),
        ({"seconds": 0.5}, "took 6."),
        ({"after": 1.3}, "busiest rank 1.30 > 1.1 x 1.00"),
        ({"loss": 1e-9}, "losses differ"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_bar_can_be_missed(changes: dict[str, float], missed: str) -> None:
    assert [one for one in measured("W2", paired(**changes)).missed if one.startswith(missed)]


def test_planners_are_replayed_on_made_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, "LOADS", ("W2",))
    assert main([]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("W")]
    assert [line[:2] for line in lines] == [["W2", "lpt"], ["W2", "swap"]]
    for _, _, before, after, least, hottest, gained, *_ in lines:
        assert float(hottest) <= float(least) < float(after) < float(before)
        share = (float(before) - float(after)) / (float(before) - float(least))
        assert float(gained) == pytest.approx(100 * share, abs=1)


def test_planners_are_replayed_on_a_runs_router(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, [metrics_row(0)], None)
    assert main(["--recorded", str(run.path)]) == NO_ANSWER
    assert "train.routing.record=true" in capsys.readouterr().err
    config = run.config()
    facts = {"layers": 2, "hidden": 1024, "heads": 8, "kv_heads": 8, "experts": 8, "top_k": 2, "expert_ffn": 512}
    config["model"] |= facts
    config["parallelism"]["ep"] = 4
    run.write_config(str(config))
    run.write_routed(1000 * np.tile([50, 40, 1, 1, 1, 1, 1, 1], (24, 3, 2, 1)))
    assert main(["--recorded", str(run.path)]) == 0
    (lpt, _) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("router")]
    assert float(lpt[3]) < float(lpt[2])


@pytest.mark.parametrize(
    "words",
    [["--ep", "3"], ["--model", "no_model"], ["--site", "local"], ["--site", "no_site"], ["--recorded", "no_run"]],
)
def test_what_cannot_be_replayed_ends_with_2(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == NO_ANSWER
    assert words[1] in capsys.readouterr().err


@pytest.mark.alone
@pytest.mark.processes
@pytest.mark.timeout(400)
def test_training_with_and_without_migration_in_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The short form of `--measure`: equal losses, a spread hot rank, and no harm where it turns. Steps are short here,
    so that the bar on the share of time is left to the whole."""
    monkeypatch.chdir(tmp_path)
    save(cluster().calibration, tmp_path / "made_up.json")  # measuring is not what is tested
    small = ("model=tiny", "model.experts=16", "model.top_k=4", "train=smoke", "train.steps=12", "model.layers=2")
    small += ("cluster.calibration=made_up.json",)
    ended = main(["--measure", "--loads", "W2,W6", *small, "parallelism.migration_every=2"])
    out, err = capsys.readouterr()
    assert ended in (0, MISSED), err
    hot, turning = [line.split() for line in out.splitlines() if line.startswith("W")]
    assert "losses" not in out, "they must not differ"
    runs = find(tmp_path / "runs")
    hot_rows, turning_rows = (RunFolder(run.path).measurements() for run in runs)
    found = measured("W2", hot_rows)
    assert found.migrations >= 1 and found.losses_equal
    assert found.after < (found.before + (found.bound or 0)) / 2
    assert min(measured("W6", turning_rows).speed, float(turning[1]), float(hot[1])) > 0.85
