"""The planner: every candidate satisfies every rule, none better is missed, and the count of the others adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import combinations, pairwise
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.config import check_experiment, register
from piper_hpc.paths import data_folder
from piper_hpc.planner import Axes, Plan, plan
from piper_hpc.planner.balance import balanced_layers
from piper_hpc.planner.eager import RECOMPUTES_TWICE, balanced_split, divisors
from piper_hpc.planner.search_spec import DUPLICATE, WRONG_MICRO_BATCHES, WRONG_VPP
from piper_hpc.resource_model import predict
from piper_hpc.resource_model.eager.memory import peak_bytes
from piper_hpc.resource_model.eager.step import StepPricer
from piper_hpc.spec import ALGORITHMS, ClusterSpec, Layout, ModelSpec, Prediction, Workload
from piper_hpc.spec.executor import trains
from piper_hpc.spec.rules import layout_problems
from piper_hpc.spec.schedules import SCHEDULES, holders
from tests.full import examples, full
from tests.resource_model.clusters import TINY, WIDE, cluster

WORKLOAD = Workload(global_batch=32, sequence=128)
TESTBED = cluster()
HEADY = replace(TINY, name="heady", vocab=4096)
"""Its head is as much work as some of its layers: stages are balanced by an uneven split."""

ONE_EACH = {"vpp": (1,), "zero": (0,), "schedule": ("1f1b",), "recompute": ("none",)}
"""Degrees and micro-batches alone: a small search, of which everything can be predicted."""

PIPELINES = [("1f1b", 1), ("gpipe", 1), ("interleaved", 2), ("zb_h1", 1), ("zbv", 2), ("dualpipev", 2)]


def searched(where: ClusterSpec, workload: Workload = WORKLOAD, model: ModelSpec = TINY, **asked: Any) -> Plan:
    """The plan with all degrees and micro-batches, and the given values of the other axes, one each unless given."""
    ranks = asked.get("ranks") or [where.ranks]
    degrees = tuple(sorted({divisor for count in ranks for divisor in divisors(count)}))
    axes = replace(Axes.shipped(), pp=degrees, ep=degrees, micro_batch=tuple(divisors(workload.global_batch)))
    chosen = ONE_EACH | {axis: asked.pop(axis) for axis in ONE_EACH if axis in asked}
    return plan(model, where, workload, axes=replace(axes, **chosen), **asked)


def layout_of(prediction: Prediction) -> Layout:
    return prediction.layout


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from([TINY, WIDE]),
    st.sampled_from([(1, 1), (1, 4), (4, 2), (3, 2), (8, 8)]),
    st.sampled_from([8, 24, 32, 96]),
    st.sampled_from([2**24, 2**26, 2**30]),
    st.booleans(),
    st.sampled_from(PIPELINES),
    st.sampled_from([0, 1]),
    st.sampled_from(["none", "full", "attention+activation"]),
)
def test_every_candidate_satisfies_every_rule(
    model: ModelSpec,
    shape: tuple[int, int],
    batch: int,
    memory_bytes: int,
    shared: bool,
    pipeline: tuple[str, int],
    zero: int,
    recompute: str,
) -> None:
    nodes, ranks_per_node = shape
    where = replace(
        cluster(nodes=nodes, ranks_per_node=ranks_per_node),
        memory_bytes=memory_bytes,
        devices_share_cores=shared,
        cores=2.0,
    )
    workload = Workload(batch, 128)
    (schedule, vpp), others = pipeline, {"zero": (zero,), "recompute": (recompute,)}
    found = searched(where, workload, model, candidates=1000, vpp=(vpp,), schedule=(schedule,), **others)
    assert found.pruned == 0
    assert found.feasible == found.fitting == len(found.candidates)
    for candidate in found.candidates:
        layout = layout_of(candidate)
        assert layout.pp * layout.ep * layout.dp == where.ranks
        assert model.experts % layout.ep == 0
        assert layout.stages <= model.layers
        assert layout.micro_batches(batch) * layout.micro_batch * layout.dense_dp == batch
        assert (layout.schedule, layout.vpp, layout.zero, layout.recompute) == (schedule, vpp, zero, recompute)
        assert not list(layout_problems(model, layout, workload)) and trains(layout)
        assert max(candidate.peak_memory_bytes) <= memory_bytes
        assert candidate == predict(model, where, layout, workload)
    assert all(better.mfu >= worse.mfu for better, worse in pairwise(found.candidates))


def every_layout(model: ModelSpec, where: ClusterSpec, workload: Workload) -> list[Layout]:
    """By brute force, from the rules as they are stated: what trains, once by each name."""
    sizes, pricer = range(1, where.ranks + 1), StepPricer(model, where, workload)
    even = [
        layout
        for pp in sizes
        for ep in sizes
        for dp in sizes
        for micro_batch in range(1, workload.global_batch + 1)
        if pp * ep * dp == where.ranks and workload.global_batch % (micro_batch * ep * dp) == 0
        for schedule, vpp in (PIPELINES if pp > 1 else [("1f1b", 1)])
        for zero in ((0, 1) if ep * dp > 1 else (0,))
        for recompute in ("none", "full", "activation", "attention")
        for layout in [Layout(pp, vpp, ep, 1, 1, 1, dp, zero, schedule, micro_batch, recompute)]
        if not list(layout_problems(model, layout, workload)) and trains(layout)
    ]
    splits = [replace(layout, stage_layers=balanced_split(pricer, layout)) for layout in even]
    every = dict.fromkeys([*even, *splits])
    return [layout for layout in every if max(peak_bytes(model, layout, workload)) <= where.memory_bytes]


def test_nothing_feasible_is_missed() -> None:
    four, workload = replace(cluster(nodes=2), memory_bytes=50 * 2**20), Workload(8, 128)
    found = plan(HEADY, four, workload, candidates=10_000)
    layouts = [layout_of(candidate) for candidate in found.candidates]
    assert len(layouts) == len(set(layouts)) and any(layout.stage_layers for layout in layouts)
    assert found.rejected["Eq 11: peak memory must fit the rank's memory"] > 0
    assert set(layouts) == set(every_layout(HEADY, four, workload))


@given(
    st.sampled_from([("1f1b", 1), ("interleaved", 2), ("interleaved", 3), ("zbv", 2)]),
    st.integers(1, 3),
    st.integers(0, 5),
    *(st.floats(0.0, 6.0) for _ in range(2)),
)
def test_a_balanced_split_has_the_smallest_largest_rank(
    pipeline: tuple[str, int], pp: int, more: int, first_s: float, last_s: float
) -> None:
    """Against every split there is."""
    (schedule, vpp), layers = pipeline, pp * pipeline[1] + more
    layout = Layout(pp=pp, vpp=vpp, schedule=schedule)

    def busiest(counts: Sequence[int]) -> float:
        work = [0.0] * pp
        for stage, (rank, count) in enumerate(zip(holders(schedule, pp, vpp), counts, strict=True)):
            work[rank] += count + first_s * (stage == 0) + last_s * (stage == layout.stages - 1)
        return max(work)

    cuts = combinations(range(1, layers), layout.stages - 1)
    every = [[high - low for low, high in pairwise((0, *inner, layers))] for inner in cuts]
    best, even = min(map(busiest, every)), busiest([len(each) for each in layout.layers_by_stage(layers)])
    found = balanced_layers(layout, layers, 1.0, first_s, last_s)
    assert busiest(found or [len(each) for each in layout.layers_by_stage(layers)]) == pytest.approx(best)
    assert bool(found) == (best < even * (1 - 1e-9))
    assert not found or (sum(found) == layers and min(found) >= 1)


@pytest.mark.slow
@pytest.mark.parametrize("rank_by", [pytest.param("mfu", marks=full), "tokens_per_s", "memory"])
def test_pruning_loses_no_candidate(rank_by: str) -> None:
    ranks = [2, 4, 8]
    wide = {"vpp": (1, 2), "zero": (0, 1), "schedule": ("1f1b", "zb_h1", "zbv"), "recompute": ("none", "activation")}
    everything = searched(TESTBED, model=HEADY, ranks=ranks, rank_by=rank_by, candidates=10_000, **wide)
    few = searched(TESTBED, model=HEADY, ranks=ranks, rank_by=rank_by, candidates=3, **wide)
    assert few.candidates == everything.candidates[:3]
    assert few.pareto == everything.pareto
    assert few.pruned > 0
    assert few.fitting + few.pruned == few.feasible == everything.feasible


@pytest.mark.slow
@settings(max_examples=examples(10, 20), deadline=None)
@given(
    st.sampled_from([TINY, WIDE, HEADY]),
    st.sampled_from([[4], [8], [2, 8]]),
    st.sampled_from([8, 24, 96]),
    st.sampled_from([2**22, 2**23, 2**26]),
    st.sampled_from(["mfu", "tokens_per_s", "memory"]),
    st.integers(1, 4),
    st.lists(st.sampled_from(SCHEDULES), min_size=2, max_size=2, unique=True),
    st.sampled_from(["full", "attention", "activation", "attention+activation"]),
    st.booleans(),
)
def test_the_bound_is_exact(
    model: ModelSpec,
    ranks: list[int],
    batch: int,
    memory_bytes: int,
    rank_by: str,
    candidates: int,
    schedules: list[str],
    recompute: str,
    shared: bool,
) -> None:
    """What a search with a bound finds is what evaluating everything finds: the best, the front, and what limits."""
    where = replace(TESTBED, memory_bytes=memory_bytes, devices_share_cores=shared, cores=2.0)
    workload, of_all = Workload(batch, 128), {"ranks": ranks, "rank_by": rank_by, "model": model}
    of_all |= {"vpp": (1, 2), "zero": (0, 1), "schedule": tuple(schedules), "recompute": ("none", recompute)}
    everything = searched(where, workload, candidates=10_000, **of_all)
    few = searched(where, workload, candidates=candidates, **of_all)
    assert few.candidates == everything.candidates[:candidates]
    assert few.pareto == everything.pareto
    assert few.fitting + few.pruned == everything.fitting
    assert few.limits == everything.limits
    assert few.rejected == everything.rejected


def test_the_same_question_gets_the_same_answer() -> None:
    first, second = (plan(TINY, TESTBED, WORKLOAD) for _ in range(2))
    assert replace(first, seconds=0.0) == replace(second, seconds=0.0)


def test_ranking_by_memory_puts_the_least_peak_first() -> None:
    found = searched(TESTBED, rank_by="memory", candidates=1000)
    peaks = [max(candidate.peak_memory_bytes) for candidate in found.candidates]
    assert peaks == sorted(peaks)


def test_rejections_are_counted_by_rule() -> None:
    tight = replace(TESTBED, memory_bytes=2**25)
    found = searched(tight, model=HEADY, candidates=1000)
    assert found.rejected["Eq 9: pp * vpp must not exceed the layers"] == 1  # pp = 8 of 4 layers
    assert found.rejected["Eq 11: peak memory must fit the rank's memory"] > 0
    # Every other pp leaves 8 / pp ranks for ep and dp, and a batch of 32 pp / 8 sequences a rank to divide.
    micro_batch_sizes = {1: 3, 2: 4, 4: 5}
    even = sum(len(divisors(8 // pp)) * sizes for pp, sizes in micro_batch_sizes.items())
    uneven = sum(
        candidate.layout.stage_layers != () for candidate in searched(TESTBED, model=HEADY, candidates=1000).candidates
    )
    assert 0 < uneven < even
    assert found.feasible + sum(found.rejected.values()) - 1 == even + uneven


def test_combinations_that_are_no_layouts_are_counted_by_rule() -> None:
    """On four ranks, pp of 1, 2 and 4: TINY has four layers."""
    four = cluster(nodes=2)
    axes = {"vpp": (1, 2), "zero": (0, 1), "schedule": ("zb_h1", "dualpipev"), "recompute": ("none", "full")}
    rejected = searched(four, Workload(4, 128), candidates=1000, **axes).rejected
    # Degrees: three with pp = 1, two with 2, one with 4. Two schedules with two vpp each, of which one fits.
    assert rejected["Eq 9: pp * vpp must not exceed the layers"] == 2  # pp = 4 with vpp = 2, by schedule
    assert rejected[WRONG_VPP] == 3 * 2 + 2 * 2 + 1
    # One rank needs one schedule; a rank without replicas has nothing to shard, with any of its micro-batches.
    assert rejected[DUPLICATE] == 3 + len(divisors(4))
    # dualpipev wants four micro-batches: the two degrees of pp = 2 have at most two. All other schedules here split.
    assert rejected[WRONG_MICRO_BATCHES] == 2 * 2
    assert rejected[RECOMPUTES_TWICE] == 3 * 1 + 2 * 2 + 3


def test_a_head_room_is_memory_that_no_layout_may_use() -> None:
    """A share kept free equals a machine with so much less, except that its memory is still all of it."""
    where = replace(TESTBED, memory_bytes=2**25)
    kept = searched(where, candidates=1000, memory_headroom=0.25)
    less = searched(replace(where, memory_bytes=3 * 2**23), candidates=1000)
    everything = searched(where, candidates=1000)
    assert 0 < len(kept.candidates) < len(everything.candidates)
    assert (kept.candidates, kept.pareto) == (less.candidates, less.pareto)
    assert max(max(one.peak_memory_bytes) for one in kept.candidates) <= 0.75 * where.memory_bytes
    words = "Eq 11: peak memory must fit the rank's memory"
    assert kept.rejected[f"{words}, less a head-room of 25 %"] == less.rejected[words] and words not in kept.rejected
    assert kept.limits is not None and less.limits is not None
    assert kept.memory_bytes == kept.limits["memory"]["available_bytes"] == where.memory_bytes
    assert kept.limits["memory"]["headroom_bytes"] == less.limits["memory"]["headroom_bytes"] + 2**23
    assert (kept.document()["memory_headroom"], everything.document()["memory_headroom"]) == (0.25, 0.0)


def test_shapes_are_the_best_of_each_degrees() -> None:
    found = searched(TESTBED, candidates=1000)
    best = {}
    for candidate in found.candidates:
        best.setdefault((candidate.layout.pp, candidate.layout.ep), candidate)
    assert found.shapes == list(best.values()) != found.candidates
    few = searched(TESTBED, candidates=2)
    assert few.shapes[0] == few.candidates[0] and len(few.shapes) <= 2


def test_nothing_feasible_is_no_error() -> None:
    found = plan(TINY, replace(TESTBED, memory_bytes=2**20), WORKLOAD)
    assert found.candidates == []
    assert (found.searched, found.fitting, found.pruned, found.feasible) == (0, 0, 0, 0)
    assert sum(found.rejected.values()) > 0


def test_expert_groups_stay_in_the_domain_asked_for() -> None:
    anywhere = searched(TESTBED, candidates=1000)
    in_node = searched(TESTBED, ep_domain="node", candidates=1000)
    assert {layout_of(candidate).ep for candidate in anywhere.candidates} == {1, 2, 4, 8}
    assert {layout_of(candidate).ep for candidate in in_node.candidates} == {1, 2}
    assert in_node.rejected["Eq 10: expert groups must stay within ep_domain=node"] > 0


def test_the_document_is_the_contract() -> None:
    found = plan(TINY, TESTBED, WORKLOAD, candidates=2)
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    contract = {"model", "cluster", "searched", "pruned", "feasible", "seconds", "candidates", "rejected"}
    assert contract <= set(document)
    assert document["model"]["parameters"] == TINY.parameters
    assert document["candidates"][0]["layout"] == asdict(found.candidates[0].layout) | {"stage_layers": []}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_by": "luck"}, "rank_by='luck': must be one of mfu, tokens_per_s, memory"),
        ({"ep_domain": "rack"}, "ep_domain='rack': must be one of none, switch, node"),
        ({"ranks": [16]}, "ranks=16: cluster 'made-up' has 8; use ranks=8"),
        ({"memory_headroom": 1.0}, r"memory_headroom=1.0: must lie in \[0, 1\), for example memory_headroom=0.08"),
        ({"memory_headroom": -0.1}, "memory_headroom=-0.1: must lie in"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan(TINY, TESTBED, WORKLOAD, **options)  # type: ignore[arg-type]


@pytest.mark.alone
def test_planning_for_the_testbed_takes_less_than_a_second() -> None:
    assert min(plan(TINY, TESTBED, WORKLOAD).seconds for _ in range(3)) < 1.0  # other work can spoil one


def test_a_plan_for_this_executor_takes_the_all_to_all_that_is_asked_for() -> None:
    found = {name: searched(TESTBED, all_to_all=name, candidates=1000).candidates for name in ("flat", "halo", "auto")}
    for name, candidates in found.items():
        assert {candidate.layout.all_to_all for candidate in candidates} == {name}
    chosen = {layout_of(one): one for one in found["auto"]}
    for flat in found["flat"]:
        auto = chosen[replace(layout_of(flat), all_to_all="auto")]
        assert auto.step_time_s <= flat.step_time_s * (1 + 1e-12)
        exchanged = auto.layout.ep > 1
        assert any(note.startswith("all_to_all=auto: ") for note in auto.notes) == exchanged


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys, piper_hpc.planner, piper_hpc.cluster.calibration, piper_hpc.cluster.data_sheet; "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_shipped_axes_are_those_of_the_default_configuration() -> None:
    register()
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        configured = check_experiment(compose("config", overrides=["task=plan"])).plan.axes
    assert Axes.of(vars(configured)) == Axes.shipped()
    assert Axes.shipped().all_to_all == tuple(ALGORITHMS)
