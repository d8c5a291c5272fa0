"""ExpertPlacement `pack`: what Slurm is asked for, what is refused, and where ranks stand on what was granted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from piper_hpc.cluster.data_sheet import topology_of
from piper_hpc.cluster.machine import Machine
from piper_hpc.cluster.placement import leaf_switches, rank_order, request, switch_paths_of_nodes
from piper_hpc.config import ConfigError, Experiment
from piper_hpc.config.schema import ClusterConfig, TopologyConfig
from piper_hpc.resource_model.eager.dispatch import cell_of
from piper_hpc.resource_model.eager.groups import layout_groups
from piper_hpc.resource_model.topology import axis_groups
from piper_hpc.runtime.rank import RankEnvironment
from piper_hpc.spec import DATA_SHEET, Calibration, Layout, RankMap
from tests.presets import experiment
from tests.resource_model.clusters import TINY

SITE = (
    "cluster=frontier",
    "cluster.account=abc",
    "train=paper",
    "model=small",
    "parallelism.ep=16",
    "parallelism.pp=1",
)


@pytest.fixture(autouse=True)
def without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda command: None)
    monkeypatch.setenv("PATH", "/nonexistent")  # an scontrol that is installed waits seconds for its controller


def asked(*overrides: str) -> Experiment:
    return experiment("parallelism.placement=pack", *overrides)


def directives(*overrides: str) -> dict[str, str]:
    found = asked(*overrides)
    return request(found.cluster, found.layout, {"SLURM_CONF": "/nonexistent"})


def test_slurm_is_asked_for_the_fewest_switches() -> None:
    assert directives(*SITE, "cluster.nodes=16", "train.global_batch=1024") == {
        "switches": "4@60",
        "distribution": "block",
    }
    more = directives(
        *SITE, "cluster.max_switches=8", "cluster.nodes=16", "train.global_batch=1024", "cluster.switch_wait_min=5"
    )
    assert more["switches"] == "8@5"
    assert directives(*SITE, "cluster.racks=[0,0,0,1,1,1,1,2]", "train.global_batch=1024")["switches"] == "3@60"
    uneven = directives(*SITE, "+cluster.switches={a:'n[1-6]',b:'n[7-9]'}", "train.global_batch=1024")
    assert uneven["switches"] == "2@60"


def test_a_switch_holds_more_slurm_nodes_where_several_make_a_node() -> None:
    cluster = ClusterConfig(topology=TopologyConfig(nodes_per_switch=2, hosts_per_node=16))
    found = leaf_switches(cluster, {})
    assert found is not None and [found.fewest(hosts) for hosts in (1, 32, 33, 64)] == [1, 1, 2, 2]


def test_linear_asks_for_nothing() -> None:
    assert directives(*SITE, "parallelism.placement=linear", "train.global_batch=1024") == {}


def test_where_domains_are_to_be_measured_neighbours_are_asked_for() -> None:
    blind = ("cluster.topology.nodes_per_switch=null", "cluster.domains=measured")
    assert directives(*SITE, *blind, "train.global_batch=1024") == {"contiguous": "", "distribution": "block"}


@pytest.mark.parametrize(
    ("overrides", "key", "value", "rule", "works"),
    [
        (
            ["cluster.max_switches=1"],
            "cluster.max_switches", 1, "8 nodes need 2 leaf switches at least", "cluster.max_switches=2",
        ),
        (
            ["cluster.max_switches=9"],
            "cluster.max_switches", 9, "8 nodes are below 8 at most", "cluster.max_switches=2",
        ),
        (
            ["cluster.max_switches=5", "cluster.racks=[0,0,0,0,1,1,1,1]"],
            "cluster.max_switches", 5, "there are 2", "cluster.max_switches=2",
        ),
        (
            ["cluster.topology.nodes_per_switch=null"],
            "parallelism.placement", "pack", "nothing is known of the topology of cluster frontier",
            "cluster.domains=measured, or parallelism.placement=linear",
        ),
    ],
)  # fmt: skip
def test_bad_requests_name_key_value_rule_and_what_works(
    overrides: list[str], key: str, value: object, rule: str, works: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        directives(*SITE, "train.global_batch=1024", *overrides)
    (problem,) = caught.value.problems
    assert (problem.key, problem.value) == (key, value)
    assert rule in problem.rule and works in problem.works
    # What is said to work does.
    assert directives(*SITE, "train.global_batch=1024", *overrides, works.split(", or ")[0])


def test_one_machine_has_nothing_to_pack_into() -> None:
    with pytest.raises(ConfigError, match="one machine has no topology"):
        directives()


def tasks(nodes: Sequence[str], switches: dict[str, tuple[str, ...]], per_node: int) -> list[RankEnvironment]:
    """As Slurm starts them: node after node."""
    return [
        RankEnvironment(t, len(nodes) * per_node, t % per_node, node, switches.get(node, ()), "1", "", 0, "", t)
        for t, node in enumerate(node for node in nodes for _ in range(per_node))
    ]  # fmt: skip


RACKS = {node: ("spine", rack) for rack, names in {"r1": ("n1", "n3"), "r2": ("n2", "n4")}.items() for node in names}


def placed(order: Sequence[int], started: Sequence[RankEnvironment], layout: Layout, ranks_per_nic: int = 1) -> RankMap:
    nodes = [started[task].node for task in order]
    names = list(dict.fromkeys(nodes))
    racks = [started[task].switches for task in order]
    return RankMap(
        layout,
        tuple(names.index(node) for node in nodes),
        tuple(list(dict.fromkeys(racks)).index(racks[nodes.index(name)]) for name in names),
        ranks_per_nic,
    )


def test_expert_groups_stay_inside_racks_that_hold_them_where_linear_straddles() -> None:
    layout = Layout(ep=4, dp=2, placement="pack")
    started = tasks(("n1", "n2", "n3", "n4"), RACKS, per_node=2)
    order = rank_order(started, layout, ClusterConfig(name="site"))
    assert [started[task].node for task in order] == ["n1", "n1", "n3", "n3", "n2", "n2", "n4", "n4"]

    def racks_of_groups(map_of: RankMap) -> set[int]:
        groups = (map_of.expert_group(rank) for rank in range(layout.ranks))
        return {len({map_of.places[member].rack for member in group}) for group in groups}

    assert racks_of_groups(placed(order, started, layout)) == {1}
    assert racks_of_groups(placed(range(8), started, layout)) == {2}


def test_rails_have_cards_of_one_number() -> None:
    """Ranks of equal place on their nodes, of one expert group, share a card with the same neighbours everywhere."""
    layout = Layout(ep=32, placement="pack")
    started = tasks(("n4", "n1", "n2", "n3"), RACKS, per_node=8)
    ranks = placed(rank_order(started, layout, ClusterConfig(name="site")), started, layout, ranks_per_nic=2)
    rails: dict[int, set[int]] = {}
    for rank, place in enumerate(ranks.places):
        rails.setdefault(rank % 8, set()).add(place.nic)
    assert [rails[local] for local in range(8)] == [{0}, {0}, {1}, {1}, {2}, {2}, {3}, {3}]


def test_a_file_that_names_nodes_goes_before_slurm_and_racks_by_number_come_last() -> None:
    told = [("spine", "r1"), ("spine", "r2")]
    named = ClusterConfig(name="site", switches={"a": "n1", "b": "n2"})
    assert switch_paths_of_nodes(named, ["n1", "n2"], told) == ([("a",), ("b",)], "cluster.switches")
    numbered = ClusterConfig(name="site", racks=[0, 1])
    assert switch_paths_of_nodes(numbered, ["n1", "n2"], told) == (told, "SLURM_TOPOLOGY_ADDR")
    assert switch_paths_of_nodes(numbered, ["n1", "n2"], [(), ()]) == ([("rack0",), ("rack1",)], "cluster.racks")
    assert len(set(switch_paths_of_nodes(ClusterConfig(name="site"), ["n1", "n2"], [(), ()])[0])) == 1


@pytest.mark.parametrize(
    ("sizes", "racks"),
    [
        ({"nodes_per_switch": 2}, [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"nodes_per_rack": 2}, [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"nodes_per_switch": 2, "nodes_per_rack": 4}, [0, 0, 1, 1, 2, 2, 3, 3]),
        ({"nodes_per_switch": 1, "nodes_per_rack": 2}, list(range(8))),
        ({"nics_per_node": 1}, [0] * 8),
    ],
)
def test_a_run_and_a_prediction_take_a_uniform_machine_for_the_same_racks(
    sizes: dict[str, int], racks: list[int]
) -> None:
    """Slurm names no switches, the file gives sizes or none: both sides count the innermost domains."""
    site = ClusterConfig(name="site", nodes=8, ranks_per_node=2, topology=TopologyConfig(**sizes))
    paths, source = switch_paths_of_nodes(site, [f"n{node}" for node in range(8)], [()] * 8)
    leaf_switches = list(dict.fromkeys(paths))
    assert [leaf_switches.index(path) for path in paths] == racks
    assert ("cluster.topology" in source) == (len(leaf_switches) > 1)
    experts = axis_groups(Layout(ep=16), topology_of(site)).experts
    cell = cell_of(experts, topology_of(site), TINY, 64, 4, 1.0)
    assert (cell.ranks, cell.nodes, cell.racks) == (16, 8, len(leaf_switches))


def test_what_was_granted_is_predicted_with() -> None:
    """Racks that alternate make the links between them an expert group's, where blocks of racks keep it inside."""
    cluster = ClusterConfig(name="site", nodes=4, ranks_per_node=2)
    assumed = Machine(rack_of_node=(0, 0, 1, 1), memory_bytes=2**30, cores=0.0)
    calibration = Calibration(DATA_SHEET, "", 1e12)
    tiers = {
        granted: layout_groups(Layout(ep=4, dp=2), replace(assumed, granted=granted).spec(cluster, calibration))
        for granted in ((), (0, 0, 1, 1), (0, 1, 0, 1))
    }
    assert tiers[()] == tiers[0, 0, 1, 1]
    assert tiers[0, 0, 1, 1].stages[0].experts.tier == "rack"
    assert tiers[0, 1, 0, 1].stages[0].experts.tier == "system"


def test_a_switch_that_was_granted_in_part_is_as_wide_as_that_part() -> None:
    frontier = asked(*SITE, "train.global_batch=1024").cluster
    granted = Machine(rack_of_node=(0,) * 8, memory_bytes=2**30, cores=0.0, granted=(0, 0, 1, 1, 2, 2, 3, 3))
    topology = granted.spec(frontier, Calibration(DATA_SHEET, "", 1e12)).topology
    assert topology is not None and topology.switch == 16
