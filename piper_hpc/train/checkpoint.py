"""Checkpoints under global logical names: any layout reads what another wrote.

One key for each parameter and each of its two moments, one for each expert apart; no rank, stage or placement in any.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from piper_hpc.parallel.parameters import ParameterStore
from piper_hpc.train.optimizer import MOMENTS, Optimizer

NAME = "step-{:08d}"


@dataclass(frozen=True)
class Progress:
    """Where training stands: optimizer steps done, samples of the data order used, and the seed of both."""

    step: int
    samples: int
    seed: int


def state_tensors(store: ParameterStore, optimizer: Optimizer) -> dict[str, torch.Tensor]:
    """Master weights as `model.<name>`, Adam's moments as `optimizer.<name>.exp_avg` and `.exp_avg_sq`: live views."""
    tensors = {}
    for bucket, moments in zip(store.buckets, optimizer.moments, strict=True):
        for piece in bucket.pieces:
            tensors[f"model.{piece.name}"] = piece.of(bucket.master)
            for moment in MOMENTS:
                tensors[f"optimizer.{piece.name}.{moment}"] = piece.of(moments[moment])
    return tensors


def save(folder: Path, store: ParameterStore, optimizer: Optimizer, progress: Progress) -> Path:
    """Write `folder/step-N`, collectively; it appears under its name only when it is whole."""
    target = folder / NAME.format(progress.step)
    partial = target.with_suffix(".partial")
    state: dict[str, Any] = {**state_tensors(store, optimizer), "progress": asdict(progress)}
    if _rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        folder.mkdir(parents=True, exist_ok=True)
    _barrier()
    dcp.save(state, checkpoint_id=partial, no_dist=not dist.is_initialized())
    _barrier()
    if _rank() == 0:
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
    _barrier()
    return target


def load(path: Path, store: ParameterStore, optimizer: Optimizer) -> Progress:
    """Read a checkpoint into parameters and moments in place, collectively, whatever layout wrote it."""
    state: dict[str, Any] = {
        **state_tensors(store, optimizer),
        "progress": asdict(Progress(step=0, samples=0, seed=0)),
    }
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    progress = Progress(**state["progress"])
    store.publish()
    optimizer.steps = progress.step
    return progress


def latest(folder: Path) -> Path | None:
    """The newest whole checkpoint of a folder, or None."""
    whole = [path for path in folder.glob(NAME.format(0).replace("0" * 8, "*")) if (path / ".metadata").is_file()]
    return max((path for path in whole if not path.suffix), default=None)


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
