"""Folders of tokens: what is read is what lies there, across shards, and what is torn is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.tokens.folder import TokenIndex, TokensError, TokenStream
from tests.tokens.made import counted, made

DOCUMENTS = st.lists(st.lists(st.integers(0, 999), min_size=1, max_size=5), min_size=1, max_size=5)


@given(shards=st.lists(DOCUMENTS, min_size=1, max_size=4), draw=st.data())
def test_any_range_is_read_across_shards_with_its_document_starts(
    shards: list[list[list[int]]], draw: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stream = TokenStream(made(tmp_path_factory.mktemp("tokens"), shards))
    documents = [document for shard in shards for document in shard]
    whole = [each for document in documents for each in document]
    begins = [sum(map(len, documents[:number])) for number in range(len(documents))]
    assert len(stream) == len(whole)
    start = draw.draw(st.integers(0, len(whole) - 1))
    stop = draw.draw(st.integers(start + 1, len(whole)))
    assert stream.read(start, stop).tolist() == whole[start:stop]
    assert stream.first_tokens(start, stop).tolist() == [each for each in begins if start < each < stop]


def test_a_range_beyond_the_end_is_no_silent_rest(tmp_path: Path) -> None:
    stream = TokenStream(counted(tmp_path, 20))
    for start, stop in ((15, 21), (-1, 3), (4, 4)):
        with pytest.raises(IndexError):
            stream.read(start, stop)


def test_more_shards_than_are_kept_open_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("piper_hpc.tokens.folder.OPEN_SHARDS", 2)
    stream = TokenStream(made(tmp_path, [[[number]] for number in range(9)]))
    assert stream.read(0, 9).tolist() == list(range(9))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda folder: (folder / "index.json").unlink(), "no index.json"),
        (lambda folder: (folder / "index.json").write_text("{"), "cannot be read"),
        (lambda folder: altered(folder, schema_version=2), "schema_version 2, read here is 1"),
        (lambda folder: altered(folder, dtype="float32"), "has not the keys"),
        (lambda folder: (folder / "shard-00001.bin").unlink(), "shard-00001.bin is missing"),
        (lambda folder: (folder / "shard-00000.docs.npy").unlink(), "shard-00000.docs.npy is missing"),
        (lambda folder: (folder / "shard-00001.bin").write_bytes(b"xx"), "has 2 bytes, 26 were written"),
    ],
)
def test_what_is_torn_is_named(change: object, named: str, tmp_path: Path) -> None:
    folder = counted(tmp_path, 20)
    TokenIndex.of_whole(folder)
    change(folder)  # type: ignore[operator]
    with pytest.raises(TokensError, match=r"data\.path = .*python -m piper_hpc\.prepare") as caught:
        TokenStream(folder)
    assert named in str(caught.value)


def altered(folder: Path, **facts: object) -> None:
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | facts))
