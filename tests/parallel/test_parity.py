"""Every layout computes what one process computes: loss, all gradients, and the losses of five optimizer steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from piper_hpc.comm import autograd
from piper_hpc.model.names import logical_tensors
from piper_hpc.spec import Layout, ModelSpec, RankMap, RankPlace, Workload
from piper_hpc.train.data import ByteDataset
from piper_hpc.train.loop import Trainer
from piper_hpc.train.metrics import tokens_by_group
from piper_hpc.train.settings import TrainSettings
from tests.parallel.reference import Reference
from tests.processes import run_ranks

MODEL = ModelSpec(
    "tiny", layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, experts=4, top_k=2, expert_ffn=48, vocab=64,
    router_aux_coef=0.1,
)  # fmt: skip
UNGATED = ModelSpec(
    "ungated", layers=2, hidden=16, heads=2, kv_heads=2, head_dim=8, experts=4, top_k=1, expert_ffn=32, vocab=64,
    matrices_per_expert=2,
)  # fmt: skip
WORKLOAD = Workload(global_batch=16, sequence=12)
STEPS = 5
LAYOUTS = [
    Layout(pp=1, ep=1, micro_batch=4),
    Layout(pp=2, ep=1, micro_batch=2),
    Layout(pp=1, ep=2, micro_batch=2),
    Layout(pp=2, ep=2, micro_batch=2),
    Layout(pp=1, ep=2, dp=2, micro_batch=2),
    Layout(pp=2, ep=2, dp=2, micro_batch=1),
]


@dataclass
class Outcome:
    """What one rank, or the reference, found: losses and norms by step, first weights and first clipped gradients.

    exchanges: all-to-alls of rows in the first step; routed: [layers][experts] choices of all ranks in the last step.
    """

    losses: list[float]
    aux_losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    gradients: dict[str, torch.Tensor]
    exchanges: int = 0
    routed: list[list[int]] = field(default_factory=list)


def settings(dtype: str) -> TrainSettings:
    """A clip that bites (norms are near 1) and a rate at which five steps change the loss."""
    return TrainSettings(
        steps=STEPS, learning_rate=0.01, schedule="constant", warmup_steps=2, grad_clip=0.3, dtype=dtype,
        collective_timeout_s=30.0,
    )  # fmt: skip


def placed(layout: Layout) -> tuple[RankPlace, ...]:
    return RankMap.block(layout, layout.ranks, (0,)).places


def dataset(path: Path, layout: Layout, rank: int) -> ByteDataset:
    return ByteDataset(
        path,
        sequence=WORKLOAD.sequence,
        global_batch=WORKLOAD.global_batch,
        dense_dp=layout.dense_dp,
        place=placed(layout)[rank],
        ep=layout.ep,
        seed=5,
    )


def train_ranks(model: ModelSpec, layout: Layout, path: Path, steps: dict[str, int]) -> dict[str, Outcome]:
    """On one rank: `steps` optimizer steps for each dtype."""
    data = dataset(path, layout, dist.get_rank())
    return {dtype: train_rank(model, layout, data, dtype, count) for dtype, count in steps.items()}


def train_rank(model: ModelSpec, layout: Layout, data: ByteDataset, dtype: str, steps: int) -> Outcome:
    rank_map = RankMap.block(layout, layout.ranks, (0,))
    trainer = Trainer(model, layout, WORKLOAD, settings(dtype), rank_map=rank_map, device=torch.device("cpu"))
    named = list(trainer.stage.named_parameters())
    outcome = Outcome([], [], [], copies(named, trainer.experts), {})
    for step in range(steps):
        rate = settings(dtype).learning_rate * min(1.0, (step + 1) / 2)
        with patch.object(autograd, "all_to_all", side_effect=autograd.all_to_all) as exchanges:
            trainer.step(data, step * WORKLOAD.global_batch, rate, sample_memory=False)
        if step == 0:
            outcome.exchanges = exchanges.call_count
            outcome.gradients = copies([(name, each.grad) for name, each in named], trainer.experts)
        records = trainer.record()
        if records is not None:
            outcome.losses.append(float(records.ranks["loss"].sum()))
            outcome.aux_losses.append(float(records.ranks["aux_loss"].sum()))
            outcome.norms.append(float(records.ranks["grad_norm"][0]))
            outcome.routed = tokens_by_group(records, layout).sum(axis=0).tolist()
    return outcome


def copies(named: list[tuple[str, torch.Tensor]], experts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in logical_tensors(named, experts)}


def merged(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """One dictionary from all ranks; a name on several ranks must hold the same bits on each."""
    whole: dict[str, torch.Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), f"{name} differs between replicas"
    return whole


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "bytes.bin"
    np.random.default_rng(1).integers(0, MODEL.vocab, 4000, dtype=np.uint8).tofile(path)
    return path


@lru_cache
def reference(model: ModelSpec, path: Path, dtype: str, steps: int) -> Outcome:
    """Trains from the weights that one rank of PP1 x EP1 starts from."""
    single = Layout(micro_batch=WORKLOAD.global_batch)
    trainer = Trainer(
        model, single, WORKLOAD, settings(dtype), rank_map=RankMap.block(single, 1, (0,)), device=torch.device("cpu")
    )
    weights = copies(list(trainer.stage.named_parameters()), trainer.experts)
    outcome = Outcome([], [], [], weights, {})
    learner = Reference(model, {name: each.clone().requires_grad_() for name, each in weights.items()})
    chosen, data = settings(dtype), dataset(path, single, 0)
    for step in range(steps):
        loss, aux_loss, gradients = learner.gradients(data.batch(step * WORKLOAD.global_batch))
        norm = sum(float((each.double() ** 2).sum()) for each in gradients.values()) ** 0.5
        assert norm > chosen.grad_clip, "the clip must bite to be tested"
        if step == 0:
            outcome.gradients = {name: each * (chosen.grad_clip / (norm + 1e-6)) for name, each in gradients.items()}
        outcome.losses.append(loss)
        outcome.aux_losses.append(aux_loss)
        outcome.norms.append(norm)
        learner.step(
            gradients,
            rate=chosen.learning_rate * min(1.0, (step + 1) / 2),
            clip=chosen.grad_clip,
            decay=chosen.weight_decay,
            betas=(chosen.beta1, chosen.beta2),
        )
    return outcome


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def compare(ranks: list[Outcome], expected: Outcome, *, gradients: float, losses: float) -> None:
    """Equal bits at the start; gradients and losses within the relative tolerances."""
    weights, found = merged([each.weights for each in ranks]), merged([each.gradients for each in ranks])
    assert weights.keys() == found.keys() == expected.gradients.keys()
    assert all(torch.equal(weights[name], expected.weights[name]) for name in weights)
    errors = {name: relative(found[name], expected.gradients[name]) for name in found}
    worst = max(errors, key=lambda name: errors[name])
    assert errors[worst] < gradients, f"gradient of {worst} is off by {errors[worst]:.2e}"
    assert ranks[0].losses == pytest.approx(expected.losses, rel=losses)
    assert ranks[0].aux_losses == pytest.approx(expected.aux_losses, rel=losses)
    assert ranks[0].norms == pytest.approx(expected.norms, rel=10 * losses)


@pytest.mark.processes
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name())
def test_layout_matches_one_process(layout: Layout, corpus: Path) -> None:
    steps = {"float64": 1, "float32": STEPS}
    ranks = run_ranks(layout.ranks, train_ranks, MODEL, layout, corpus, steps)
    for dtype, gradients, losses in (("float64", 1e-10, 1e-10), ("float32", 1e-5, 1e-4)):
        expected = reference(MODEL, corpus, dtype, steps[dtype])
        compare([each[dtype] for each in ranks], expected, gradients=gradients, losses=losses)
    micro_batches = layout.micro_batches(WORKLOAD.global_batch)
    layers = [len(layout.layers_by_stage(MODEL.layers)[place.pipeline_rank]) for place in placed(layout)]
    expected_exchanges = [4 * count * micro_batches if layout.ep > 1 else 0 for count in layers]
    assert [each["float32"].exchanges for each in ranks] == expected_exchanges
    routed = ranks[0]["float64"].routed
    assert [sum(layer) for layer in routed] == [WORKLOAD.tokens * MODEL.top_k] * MODEL.layers


@pytest.mark.processes
def test_ungated_top_1_experts_match_one_process(corpus: Path) -> None:
    layout, steps = Layout(pp=2, ep=2, micro_batch=2), {"float64": 1}
    ranks = run_ranks(layout.ranks, train_ranks, UNGATED, layout, corpus, steps)
    expected = reference(UNGATED, corpus, "float64", 1)
    compare([each["float64"] for each in ranks], expected, gradients=1e-10, losses=1e-10)


def test_reference_notices_a_wrong_gradient(corpus: Path) -> None:
    """The comparison itself can fail: one expert's gradient off by 1e-4."""
    expected = reference(MODEL, corpus, "float64", 1)
    wrong = dict(expected.gradients)
    wrong["layers.1.experts.2.w3"] = wrong["layers.1.experts.2.w3"] * 1.0001
    found = Outcome(expected.losses, expected.aux_losses, expected.norms, expected.weights, wrong)
    with pytest.raises(AssertionError, match=r"layers\.1\.experts\.2\.w3"):
        compare([found], expected, gradients=1e-5, losses=1e-4)
