"""Writes the shards of a folder of token ids, each whole or not at all, and goes on where an earlier run was ended."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from piper_hpc.config import ConfigError, Problem
from piper_hpc.prepare.documents import Source, documents, file_sha256
from piper_hpc.prepare.tokenizing import Tokenizer
from piper_hpc.runs.checkpoints import sync_folder
from piper_hpc.tokens.folder import DTYPES, INDEX, Shard, TokenIndex, TokensError

DRAFT = "index.partial.json"
"""The index while shards are missing; readers do not know it."""

BATCH_CHARACTERS = 1 << 20
"""Of documents that are tokenized at once."""

Place = tuple[int, int]
"""(source, documents of it that were read)."""


@dataclass(frozen=True)
class Written:
    """What became of a folder: its index, and how many shards of it were there already."""

    index: TokenIndex
    kept: int


@contextmanager
def folder_of_one_writer(folder: Path) -> Iterator[None]:
    """Make the folder and hold it. Raises ConfigError where another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        rule = "another prepare is writing there"
        raise ConfigError(Problem("--out", str(folder), rule, "another folder, or wait for it")) from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        os.close(descriptor)


def write(
    folder: Path,
    begun: TokenIndex,
    sources: Sequence[Source],
    tokenizer: Tokenizer,
    *,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> Written:
    """Write what `folder` lacks of `sources`, and its index. begun: the index without shards.

    A shard that an earlier run finished is kept where its bytes still have the digests that were noted of them.
    on_bytes: told how many bytes of the sources are done, as they are. Raises ConfigError where the folder was made
    from something else, or holds no document at the end.
    """
    noted, kept = _noted(folder, begun), 0
    index, at = begun, (0, 0)
    stream: Iterator[tuple[Place, np.ndarray]] | None = None
    key, fill = str(begun.made_from["key"]), int(begun.made_from["shard_tokens"])
    if not noted:
        _save(folder / DRAFT, begun)
    while True:
        number = len(index.shards)
        found = noted[number] if number < len(noted) else None
        if found is not None and _is_whole(folder, found):
            on_bytes(sum(source.size_bytes for source in sources[at[0] : found.ends[0]]))
            index, at, stream, kept = replace(index, shards=(*index.shards, found)), found.ends, None, kept + 1
            continue
        stream = stream or _tokenized(sources, tokenizer, key, at, on_bytes)
        written = _write_shard(folder, f"shard-{number:05d}", stream, DTYPES[begun.dtype], fill)
        if written is None:
            break
        if written != found:  # what was noted behind it is of other bytes
            noted = noted[:number]
        index, at = replace(index, shards=(*index.shards, written)), written.ends
        _save(folder / DRAFT, replace(index, shards=(*index.shards, *noted[number + 1 :])))
    if not index.shards:
        raise ConfigError(Problem("INPUT", [each.name for each in sources], "hold no document with text", "README.md"))
    if kept < len(index.shards) or not (folder / INDEX).is_file():
        _save(folder / INDEX, index)
    (folder / DRAFT).unlink(missing_ok=True)
    return Written(index, kept)


def _noted(folder: Path, begun: TokenIndex) -> tuple[Shard, ...]:
    """Shards that an earlier run of the same making finished. Raises ConfigError where it was of another making."""
    for name in (DRAFT, INDEX):  # a draft beside an index is of a later run
        if not (folder / name).is_file():
            continue
        try:
            earlier = TokenIndex.read(folder, name)
        except TokensError as error:
            raise ConfigError(Problem("--out", str(folder), error.problems[0].rule, f"--out {folder}-2")) from None
        if facts := _differences(earlier.made_from, begun.made_from):
            rule = f"holds tokens that were made otherwise ({'; '.join(facts)})"
            raise ConfigError(Problem("--out", str(folder), rule, f"--out {folder}-2"))
        return earlier.shards
    if strange := sorted(folder.glob("shard-*")):
        rule = f"has {strange[0].name} and no index that tells what it was made from"
        raise ConfigError(Problem("--out", str(folder), rule, f"--out {folder}-2"))
    return ()


def _differences(earlier: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Each fact of the making that differs, as it was and as it is."""
    return [f"{key} was {_said(earlier.get(key))}, is {_said(now[key])}" for key in now if earlier.get(key) != now[key]]


def _said(value: Any) -> str:
    if isinstance(value, list):
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        return f"{len(value)} files with digest {digest[:8]}"
    return f"{value['name']} {value['sha256'][:8]}" if isinstance(value, dict) else str(value)


def _is_whole(folder: Path, shard: Shard) -> bool:
    try:
        found = (file_sha256(shard.bin(folder)), file_sha256(shard.docs(folder)))
    except FileNotFoundError:
        return False
    return found == (shard.bin_sha256, shard.docs_sha256)


def _tokenized(
    sources: Sequence[Source], tokenizer: Tokenizer, key: str, at: Place, on_bytes: Callable[[int], None]
) -> Iterator[tuple[Place, np.ndarray]]:
    """Ids of every document from `at` on, and the place behind it; those without ids are left out."""
    texts: list[str] = []
    places: list[Place] = []
    waiting = 0
    for number in range(at[0], len(sources)):
        first = at[1] if number == at[0] else 0
        for document, text in enumerate(documents(sources[number], key, first, on_bytes), first):
            texts.append(text)
            places.append((number, document + 1))
            waiting += len(text)
            if waiting >= BATCH_CHARACTERS:
                yield from _ids(tokenizer, texts, places)
                texts, places, waiting = [], [], 0
    yield from _ids(tokenizer, texts, places)


def _ids(tokenizer: Tokenizer, texts: Sequence[str], places: Sequence[Place]) -> Iterator[tuple[Place, np.ndarray]]:
    for place, ids in zip(places, tokenizer.ids(texts), strict=True):
        if ids:
            yield place, np.array(ids, np.int64)


def _write_shard(
    folder: Path, name: str, stream: Iterator[tuple[Place, np.ndarray]], dtype: np.dtype[Any], fill: int
) -> Shard | None:
    """The documents that come until one of them fills the shard, on disk under its name; None where none comes."""
    digest, tokens, max_id, ends = hashlib.sha256(), 0, 0, []
    place: Place | None = None
    partial = folder / f"{name}.bin.partial"
    with partial.open("wb") as file:
        for behind, ids in stream:
            place = behind
            block = ids.astype(dtype).tobytes()
            file.write(block)
            digest.update(block)
            tokens, max_id = tokens + len(ids), max(max_id, int(ids.max()))
            ends.append(tokens)
            if tokens >= fill:
                break
        file.flush()
        os.fsync(file.fileno())
    if place is None:
        partial.unlink()
        return None
    partial_docs = folder / f"{name}.docs.npy.partial"
    with partial_docs.open("wb") as file:
        np.save(file, np.array(ends, "<i8"), allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    shard = Shard(name, tokens, len(ends), max_id, digest.hexdigest(), file_sha256(partial_docs), place)
    os.replace(partial, shard.bin(folder))
    os.replace(partial_docs, shard.docs(folder))
    sync_folder(folder)
    return shard


def _save(path: Path, index: TokenIndex) -> None:
    partial = path.with_name(f".{path.name}.draft")
    with partial.open("w") as file:
        file.write(json.dumps(index.document(), indent=1) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    sync_folder(path.parent)
