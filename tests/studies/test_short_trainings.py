"""Trainings that follow one another in the same processes: what each leaves behind."""

from __future__ import annotations

import gc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from piper_hpc.spec import TERMS, Layout, ModelSpec, RankMap, Workload
from piper_hpc.studies.training import Training, cpu_terms, train
from piper_hpc.tasks.context import Context
from piper_hpc.train.trainer import Trainer
from tests.processes import run_ranks

MODEL = ModelSpec(
    "tiny", layers=2, hidden=16, heads=2, kv_heads=2, head_dim=8, experts=4, top_k=2, expert_ffn=16, vocab=256
)


def _trained(corpus: Path) -> tuple[dict[str, Any] | None, dict[str, float] | None, int]:
    """Two trainings without the garbage collector's own rounds: their rows, and the trainers that are alive after."""
    context = SimpleNamespace(
        experiment=SimpleNamespace(cluster=SimpleNamespace(comm_timeout_s=30.0)),
        rank_map=lambda layout: RankMap.block(layout, layout.ranks, (0,)),
        rank_env=SimpleNamespace(rank=dist.get_rank()),
        device=torch.device("cpu"),
    )
    training = Training(MODEL, Layout(ep=2, micro_batch=2), Workload(global_batch=8, sequence=8))
    gc.disable()
    try:
        row = train(cast(Context, context), training, corpus)
        cpu_s = cpu_terms(cast(Context, context), training, corpus)
        return row, cpu_s, sum(isinstance(each, Trainer) for each in gc.get_objects())
    finally:
        gc.enable()


@pytest.mark.processes
def test_a_training_leaves_no_trainer_behind_and_the_first_rank_has_its_rows(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_bytes(bytes(range(256)) * 64)
    first, second = run_ranks(2, _trained, tmp_path / "corpus")
    row, cpu_s, _ = first
    assert [alive for _, _, alive in (first, second)] == [0, 0]
    assert row is not None and row["step_time_s"] > 0 and cpu_s is not None and set(cpu_s) == set(TERMS)
    assert cpu_s["expert_s"] > 0 and second[:2] == (None, None)
