"""A tiny model at six layouts that differ in every way a checkpoint may see, and what the ranks of one do with it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from piper_hpc.runs.checkpoints import Origin
from piper_hpc.spec import Layout, ModelSpec, RankMap, Workload
from piper_hpc.train.checkpoint import Progress
from piper_hpc.train.checkpoint.state import Part, held
from piper_hpc.train.data import ByteDataset
from piper_hpc.train.loop import train
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.trainer import Trainer

MODEL = ModelSpec(
    "tiny", layers=4, hidden=16, heads=2, kv_heads=1, head_dim=8, experts=4, top_k=2, expert_ffn=16, vocab=64,
    dense_first=1, dense_ffn=24, selection_bias=True, router_aux="global_batch",
)  # fmt: skip
WORKLOAD = Workload(global_batch=12, sequence=8)
CPU = torch.device("cpu")
SEED = 3
LAYOUTS = {
    "one": Layout(micro_batch=4),
    "pp2_ep2": Layout(pp=2, ep=2),
    "ep2_dp2_zero1": Layout(ep=2, dp=2, zero=1),
    "v_pp2_dp2_zero1": Layout(pp=2, dp=2, vpp=2, zero=1, schedule="zbv"),
    "uneven_pp2_dp2": Layout(pp=2, dp=2, stage_layers=(3, 1)),
    "dp3_zero1": Layout(dp=3, zero=1),  # slices of 16 rows over 3 ranks: 6, 6, 4
}


def settings(steps: int, dtype: str = "float32", **chosen: object) -> TrainSettings:
    return TrainSettings(steps=steps, seed=SEED, warmup_steps=2, dtype=dtype, collective_timeout_s=30.0, **chosen)  # type: ignore[arg-type]


def rank_map(layout: Layout) -> RankMap:
    """All ranks on one node."""
    return RankMap.block(layout, layout.ranks, (0,))


def corpus(folder: Path) -> Path:
    path = folder / "bytes.bin"
    np.random.default_rng(1).integers(0, MODEL.vocab, 3000, dtype=np.uint8).tofile(path)
    return path


def data(layout: Layout, path: Path) -> ByteDataset:
    """This rank's share of the corpus."""
    return ByteDataset(
        path,
        sequence=WORKLOAD.sequence,
        global_batch=WORKLOAD.global_batch,
        dense_dp=layout.dense_dp,
        place=rank_map(layout).places[dist.get_rank() if dist.is_initialized() else 0],
        ep=layout.ep,
        seed=SEED,
    )


def trainer(layout: Layout, steps: int = 4, dtype: str = "float32") -> Trainer:
    return Trainer(MODEL, layout, WORKLOAD, settings(steps, dtype), rank_map=rank_map(layout), device=CPU)


def parts(of: Trainer) -> list[Part]:
    """What a rank holds, copied."""
    return [part.copied() for part in held(of.store, of.optimizer)]


def write(layout: Layout, source: Path, folder: Path, dtype: str = "float32") -> list[Part]:
    """Two steps and a checkpoint of them; what this rank held."""
    writer = trainer(layout, dtype=dtype)
    for step in range(2):
        writer.step(data(layout, source), step * WORKLOAD.global_batch, 1e-2, sample_memory=False)
    saver = writer.saver(folder, origin(layout, dtype), Progress(0, 0))
    saver.save(Progress(2, 2 * WORKLOAD.global_batch))
    saver.close()
    return parts(writer)


def origin(layout: Layout, dtype: str = "float32") -> Origin:
    return Origin.of(MODEL, rank_map(layout), None, seed=SEED, dtype=dtype)


def read(layout: Layout, path: Path, dtype: str = "float32") -> tuple[Progress, int, list[Part], bool]:
    """Progress, optimizer steps and parts of a rank that took up `path`; whether its weights are its master's."""
    reader = trainer(layout, dtype=dtype)
    progress = reader.load(path, MODEL)
    weights = [bucket.weights.clone() for bucket in reader.store.buckets]
    reader.store.publish()
    published = all(
        torch.equal(before, bucket.weights) for before, bucket in zip(weights, reader.store.buckets, strict=True)
    )
    return progress, reader.optimizer.steps, parts(reader), published


def losses(
    layout: Layout, steps: int, source: Path, folder: Path | None, resume_from: Path | None, every: int = 2
) -> dict[int, float]:
    """Loss by step of a run that saves into `folder`, on rank 0."""
    found: dict[int, float] = {}
    train(
        MODEL,
        layout,
        WORKLOAD,
        settings(steps, checkpoint_every=every, checkpoint_keep=0),
        rank_map=rank_map(layout),
        device=CPU,
        data=data(layout, source),
        checkpoint_dir=folder,
        resume_from=resume_from,
        on_step=lambda row: found.__setitem__(row["step"], row["loss"]),
    )
    return found


def whole(of_ranks: Iterable[list[Part]]) -> dict[str, torch.Tensor]:
    """The tensors of which ranks hold rows."""
    tensors: dict[str, torch.Tensor] = {}
    for part in (part for of_rank in of_ranks for part in of_rank):
        tensors.setdefault(part.name, torch.full(part.shape, torch.nan, dtype=part.values.dtype))
        tensors[part.name][part.start : part.stop] = part.values
    return tensors
