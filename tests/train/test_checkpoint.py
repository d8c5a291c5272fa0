"""A checkpoint written by one layout is read by others: every parameter, every expert, both moments, the position."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from piper_hpc.spec import Layout, ModelSpec, RankMap, Workload
from piper_hpc.train import checkpoint
from piper_hpc.train.data import ByteDataset
from piper_hpc.train.loop import Trainer, train
from piper_hpc.train.settings import TrainSettings
from tests.processes import run_ranks

MODEL = ModelSpec(
    "tiny", layers=3, hidden=16, heads=2, kv_heads=1, head_dim=8, experts=8, top_k=2, expert_ffn=16, vocab=64
)
WORKLOAD = Workload(global_batch=8, sequence=8)
WRITER = Layout(pp=2, ep=2, micro_batch=1)
CPU = torch.device("cpu")


def settings(steps: int) -> TrainSettings:
    return TrainSettings(steps=steps, seed=3, schedule="constant", checkpoint_every=2, collective_timeout_s=30.0)


def place(layout: Layout) -> RankMap:
    return RankMap.block(layout, layout.ranks, (0,))


def run(layout: Layout, steps: int, corpus: Path, folder: Path | None, resume: bool) -> dict[int, float]:
    """Train on one rank; loss by step, on rank 0."""
    here = place(layout).places[dist.get_rank()]
    data = ByteDataset(
        corpus, sequence=WORKLOAD.sequence, global_batch=8, dense_dp=layout.dense_dp, place=here, ep=layout.ep, seed=3
    )
    losses: dict[int, float] = {}
    train(
        MODEL,
        layout,
        WORKLOAD,
        settings(steps),
        rank_map=place(layout),
        device=CPU,
        data=data,
        checkpoint_dir=folder,
        resume_from=folder if resume else None,
        on_step=lambda row: losses.__setitem__(row["step"], row["loss"]),
    )
    return losses


def loaded(layout: Layout, path: Path) -> tuple[checkpoint.Progress, dict[str, torch.Tensor], set[float]]:
    """What one rank holds after reading `path`, by logical name."""
    trainer = Trainer(MODEL, layout, WORKLOAD, settings(4), rank_map=place(layout), device=CPU)
    progress = checkpoint.load(path, trainer.stage, trainer.optimizer, trainer.experts)
    tensors = checkpoint.state_tensors(trainer.stage, trainer.optimizer, trainer.experts)
    steps = {float(held["step"]) for held in trainer.optimizer.state.values()}
    return progress, {name: tensor.clone() for name, tensor in tensors.items()}, steps


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "bytes.bin"
    np.random.default_rng(1).integers(0, MODEL.vocab, 3000, dtype=np.uint8).tofile(path)
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> Path:
    """Checkpoints after 2 and 4 steps at PP2 x EP2."""
    folder = tmp_path_factory.mktemp("checkpoints")
    run_ranks(WRITER.ranks, run, WRITER, 4, corpus, folder, False)
    return folder


@pytest.mark.processes
@pytest.mark.parametrize(
    "layout", [Layout(micro_batch=4), Layout(ep=4, micro_batch=2), WRITER], ids=lambda layout: layout.name()
)
def test_other_layouts_read_every_tensor(layout: Layout, written: Path) -> None:
    newest = checkpoint.latest(written)
    assert newest is not None and newest.name == "step-00000004"
    stored = read_plain(newest)
    ranks = run_ranks(layout.ranks, loaded, layout, newest)
    for progress, tensors, steps in ranks:
        assert progress == checkpoint.Progress(step=4, samples=32, seed=3)
        assert steps == {4.0}
        for name, tensor in tensors.items():
            assert torch.equal(tensor, stored[name]), name
    assert set().union(*(tensors for _, tensors, _ in ranks)) == set(stored)


@pytest.mark.processes
def test_names_tell_nothing_of_the_layout(written: Path) -> None:
    newest = checkpoint.latest(written)
    assert newest is not None
    stored = read_plain(newest)
    names = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
    per_layer = {"attention_norm.weight", "router_norm.weight", "router.gate.weight"}
    per_layer |= {f"attention.{letter}.weight" for letter in "qkvo"}
    per_layer |= {f"experts.{expert}.{weight}" for expert in range(8) for weight in ("w1", "w2", "w3")}
    expected = {f"layers.{layer}.{name}" for layer in range(3) for name in per_layer}
    assert names == expected | {"embedding.weight", "norm.weight", "head.weight"}
    moments = {f"optimizer.{name}.{moment}" for name in names for moment in ("exp_avg", "exp_avg_sq")}
    assert {name for name in stored if name.startswith("optimizer.")} == moments
    assert all(stored[name].abs().sum() > 0 for name in moments)


@pytest.mark.processes
def test_resumed_run_continues_the_same_losses(written: Path, corpus: Path, tmp_path: Path) -> None:
    """Six steps in one go, and two more steps after the checkpoint of step 4, at another layout."""
    shutil.copytree(written, tmp_path, dirs_exist_ok=True)
    whole = run_ranks(WRITER.ranks, run, WRITER, 6, corpus, None, False)[0]
    single = Layout(micro_batch=4)
    resumed = run_ranks(1, run, single, 6, corpus, tmp_path, True)[0]
    assert set(resumed) == {4, 5}
    assert [resumed[4], resumed[5]] == pytest.approx([whole[4], whole[5]], rel=1e-5)


def test_partial_checkpoint_is_not_the_latest(tmp_path: Path) -> None:
    for name in ("step-00000002", "step-00000010", "step-00000012.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ".metadata").touch()
    (tmp_path / "step-00000011").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000010"
    assert checkpoint.latest(tmp_path / "nothing") is None


def read_plain(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, read without the code under test."""
    reader = dcp.FileSystemReader(path)
    metadata = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if hasattr(entry, "size")
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
