"""Which of the kept calibrations serves a run: by device and links, at any number of nodes, old files too."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.cluster.calibration import CalibrationError, save
from piper_hpc.cluster.catalogue import Kept, choose, kept, needed_tiers
from piper_hpc.cluster.machine import Machine, describe
from piper_hpc.cluster.resume import resumed_rows
from piper_hpc.config import ConfigError
from piper_hpc.config.schema import ClusterConfig, TopologyConfig
from piper_hpc.runs import RunFolder
from piper_hpc.runs.manifest import versions
from piper_hpc.spec import TIERS, Calibration
from tests.presets import experiment
from tests.resource_model.clusters import line

MEASURED = ("node", "rack", "system")
"""Tiers that micro-benchmarks tell apart."""


def made(nodes: int = 8, tiers: tuple[str, ...] = MEASURED, day: int = 1, **provenance: str) -> Calibration:
    """A calibration of so many nodes of two ranks whose messages crossed links of `tiers`."""
    at = datetime(2026, 1, day, tzinfo=timezone.utc).isoformat()
    curves = {f"p2p/{tier}": line(f"p2p/{tier}") for tier in tiers}
    return Calibration("made up", at, 5e10, curves, {"size": f"{nodes} nodes x 2 ranks"} | provenance)


def in_file(nodes: int, tiers: tuple[str, ...] = MEASURED, day: int = 1) -> Kept:
    return Kept(Path(f"made-{nodes}x2-{day}-{'-'.join(tiers)}.json"), nodes, made(nodes, tiers, day))


TIER_SETS = st.sets(st.sampled_from(MEASURED)).map(lambda found: tuple(tier for tier in MEASURED if tier in found))
FILES = st.lists(st.builds(in_file, st.integers(1, 512), TIER_SETS, st.integers(1, 28)), max_size=6)


@given(FILES, st.integers(1, 512), TIER_SETS)
def test_the_one_that_is_taken_serves_and_none_that_serves_is_better(
    found: list[Kept], nodes: int, needed: tuple[str, ...]
) -> None:
    def serves(each: Kept) -> bool:
        wide = needed[-1:]
        return each.nodes == nodes or not wide or any(TIERS.index(t) >= TIERS.index(wide[0]) for t in each.tiers)

    chosen = choose(found, nodes, needed)
    serving = [each for each in found if serves(each)]
    assert (chosen is None) == (not serving)
    if chosen is None:
        return
    assert chosen in serving

    def missing(each: Kept) -> int:
        return len(set(needed) - set(each.tiers))

    def far(each: Kept) -> float:
        return abs(math.log2(each.nodes / nodes))

    fullest = [each for each in serving if missing(each) == min(map(missing, serving))]
    nearest = [each for each in fullest if far(each) == min(map(far, fullest))]
    assert chosen in nearest
    assert chosen.calibration.measured_at == max(each.calibration.measured_at for each in nearest)


@given(FILES, st.integers(1, 512), TIER_SETS, st.randoms())
def test_the_choice_does_not_depend_on_the_order_of_files(found, nodes, needed, random) -> None:
    shuffled = list(found)
    random.shuffle(shuffled)
    assert choose(found, nodes, needed) == choose(shuffled, nodes, needed)


def test_sixty_four_nodes_are_served_by_eight_and_never_by_one() -> None:
    one, eight = in_file(1, ("node",)), in_file(8, ("node", "rack"))
    assert choose([one, eight], 64, ("node", "rack")) == eight
    assert choose([one], 64, ("node", "rack")) is None
    assert choose([eight], 64, ("node", "rack", "system")) is None, "no link between racks was measured"
    assert choose([eight], 1, ("node",)) == eight
    assert choose([eight, in_file(64, ("node",))], 64, ("node", "rack")) == eight, "what is needed goes first"
    assert choose([in_file(64, ("node",))], 64, ("node", "rack")) == in_file(64, ("node",)), "as ever at its own size"


def perlmutter(*overrides: str, nodes: int = 8) -> ClusterConfig:
    return experiment("task=plan", "cluster=perlmutter", f"cluster.nodes={nodes}", *overrides).cluster


FORTY, EIGHTY = "cluster.accelerator=a100_40gb", "cluster.accelerator=a100_80gb"


def of(cluster: ClusterConfig, runs: Path) -> list[int]:
    return [each.nodes for each in kept(describe(cluster), cluster, "bfloat16", runs)]


def test_nodes_of_40_and_of_80_gb_are_apart(tmp_path: Path) -> None:
    """Perlmutter has both: what one measured says nothing of the other, at any number of nodes."""
    for option, nodes in ((FORTY, 8), (EIGHTY, 16)):
        cluster = perlmutter(option, nodes=nodes)
        save(made(nodes), describe(cluster).calibration_file(cluster, "bfloat16", tmp_path))
    assert of(perlmutter(FORTY, nodes=64), tmp_path) == [8]
    assert of(perlmutter(EIGHTY, nodes=64), tmp_path) == [16]
    assert kept(describe(perlmutter()), perlmutter(), "float32", tmp_path) == [], "another type of number"
    assert of(perlmutter("cluster.ranks_per_node=2"), tmp_path) == [], "other ranks a node"


def old_file(nodes: int, runs: Path, run: str = "") -> Path:
    """As it was named before accelerators were in the fingerprint."""
    cluster = perlmutter(nodes=nodes)
    machine = describe(cluster)
    named = replace(machine, fingerprint={"torch": machine.fingerprint["torch"]})
    path = named.calibration_file(cluster, "bfloat16", runs)
    save(made(nodes, run=run), path)
    return path


def test_a_file_of_before_the_devices_names_is_still_read(tmp_path: Path) -> None:
    """By all devices where nobody knows of which it is, else by that of the run that measured it."""
    old_file(8, tmp_path)
    assert of(perlmutter(FORTY), tmp_path) == of(perlmutter(EIGHTY), tmp_path) == [8]
    run = RunFolder.create(tmp_path)
    run.write_config(yaml.safe_dump({"cluster": {"accelerator": "a100_80gb"}}))
    old_file(16, tmp_path, run.run_id)
    assert of(perlmutter(FORTY), tmp_path) == [8] and of(perlmutter(EIGHTY), tmp_path) == [8, 16]
    old, known = kept(describe(perlmutter(EIGHTY)), perlmutter(EIGHTY), "bfloat16", tmp_path)
    assert "accelerator" not in old.calibration.provenance
    assert known.calibration.provenance["accelerator"] == "a100_80gb"


def test_other_files_are_left_alone_and_a_torn_one_is_named(tmp_path: Path) -> None:
    cluster = ClusterConfig(name="site", scheduler="slurm", memory_gib_per_rank=64.0, nodes=4)
    machine = describe(cluster)
    assert kept(machine, cluster, "float32", tmp_path) == []
    path = machine.calibration_file(cluster, "float32", tmp_path)
    save(made(4), path)
    for name in (path.name.replace("site-", "site-b-"), f".{path.name}.12", path.name.replace("-4x", "-x")):
        path.with_name(name).write_text("{")
    assert [each.path for each in kept(machine, cluster, "float32", tmp_path)] == [path]
    torn = path.with_name(path.name.replace("-4x", "-16x"))
    torn.write_text("{")
    with pytest.raises(CalibrationError, match=torn.name):
        kept(machine, cluster, "float32", tmp_path)


@pytest.mark.parametrize(
    ("changes", "granted", "tiers"),
    [
        ({"nodes": 1}, (), ("node",)),
        ({"nodes": 1, "ranks_per_node": 1}, (), ()),
        ({"nodes": 4, "ranks_per_node": 1}, (), ("rack",)),
        ({"nodes": 4}, (), ("node", "rack")),
        ({"nodes": 4, "racks": [0, 0, 1, 1]}, (), MEASURED),
        ({"nodes": 2, "racks": [0, 1]}, (), ("node", "system")),
        ({"nodes": 4, "topology": TopologyConfig(nodes_per_switch=4, nodes_per_rack=8)}, (), ("node", "rack")),
        ({"nodes": 5, "topology": TopologyConfig(nodes_per_switch=4, nodes_per_rack=8)}, (), MEASURED),
        ({"nodes": 8, "topology": TopologyConfig(nodes_per_rack=4, hosts_per_node=2)}, (), ("node", "rack")),
        ({"nodes": 9, "topology": TopologyConfig(nodes_per_rack=4, hosts_per_node=2)}, (), MEASURED),
        ({"nodes": 9, "topology": TopologyConfig()}, (), ("node", "rack")),
        ({"nodes": 4, "topology": TopologyConfig(nodes_per_rack=8)}, (0, 1, 1, 2), MEASURED),
    ],
)
def test_the_links_that_a_run_needs(changes: dict[str, object], granted: tuple[int, ...], tiers: tuple[str, ...]):
    """As its micro-benchmark would name them; once nodes are granted, by their switches."""
    common: dict[str, object] = {"name": "site", "scheduler": "slurm", "ranks_per_node": 2, "memory_gib_per_rank": 1.0}
    cluster = ClusterConfig(**common | changes)
    machine: Machine = replace(describe(cluster), granted=granted)
    assert needed_tiers(machine, cluster) == tiers


def test_rows_of_another_device_are_not_taken_over_and_older_runs_still_are(tmp_path: Path) -> None:
    """Older runs have the device in their configuration alone."""
    asked = experiment(
        "task=microbench", "cluster=perlmutter", "task.suites=[gemm]", "task.resume=old", f"runs={tmp_path}",
        "cluster.account=abc_g",
    )  # fmt: skip
    machine = describe(asked.cluster)
    run = RunFolder.create(tmp_path, "old")
    fields = ("name", "nodes", "ranks_per_node", "device", "accelerator")
    config = {"cluster": {key: getattr(asked.cluster, key) for key in fields}, "train": {"dtype": asked.train.dtype}}
    run.write_config(yaml.safe_dump(config))
    run.write_manifest({"versions": versions(), "machine": {"fingerprint": {"torch": machine.fingerprint["torch"]}}})
    assert resumed_rows(asked, machine) == []
    config["cluster"]["accelerator"] = "a100_80gb"
    run.write_config(yaml.safe_dump(config))
    with pytest.raises(ConfigError, match="accelerator was a100_80gb and is a100_40gb"):
        resumed_rows(asked, machine)
