"""A grid of layouts says of each what the same formulas say of that layout alone."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.planner.grid import degrees
from piper_hpc.resource_model import analytical
from piper_hpc.spec import EXECUTIONS, RECIPES, Layout, ModelSpec, Routing, Workload
from piper_hpc.spec.schedules import SCHEDULES, schedule_problem
from tests.planner.machines import DENSE, MOE, SMALL, WORKLOAD, cluster

MLA = replace(
    MOE,
    name="mla",
    attention="mla",
    kv_heads=8,
    head_dim=48,
    q_lora_rank=64,
    kv_lora_rank=32,
    qk_nope_dim=32,
    qk_rope_dim=16,
    v_head_dim=32,
    mtp_layers=1,
)
ROUTINGS = [Routing(), Routing(imbalance=1.5), Routing("drop", capacity_factor=1.25)]
EXACT = 1e-12


def subsets(values: tuple) -> st.SearchStrategy[tuple]:
    return st.lists(st.sampled_from(values), min_size=1, max_size=3, unique=True).map(tuple)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_grid_and_single_layouts_agree_on_every_term_and_every_stages_memory(data: st.DataObject) -> None:
    draw = data.draw
    model: ModelSpec = draw(st.sampled_from([MOE, DENSE, MLA]))
    execution = EXECUTIONS[draw(st.sampled_from(sorted(set(EXECUTIONS) - {"piper"})))]
    workload = Workload(
        64, 512, RECIPES[draw(st.sampled_from(["mixed_18", "float32"]))], draw(st.sampled_from(ROUTINGS))
    )
    axes = replace(
        SMALL,
        ep=draw(subsets(SMALL.ep)),
        etp=draw(subsets(SMALL.etp)),
        tp=draw(subsets((1, 2, 4))),
        cp=draw(subsets((1, 2, 4))),
        zero=draw(subsets((0, 1, 2, 3))),
        micro_batch=draw(subsets((1, 2, 4))),
        recompute=draw(subsets(("none", "full", "attention", "norm+moe", "activation+mla_up"))),
    ).of_model(model)
    pp = draw(st.sampled_from([1, 2, 4]))
    vpp, schedule = draw(
        st.sampled_from([(v, s) for v in (1, 2) for s in SCHEDULES if not schedule_problem(s, pp, v, 4 * pp)])
    )
    if pp * vpp > model.layers:
        return
    where = cluster()
    grid, _ = degrees(model, workload, where.ranks, pp, axes)
    if not grid.shape[2]:
        return
    placement = draw(st.sampled_from(axes.placement))
    algorithm = draw(st.sampled_from([*axes.all_to_all, "auto"]))
    grid = grid.at(vpp=vpp, schedule=schedule, all_to_all=algorithm, placement=placement)
    together = analytical.stepper(model, where, grid, workload, execution).evaluate()
    size = int(np.prod(grid.shape))
    for index in draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=4)):
        layout = grid.layout(index)
        alone = analytical.stepper(model, where, layout, workload, execution).evaluate()

        def of_grid(value: object, index: int = index) -> float:
            return float(np.broadcast_to(np.asarray(value), grid.shape).ravel()[index])

        assert together.terms.keys() == alone.terms.keys()
        step_s = pytest.approx(alone.step_time_s, rel=EXACT)
        assert of_grid(together.step_time_s) == step_s
        for term, seconds in alone.terms.items():
            # A difference of large numbers, as the bubble may be, is exact to the step's last digits.
            near = pytest.approx(seconds, rel=EXACT, abs=EXACT * alone.step_time_s)
            assert of_grid(together.terms[term]) == near, term
        for kind, stages in alone.memory.items():
            assert [of_grid(size) for size in together.memory[kind]] == pytest.approx(stages, rel=EXACT), kind
        for term, seconds in alone.hidden.items():
            assert of_grid(together.hidden[term]) == pytest.approx(seconds, rel=EXACT, abs=EXACT * alone.step_time_s)


def test_every_combination_is_a_layout_or_breaks_a_rule() -> None:
    grid, broken = degrees(MOE, WORKLOAD, 32, 2, SMALL)
    columns = len(SMALL.micro_batch) * len(SMALL.tp) * len(SMALL.cp) * len(SMALL.ep) * len(SMALL.etp)
    assert grid.shape[2] + sum(broken.values()) == columns
    assert broken["batch: micro_batch * data-parallel ranks must divide the global batch"] > 0  # 3 of 64
    assert broken["Eq 7: ep * etp and tp * cp must divide the ranks of a stage"] > 0  # 16 x 2 of 16
    for index in range(grid.shape[2]):
        layout = grid.layout(index)
        assert layout.ranks == 32
        assert layout.pp * layout.tp * layout.cp * layout.dense_dp == 32
        assert layout.micro_batch * layout.dense_dp * layout.micro_batches(64) == 64


def test_an_index_names_the_layout_whose_values_stand_there() -> None:
    grid, _ = degrees(MOE, WORKLOAD, 32, 2, SMALL)
    named = {tuple(asdict(grid.layout(index)).values()) for index in range(int(np.prod(grid.shape)))}
    assert len(named) == int(np.prod(grid.shape))
    z, r, v = 1, 2, grid.shape[2] - 1
    layout = grid.layout(int(np.ravel_multi_index((z, r, v), grid.shape)))
    assert (layout.zero, layout.recompute, layout.ep) == (SMALL.zero[z], SMALL.recompute[r], grid.ep[v])
    assert isinstance(layout, Layout)
