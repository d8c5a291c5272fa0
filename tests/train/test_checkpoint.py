"""A checkpoint written at one layout is read at any other: masters, every expert, both moments, the position."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

from piper_hpc.runs.checkpoints import Sidecar
from piper_hpc.train.checkpoint import Progress
from tests.full import full
from tests.processes import run_ranks
from tests.train import layouts
from tests.train.layouts import LAYOUTS, MODEL, WORKLOAD

NAMES = list(LAYOUTS)
# Every layout writes once and reads once what another wrote; one reads itself.
COVER = {(writer, NAMES[(at + 1) % len(NAMES)]) for at, writer in enumerate(NAMES)} | {("dp3_zero1", "dp3_zero1")}
PAIRS = [pytest.param(*pair, marks=[] if pair in COVER else full) for pair in product(NAMES, NAMES)]
pytestmark = pytest.mark.processes


class Written:
    """Checkpoints of the module's layouts, each written when it is first asked for."""

    def __init__(self, folder: Path) -> None:
        self.corpus = layouts.corpus(folder)
        self._folder = folder
        self.of = cache(self._of)

    def _of(self, name: str, dtype: str = "float32") -> tuple[Path, dict[str, torch.Tensor]]:
        """The checkpoint, and what the ranks that wrote it held."""
        folder, layout = self._folder / name / dtype, LAYOUTS[name]
        ranks = run_ranks(layout.ranks, layouts.write, layout, self.corpus, folder, dtype)
        return folder / "step-00000002", layouts.whole(ranks)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    return Written(tmp_path_factory.mktemp("checkpoints"))


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_any_layout_reads_what_another_wrote(writer: str, reader: str, written: Written) -> None:
    path, stored = written.of(writer)
    layout = LAYOUTS[reader]
    ranks = run_ranks(layout.ranks, layouts.read, layout, path)
    for progress, optimizer_steps, _, weights_are_published in ranks:
        assert progress == Progress(step=2, samples=2 * WORKLOAD.global_batch)
        assert optimizer_steps == 2 and weights_are_published
    assert_same(layouts.whole(parts for _, _, parts, _ in ranks), stored)


@pytest.mark.parametrize(("writer", "reader"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_bfloat16_and_float32_have_the_same_masters(writer: str, reader: str, written: Written) -> None:
    path, stored = written.of("pp2_ep2", writer)
    layout = LAYOUTS["ep2_dp2_zero1"]
    ranks = run_ranks(layout.ranks, layouts.read, layout, path, reader)
    assert all(published for _, _, _, published in ranks)
    read = layouts.whole(parts for _, _, parts, _ in ranks)
    assert {tensor.dtype for tensor in read.values()} == {torch.float32}
    assert_same(read, stored)


def test_torch_itself_reads_the_files(written: Written) -> None:
    """Slices of three ranks, by torch's own reader of safetensors."""
    path, stored = written.of("dp3_zero1")
    read = {name: torch.full_like(tensor, torch.nan) for name, tensor in stored.items()}
    dcp.load(read, storage_reader=HuggingFaceStorageReader(str(path)), no_dist=True)
    assert_same(read, stored)


def test_names_tell_nothing_of_the_layout(written: Written) -> None:
    path, stored = written.of("v_pp2_dp2_zero1")
    names = {name.removeprefix("model.") for name in stored if name.startswith("model.")}
    attention = {"attention_norm.weight", *(f"attention.{letter}.weight" for letter in "qkvo")}
    experts = {f"experts.{expert}.{weight}" for expert in range(MODEL.experts) for weight in ("w1", "w2", "w3")}
    dense = attention | {"ffn_norm.weight", "ffn.w1.weight", "ffn.w2.weight", "ffn.w3.weight"}
    moe = attention | {"router_norm.weight", "router.gate.weight"} | experts
    expected = {f"layers.{layer}.{name}" for layer in range(MODEL.layers) for name in (moe if layer else dense)}
    state = {f"layers.{layer}.router.{name}" for layer in (1, 2, 3) for name in ("selection_bias", "load")}
    assert names == expected | state | {"embedding.weight", "norm.weight", "head.weight"}
    assert any(stored[f"model.{name}"].unique().numel() > 1 for name in state)
    names -= state
    moments = {f"optimizer.{name}.{moment}" for name in names for moment in ("exp_avg", "exp_avg_sq")}
    assert {name for name in stored if name.startswith("optimizer.")} == moments
    assert all(stored[name].abs().sum() > 0 for name in moments)
    assert sum(tensor.numel() for name, tensor in stored.items() if name in moments) == 2 * MODEL.parameters
    assert Sidecar.read(path).tensors.keys() == stored.keys()


def test_copies_share_the_work(written: Written) -> None:
    """Two copies of each of two stages: no tensor twice, and no rank idle."""
    path, stored = written.of("uneven_pp2_dp2")
    files = Sidecar.read(path).files
    assert sorted(name for file in files for name in file.rows) == sorted(stored)
    assert len(files) == 4 and all(file.rows for file in files)


@pytest.mark.parametrize("name", ["pp2_ep2", "v_pp2_dp2_zero1"])
def test_the_same_layout_goes_on_bit_for_bit(name: str, written: Written, tmp_path: Path) -> None:
    layout = LAYOUTS[name]
    whole = run_ranks(layout.ranks, layouts.losses, layout, 5, written.corpus, tmp_path, None)[0]
    saved = tmp_path / "step-00000002"
    resumed = run_ranks(layout.ranks, layouts.losses, layout, 5, written.corpus, None, saved)[0]
    assert resumed == {step: whole[step] for step in (2, 3, 4)}


def test_another_layout_goes_on_with_the_same_losses(written: Written, tmp_path: Path) -> None:
    layout = LAYOUTS["dp3_zero1"]
    whole = run_ranks(layout.ranks, layouts.losses, layout, 4, written.corpus, tmp_path, None)[0]
    one = LAYOUTS["one"]
    resumed = run_ranks(1, layouts.losses, one, 4, written.corpus, None, tmp_path / "step-00000002")[0]
    assert list(resumed) == [2, 3]
    assert [resumed[2], resumed[3]] == pytest.approx([whole[2], whole[3]], rel=1e-5)


def assert_same(read: dict[str, torch.Tensor], stored: dict[str, torch.Tensor]) -> None:
    assert read.keys() == stored.keys()
    for name, tensor in read.items():
        assert torch.equal(tensor, stored[name]), name
