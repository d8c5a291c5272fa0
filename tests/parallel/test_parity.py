"""Every layout computes what one process computes: loss, all gradients, and the losses of five optimizer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from piper_hpc.comm.channel import GroupChannel
from piper_hpc.model.names import logical_tensors
from piper_hpc.spec import Layout, ModelSpec, RankMap, RankPlace, Workload
from piper_hpc.train.data import ByteDataset
from piper_hpc.train.metrics import tokens_by_group
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.trainer import Trainer
from tests.full import full
from tests.parallel.matrix import AXES, RANKS, Cell, every_cell, pairwise_cover
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
DEEP = ModelSpec(
    "deep", layers=5, hidden=32, heads=4, kv_heads=2, head_dim=8, experts=8, top_k=2, expert_ffn=48, vocab=64,
    router_aux_coef=0.1,
)  # fmt: skip
WORKLOAD = Workload(global_batch=16, sequence=12)
BFLOAT16_LOSS = 5e-3
"""Relative distance of a bf16 run's losses, with float32 masters, from those of a float32 run, over CELL_STEPS."""
STEPS = 5
CELL_STEPS = 2
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

    gradients: by logical name, of a rank by name and first row of what it reduced; exchanges: all-to-alls of rows in
    the first step; routed: [layers][experts] choices of all ranks in the last step.
    """

    losses: list[float]
    aux_losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    gradients: dict[Any, torch.Tensor]
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


def train_rank(
    model: ModelSpec, layout: Layout, data: ByteDataset, dtype: str, steps: int, rank_map: RankMap | None = None
) -> Outcome:
    rank_map = rank_map or RankMap.block(layout, layout.ranks, (0,))
    trainer = Trainer(model, layout, WORKLOAD, settings(dtype), rank_map=rank_map, device=torch.device("cpu"))
    named = [each for chunk in trainer.chunks for each in chunk.named_parameters()]
    outcome = Outcome([], [], [], copies(named, trainer.store.experts), {})
    for step in range(steps):
        rate = settings(dtype).learning_rate * min(1.0, (step + 1) / 2)
        posted = GroupChannel.all_to_all
        with patch.object(GroupChannel, "all_to_all", autospec=True, side_effect=posted) as exchanges:
            trainer.step(data, step * WORKLOAD.global_batch, rate, sample_memory=False)
        if step == 0:
            outcome.exchanges = sum(call.args[2].is_floating_point() for call in exchanges.call_args_list)
            outcome.gradients = {
                (piece.name, piece.start): piece.of(bucket.reduced).clone()
                for bucket in trainer.store.buckets
                for piece in bucket.pieces
            }
        records = trainer.record()
        if records is not None:
            outcome.losses.append(float(records.ranks["loss"].sum()))
            outcome.aux_losses.append(float(records.ranks["aux_loss"].sum()))
            outcome.norms.append(float(records.ranks["grad_norm"][0]))
            outcome.routed = tokens_by_group(records, layout).sum(axis=0).tolist()
    return outcome


def copies(named: list[tuple[str, torch.Tensor]], experts: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in logical_tensors(named, experts)}


def merged(parts: list[dict[Any, torch.Tensor]]) -> dict[Any, torch.Tensor]:
    """One dictionary from all ranks; a name on several ranks must hold the same bits on each."""
    whole: dict[Any, torch.Tensor] = {}
    for part in parts:
        for name, tensor in part.items():
            assert torch.equal(whole.setdefault(name, tensor), tensor), f"{name} differs between replicas"
    return whole


def joined(pieces: dict[tuple[str, int], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by name from their pieces by (name, first row), which follow one another without a gap."""
    rows: dict[str, list[torch.Tensor]] = {}
    for (name, start), piece in sorted(pieces.items(), key=lambda each: each[0]):
        assert start == sum(len(each) for each in rows.setdefault(name, []))
        rows[name].append(piece)
    return {name: torch.cat(of_name) for name, of_name in rows.items()}


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
    weights = copies(list(trainer.chunks[0].named_parameters()), trainer.store.experts)
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
    weights, found = merged([each.weights for each in ranks]), joined(merged([each.gradients for each in ranks]))
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


def train_cells(cells: Sequence[Cell], path: Path) -> list[dict[str, Outcome]]:
    """On one rank: every cell in turn, each with groups, weights and an optimizer of its own."""
    found = []
    for cell in cells:
        data = dataset(path, cell.layout, dist.get_rank())
        steps = {"bfloat16": {"bfloat16": CELL_STEPS}, "float32": {"float64": 1, "float32": CELL_STEPS}}[cell.dtype]
        found.append(
            {dtype: train_rank(DEEP, cell.layout, data, dtype, count, cell.rank_map) for dtype, count in steps.items()}
        )
    return found


def check_cell(cell: Cell, ranks: list[dict[str, Outcome]], corpus: Path) -> None:
    """Losses, norms and clipped gradients of one cell against one process; rows sent, and choices counted once."""
    if cell.dtype == "bfloat16":
        expected = reference(DEEP, corpus, "float32", CELL_STEPS)
        assert ranks[0]["bfloat16"].losses == pytest.approx(expected.losses, rel=BFLOAT16_LOSS)
        outcomes = [each["bfloat16"] for each in ranks]
    else:
        for dtype, gradients, losses in (("float64", 1e-10, 1e-10), ("float32", 1e-5, 1e-4)):
            expected = reference(DEEP, corpus, dtype, 1 if dtype == "float64" else CELL_STEPS)
            compare([each[dtype] for each in ranks], expected, gradients=gradients, losses=losses)
        outcomes = [each["float32"] for each in ranks]
    if cell.all_to_all == "flat":
        layers = [len(of_stage) for of_stage in cell.layout.layers_by_stage(DEEP.layers)]
        held = [sum(layers[stage] for stage in place.stages) for place in cell.rank_map.places]
        per_layer = 6 if cell.recompute == "full" else 4
        micro_batches = cell.layout.micro_batches(WORKLOAD.global_batch)
        assert [each.exchanges for each in outcomes] == [per_layer * count * micro_batches for count in held]
    assert [sum(layer) for layer in outcomes[0].routed] == [WORKLOAD.tokens * DEEP.top_k] * DEEP.layers


def groups_of(cells: Sequence[Cell], size: int) -> list[list[Cell]]:
    return [list(cells[first : first + size]) for first in range(0, len(cells), size)]


COVER = pairwise_cover(every_cell())
REST = [cell for cell in every_cell() if cell not in COVER]


@pytest.mark.processes
@pytest.mark.parametrize(
    "cells",
    [
        *groups_of(COVER, 5),
        *(pytest.param(cells, marks=full) for cells in groups_of(REST, 10)),
    ],
    ids=lambda cells: f"{cells[0].name}-and-{len(cells) - 1}",
)
def test_every_combination_matches_one_process(cells: list[Cell], corpus: Path) -> None:
    by_rank = run_ranks(RANKS, train_cells, cells, corpus)
    for index, cell in enumerate(cells):
        try:
            check_cell(cell, [of_rank[index] for of_rank in by_rank], corpus)
        except AssertionError as error:
            raise AssertionError(f"{cell.name}: {error}") from error


def test_the_cover_is_small_and_whole() -> None:
    assert len(COVER) <= 40
    for axis, values in enumerate(AXES):
        assert {list(vars(cell).values())[axis] for cell in COVER} == set(values)


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
    pieces = {(name, 0): gradient for name, gradient in wrong.items()}
    found = Outcome(expected.losses, expected.aux_losses, expected.norms, expected.weights, pieces)
    with pytest.raises(AssertionError, match=r"layers\.1\.experts\.2\.w3"):
        compare([found], expected, gradients=1e-5, losses=1e-4)
