"""Cluster and accelerator files: every value has a source, pinned facts are right, and what is unknown is refused."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from piper_hpc.cluster import accelerator, data_sheet
from piper_hpc.cluster.machine import describe
from piper_hpc.config import ConfigError, Experiment, check_experiment, register
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.forecast import calibration_of
from piper_hpc.paths import data_folder
from piper_hpc.resource_model.topology import group, tier_links, topology_of
from piper_hpc.spec import ClusterSpec
from tests.presets import experiment

CONF = data_folder("conf")
SITES = sorted({path.stem for path in (CONF / "cluster").glob("*.yaml")} - {"local", "slurm", "testbed"})
REFUSED = {"leonardo_booster": "data_sheet.peak_flops is not public for a100_64gb_custom in bfloat16"}
MODELLED = [site for site in SITES if site not in REFUSED]
SELF_EVIDENT = {"name", "checked", "scheduler", "nodes", "ranks_per_node", "device", "accelerator", "template"} | {
    "gpus_per_task",
    "gpus_per_node",
    "comm_timeout_s",
}


def planned(*overrides: str) -> Experiment:
    return experiment("task=plan", "train=paper", *overrides)


def spec_of(site: str, tmp_path: Path, *overrides: str) -> ClusterSpec:
    asked = planned(f"cluster={site}", f"runs={tmp_path}", *overrides)
    machine = describe(asked.cluster)
    calibration = calibration_of(asked, machine)
    assert calibration is not None
    return machine.spec(asked.cluster, calibration)


def leaves(document: dict[str, object], above: str = "") -> dict[str, object]:
    found: dict[str, object] = {}
    for key, value in document.items():
        found |= leaves(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def test_the_sites_of_the_project_are_there() -> None:
    wanted = (
        "frontier perlmutter lumi_g leonardo_booster juwels_booster alps jupiter delta deltaai dgx_a100 dgx_h100 h800"
    )
    assert sorted([*wanted.split(), "gb200_nvl72", "b200", "mi325x", "mi355x", "aurora"]) == SITES


@pytest.mark.parametrize("site", SITES)
def test_every_fact_of_a_site_has_a_source_and_a_date(site: str) -> None:
    document = OmegaConf.to_container(OmegaConf.load(CONF / "cluster" / f"{site}.yaml"))
    assert isinstance(document, dict)
    sources = document.pop("sources")
    date.fromisoformat(document["checked"])
    facts = {key.removeprefix("data_sheet."): value for key, value in leaves(document).items()}
    unsourced = {key for key in facts if key.split(".")[0] not in SELF_EVIDENT and key not in sources}
    assert unsourced == set()
    assert set(sources) <= set(facts), "a source of nothing"
    for key, value in facts.items():
        if value is None and not key.startswith("sbatch."):
            assert sources[key].startswith("unknown"), key


@pytest.mark.parametrize("name", accelerator.names())
def test_every_fact_of_an_accelerator_has_a_source_and_a_date(name: str) -> None:
    facts = accelerator.facts(name)
    date.fromisoformat(facts.checked)
    assert facts.name == name
    for key in ("compute_units", "memory_bytes", "memory_bytes_per_s"):
        assert key in facts.sources
    for table in ("peak_flops", "mamf_flops"):
        for dtype in getattr(facts, table):
            assert table in facts.sources or f"{table}.{dtype}" in facts.sources
    for dtype, best in facts.mamf_flops.items():
        assert 0.4 < best / facts.peak_flops[dtype] < 1
    assert not facts.peak_flops or facts.peak_flops["float32"] < facts.peak_flops["bfloat16"]


@pytest.mark.parametrize(
    ("name", "bfloat16", "memory_gb", "memory_bytes_per_s", "ratio"),
    [
        ("mi250x_gcd", 191.5e12, 64, 1.64e12, None),
        ("a100_40gb", 312e12, 40, 1.555e12, 0.869),
        ("a100_80gb", 312e12, 80, 2.039e12, 0.869),
        ("h100", 989e12, 80, 3.35e12, 0.803),
        ("h200", 989e12, 141, 4.8e12, 0.803),
        ("gh200", 989e12, 96, 4.0e12, 0.838),
        ("b200", 2250e12, 180, 8.0e12, 0.776),
        ("gb200", 2500e12, 186, 8.0e12, 0.729),
        ("max_1550_tile", 367e12, 64, 1.638e12, 0.698),
        ("mi300x", 1307.4e12, 192, 5.3e12, 0.511),
        ("mi325x", 1307.4e12, 256, 6.0e12, 0.600),
        ("mi355x", 2500e12, 288, 8.0e12, 0.626),
    ],
)
def test_accelerator_pins(
    name: str, bfloat16: float, memory_gb: float, memory_bytes_per_s: float, ratio: float | None
) -> None:
    facts = accelerator.facts(name)
    assert facts.peak_flops["bfloat16"] == bfloat16
    assert memory_gb * 1e9 <= facts.memory_bytes <= memory_gb * 2**30 * 1.001
    assert facts.memory_bytes_per_s == pytest.approx(memory_bytes_per_s, rel=0.01)
    assert (facts.mamf_flops.get("bfloat16") is None) == (ratio is None)
    if ratio is not None:
        assert facts.mamf_flops["bfloat16"] / bfloat16 == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize(
    ("site", "near", "far", "ranks_in_node"),
    [
        ("frontier", 50e9, 12.5e9, 8),
        ("lumi_g", 50e9, 12.5e9, 8),
        ("perlmutter", 300e9, 25e9, 4),
        ("juwels_booster", 300e9, 25e9, 4),
        ("alps", 450e9, 25e9, 4),
        ("deltaai", 450e9, 25e9, 4),
        ("delta", 300e9, 6.25e9, 4),
        ("jupiter", 450e9, 25e9, 4),
        ("aurora", 75e9, 16.6e9, 12),
        ("dgx_a100", 300e9, 25e9, 8),
        ("dgx_h100", 450e9, 50e9, 8),
        ("h800", 200e9, 50e9, 8),
        ("gb200_nvl72", 900e9, 50e9, 64),
        ("b200", 900e9, 50e9, 8),
        ("mi325x", 448e9, 50e9, 8),
        ("mi355x", 535.5e9, 50e9, 8),
    ],
)
def test_link_pins(site: str, near: float, far: float, ranks_in_node: int, tmp_path: Path) -> None:
    spec = spec_of(site, tmp_path)
    links = tier_links(spec.links, name=spec.name, tiers=topology_of(spec).tiers)
    assert links.notes == ()  # a link is known of every tier that the machine has
    assert (links.links[1].bytes_per_s, links.links[4].bytes_per_s) == (near, far)
    assert spec.topology is not None
    assert spec.topology.node == ranks_in_node
    assert 0 < links.latency_s[1] < links.latency_s[4]


def test_every_modelled_site_is_pinned() -> None:
    assert len(MODELLED) == 16


def test_frontier_pins(tmp_path: Path) -> None:
    spec = spec_of("frontier", tmp_path)
    assert spec.calibration.peak_flops == 191.5e12
    assert spec.memory_bytes == pytest.approx(64e9, rel=1e-3)
    assert spec.topology is not None
    assert spec.topology.sizes == (2, 8, 32, 32)
    assert spec.topology.ranks_per_nic == 2
    # 25 GB/s a NIC: what its ranks share is what one of them has.
    assert spec.links["system"].bytes_per_s * spec.topology.ranks_per_nic == 25e9
    assert spec.links["pair"].bytes_per_s == 200e9
    assert group(spec.topology, 32).tier == "switch"  # the single-hop domain of Eq 10


def test_what_nobody_published_is_said_to_be_assumed(tmp_path: Path) -> None:
    alps = spec_of("alps", tmp_path).calibration
    assert alps.provenance["links.system.bytes_per_s"].startswith("assumed: one 25 GB/s")
    assert "900 W" in alps.provenance["gemm_efficiency"]
    assert spec_of("h800", tmp_path).calibration.provenance["gemm_efficiency"].startswith("assumed: the peak")


@pytest.mark.parametrize("site", REFUSED)
def test_what_is_unknown_is_refused_by_name(site: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=REFUSED[site]):
        spec_of(site, tmp_path)


def test_what_is_unknown_may_be_given(tmp_path: Path) -> None:
    leonardo = spec_of(
        "leonardo_booster",
        tmp_path,
        "cluster.data_sheet.peak_flops=3e14",
        "cluster.data_sheet.memory_bytes_per_s=1.6e12",
    )
    assert leonardo.calibration.peak_flops == 3e14


SUBMITTED = (
    *("frontier", "perlmutter", "lumi_g", "alps", "jupiter"),
    *("juwels_booster", "leonardo_booster", "delta", "deltaai"),
)


@pytest.mark.parametrize("site", SUBMITTED)
def test_a_site_with_a_batch_template_says_how_long_a_job_may_last(site: str) -> None:
    cluster = planned(f"cluster={site}").cluster
    assert cluster.template is not None and cluster.limits
    nodes = [limit.nodes for limit in cluster.limits]
    assert nodes == sorted(nodes) and cluster.time_min <= cluster.limits[0].time_min
    assert (cluster.gpus_per_node or cluster.gpus_per_task or cluster.gres) and cluster.memory_gib_per_rank >= 0


OTHER_SCHEDULERS = {"aurora"}


@pytest.mark.parametrize("site", sorted(OTHER_SCHEDULERS))
@pytest.mark.parametrize("asked", ["task=train", "task=microbench", "submit=false"])
def test_nothing_is_submitted_to_another_scheduler_whatever_the_template(site: str, asked: str) -> None:
    others = ["cluster.template=generic.sbatch", "dry_run=true"]
    task = [] if asked.startswith("task") else ["task=train"]
    with pytest.raises(ConfigError, match=f"submitted to Slurm or run on this machine: {site} is for task=plan alone"):
        planned(f"cluster={site}", asked, *task, *others)


@pytest.mark.parametrize("site", sorted(set(SITES) - set(SUBMITTED) - OTHER_SCHEDULERS))
def test_training_without_a_batch_template_is_refused(site: str) -> None:
    with pytest.raises(ConfigError, match=f"without one {site} is for task=plan alone"):
        planned(f"cluster={site}", "task=train")


def test_the_precision_chooses_the_peak(tmp_path: Path) -> None:
    assert spec_of("dgx_h100", tmp_path, "train.dtype=float32").calibration.peak_flops == 67e12
    with pytest.raises(ConfigError, match="peak_flops is not public for h100 in float64"):
        spec_of("dgx_h100", tmp_path, "train.dtype=float64")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cluster.accelerator=tpu", "must be one of a100_40gb, "),
        ("cluster.topology.ranks_per_pair=3", "must divide cluster.ranks_per_node = 8"),
        ("cluster.topology.nodes_per_rack=6", "must be a multiple of cluster.topology.nodes_per_switch = 4"),
        ("cluster.topology.hosts_per_node=0", "must be at least 1"),
        ("cluster.data_sheet.links.node.bytes_per_s=0", "must be at least 1"),
    ],
)
def test_facts_that_make_no_sense_are_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned("cluster=frontier", override)


def test_a_link_of_an_unknown_tier_is_refused() -> None:
    register()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = OmegaConf.to_container(compose("config", overrides=["task=plan", "cluster=frontier"]), resolve=True)
    assert isinstance(composed, dict)
    composed["cluster"]["data_sheet"]["links"]["rail"] = {"latency_s": 1e-6, "bytes_per_s": 1e9}
    with pytest.raises(ConfigError, match="must be one of pair, node, switch, rack, system"):
        check_experiment({str(key): value for key, value in composed.items()})


def test_racks_given_take_the_place_of_the_topology(tmp_path: Path) -> None:
    spec = spec_of("frontier", tmp_path, "cluster.nodes=2", "cluster.racks=[0,1]")
    assert spec.topology is None
    assert spec.rack_of_node == (0, 1)


def test_a_cluster_of_which_nothing_is_known_has_no_data_sheet() -> None:
    assert data_sheet.calibration_of_cluster(ClusterConfig(name="nowhere"), "bfloat16") is None
    with pytest.raises(ValueError, match="accelerator=tpu: must be one of"):
        accelerator.facts("tpu")
