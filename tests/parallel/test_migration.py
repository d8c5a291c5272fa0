"""Moved experts take all their state along, and training goes on bit for bit as if they had stayed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.parallel import migration
from piper_hpc.spec import ExpertPlacement, Layout, ModelSpec, RankMap
from piper_hpc.spec.expert_placement import moves_between
from piper_hpc.train.checkpoint.state import held
from piper_hpc.train.trainer import Trainer
from tests.full import full
from tests.parallel.test_parity import WORKLOAD, dataset, settings
from tests.processes import run_ranks

MODEL = ModelSpec(
    "tiny", layers=3, hidden=32, heads=4, kv_heads=2, head_dim=8, experts=16, top_k=3, expert_ffn=64, vocab=64,
    router_aux_coef=0.1,
)  # fmt: skip
STEPS = 6
RANKS_PER_NODE = 2


@dataclass
class Trained:
    """What one rank ends with: losses and norms by step, all state by logical name and first row, rows of experts
    moved."""

    losses: list[float]
    norms: list[float]
    state: dict[tuple[str, int], torch.Tensor]
    moved: int


@st.composite
def placements(draw: st.DrawFn) -> tuple[ExpertPlacement, list[int]]:
    ranks, slots = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    first, then = (draw(st.permutations(range(ranks * slots))) for _ in range(2))
    before = ExpertPlacement(2, tuple(at // slots for at in first), tuple(at % slots for at in first))
    return before, [at // slots for at in then]


@given(placements())
def test_who_stays_on_a_rank_keeps_its_slot(drawn: tuple[ExpertPlacement, list[int]]) -> None:
    before, ranks = drawn
    after = before.moved(ranks)  # which checks that every slot is taken once
    assert after.version == 3 and list(after.rank_of_expert) == ranks
    moves = moves_between(before, after)
    assert all(move.source != move.target for move in moves)
    assert len(moves) == sum(old != new for old, new in zip(before.rank_of_expert, ranks, strict=True))


def test_a_placement_with_unequal_ranks_is_refused() -> None:
    with pytest.raises(ValueError, match="exactly once"):
        ExpertPlacement.linear(4, 2).moved([0, 0, 0, 1])


def shuffled(placement: ExpertPlacement, ranks_per_domain: int, generator: random.Random) -> ExpertPlacement:
    """Experts at random on the ranks of the domain that they are in: adjacent ranks, as many as said."""
    ranks = list(placement.rank_of_expert)
    for domain in {rank // ranks_per_domain for rank in ranks}:
        inside = [expert for expert, rank in enumerate(ranks) if rank // ranks_per_domain == domain]
        for expert, rank in zip(inside, generator.sample([ranks[e] for e in inside], len(inside)), strict=True):
            ranks[expert] = rank
    return placement.moved(ranks)


def train(
    layout: Layout, path: Path, dtype: str, domain: int, forced: bool, staging_bytes: int, steps: int = STEPS
) -> Trained:
    """On one rank: some steps, and between some of them, if `forced`, every expert somewhere else in its domain."""
    nodes = layout.ranks // RANKS_PER_NODE
    rank_map = RankMap.block(layout, RANKS_PER_NODE, (0,) * nodes)
    placed = [ExpertPlacement.linear(MODEL.experts, layout.ep)] * MODEL.layers
    trainer = Trainer(
        MODEL, layout, WORKLOAD, settings(dtype), rank_map=rank_map, device=torch.device("cpu"), placements=placed
    )
    data, generator = dataset(path, layout, dist.get_rank()), random.Random(5)
    migration.STAGING_BYTES = staging_bytes
    losses, norms, moved = [], [], 0
    for step in range(steps):
        vote = trainer.step(data, step * WORKLOAD.global_batch, 0.01, sample_memory=False)
        records = trainer.record()
        if records is not None:
            losses.append(float(records.ranks["loss"].sum()))
        norms.append(vote.grad_norm)
        assert vote.grad_norm > 0.3, "the clip must bite to be tested"
        if forced and generator.random() < 0.7:
            after = [shuffled(each, domain, generator) for each in trainer.placements]
            moved += sum(len(moves_between(a, b)) for a, b in zip(trainer.placements, after, strict=True))
            trainer.migrate(after)
    state = {(part.name, part.start): part.values.clone() for part in held(trainer.store, trainer.optimizer)}
    return Trained(losses, norms, state, moved)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "bytes.bin"
    np.random.default_rng(1).integers(0, MODEL.vocab, 4000, dtype=np.uint8).tofile(path)
    return path


def whole(ranks: Sequence[Trained]) -> dict[tuple[str, int], torch.Tensor]:
    """All ranks' state; what several hold must be the same bits."""
    found: dict[tuple[str, int], torch.Tensor] = {}
    for rank in ranks:
        for key, values in rank.state.items():
            assert torch.equal(found.setdefault(key, values), values), f"{key} differs between replicas"
    return found


CASES = [
    ("flat", Layout(ep=4, micro_batch=2), "float32", 4, 2**20),
    ("halo", Layout(pp=2, ep=4, micro_batch=2, schedule="zb_h1"), "bfloat16", 4, 200),
    ("halo_dedup", Layout(ep=4, dp=2, micro_batch=1, zero=1), "bfloat16", 2, 1000),
    ("flat", Layout(ep=2, dp=4, micro_batch=1, zero=0), "float32", 2, 2**20),
    ("flat", Layout(ep=2, dp=4, micro_batch=1, zero=1), "float32", 2, 2**20),
]
MORE = [
    (algorithm, Layout(pp=2, ep=4, micro_batch=2, recompute=recompute), dtype, domain, 4096)
    for algorithm, domain in (("flat", 4), ("halo", 4), ("halo_dedup", 2), ("flat_dedup", 1))
    for recompute in ("none", "full")
    for dtype in ("float32", "bfloat16", "float64")
]


@pytest.mark.processes
@pytest.mark.parametrize(
    ("algorithm", "layout", "dtype", "domain", "staging_bytes"),
    [*CASES, *(pytest.param(*case, marks=full) for case in MORE)],
)
def test_training_with_moving_experts_ends_bit_for_bit_as_without(
    algorithm: str, layout: Layout, dtype: str, domain: int, staging_bytes: int, corpus: Path
) -> None:
    layout = replace(layout, all_to_all=algorithm)
    stayed, moved = (
        run_ranks(layout.ranks, train, layout, corpus, dtype, domain, forced, staging_bytes) for forced in (False, True)
    )
    assert moved[0].moved > MODEL.experts or domain == 1
    assert moved[0].losses == stayed[0].losses and moved[0].norms == stayed[0].norms
    here, there = whole(stayed), whole(moved)
    assert here.keys() == there.keys()
    assert [key for key in here if not torch.equal(here[key], there[key])] == []


@pytest.mark.processes
def test_across_nodes_deduplicated_sums_differ_by_rounding_alone(corpus: Path) -> None:
    """In another order: 1e-10 in float64."""
    layout = Layout(ep=4, micro_batch=2, all_to_all="halo_dedup")
    stayed, moved = (run_ranks(4, train, layout, corpus, "float64", 4, forced, 2**20) for forced in (False, True))
    here, there = whole(stayed), whole(moved)
    assert moved[0].moved > MODEL.experts and moved[0].losses == pytest.approx(stayed[0].losses, rel=1e-10)
    errors = [float((here[key] - there[key]).norm() / here[key].norm()) for key in here if here[key].any()]
    assert 0 < max(errors) < 1e-10
