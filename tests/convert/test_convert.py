"""Weights between Hugging Face folders and checkpoints: bit for bit both ways, and refused by name."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from piper_hpc.convert.__main__ import main
from piper_hpc.convert.model_files import INDEX
from piper_hpc.runs import find
from tests.live import launch
from tests.model.families import FAMILIES, build, save


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_there_and_back_bit_for_bit_in_shards(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    source = save(build(FAMILIES[name]()).to(dtype), tmp_path / "released")
    config, few = str(source / "config.json"), ["--shard-bytes", "20000"]
    assert main(["to-checkpoint", str(source), str(tmp_path / "checkpoint"), *few]) == 0
    assert len(list((tmp_path / "checkpoint").glob("*.safetensors"))) > 1
    back = ["to-model", str(tmp_path / "checkpoint"), str(tmp_path / "back"), "--config", config]
    assert main([*back, *few]) == 0
    assert same(tensors(source), tensors(tmp_path / "back"))
    index = json.loads((tmp_path / "back" / INDEX).read_text())["weight_map"]
    assert index.keys() == tensors(source).keys()
    assert (tmp_path / "back" / "config.json").read_text() == (source / "config.json").read_text()


def test_weights_can_be_written_narrower_and_a_router_s_bias_stays(tmp_path: Path) -> None:
    source = save(build(FAMILIES["deepseek_v3"]()), tmp_path / "released")
    main(["to-checkpoint", str(source), str(tmp_path / "checkpoint")])
    config = str(source / "config.json")
    back = ["to-model", str(tmp_path / "checkpoint"), str(tmp_path / "back"), "--config", config]
    assert main([*back, "--dtype", "bfloat16"]) == 0
    wide, narrow = tensors(source), tensors(tmp_path / "back")
    for name, tensor in wide.items():
        kept = name.endswith("e_score_correction_bias")
        assert torch.equal(narrow[name], tensor if kept else tensor.to(torch.bfloat16))


@pytest.fixture
def released(tmp_path: Path) -> Path:
    return save(build(FAMILIES["qwen3_moe"]()), tmp_path / "released")


def changed(folder: Path, **tensors_: torch.Tensor | None) -> None:
    path = folder / "model.safetensors"
    found = load_file(path) | {name.replace("__", "."): each for name, each in tensors_.items()}
    save_file({name: each for name, each in found.items() if each is not None}, path, {"format": "pt"})


def test_what_the_model_has_no_place_for_is_refused_until_it_is_left_out_by_name(released, tmp_path, capsys) -> None:
    changed(released, model__layers__4__eh_proj__weight=torch.ones(2, 2))
    command = ["to-checkpoint", str(released), str(tmp_path / "checkpoint")]
    assert main(command) == 2
    assert "model.layers.4.eh_proj.weight" in capsys.readouterr().err
    assert not (tmp_path / "checkpoint").exists()
    assert main([*command, "--leave-out", "model.layers.4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["left_out"] == ["model.layers.4.eh_proj.weight"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "is in no file"),
        (torch.ones(3), "has shape [3]"),
        (torch.ones(32).to(torch.float8_e4m3fn), "plain numbers"),
    ],
    ids=["missing", "another shape", "scaled"],
)
def test_a_tensor_that_is_not_as_the_configuration_says_is_named(value, words, released, tmp_path, capsys) -> None:
    changed(released, model__norm__weight=value)
    assert main(["to-checkpoint", str(released), str(tmp_path / "checkpoint")]) == 2
    told = " ".join(capsys.readouterr().err.split())
    assert "model.norm.weight" in told and words in told
    assert not (tmp_path / "checkpoint").exists()


def test_nothing_is_written_over_and_another_model_s_configuration_is_refused(released, tmp_path, capsys) -> None:
    checkpoint, config = str(tmp_path / "checkpoint"), json.loads((released / "config.json").read_text())
    assert main(["to-checkpoint", str(released), checkpoint]) == 0
    assert main(["to-checkpoint", str(released), checkpoint]) == 2
    assert "there already" in capsys.readouterr().err
    other = tmp_path / "config.json"
    other.write_text(json.dumps(config | {"norm_topk_prob": False}))
    assert main(["to-model", checkpoint, str(tmp_path / "back"), "--config", str(other)]) == 2
    assert "model.normalised_weights" in capsys.readouterr().err
    other.write_text(json.dumps(config | {"model_type": "dbrx"}))
    assert main(["to-model", checkpoint, str(tmp_path / "back"), "--config", str(other)]) == 2
    assert main(["to-checkpoint", str(tmp_path / "nowhere"), str(tmp_path / "x")]) == 2


@pytest.mark.slow
@pytest.mark.processes
def test_a_converted_model_trains_on_over_stages_and_ranks(tmp_path: Path) -> None:
    """The first loss is that of the weights that were brought: far above that of fresh ones, which is log 256."""
    config = FAMILIES["qwen3_moe"]()
    config.vocab_size = 256  # text is read as bytes
    source = save(build(config), tmp_path / "released")
    assert main(["to-checkpoint", str(source), str(tmp_path / "checkpoint")]) == 0
    command = [f"model.path={source / 'config.json'}", f"train.resume_from={tmp_path / 'checkpoint'}", "train.steps=2"]
    done = launch("model=hf", *command, "train=smoke", "cluster.calibration=off", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = find(tmp_path / "runs")
    assert run.metrics()[0]["loss"] > 1.3 * math.log(256)
