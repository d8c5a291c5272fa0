"""A folder of token ids: shards of ids, where their documents end, and `index.json`, which is written last.

`shard-00000.bin` has ids alone, little-endian, of the index's dtype; `shard-00000.docs.npy` has, as int64, the position
in its shard behind each document's last token. Documents follow one another, and none is in two shards.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from piper_hpc.spec.problem import Problem, SpecError

INDEX = "index.json"
SCHEMA_VERSION = 1
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
OPEN_SHARDS = 256
"""Memory maps kept at once by a reader: each holds a file descriptor."""


class TokensError(SpecError):
    """A folder that cannot be trained on: which, what is wrong, and the command that mends it."""

    @staticmethod
    def of(folder: Path, rule: str) -> TokensError:
        """What is wrong with `folder`."""
        works = f"data.path=FOLDER that python -m piper_hpc.prepare --out FOLDER wrote; for {folder}, run it again"
        return TokensError(Problem("data.path", str(folder), rule, works))


@dataclass(frozen=True)
class Shard:
    """One shard: tokens and documents in it, its largest id, SHA-256 of its two files, where in the sources it ends.

    ends: [source, documents of it that were read by then], so that writing can go on behind a shard.
    """

    name: str
    tokens: int
    documents: int
    max_id: int
    bin_sha256: str
    docs_sha256: str
    ends: tuple[int, int]

    def bin(self, folder: Path) -> Path:
        """The file of ids."""
        return folder / f"{self.name}.bin"

    def docs(self, folder: Path) -> Path:
        """The file of document ends."""
        return folder / f"{self.name}.docs.npy"


@dataclass(frozen=True)
class TokenIndex:
    """`index.json`: what the ids are of, what they were made from, and the shards.

    vocab: rows of an embedding that any id of the tokenizer needs; eos: the id behind every document, None where there
    is none; made_from: all that decides the bytes, see `piper_hpc.prepare`.
    """

    dtype: str
    vocab: int
    eos: int | None
    made_from: dict[str, Any]
    shards: tuple[Shard, ...] = field(default=())

    @property
    def tokens(self) -> int:
        """Of all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """Of all shards."""
        return sum(shard.documents for shard in self.shards)

    @property
    def max_id(self) -> int:
        """The largest id that occurs."""
        return max((shard.max_id for shard in self.shards), default=0)

    @property
    def tokenizer_sha256(self) -> str:
        """SHA-256 of the tokenizer's file."""
        return str(self.made_from["tokenizer"]["sha256"])

    def document(self) -> dict[str, Any]:
        """The file's JSON."""
        sums = {"tokens": self.tokens, "documents": self.documents, "max_id": self.max_id}
        return {"schema_version": SCHEMA_VERSION} | sums | asdict(self)

    @staticmethod
    def read(folder: Path, name: str = INDEX) -> TokenIndex:
        """Raises TokensError where there is none, or it is torn or of another schema_version."""
        try:
            document = json.loads((folder / name).read_bytes())
            version = document["schema_version"]
        except (FileNotFoundError, NotADirectoryError):
            raise TokensError.of(folder, f"has no {name}: it is no folder of tokens, or was not finished") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise TokensError.of(folder, f"{name} cannot be read ({error!r})") from None
        if version != SCHEMA_VERSION:
            raise TokensError.of(folder, f"{name} has schema_version {version!r}, read here is {SCHEMA_VERSION}")
        try:
            DTYPES[document["dtype"]]
            shards = tuple(Shard(**each | {"ends": tuple(each["ends"])}) for each in document["shards"])
            facts = {key: document[key] for key in ("dtype", "vocab", "eos", "made_from")}
            return TokenIndex(**facts, shards=shards)
        except (KeyError, TypeError) as error:
            raise TokensError.of(folder, f"{name} has not the keys that it must have ({error!r})") from None

    @staticmethod
    def of_whole(folder: Path) -> TokenIndex:
        """Read it, and see that every shard is there in its size. Raises TokensError naming the file."""
        index = TokenIndex.read(folder)
        itemsize = DTYPES[index.dtype].itemsize
        for shard in index.shards:
            try:
                size_bytes = shard.bin(folder).stat().st_size
                shard.docs(folder).stat()
            except OSError as error:
                raise TokensError.of(folder, f"{error.filename} is missing ({error.strerror})") from None
            if size_bytes != shard.tokens * itemsize:
                rule = f"{shard.name}.bin has {size_bytes} bytes, {shard.tokens * itemsize} were written"
                raise TokensError.of(folder, rule)
        return index

    @cached_property
    def sha256(self) -> str:
        """Of the whole index, and so of every byte of the shards as they were written."""
        return hashlib.sha256(json.dumps(self.document(), sort_keys=True).encode()).hexdigest()


class TokenStream:
    """The documents of a folder one after the other, read through memory maps."""

    def __init__(self, folder: Path) -> None:
        """Raises TokensError, see `TokenIndex.of_whole`."""
        self.folder = folder
        self.index = TokenIndex.of_whole(folder)
        self._starts = [*accumulate((shard.tokens for shard in self.index.shards), initial=0)]
        self._ids = lru_cache(OPEN_SHARDS)(self._map_ids)
        self._ends = lru_cache(OPEN_SHARDS)(self._map_ends)

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, start: int, stop: int) -> np.ndarray:
        """int64 [stop - start]: the tokens from `start` on."""
        parts = [self._ids(shard)[first:last] for shard, first, last in self._pieces(start, stop)]
        return np.concatenate(parts).astype(np.int64)

    def first_tokens(self, start: int, stop: int) -> np.ndarray:
        """int64, rising: the positions in (start, stop) of tokens with which a document begins."""
        found: list[np.ndarray] = []
        for shard, first, last in self._pieces(start, stop):
            ends = self._ends(shard)
            begins = [0, *ends[np.searchsorted(ends, first) : np.searchsorted(ends, last)]]
            found.append(np.array([each for each in begins if first <= each < last], np.int64) + self._starts[shard])
        positions = np.concatenate(found)
        return positions[positions > start]

    def _pieces(self, start: int, stop: int) -> Sequence[tuple[int, int, int]]:
        """(shard, first, last) of each shard that holds some of [start, stop)."""
        if not 0 <= start < stop <= len(self):
            raise IndexError(f"tokens {start} to {stop} of {len(self)}")
        first = bisect_right(self._starts, start) - 1
        last = bisect_left(self._starts, stop)
        return [
            (shard, max(start - self._starts[shard], 0), min(stop, self._starts[shard + 1]) - self._starts[shard])
            for shard in range(first, last)
        ]

    def _map_ids(self, shard: int) -> np.ndarray:
        return np.memmap(self.index.shards[shard].bin(self.folder), DTYPES[self.index.dtype], mode="r")

    def _map_ends(self, shard: int) -> np.ndarray:
        ends: np.ndarray = np.load(self.index.shards[shard].docs(self.folder), mmap_mode="r", allow_pickle=False)
        return ends
