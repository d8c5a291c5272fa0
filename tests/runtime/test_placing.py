"""Ranks numbered by where their nodes are, and nodes whose domains are found by timing messages: on real processes."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from piper_hpc.cluster.placement import rank_order
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.runtime.group import process_group
from piper_hpc.runtime.pairs import time_pairs
from piper_hpc.runtime.rank import RankEnvironment
from piper_hpc.spec import Layout
from piper_hpc.worker import _with_measured_switches
from tests.processes import run_ranks

pytestmark = pytest.mark.processes
CPU = torch.device("cpu")


def _rank_env(task: int, tasks: int) -> RankEnvironment:
    switches = ("spine", f"rack{task % 2}")
    return RankEnvironment(task, tasks, 0, f"n{task}", switches, "7", "0", 0, "127.0.0.1", task)


def _numbered(folder: str) -> tuple[int, int, list[int], tuple[str, ...]]:
    """Rank before, rank by domain, tasks in the order of ranks, and the path that timed messages gave the node."""
    task, tasks = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    dist.destroy_process_group()
    rank_env = _rank_env(task, tasks)
    measured = _with_measured_switches(rank_env, Path(folder) / "measuring", CPU, 30.0)
    order = partial(rank_order, layout=Layout(ep=2, dp=2), cluster=ClusterConfig(name="site"))
    with process_group(rank_env, Path(folder) / "rendezvous", CPU, 30.0, order) as placed:
        assert dist.get_rank() == placed.rank and placed.task == task
        told: list[int] = [0] * tasks
        dist.all_gather_object(told, task)
    again = dist.FileStore(str(Path(folder) / "again"), tasks)  # the pool ends a group of its own
    dist.init_process_group("gloo", store=again, rank=task, world_size=tasks, timeout=timedelta(seconds=30))
    return task, placed.rank, told, measured.switches


def test_ranks_of_one_rack_are_adjacent_in_the_group(tmp_path: Path) -> None:
    found = run_ranks(4, _numbered, str(tmp_path))
    assert [rank for _, rank, _, _ in found] == [0, 2, 1, 3]
    assert all(told == [0, 2, 1, 3] for _, _, told, _ in found)
    # Processes of one machine may be told apart by noise, but every rank was given a path of some domain.
    assert all(path[-1].startswith("domain") for _, _, _, path in found)


def _timed(nodes: list[str]) -> np.ndarray:
    return time_pairs(nodes, CPU)


def test_every_rank_learns_the_time_between_every_two_nodes() -> None:
    first, *others = run_ranks(4, _timed, ["a", "a", "b", "c"])
    assert first.shape == (3, 3) and np.array_equal(first, first.T)
    assert (first[~np.eye(3, dtype=bool)] > 0).all() and (np.diag(first) == 0).all()
    assert all(np.array_equal(first, other) for other in others)
