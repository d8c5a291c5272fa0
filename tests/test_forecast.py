"""Which calibration a run is predicted by, at any number of nodes, and what is said of it, or of its absence."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from piper_hpc.cli import show
from piper_hpc.cluster.calibration import save
from piper_hpc.cluster.machine import describe
from piper_hpc.config import ConfigError, Experiment
from piper_hpc.config.schema import DataSheetConfig, LinkConfig
from piper_hpc.forecast import calibration_notes, calibration_of, forecast
from piper_hpc.spec import Calibration
from tests.presets import experiment
from tests.resource_model.clusters import calibration

Asked = Callable[..., Experiment]


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    """Training on a Slurm cluster of two ranks a node of which nothing is known but what was measured."""

    def compose(nodes: int, *overrides: str) -> Experiment:
        return experiment(
            *("cluster=slurm", "cluster.account=abc", "cluster.memory_gib_per_rank=8", "cluster.ranks_per_node=2"),
            *(f"cluster.nodes={nodes}", f"runs={tmp_path}"),
            *("parallelism=single", f"parallelism.ep={min(8, 2 * nodes)}"),
            *("model.layers=2", "train.global_batch=512", "parallelism.micro_batch=1"),
            *overrides,
        )  # fmt: skip

    return compose


def keep(one: Experiment, given: Calibration, measured_at: str = "2099-01-01T00:00:00+00:00") -> None:
    """As `task=microbench` keeps what it measured on these nodes."""
    cluster = one.cluster
    size = {"size": f"{cluster.nodes} nodes x {cluster.ranks_per_node} ranks", "nodes": f"n[1-{cluster.nodes}]"}
    found = replace(given, provenance={"cluster": cluster.name} | size, measured_at=measured_at)
    save(found, describe(cluster).calibration_file(cluster, one.train.dtype, one.runs))


NEAR = calibration("p2p/system", "all_reduce/system/8")
IN_NODE = calibration(*(name for name in calibration().curves if "rack" in name or "system" in name))


def of_calibration(notes: list[str]) -> list[str]:
    return [note for note in notes if note.startswith("calibration:")]


def test_sixty_four_nodes_are_predicted_by_what_eight_measured_and_say_so(asked: Asked) -> None:
    keep(asked(8), NEAR)
    steps = {}
    for nodes in (8, 64):
        one = asked(nodes)
        machine = describe(one.cluster)
        found = calibration_of(one, machine)
        assert found is not None and found.nodes == 8
        steps[nodes] = forecast(one, machine, found, [f"n{number}" for number in range(nodes)] if nodes > 8 else ())
    assert of_calibration(steps[8].notes) == []
    (note,) = of_calibration(steps[64].notes)
    assert note.startswith("calibration: measured on 8 nodes, used on 64: ") and "by a factor of 1.68" in note

    def ratio(nodes: int) -> float:
        return steps[nodes].intervals["grad_reduce_s"][1] / steps[nodes].terms["grad_reduce_s"]

    assert ratio(64) > 1.5 * ratio(8)


def test_one_node_does_not_speak_for_many(asked: Asked) -> None:
    """There the run measures first, or the data sheet is taken; either is said, with the command."""
    keep(asked(1), IN_NODE)
    many = asked(4)
    machine = describe(many.cluster)
    assert calibration_of(asked(1), describe(asked(1).cluster)) is not None
    assert calibration_of(many, machine) is None
    (note,) = calibration_notes(many, machine, None)
    assert note == (
        "calibration: none on slurm with 2 ranks a node, in float32, has the links that are needed here (node, rack); "
        "that on 1 node has node; this run measures before it trains; any number of nodes with these links will do to "
        "measure them: python -m piper_hpc.launch task=microbench cluster=slurm cluster.nodes=4 train.dtype=float32"
    )
    spread = replace(machine, granted=(0, 0, 1, 1))
    keep(asked(8), NEAR)
    assert calibration_of(many, machine) is not None
    assert calibration_of(many, spread) is None, "no message between switches was timed"
    sheet = DataSheetConfig(peak_flops=1e12, memory_bytes_per_s=1e11, links={"node": LinkConfig(1e-6, 1e10)})
    published = replace(many, cluster=replace(many.cluster, data_sheet=sheet))
    found = calibration_of(published, spread)
    assert found is not None and not found.measured
    (note,) = of_calibration(forecast(published, spread, found).notes)
    assert "(node, rack, system); that on 1 node has node; that on 8 nodes has node, rack; any number" in note


def test_of_several_the_choice_is_said(asked: Asked) -> None:
    for nodes in (2, 4, 32):
        keep(asked(nodes), NEAR)
    one = asked(16)
    machine = describe(one.cluster)
    found = calibration_of(one, machine)
    assert found is not None and found.nodes == 32
    (note,) = calibration_notes(one, machine, found)
    assert note.startswith("calibration: of those measured on 2, 4, 32 nodes that on 32 is taken")
    exact = asked(4)
    found = calibration_of(exact, describe(exact.cluster))
    assert found is not None and found.nodes == 4 and calibration_notes(exact, describe(exact.cluster), found) == []


def test_another_number_of_nodes_is_not_stale_and_other_ranks_a_node_are(asked: Asked) -> None:
    keep(asked(8), NEAR)
    one = asked(16)
    machine = describe(one.cluster)
    found = calibration_of(one, machine)
    assert found is not None and calibration_notes(one, machine, found, ["n1", "n2"]) == []
    four = replace(one, cluster=replace(one.cluster, ranks_per_node=4, calibration="given.json"))
    (note,) = calibration_notes(four, describe(four.cluster), found)
    assert note == ("calibration: size was '8 nodes x 2 ranks' when it was measured and is '8 nodes x 4 ranks' now")
    same = asked(8)
    (note,) = calibration_notes(same, describe(same.cluster), found, ["n1", "n2"])
    assert note.startswith("calibration: nodes was ")


def test_a_site_without_measurements_says_how_to_make_them(tmp_path: Path) -> None:
    words = ("cluster=perlmutter", "cluster.account=abc_g", "cluster.accelerator=a100_80gb", f"runs={tmp_path}")
    words += ("train.global_batch=512", "parallelism=single", "parallelism.ep=8", "cluster.nodes=2")
    one = experiment(*words, "train.dtype=bfloat16")
    machine = describe(one.cluster)
    sheet = calibration_of(one, machine)
    assert sheet is not None and not sheet.measured
    found = forecast(one, machine, sheet)
    (note,) = of_calibration(found.notes)
    assert note.startswith("calibration: none of a100_80gb on perlmutter with 4 ranks a node, in bfloat16, has ")
    assert note.endswith("task=microbench cluster=perlmutter cluster.nodes=2 train.dtype=bfloat16 "
                         "cluster.accelerator=a100_80gb")  # fmt: skip
    console = Console(file=io.StringIO(), width=80)
    show.preview("script", found, one, machine.memory_bytes, found.notes, console)
    assert note in console.file.getvalue().splitlines()
    for other in (("cluster.calibration=off",), ("train.dtype=float64",)):
        quiet = experiment(*words, *other)
        assert calibration_notes(quiet, machine, sheet) == []
    planned = experiment(*words[:4], "task=plan", "cluster.nodes=2")
    assert calibration_notes(planned, machine, sheet) == [], "a plan for a machine that nobody measured"


def test_what_is_shown_where_there_is_no_prediction(asked: Asked) -> None:
    one = asked(4)
    console = Console(file=io.StringIO(), width=80)
    show.preview("script", None, one, 2**30, calibration_notes(one, describe(one.cluster), None), console)
    told = console.file.getvalue()
    assert "no prediction" in told and "task=microbench cluster=slurm cluster.nodes=4" in told
    here = experiment("parallelism=single")
    assert calibration_notes(here, describe(here.cluster), None) == [], "this machine is measured by the run itself"


def test_a_device_that_an_old_file_does_not_name_is_said(tmp_path: Path) -> None:
    one = experiment("task=plan", "cluster=perlmutter", "train.dtype=bfloat16", f"runs={tmp_path}")
    machine = describe(one.cluster)
    old = replace(machine, fingerprint={"torch": machine.fingerprint["torch"]})
    save(NEAR, old.calibration_file(one.cluster, "bfloat16", tmp_path))
    found = calibration_of(one, machine)
    assert found is not None and found.measured
    assert any("is taken to be of a100_40gb" in note for note in calibration_notes(one, machine, found))


def test_a_torn_file_is_bad_input(asked: Asked) -> None:
    one = asked(4)
    machine = describe(one.cluster)
    path = machine.calibration_file(one.cluster, one.train.dtype, one.runs)
    path.parent.mkdir()
    path.with_name(path.name.replace("-4x", "-8x")).write_text("{")
    with pytest.raises(ConfigError, match=r"slurm-8x2-.*is no calibration file.*cluster.calibration=off"):
        calibration_of(one, machine)
