"""Which checkpoints of a folder are whole, which is the newest, which stay, and what may go on from one."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest

from piper_hpc.runs import checkpoints
from piper_hpc.runs.checkpoints import SIDECAR, CheckpointError, Origin, Sidecar, new_folder, newest, prune
from piper_hpc.spec import AllToAllConfig, Layout, ModelSpec, RankMap

MODEL = ModelSpec(
    "tiny", layers=2, hidden=16, heads=2, kv_heads=1, head_dim=8, experts=4, top_k=2, expert_ffn=16, vocab=64
)
LAYOUT = Layout(ep=4, all_to_all="auto", stage_layers=(2,))
CONFIGS = {(0, 1, 2, 3): AllToAllConfig("halo_dedup", chunks=4)}


def rank_map(layout: Layout = LAYOUT, rack_of_node: tuple[int, ...] = (0, 1)) -> RankMap:
    return RankMap.block(layout, 2, rack_of_node)


def origin() -> Origin:
    return Origin.of(MODEL, rank_map(), CONFIGS, seed=3, dtype="bfloat16")


def whole(folder: Path, step: int) -> Path:
    path = new_folder(folder, step)
    Sidecar(step, 8 * step, step, origin(), {}, ()).write(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_sidecar_says_what_was_written(tmp_path: Path) -> None:
    written = Sidecar(4, 32, 3, origin(), {"model.a": (4, 2)}, ())
    written.write(tmp_path)
    assert names(tmp_path) == [SIDECAR]
    read = Sidecar.read(tmp_path)
    assert (read.step, read.samples, read.optimizer_steps) == (4, 32, 3)
    assert read.origin == written.origin and read.origin.dtype == "float32"
    assert read.origin.configs() == CONFIGS
    document = json.loads((tmp_path / SIDECAR).read_text())
    assert document["schema_version"] == 1 and document["origin"]["rank_map"]["layout"]["ep"] == 4
    assert document["origin"]["rank_map"]["node_of_rank"] == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("layout", "rack_of_node", "same"),
    [
        (LAYOUT, (0, 1), True),
        (LAYOUT, (0, 0), False),
        (Layout(ep=4, all_to_all="auto"), (0, 1), False),
        (Layout(ep=2, dp=2, all_to_all="auto", stage_layers=(2,)), (0, 1), False),
    ],
    ids=["same", "other racks", "other stages", "other degrees"],
)
def test_the_same_place_is_the_same_layout_on_nodes_of_the_same_shape(
    layout: Layout, rack_of_node: tuple[int, ...], same: bool, tmp_path: Path
) -> None:
    read = Sidecar.read(whole(tmp_path, 1)).origin
    assert read.same_place(rank_map(layout, rack_of_node)) is same


def test_the_same_facts_may_go_on_under_another_name() -> None:
    renamed = ModelSpec(**{**vars(MODEL), "name": "other"})
    assert origin().disagreements(renamed, seed=3, dtype="float32") == []


def test_the_newest_is_by_step_and_then_by_attempt(tmp_path: Path) -> None:
    assert newest(tmp_path / "nothing") is None and newest(tmp_path) is None
    for step in (2, 10, 9):
        whole(tmp_path, step)
    again = whole(tmp_path, 10)
    assert again.name == "step-00000010.1"
    new_folder(tmp_path, 12)
    (tmp_path / "step-00000013.partial").mkdir()
    assert newest(tmp_path) == again
    assert newest(again) == again  # one that is named itself
    assert whole(tmp_path, 100_000_000) == newest(tmp_path)


@pytest.mark.parametrize(
    ("keep", "left"),
    [
        (1, ["step-00000008"]),
        (2, ["step-00000006", "step-00000008"]),
        (0, [f"step-0000000{at}" for at in (2, 4, 6, 8)]),
    ],
)
def test_the_newest_whole_ones_are_kept_and_torn_ones_are_not(keep: int, left: list[str], tmp_path: Path) -> None:
    for step in (2, 4, 6):
        whole(tmp_path, step)
    new_folder(tmp_path, 7)
    (tmp_path / "mine").mkdir()
    done = whole(tmp_path, 8)
    in_flight = new_folder(tmp_path, 9)
    prune(tmp_path, keep, done)
    assert names(tmp_path) == ["mine", *left, in_flight.name]


@pytest.mark.parametrize(
    ("rules", "left"),
    [
        ({"keep_every": 4}, [4, 8, 12, 14]),
        ({"keep_every": 4, "inodes": 100}, [4, 8, 12, 14]),
        # Of two files and folders each: three, and the next one.
        ({"keep_every": 4, "inodes": 8}, [8, 12, 14]),
        ({"keep": 0, "inodes": 6}, [12, 14]),
        ({"inodes": 1}, [14]),
    ],
    ids=["some for good", "room enough", "the oldest first", "all that fit", "the newest in any case"],
)
def test_older_ones_stay_by_policy_within_the_budget_of_inodes(rules: dict[str, int], left: list[int], tmp_path: Path):
    for step in (2, 4, 6, 8, 10, 12):
        whole(tmp_path, step)
    done = whole(tmp_path, 14)
    assert len(list(done.iterdir())) == 1
    prune(tmp_path, rules.pop("keep", 2), done, **rules)
    assert names(tmp_path) == [f"step-{step:08d}" for step in left]


def test_a_removal_that_is_cut_off_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    old, done = whole(tmp_path, 2), whole(tmp_path, 4)
    with patch.object(checkpoints.shutil, "rmtree", side_effect=OSError), pytest.raises(OSError):
        prune(tmp_path, 1, done)
    assert old.is_dir() and newest(tmp_path) == done
    with pytest.raises(CheckpointError, match=f"{SIDECAR} is missing"):
        Sidecar.read(old)
    prune(tmp_path, 1, done)
    assert names(tmp_path) == [done.name]


def test_a_sidecar_without_its_keys_is_refused(tmp_path: Path) -> None:
    path = whole(tmp_path, 2)
    document = json.loads((path / SIDECAR).read_text())
    for key in ("files", "origin", "step"):
        less = {each: value for each, value in document.items() if each not in (key, "schema_version", "blake2b")}
        signed = {"schema_version": 1, "blake2b": checkpoints._digest(less)} | less
        (path / SIDECAR).write_text(json.dumps(signed))
        with pytest.raises(CheckpointError, match=f"has not the keys .*{key}"):
            Sidecar.read(path)
