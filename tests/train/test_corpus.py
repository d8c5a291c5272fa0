"""The corpus: made once, never replaced under a reader, and the same bytes on every rank."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch.distributed as dist

from piper_hpc.spec import SpecError
from piper_hpc.train import corpus as corpora
from piper_hpc.train.corpus import find_files, prepare_corpus, prepare_on_all_ranks, standard_library_files
from tests.processes import run_ranks

HELLO_SHA256 = "b94d27b9934d3e08a52e52d7da7dabfac484efe37a5380ee9088f7ace2efcde9"
"""Of "hello world", as sha256sum says."""


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    folder = tmp_path / "text"
    folder.mkdir()
    for name, text in (("b.txt", "world"), ("a.txt", "hello ")):
        (folder / name).write_text(text)
    return find_files(str(folder))


def test_corpus_is_the_files_in_order_with_an_index_and_is_made_once(files: list[Path], tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    made = prepare_corpus(files, cache)
    assert (made.files, made.size_bytes, made.path.read_bytes()) == (2, 11, b"hello world")
    assert made.sha256 == HELLO_SHA256 and HELLO_SHA256.startswith(made.path.stem.removeprefix("corpus-"))
    (index,) = cache.glob("*.json")
    about = json.loads(index.read_text())
    assert (about["corpus"], about["sha256"], about["size_bytes"]) == (made.path.name, HELLO_SHA256, 11)
    assert [size for _, size in about["files"]] == [6, 5]
    facts = made.path.stat()
    assert prepare_corpus(files, cache) == made and made.path.stat() == facts
    files[0].write_text("changed")
    assert prepare_corpus(files, cache).path != made.path
    assert sorted(path.suffix for path in cache.iterdir()) == [".bin", ".bin", ".json", ".json"]


def test_a_corpus_that_is_there_is_not_read_again(files: list[Path], tmp_path: Path) -> None:
    made = prepare_corpus(files, tmp_path / "cache")
    with patch.object(corpora, "_sha256", side_effect=AssertionError), patch.object(Path, "read_bytes") as read:
        assert prepare_corpus(files, tmp_path / "cache") == made
    read.assert_not_called()


def test_equal_bytes_from_other_files_are_one_corpus(files: list[Path], tmp_path: Path) -> None:
    (tmp_path / "whole").write_text("hello world")
    made = prepare_corpus(files, tmp_path / "cache")
    assert prepare_corpus([tmp_path / "whole"], tmp_path / "cache").path == made.path


@pytest.mark.parametrize("torn", [b"hello", b"hello_world", b"hello world and more"], ids=["short", "changed", "long"])
@pytest.mark.parametrize("indexed", [True, False])
def test_what_stands_under_the_name_is_never_replaced_under_its_reader(
    torn: bytes, indexed: bool, files: list[Path], tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    made = prepare_corpus(files, cache)
    made.path.write_bytes(torn)
    os.utime(made.path, ns=(1, 1))
    if not indexed:
        for index in cache.glob("*.json"):
            index.unlink()
    mapped = np.memmap(made.path, dtype=np.uint8, mode="r")
    inode = made.path.stat().st_ino
    again = prepare_corpus(files, cache)
    assert again.path != made.path and again.path.read_bytes() == b"hello world"
    assert made.path.stat().st_ino == inode and mapped.tobytes() == torn
    assert prepare_corpus(files, cache) == again, "the index names the new one"
    assert not list(cache.glob("*.partial"))


def test_an_index_that_is_torn_is_written_again(files: list[Path], tmp_path: Path) -> None:
    made = prepare_corpus(files, tmp_path / "cache")
    (index,) = (tmp_path / "cache").glob("*.json")
    index.write_text(index.read_text()[:20])
    assert prepare_corpus(files, tmp_path / "cache") == made
    assert json.loads(index.read_text())["sha256"] == HELLO_SHA256


def prepared(folder: Path, shared: bool, texts: list[str]) -> tuple[str, str]:
    """(digest, error) of this rank, whose node has files and, unless `shared`, a cache of its own."""
    rank = dist.get_rank()
    source = folder / f"node{rank}" / "text"
    source.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(texts[rank])
    cache = folder / ("cache" if shared else f"cache{rank}")
    try:
        return prepare_on_all_ranks([source], cache, f"n{rank}", first_on_node=True).sha256, ""
    except SpecError as error:
        return "", str(error)


@pytest.mark.processes
@pytest.mark.parametrize("shared", [True, False])
def test_nodes_with_equal_files_train_on_the_same_bytes(shared: bool, tmp_path: Path) -> None:
    assert run_ranks(3, prepared, tmp_path, shared, ["hello world"] * 3) == [(HELLO_SHA256, "")] * 3


@pytest.mark.processes
def test_a_rank_with_other_bytes_is_named_on_every_rank_before_any_step(tmp_path: Path) -> None:
    found = run_ranks(3, prepared, tmp_path, False, ["hello world", "hello world", "hello earth"])
    assert found[0] == found[1] == found[2], "all ranks end, with the same words"
    _, said = found[0]
    assert said.startswith(f"data = '{tmp_path}/cache2/corpus-") and "this works: data.path" in said
    other = hashlib.sha256(b"hello earth").hexdigest()[:16]
    assert f"rank 2 on n2 would read it (11 bytes, sha256 {other}), and rank 0 on n0 {tmp_path}/cache0/corpus-" in said
    assert f"(11 bytes, sha256 {HELLO_SHA256[:16]})" in said


def test_files_are_found_by_folder_path_and_pattern(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("one.txt", "deep/two.txt", "deep/three.md"):
        (tmp_path / name).touch()
    assert len(find_files(str(tmp_path))) == 3
    assert [path.name for path in find_files(f"{tmp_path}/**/*.txt")] == ["two.txt", "one.txt"]
    assert [path.name for path in find_files(f"{tmp_path}/one.txt")] == ["one.txt"]
    with pytest.raises(FileNotFoundError, match=r"data\.path=.*nothing"):
        find_files(f"{tmp_path}/nothing/*")


def test_the_standard_library_is_a_corpus_of_python_files() -> None:
    files = standard_library_files()
    assert len(files) > 300 and {path.suffix for path in files} == {".py"}
    assert not any("site-packages" in path.parts for path in files)
