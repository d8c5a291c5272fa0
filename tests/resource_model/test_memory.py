"""Memory by stage: its monotonicity, and its agreement with what the training step really keeps alive."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.comm import FlatDispatcher
from piper_hpc.model import Stage
from piper_hpc.model.names import initialise
from piper_hpc.parallel.groups import make_groups
from piper_hpc.parallel.parameters import ParameterStore
from piper_hpc.parallel.pipeline import Pipeline
from piper_hpc.profiling.clock import clock_for
from piper_hpc.profiling.memory import LiveBytes, peak_tensor_bytes
from piper_hpc.profiling.spans import Recorder
from piper_hpc.resource_model.eager.memory import memory_by_rank, peak_bytes, stage_parameters
from piper_hpc.spec import RECIPES, Layout, ModelSpec, RankMap, Workload
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.train.optimizer import Optimizer
from piper_hpc.train.settings import TrainSettings
from tests.resource_model.clusters import TINY, WIDE

WORKLOAD = Workload(global_batch=64, sequence=128)


@given(
    st.sampled_from([TINY, WIDE]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from(["micro_batch", "sequence", "hidden", "expert_ffn", "layers", "vocab", "bytes"]),
)
def test_more_of_anything_never_needs_less_memory(model: ModelSpec, pp: int, ep: int, what: str) -> None:
    layout, workload = Layout(pp=pp, ep=ep, micro_batch=2), WORKLOAD
    before = peak_bytes(model, layout, workload)
    if what == "micro_batch":
        layout = replace(layout, micro_batch=4)
    elif what == "sequence":
        workload = replace(workload, sequence=256)
    elif what == "bytes":
        workload = replace(workload, recipe=RECIPES["float64"])
    else:
        model = replace(model, **{what: 2 * getattr(model, what)})
    assert all(after >= size for size, after in zip(before, peak_bytes(model, layout, workload), strict=True))


def test_earlier_stages_keep_more_micro_batches_alive() -> None:
    deep = replace(TINY, layers=8)
    memory = memory_by_rank(deep, Layout(pp=4, micro_batch=2), WORKLOAD)
    assert all(earlier > later for earlier, later in pairwise(memory["activations"][:3]))


def test_experts_are_divided_by_ep_and_nothing_else_is() -> None:
    whole, halved = (sum(stage_parameters(TINY, Layout(ep=ep))) for ep in (1, 2))
    assert whole == TINY.parameters
    assert whole - halved == TINY.layers * TINY.experts // 2 * TINY.expert_parameters


@pytest.mark.parametrize("pp", [1, 2, 3, 4])
def test_stages_hold_every_parameter_once(pp: int) -> None:
    assert sum(stage_parameters(TINY, Layout(pp=pp))) == TINY.parameters


@pytest.mark.parametrize(
    ("model", "micro_batch", "sequence"),
    [
        (TINY, 4, 64),
        (replace(TINY, layers=2, top_k=4, expert_ffn=512, matrices_per_expert=2), 2, 128),
        (replace(TINY, layers=2, hidden=64, head_dim=16, vocab=2048, top_k=1), 4, 128),
        (replace(TINY, layers=2, experts=16, expert_ffn=512, kv_heads=4), 1, 64),
    ],
    ids=["tiny", "two matrices", "large vocabulary", "large experts"],
)
def test_peak_of_a_real_step_on_one_rank(model: ModelSpec, micro_batch: int, sequence: int) -> None:
    layout, workload = Layout(micro_batch=micro_batch), Workload(2 * micro_batch, sequence)
    measured = measured_peak(model, layout, workload)
    assert peak_bytes(model, layout, workload)[0] == pytest.approx(measured, rel=2e-3)


def measured_peak(model: ModelSpec, layout: Layout, workload: Workload) -> int:
    """Peak of live tensor bytes of the second optimizer step on one rank, without those that other tests keep."""
    with LiveBytes() as others:
        pass
    device, dtype = torch.device("cpu"), torch.float32
    recorder = Recorder(clock_for(device))
    groups = make_groups(RankMap.block(layout, 1, (0,)), timedelta(seconds=10))
    stage = Stage(
        model,
        range(model.layers),
        sequence=workload.sequence,
        aux_scale=0.01,
        dispatcher=FlatDispatcher(None),
        placement=ExpertPlacement.linear(model.experts, 1),
        recorder=recorder,
        recompute=layout.recomputed,
        device=device,
        dtype=dtype,
    )
    store = ParameterStore([stage], groups, layout, range(model.experts))
    optimizer = Optimizer(store.buckets, TrainSettings(steps=2))
    pipeline = Pipeline(
        [stage],
        model=model,
        layout=layout,
        workload=workload,
        groups=groups,
        recorder=recorder,
        device=device,
        dtype=dtype,
        on_gradients=store.start_reduction,
    )
    tokens = torch.randint(model.vocab, (workload.global_batch, workload.sequence + 1))
    initialise(stage, range(model.experts), layers=model.layers, seed=0)

    def step() -> None:
        recorder.start()
        store.zero()
        pipeline.step(tokens)
        store.finish_reduction()
        store.clip(float(store.squared_norm()) ** 0.5, 1.0)
        optimizer.step(1e-3)
        store.publish()
        recorder.finish()

    step()
    return peak_tensor_bytes(step) - others.live_bytes
