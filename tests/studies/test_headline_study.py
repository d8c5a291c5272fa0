"""`make compare-strategies`: links as scaled, searches that differ as the strategies do, and bars on known numbers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from piper_hpc.runs import RunFolder
from piper_hpc.spec import AUTO, TERMS, Layout
from piper_hpc.spec.executor import missing_of_layout, missing_of_model
from piper_hpc.studies.headline.__main__ import MET, MISSED, NO_ANSWER, main
from piper_hpc.studies.headline.judge import Bar, bars, crossing, point_of
from piper_hpc.studies.headline.links import Links, ceiling, layer_of, scaled
from piper_hpc.studies.headline.resident import CPU, MEASURED, PREDICTED, TRAINED, TRIED, Asked
from piper_hpc.studies.headline.strategies import (
    FLAT,
    MACHINE,
    MODEL,
    NAMED,
    OURS,
    PADDED,
    PAPER,
    SITE,
    STRATEGIES,
    XMOE,
)
from piper_hpc.studies.jobs import ask
from piper_hpc.testbed import presets
from tests.resource_model.clusters import cluster


def links(slowdown: float = 1.0) -> Links:
    return scaled(presets.machine(SITE), presets.layer(NAMED), layer_of(MODEL), 1e10, slowdown)


def test_links_keep_the_sites_ratio_and_slow_only_between_nodes() -> None:
    fast, slow = links(), links(4.0)
    assert fast.node_bytes_per_s / fast.nic_bytes_per_s == pytest.approx(50 / 12.5)
    assert (slow.node_bytes_per_s, slow.nic_bytes_per_s) == (fast.node_bytes_per_s, fast.nic_bytes_per_s / 4)
    # What Frontier moves between nodes while it computes a row of X-MoE's experts, 2 x 2 x 1536 x 5120 FLOP of 1e14/s.
    per_row_s = 2 * 2 * 5120 * 1536 / 1e14
    here_s = 2 * 3 * MODEL.hidden * MODEL.expert_ffn / 1e10
    assert MODEL.hidden * 4 / fast.nic_bytes_per_s / here_s == pytest.approx(5120 * 2 / 12.5e9 / per_row_s)


def test_what_is_left_of_an_exchange_inside_a_node_is_a_sixth_on_frontier() -> None:
    assert links().left(MACHINE) == pytest.approx(1 / 6)
    assert links(2.0).left(MACHINE) == pytest.approx(1 / 12)
    assert ceiling(0.71, 1 / 6) == pytest.approx(1 / (0.29 + 0.71 / 6))
    assert ceiling(0.0, 0.5) == 1.0


def test_the_wire_takes_what_the_busier_link_needs() -> None:
    found = Links(100.0, 10.0).wire_s({"node": 800.0, "rack": 40.0, "system": 40.0}, ranks=8)
    assert found == pytest.approx(max(800 / 8 / 100, 80 / 8 / 10))


def test_flags_give_ranks_their_shares() -> None:
    assert Links(1e6, 1e6).flags(MACHINE) == (
        *("--node-mbit-per-s", "16.0", "--nic-mbit-per-s", "16.0", "--rack-mbit-per-s", "32.0"),
        *("--period-us", "5000"),
    )


@pytest.fixture(scope="module")
def layouts() -> dict[str, list[Layout]]:
    """The best of each strategy on a made-up machine."""
    made = cluster()
    return {key: [one.layout for one in strategy.settings(made, 3)] for key, strategy in STRATEGIES.items()}


def test_every_strategy_is_what_it_stands_for(layouts: dict[str, list[Layout]]) -> None:
    assert not list(missing_of_model(MODEL, "float32"))
    for key, found in layouts.items():
        assert found and all(layout.pp * layout.ep == MACHINE.ranks and layout.dp == 1 for layout in found), key
        assert all(layout.ep > 1 and not list(missing_of_layout(layout)) for layout in found), key
    for key, algorithm in ((FLAT, "flat"), (PADDED, "flat_padded"), (XMOE, "halo_dedup")):
        assert {(layout.pp, layout.ep, layout.all_to_all) for layout in layouts[key]} == {(1, 8, algorithm)}
    assert {layout.zero for layout in layouts[XMOE]} == {1}
    paper = {(layout.pp, layout.ep, layout.schedule, layout.vpp) for layout in layouts[PAPER]}
    assert paper == {(4, MACHINE.ranks_per_node, "1f1b", 1)}
    assert {layout.all_to_all for layout in layouts[OURS]} == {AUTO}


def test_the_planners_choice_is_predicted_no_slower_than_any_other() -> None:
    made = cluster()
    best = {key: strategy.settings(made, 1)[0].step_time_s for key, strategy in STRATEGIES.items()}
    assert min(best, key=lambda key: best[key]) == OURS or best[OURS] == pytest.approx(min(best.values()), rel=0.01)


STEPS = {FLAT: 4.0, PADDED: 4.2, XMOE: 3.2, PAPER: 2.0, OURS: 1.6}
SHARE = {FLAT: 0.75, PADDED: 0.76, XMOE: 0.6, PAPER: 0.2, OURS: 0.2}


def rows(steps: dict[str, float], *, share: float = 0.75, loss: float = 0.0) -> list[dict[str, Any]]:
    """Two settings of each strategy, the second of which is measured three times; predictions a tenth too long."""
    made: list[dict[str, Any]] = []
    for key, step_s in steps.items():
        exchange_s = (share if key == FLAT else SHARE[key]) * step_s
        of_key = {"strategy": key, "setting": 1}
        run = {
            "step_time_s": step_s, "terms": dict.fromkeys(TERMS, 0.0) | {"dispatch_s": exchange_s},
            "losses": [5.0, 4.0 + loss * (key == OURS)], "payload_bytes": {"node": 8e6, "rack": 0, "system": 8e6},
            "peak_memory_bytes": [1, 2 * 2**20],
        }  # fmt: skip
        for number in (0, 1):
            layout = Layout(ep=8) if key in (FLAT, PADDED, XMOE) else Layout(pp=4, ep=2)
            made.append(
                {"operator": PREDICTED, "strategy": key, "setting": number, "layout": asdict(layout)}
                | {"step_time_s": 1.1 * step_s, "bubble_fraction": 0.2, "all_to_all": ["flat"]}
            )
            made.append({"operator": TRIED, "strategy": key, "setting": number} | run)
        made += [
            {"operator": MEASURED, "repeat": repeat} | of_key | run | {"step_time_s": factor * step_s}
            for repeat, factor in enumerate((0.98, 1.0, 1.02))
        ]
        made.append({"operator": TRAINED} | of_key | run | {"step_time_s": 1.5 * step_s})
        made.append({"operator": CPU, "cpu_s": 0.01} | of_key)
    return made


def run_of(folder: Path, made: list[dict[str, Any]], slowdown: float = 1.0) -> RunFolder:
    run = RunFolder.create(folder)
    run.write_manifest({})
    ask(run, Asked(slowdown, 50e6, 12.5e6 / slowdown, 3, 2, tuple(STRATEGIES)))
    for row in made:
        run.append_measurement(row)
    return run


def judged(folder: Path, made: list[dict[str, Any]]) -> dict[str, Bar]:
    point = point_of(run_of(folder, made))
    assert point is not None
    return {bar.name: bar for bar in bars([point])}


def test_a_point_says_what_was_measured(tmp_path: Path) -> None:
    point = point_of(run_of(tmp_path, rows(STEPS)))
    assert point is not None and list(point.entries) == list(STRATEGIES)
    ours = point.entries[OURS]
    assert (ours.setting, ours.tried, ours.step_s, ours.cpu_s) == (1, 2, 1.6, 0.01)
    assert (ours.predicted_s, ours.trained_s) == (pytest.approx(1.76), pytest.approx(2.4))
    assert ours.wire_s == pytest.approx(8e6 / 8 / 12.5e6)
    assert point.faster((OURS, FLAT)) == pytest.approx(2.5) == point.predicted_faster((OURS, FLAT))
    assert point.ceiling == pytest.approx(1 / (0.25 + 0.75 / 6))


def test_good_numbers_meet_every_bar(tmp_path: Path) -> None:
    found = judged(tmp_path, rows(STEPS))
    assert len(found) == 8 and all(bar.met for bar in found.values()), found


@pytest.mark.parametrize(
    ("steps", "options", "missed"),
    [
        (STEPS | {OURS: 1.9}, {}, ["of the ceiling"]),
        (STEPS | {OURS: 3.1}, {}, ["of the ceiling", "X-MoE's", "over c"]),
        (STEPS, {"share": 0.6}, ["largest share"]),
        (STEPS, {"loss": 0.1}, ["losses differ"]),
    ],
    ids=["slow", "slower", "little exchange", "other losses"],
)
def test_each_bar_can_be_missed(
    tmp_path: Path, steps: dict[str, float], options: dict[str, float], missed: list[str]
) -> None:
    found = [name for name, bar in judged(tmp_path, rows(steps, **options)).items() if not bar.met]
    assert all(any(words in name for name in found) for words in missed) and len(found) == len(missed), found


def test_crossings_lie_between_points(tmp_path: Path) -> None:
    slow, fast = (STEPS | {OURS: step_s} for step_s in (4.0, 1.0))
    points = [point_of(run_of(tmp_path, rows(steps), at)) for steps, at in ((slow, 1.0), (fast, 4.0))]
    known = [point for point in points if point is not None]
    assert crossing(known, (OURS, FLAT), 2.0, predicted=False) == pytest.approx(2.0)
    assert crossing(known, (OURS, FLAT), 2.0, predicted=True) == pytest.approx(2.0)
    assert crossing(known, (OURS, FLAT), 5.0, predicted=False) is None
    assert crossing(known, (OURS, FLAT), 0.5, predicted=False) == 1.0


def test_runs_are_shown_again_with_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = run_of(tmp_path, rows(STEPS)), run_of(tmp_path, rows(STEPS | {OURS: 3.9}), 2.0)
    assert main(["--show", str(good.path)]) == MET
    assert main(["--show", str(bad.path), str(good.path)]) == MISSED
    out = capsys.readouterr().out
    assert "d/a reaches 2: measured links / 1" in out and "MISSED" in out
    assert "| / 2 |" in (good.path / "report.md").read_text()
    picture = (good.path / "headline.svg").read_text()
    assert picture.startswith("<svg") and picture.count("C = ") == 2 and "links between nodes / 2" in picture
    empty = RunFolder.create(tmp_path)
    empty.write_manifest({})
    assert main(["--show", str(empty.path)]) == NO_ANSWER
    assert "make compare-strategies" in capsys.readouterr().err


def test_without_flat_there_is_nothing_to_be_faster_than(tmp_path: Path) -> None:
    run = run_of(tmp_path, rows({PADDED: 4.0, OURS: 2.0}))
    assert main(["--show", str(run.path)]) == MET
    assert (run.path / "headline.svg").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "a,z"], "--only z"),
        (["--repeats", "0"], "--repeats 0"),
        (["--settings", "0"], "--settings 0"),
        (["--slowdowns", "1,x"], "--slowdowns 1,x"),
        (["--slowdowns", "0"], "--slowdowns 0"),
    ],
)
def test_a_mistake_is_refused_before_anything_starts(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == NO_ANSWER
    assert message in capsys.readouterr().err
