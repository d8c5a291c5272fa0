"""Groups and pipeline stages: what they refuse, and that the first step runs no more than the others."""

from __future__ import annotations

from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.pipelining import schedules

from piper_hpc.model import Stage
from piper_hpc.parallel.groups import make_groups
from piper_hpc.parallel.messages import instrumented_schedule
from piper_hpc.profiling.clock import CpuClock
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec import Layout, ModelSpec, RankMap, Workload
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.trainer import Trainer
from tests.processes import run_ranks

MODEL = ModelSpec(
    "m", layers=3, hidden=16, heads=2, kv_heads=2, head_dim=8, experts=4, top_k=1, expert_ffn=16, vocab=16
)
SHORT = timedelta(seconds=30)


class Tokens:
    def batch(self, first_sample: int) -> torch.Tensor:
        return torch.zeros(8, 5, dtype=torch.int64)


def forwards(steps: int) -> list[int]:
    """Forward calls of this rank's stage in each step, at three stages and eight micro-batches."""
    layout = Layout(pp=3)
    rank_map, calls = RankMap.block(layout, 3, (0,)), []
    settings = TrainSettings(steps=steps, collective_timeout_s=30.0)
    trainer = Trainer(MODEL, layout, Workload(8, 4), settings, rank_map=rank_map, device=torch.device("cpu"))
    for _ in range(steps):
        with patch.object(Stage, "forward", autospec=True, side_effect=Stage.forward) as forward:
            trainer.step(Tokens(), 0, 1e-3, sample_memory=False)
        calls.append(forward.call_count)
    return calls


def members() -> dict[str, list[int]]:
    """The global ranks of each group of this rank at PP2 x DP2 x EP2."""
    groups = make_groups(RankMap.block(Layout(pp=2, ep=2, dp=2), 8, (0,)), SHORT)
    named = {name: getattr(groups, name) for name in ("expert", "replica", "stage", "pipeline", "world")}
    return {name: dist.get_process_group_ranks(group) for name, group in named.items()}


def wrong_size() -> str:
    with pytest.raises(ValueError) as error:
        make_groups(RankMap.block(Layout(ep=4), 4, (0,)), SHORT)
    return str(error.value)


@pytest.mark.processes
def test_first_step_runs_each_micro_batch_once() -> None:
    assert run_ranks(3, forwards, 2) == [[8, 8]] * 3


@pytest.mark.processes
def test_groups_follow_the_rank_map() -> None:
    ranks = run_ranks(8, members)
    assert ranks[5] == {
        "expert": [4, 5],
        "replica": [5, 7],
        "stage": [4, 5, 6, 7],
        "pipeline": [1, 5],
        "world": list(range(8)),
    }
    assert all(rank in group for rank, groups in enumerate(ranks) for group in groups.values())


@pytest.mark.processes
def test_job_of_another_size_is_refused() -> None:
    message = "the layout pp1-ep4-dp1-mb1-1f1b needs 4 ranks, the job has 2"
    assert run_ranks(2, wrong_size) == [message, message]


def test_torch_without_the_watched_functions_is_named() -> None:
    with patch.object(schedules, "_wait_batch_p2p"):
        del schedules._wait_batch_p2p
        with (
            pytest.raises(RuntimeError, match="messages between stages cannot be timed"),
            instrumented_schedule(Recorder(CpuClock())),
        ):
            pass
