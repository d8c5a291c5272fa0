"""The search of every axis: equal to brute force, and every combination is accounted for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from piper_hpc.planner import Axes, benchmark, plan
from piper_hpc.planner.eager import divisors
from piper_hpc.planner.engines import Megatron
from piper_hpc.planner.search_spec import DUPLICATE, RankedLayout, SearchSpec
from piper_hpc.resource_model import analytical
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.spec import EXECUTIONS, Layout, ModelSpec, Prediction
from piper_hpc.spec.schedules import schedule_problem
from tests.full import full
from tests.planner.machines import DENSE, MOE, SMALL, WORKLOAD, cluster

MEGATRON = EXECUTIONS["megatron"]


def search_spec(
    axes: Axes = SMALL, model: ModelSpec = MOE, *, memory_bytes: int = 2**30, **options: object
) -> SearchSpec:
    where = cluster(memory_bytes=memory_bytes)
    given_options = {"ranks": (32,), "keep": 100} | options
    return SearchSpec(model, where, WORKLOAD, axes.of_model(model), **given_options)  # type: ignore[arg-type]


def every_name(asked: SearchSpec) -> Iterator[Layout]:
    """Every combination that is a layout, by the rules as they are written down, one by one."""
    axes, model, batch = asked.axes, asked.model, asked.workload.global_batch
    for ranks in asked.ranks:
        for values in product(*asdict(axes).values()):
            given_values = dict(zip(asdict(axes), values, strict=True))
            pp, ep, etp = (given_values[axis] for axis in ("pp", "ep", "etp"))
            if ranks % (pp * ep * etp):
                continue
            layout = Layout(dp=ranks // (pp * ep * etp), **given_values)
            if (ranks // pp) % (layout.tp * layout.cp) or pp * layout.vpp > model.layers:
                continue
            if model.experts % ep or batch % (layout.micro_batch * layout.dense_dp):
                continue
            if schedule_problem(layout.schedule, pp, layout.vpp, layout.micro_batches(batch)) is None:
                yield layout


def priced(asked: SearchSpec, layout: Layout) -> RankedLayout:
    step = analytical.stepper(asked.model, asked.cluster, layout, asked.workload, MEGATRON).evaluate()
    seconds, peak = float(step.step_time_s), float(step.peak_bytes)
    return RankedLayout(float(asked.score(layout.ranks, seconds, peak)), seconds, peak, layout)


def distinct(values: list[float]) -> list[float]:
    """Ascending, without those that rounding alone tells apart."""
    kept: list[float] = []
    for value in sorted(values):
        if not kept or value > kept[-1] * (1 + 1e-9):
            kept.append(value)
    return kept


@pytest.mark.slow
@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])  # one is slow enough
@given(
    st.sampled_from([MOE, DENSE]),
    st.sampled_from(["mfu", "tokens_per_s", "memory"]),
    st.sampled_from([2**24, 2**25, 2**26, 2**30]),
    st.data(),
)
def test_the_search_equals_brute_force(model: ModelSpec, rank_by: str, memory_bytes: int, data: st.DataObject) -> None:
    def some(axis: str) -> tuple:
        values = getattr(SMALL, axis)
        least = 2 if axis in ("ep", "zero", "all_to_all") else 1
        return tuple(data.draw(st.lists(st.sampled_from(values), min_size=least, max_size=2, unique=True), label=axis))

    axes = Axes(**{axis: some(axis) for axis in asdict(SMALL)})
    ranks = data.draw(st.sampled_from([(32,), (16, 32)]))
    assert_equal_to_brute_force(search_spec(axes, model, memory_bytes=memory_bytes, rank_by=rank_by, ranks=ranks))


@full
def test_a_larger_space_equals_brute_force() -> None:
    axes = replace(SMALL, cp=(1,), micro_batch=(1, 4), recompute=("none", "norm+moe"), zero=(0, 3), pp=(2, 4))
    assert_equal_to_brute_force(search_spec(axes, memory_bytes=2**25))


def assert_equal_to_brute_force(asked: SearchSpec) -> None:
    axes, memory_bytes = asked.axes, asked.cluster.memory_bytes
    found = Megatron().search(asked)
    assert found.fitting + found.pruned + sum(found.rejected.values()) == axes.size * len(asked.ranks)
    assert found.searched >= found.fitting

    # At one stage all schedules but the first are names of it, or another way to keep more.
    names = [
        layout
        for layout in every_name(asked)
        if layout.pp > 1
        or layout.schedule == next((s for s in axes.schedule if not schedule_problem(s, 1, 1, 1)), None)
    ]
    everything = [priced(asked, layout) for layout in names]
    feasible = [one for one in everything if one.peak_bytes <= memory_bytes]
    assert bool(feasible) == bool(found.best)
    assert found.fitting <= len(feasible)
    for one in found.best:
        again = priced(asked, one.layout)
        assert (one.score, one.step_time_s, one.peak_bytes) == pytest.approx(
            (again.score, again.step_time_s, again.peak_bytes), rel=1e-12
        )
        assert again.peak_bytes <= memory_bytes
    assert len(found.best) == min(asked.keep, found.fitting)
    ours = distinct([one.score for one in found.best])
    theirs = distinct([one.score for one in feasible])[: len(ours)]
    assert ours == pytest.approx(theirs, rel=1e-9)
    if found.fitting <= asked.keep:
        # Whatever is not counted is another name: some counted layout costs the same time and memory.
        for one in feasible:
            assert any(
                (two.step_time_s, two.peak_bytes) == pytest.approx((one.step_time_s, one.peak_bytes), rel=1e-9)
                for two in found.best
            ), one.layout

    def beats(two: RankedLayout, one: RankedLayout) -> bool:
        """Clearly: by more than rounding."""
        pairs = [
            (two.step_time_s, one.step_time_s),
            (two.peak_bytes, one.peak_bytes),
            (two.layout.ranks, one.layout.ranks),
        ]
        return all(a <= b * (1 + 1e-9) for a, b in pairs) and any(a < b * (1 - 1e-9) for a, b in pairs)

    assert not any(beats(two, one) for one in found.front for two in feasible)
    for one in feasible:
        assert any(beats(two, one) or two.key[1:2] == pytest.approx(one.key[1:2], rel=1e-9) for two in found.front)
    roomy = [one for one in everything if one.peak_bytes <= 1.25 * memory_bytes]
    assert (found.with_more_memory.score if found.with_more_memory else None) == (
        pytest.approx(min(one.score for one in roomy), rel=1e-9) if roomy else None
    )


def test_what_fits_no_rank_is_rejected_by_name_and_is_no_error() -> None:
    found = plan(MOE, cluster(memory_bytes=2**20), WORKLOAD, axes=SMALL, executor="megatron")
    assert found.candidates == [] and found.limits is None and found.pareto == []
    assert found.fitting == found.feasible == 0
    assert found.rejected["Eq 11: peak memory must fit the rank's memory"] == found.searched > 0


def test_reasons_say_which_rule_is_broken() -> None:
    found = Megatron().search(search_spec())
    assert found.rejected[DUPLICATE] > 0
    assert found.rejected["schedule: needs another number of chunks a rank (vpp), or more than one stage"] > 0
    assert found.rejected["Eq 9: pp * vpp must not exceed the layers"] > 0  # 4 x 2 of 6
    assert found.rejected["schedule: needs more micro-batches a step, or a multiple of pp"] > 0
    assert "Eq 7: pp must divide the ranks" not in found.rejected
    odd = Megatron().search(search_spec(replace(SMALL, pp=(3,))))
    assert odd.rejected == {"Eq 7: pp must divide the ranks": replace(SMALL, pp=(3,)).size}


def test_expert_groups_stay_in_the_domain_asked_for_and_its_price_is_told() -> None:
    anywhere = Megatron().search(search_spec(keep=10_000))
    in_node = Megatron().search(search_spec(keep=10_000, ep_domain="node"))
    rule = "Eq 10: expert groups must stay within ep_domain=node"
    assert max(one.layout.ep * one.layout.etp for one in anywhere.best) > 4
    assert {one.layout.ep * one.layout.etp > 4 for one in in_node.best} == {False}
    assert in_node.rejected[rule] > 0 and rule not in anywhere.rejected
    crossing = replace(SMALL, ep=(2, 16), etp=(1,), pp=(1,), tp=(1,))
    told = plan(MOE, cluster(), WORKLOAD, axes=crossing, executor="megatron").limits
    assert told is not None and told["eq_10"]["domain"] == "switch"
    assert told["eq_10"]["crosses"] == (told["eq_10"]["inside"] is not None)


def test_candidates_are_simulated_predicted_and_ranked() -> None:
    found = plan(MOE, cluster(), WORKLOAD, axes=SMALL, executor="megatron", candidates=5)
    assert len(found.candidates) == 5
    steps = [candidate.step_time_s for candidate in found.candidates]
    assert steps == sorted(steps)
    best = found.candidates[0]
    assert sum(best.terms.values()) == pytest.approx(best.step_time_s)
    assert best.tokens_per_s == pytest.approx(WORKLOAD.tokens / best.step_time_s)
    low, high = best.intervals["step_time_s"]
    assert low < best.step_time_s < high
    document = json.loads(json.dumps(found.document(), allow_nan=False))
    contract = {"model", "cluster", "searched", "pruned", "feasible", "seconds", "candidates", "rejected"}
    assert contract | {"pareto", "limits", "executor"} <= set(document)
    assert document["pareto"][0]["step_time_s"] <= document["pareto"][-1]["step_time_s"]


def test_shapes_have_each_degrees_once_also_where_the_candidates_are_one_layout_in_many_shades() -> None:
    found = plan(MOE, cluster(), WORKLOAD, axes=SMALL, executor="megatron", candidates=5)

    def shape(one: Prediction) -> tuple[int, ...]:
        return one.layout.pp, one.layout.ep, one.layout.tp, one.layout.cp

    shapes = [shape(one) for one in found.shapes]
    assert len(set(shapes)) == len(shapes) == 5 > len({shape(one) for one in found.candidates})
    assert found.shapes[0] == found.candidates[0]
    steps = [one.step_time_s for one in found.shapes]
    assert steps == sorted(steps)


def test_fused_layouts_leave_the_head_room_free_too() -> None:
    memory_bytes = 2**26
    kept = plan(
        MOE, cluster(memory_bytes=memory_bytes), WORKLOAD, axes=SMALL, executor="megatron", memory_headroom=0.25
    )
    less = plan(MOE, cluster(memory_bytes=3 * memory_bytes // 4), WORKLOAD, axes=SMALL, executor="megatron")
    assert kept.candidates == less.candidates != []
    assert kept.fitting == less.fitting < kept.searched
    assert kept.limits is not None and kept.limits["memory"]["available_bytes"] == memory_bytes


def test_what_limits_a_plan_is_what_lifts_it() -> None:
    """With a host a thousand times slower, the host binds; with links so slow, the links."""
    where = cluster()
    assert where.accelerator is not None
    efficiency = where.accelerator.efficiency
    slow_host = replace(where.accelerator, efficiency=replace(efficiency, launch_s=5e-3))
    told = plan(MOE, replace(where, accelerator=slow_host), WORKLOAD, axes=SMALL, executor="megatron").limits
    assert told is not None and told["binding"] == "host"
    assert 80 < told["lifts"][0]["gain_pct"] <= 100
    slow_links = {tier: replace(link, bytes_per_s=link.bytes_per_s / 1e4) for tier, link in where.links.items()}
    told = plan(MOE, replace(where, links=slow_links), WORKLOAD, axes=SMALL, executor="megatron").limits
    assert told is not None and told["binding"] in ("links between nodes", "links inside nodes", "global batch")
    tight = plan(MOE, cluster(memory_bytes=2**25), WORKLOAD, axes=SMALL, executor="megatron").limits
    assert tight is not None and tight["memory"]["headroom_bytes"] >= 0
    memory = next(lift for lift in tight["lifts"] if lift["constraint"] == "memory")
    assert memory["gain_pct"] > 0 and memory["other_layout"] is not None


def test_axes_without_meaning_for_a_model_count_once() -> None:
    alike = SMALL.of_model(DENSE)
    assert (alike.ep, alike.etp, alike.all_to_all, alike.placement) == ((1,), (1,), ("flat",), ("linear",))
    assert alike.recompute == ("none", "full", "norm+moe")
    both = replace(SMALL, recompute=("norm", "norm+mla_up", "norm+moe"))
    assert both.of_model(MOE).recompute == ("norm", "norm+moe")  # no latent attention
    assert both.of_model(DENSE).recompute == ("norm",)


@pytest.mark.parametrize(
    ("axis", "values", "words"),
    [
        ("tp", [0], "plan.axes.tp = 0: must be at least 1"),
        ("schedule", ["luck"], "must be one of gpipe, 1f1b"),
        ("recompute", ["some"], "recompute='some'"),
        ("zero", [4], "must be one of 0, 1, 2, 3"),
        ("cp", [], "needs values"),
        ("ep", [2, 2], "each of them once"),
    ],
)
def test_a_wrong_axis_is_refused_with_one_that_works(axis: str, values: list, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        Axes.of({**asdict(SMALL), axis: values})
    assert f"plan.axes.{axis}=[" in str(caught.value)


def test_an_executor_needs_what_it_is_priced_by() -> None:
    with pytest.raises(ResourceModelError, match="no accelerator is known"):
        plan(MOE, replace(cluster(), accelerator=None), WORKLOAD, executor="megatron")
    with pytest.raises(ValueError, match="must be auto or one of piper, megatron"):
        plan(MOE, cluster(), WORKLOAD, executor="other")
    assert plan(MOE, cluster(), WORKLOAD, axes=SMALL, executor="auto").executor == "megatron"


def test_shipped_axes_hold_every_divisor_that_machines_come_in() -> None:
    shipped = Axes.shipped()
    assert set(divisors(64)) <= set(shipped.pp) and set(divisors(512)) <= set(shipped.ep)
    assert shipped.size > 1e10


@pytest.mark.alone
def test_a_million_predictions_a_second() -> None:
    """The rate that `python -m piper_hpc.planner.benchmark` prints is above a million on one core by itself.

    Here other tests share caches and memory with it, so that a third is asked for, in seconds of the core itself.
    """
    measured = benchmark.measure(replace(MOE, layers=16), cluster(128), replace(WORKLOAD, global_batch=512))
    assert measured.evaluated > 500_000
    assert measured.predictions_per_s > 300_000
