"""Text into tokens: the same bytes whether it was interrupted or not, and every mistake named with nothing lost."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from piper_hpc.prepare import __main__ as command
from piper_hpc.prepare import shards, tokenizing
from piper_hpc.prepare.__main__ import main
from piper_hpc.tokens.folder import TokenIndex, TokenStream
from tests.prepare.tokenizer import EOS, word_tokenizer

TEXTS = [f"{'a b c d e f g h'[: 2 * length - 1]}" for length in (3, 8, 1, 5, 2, 7, 4, 6)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return word_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Three files of a folder, eight documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "b.txt").write_text(TEXTS[3])
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in TEXTS[:3]))
    with gzip.open(folder / "c.jsonl.gz", "wt") as file:
        file.write("\n".join(json.dumps({"text": each, "id": 1}) for each in TEXTS[4:]))
    return folder


def prepare(tokenizer: Path, out: Path, *inputs: Path, more: Sequence[str] = ("--shard-tokens", "8")) -> int:
    words = ["--tokenizer", str(tokenizer), "--eos", EOS, "--out", str(out), *more, *map(str, inputs)]
    return main(words)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents_of(folder: Path) -> list[list[int]]:
    """Of every shard, by its own document ends."""
    index, found = TokenIndex.of_whole(folder), []
    for shard in index.shards:
        ids = np.fromfile(shard.bin(folder), index.dtype)
        found += [part.tolist() for part in np.split(ids, np.load(shard.docs(folder)))[:-1]]
    return found


def ids_of(tokenizer: Path, text: str) -> list[int]:
    known = tokenizers.Tokenizer.from_file(str(tokenizer))
    return [known.token_to_id(each) for each in [*text.split(), EOS]]


def test_documents_are_tokenized_in_order_with_eos_behind_each(
    tokenizer: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(tokenizer, tmp_path / "out", text) == 0
    assert documents_of(tmp_path / "out") == [ids_of(tokenizer, each) for each in TEXTS]
    index = TokenIndex.of_whole(tmp_path / "out")
    assert index.documents == 8 and index.tokens == len(TokenStream(tmp_path / "out")) == sum(range(1, 9)) + 8
    assert all(shard.tokens >= 8 for shard in index.shards[:-1]) and len(index.shards) == 4
    assert index.dtype == "uint16" and index.max_id == max(map(max, documents_of(tmp_path / "out")))
    assert index.eos == ids_of(tokenizer, "")[0] and index.vocab > index.max_id
    assert [each["name"] for each in index.made_from["sources"]] == ["a.jsonl", "b.txt", "c.jsonl.gz"]
    said = capsys.readouterr()
    assert "44 tokens of 8 documents in 4 shards; ids up to" in said.out and "tokenizing" in said.err


def test_what_the_tokenizers_file_says_of_sequences_is_not_done_to_documents(tmp_path: Path, text: Path) -> None:
    """Cut at two tokens, filled up to nine, with a token before each: none of it."""
    path = word_tokenizer(tmp_path / "cutting.json", cutting=True)
    assert prepare(path, tmp_path / "out", text) == 0
    assert documents_of(tmp_path / "out") == [ids_of(path, each) for each in TEXTS]


def test_ids_beyond_two_bytes_are_kept(tmp_path: Path) -> None:
    path = word_tokenizer(tmp_path / "large.json", extra=70_000)
    (tmp_path / "text.txt").write_text("w69999 a")
    assert prepare(path, tmp_path / "out", tmp_path / "text.txt") == 0
    index = TokenIndex.of_whole(tmp_path / "out")
    assert index.dtype == "uint32" and index.max_id > 1 << 16
    assert documents_of(tmp_path / "out") == [ids_of(path, "w69999 a")]


class Ended(BaseException):
    """The process ends, at any moment."""


def ended_after(monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    """The disk is gone, or the process, at the call number `calls` that changes the folder."""
    done = iter(range(calls))

    def ending(real: object) -> object:
        def call(*arguments: object, **named: object) -> object:
            if next(done, None) is None:
                raise Ended
            return real(*arguments, **named)  # type: ignore[operator]

        return call

    for name in ("replace", "fsync"):
        monkeypatch.setattr(shards.os, name, ending(getattr(shards.os, name)))


@pytest.mark.parametrize("calls", range(39))
def test_an_interrupted_run_goes_on_to_the_same_bytes(
    calls: int, tokenizer: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare(tokenizer, tmp_path / "whole", text)
    with monkeypatch.context() as patch:
        ended_after(patch, calls)
        with pytest.raises(Ended):
            prepare(tokenizer, tmp_path / "out", text)
    assert (tmp_path / "out" / "index.json").exists() == (calls == 38), "the index comes last"
    assert prepare(tokenizer, tmp_path / "out", text) == 0
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_finished_shards_are_kept_and_not_tokenized_again(
    tokenizer: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patch:
        ended_after(patch, 20)
        with pytest.raises(Ended):
            prepare(tokenizer, tmp_path / "out", text)
    noted = json.loads((tmp_path / "out" / "index.partial.json").read_text())["shards"]
    assert len(noted) == 2
    seen: list[str] = []
    real = tokenizing.Tokenizer.ids

    def ids(self: tokenizing.Tokenizer, texts: Sequence[str]) -> list[list[int]]:
        seen.extend(texts)
        return real(self, texts)

    monkeypatch.setattr(tokenizing.Tokenizer, "ids", ids)
    capsys.readouterr()
    assert prepare(tokenizer, tmp_path / "out", text, more=["--shard-tokens", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kept_shards"] == 2
    done = sum(shard["documents"] for shard in noted)
    assert seen == TEXTS[done:]
    seen.clear()
    facts = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    assert prepare(tokenizer, tmp_path / "out", text) == 0
    assert seen == [] and facts == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(draw=st.data())
def test_a_torn_shard_is_written_again_and_no_other(
    draw: st.DataObject, tokenizer: Path, text: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("torn")
    prepare(tokenizer, folder, text)
    whole = files_of(folder)
    torn = draw.draw(st.sampled_from(sorted(name for name in whole if name.startswith("shard-"))))
    how = draw.draw(st.sampled_from(["gone", "short", "flipped"]))
    if how == "gone":
        (folder / torn).unlink()
    else:
        data = bytearray(whole[torn])
        data[-1] ^= 1
        (folder / torn).write_bytes(data[:-1] if how == "short" else data)
    times = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    assert prepare(tokenizer, folder, text) == 0
    assert files_of(folder) == whole
    now = {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*")}
    changed = {name.split(".")[0] for name in now if now[name] != times.get(name)}
    assert changed == {torn.split(".")[0]}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["--shard-tokens", "9"], "shard_tokens was 8, is 9"),
        (["--shard-tokens", "8", "--key", "body"], "key was text, is body"),
    ],
)
def test_a_folder_of_another_making_is_left_alone(
    more: list[str], named: str, tokenizer: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(tokenizer, tmp_path / "out", text)
    before = files_of(tmp_path / "out")
    assert prepare(tokenizer, tmp_path / "out", text, more=more) == 2
    assert "error: --out = " in (said := capsys.readouterr().err) and named in said
    (text / "b.txt").write_text("other")
    assert prepare(tokenizer, tmp_path / "out", text) == 2
    assert "sources was 3 files with digest" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == before


def test_shards_that_no_index_tells_of_are_not_overwritten(
    tokenizer: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shard-00000.bin").write_bytes(b"another's")
    assert prepare(tokenizer, tmp_path / "out", text) == 2
    assert "no index that tells" in capsys.readouterr().err
    assert files_of(tmp_path / "out") == {"shard-00000.bin": b"another's"}


def test_two_do_not_write_at_once(
    tokenizer: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with shards.folder_of_one_writer(tmp_path / "out"):
        assert prepare(tokenizer, tmp_path / "out", text) == 2
    assert "another prepare is writing there" in capsys.readouterr().err
    assert prepare(tokenizer, tmp_path / "out", text) == 0


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("x.jsonl", b'{"text": "a"}\nnot json\n', ("x.jsonl:2", "is not JSON")),
        ("x.jsonl", b'{"body": "a"}\n', ("x.jsonl:1", "no text under --key text; it has body", "--key body")),
        ("x.jsonl", b"[1]\n", ("x.jsonl:1", "it has list")),
        ("x.jsonl", b'{"text": "\xff"}\n', ("x.jsonl:1", "is not UTF-8")),
        ("x.txt", b"\xff\xfe", ("x.txt", "is not UTF-8")),
        ("x.jsonl.gz", b"no gzip", ("x.jsonl.gz", "is no whole gzip file")),
        ("x.txt.gz", gzip.compress(b"a b c", mtime=0)[:-9], ("x.txt.gz", "is no whole gzip file")),
        ("x.txt", b"", ("INPUT", "hold no document with text")),
        ("x.bin", b"", ("INPUT", "must be a file, or a folder with files *.txt")),
    ],
)
def test_bad_text_is_named_with_its_line_and_ends_with_2(
    name: str, content: bytes, named: Sequence[str], tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    assert prepare(tokenizer, tmp_path / "out", tmp_path / "text") == 2
    said = capsys.readouterr().err
    assert all(words in said for words in ("error: ", *named)) and "Traceback" not in said
    assert not (tmp_path / "out" / "index.json").exists()


def test_blank_lines_and_half_pairs_are_no_mistake(tokenizer: Path, tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n\n{"text": ""}\n{"text": "\\ud800 b"}\n')
    assert prepare(tokenizer, tmp_path / "out", tmp_path / "x.jsonl") == 0
    assert documents_of(tmp_path / "out") == [ids_of(tokenizer, "a"), ids_of(tokenizer, "[UNK] b")]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--eos", "<end>"], ("--eos = '<end>'", f"its special tokens are [UNK], {EOS}", f"--eos '{EOS}'")),
        (["--tokenizer", "/nowhere.json"], ("--tokenizer", "nothing is downloaded")),
        (["--tokenizer", __file__], ("--tokenizer", "is no tokenizer.json")),
        (["--shard-tokens", "0"], ("--shard-tokens = 0", "at least 1")),
        (["/nowhere"], ("INPUT = '/nowhere'", "must be a file")),
    ],
)
def test_bad_arguments_are_named_and_end_with_2(
    words: list[str],
    named: Sequence[str],
    tokenizer: Path,
    text: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--tokenizer", str(tokenizer), "--out", str(tmp_path / "out"), str(text), *words]) == 2
    said = capsys.readouterr().err
    assert all(word in said for word in named)


def test_a_file_that_is_given_twice_is_a_mistake(
    tokenizer: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(tokenizer, tmp_path / "out", text, text / "b.txt") == 2
    assert "is given twice" in capsys.readouterr().err


def test_without_the_package_the_message_says_what_to_install(
    tokenizer: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tokenizing, "find_spec", lambda name: None)
    assert prepare(tokenizer, tmp_path / "out", text) == 2
    assert "pip install 'piper-hpc[data]'" in capsys.readouterr().err


def test_a_full_disk_is_no_traceback(
    tokenizer: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*arguments: object, **named: object) -> Iterator[None]:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "write", full)
    assert prepare(tokenizer, tmp_path / "out", text) == 2
    assert "No space left" in (said := capsys.readouterr().err) and "goes on behind the last shard" in said
