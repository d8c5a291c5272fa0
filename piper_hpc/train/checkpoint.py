"""Checkpoints under global logical names: any layout reads what another wrote.

One key for each parameter and each of its two moments, one for each expert apart; no rank, stage or placement in any.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn

from piper_hpc.model.names import logical_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
NAME = "step-{:08d}"


@dataclass(frozen=True)
class Progress:
    """Where training stands: optimizer steps done, samples of the data order used, and the seed of both."""

    step: int
    samples: int
    seed: int


def state_tensors(stage: nn.Module, optimizer: torch.optim.AdamW, experts: Sequence[int]) -> dict[str, torch.Tensor]:
    """Parameters as `model.<name>`, Adam's moments as `optimizer.<name>.exp_avg` and `.exp_avg_sq`.

    Views of the live tensors, each with the shape of its parameter; a stack of experts [experts_per_rank, in, out]
    gives one [in, out] an expert. experts: the rank's logical experts in the order of the stack.
    """
    parameters = dict(stage.named_parameters())
    tensors = {f"model.{name}": part.detach() for name, part in logical_tensors(parameters.items(), experts)}
    for moment in MOMENTS:
        held = ((name, optimizer.state[parameter][moment]) for name, parameter in parameters.items())
        tensors |= {f"optimizer.{name}.{moment}": part for name, part in logical_tensors(held, experts)}
    return tensors


def save(
    folder: Path, stage: nn.Module, optimizer: torch.optim.AdamW, experts: Sequence[int], progress: Progress
) -> Path:
    """Write `folder/step-N`, collectively; it appears under its name only when it is whole."""
    target = folder / NAME.format(progress.step)
    partial = target.with_suffix(".partial")
    state: dict[str, Any] = {**state_tensors(stage, optimizer, experts), "progress": asdict(progress)}
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


def load(path: Path, stage: nn.Module, optimizer: torch.optim.AdamW, experts: Sequence[int]) -> Progress:
    """Read a checkpoint into parameters and moments in place, collectively, whatever layout wrote it."""
    state: dict[str, Any] = {
        **state_tensors(stage, optimizer, experts),
        "progress": asdict(Progress(step=0, samples=0, seed=0)),
    }
    dcp.load(state, checkpoint_id=path, no_dist=not dist.is_initialized())
    progress = Progress(**state["progress"])
    for held in optimizer.state.values():
        held["step"].fill_(float(progress.step))
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
