"""Documents of text files, in an order that the command line and the files' names decide alone."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from piper_hpc.config import ConfigError, Problem

IN_FOLDERS = (".txt", ".txt.gz", ".jsonl", ".jsonl.gz")
BLOCK_BYTES = 1 << 22


@dataclass(frozen=True)
class Source:
    """One input file. name: as it was given, or below the folder that was given."""

    path: Path
    name: str
    size_bytes: int

    @property
    def has_lines(self) -> bool:
        """Whether each line is a document."""
        return self.path.name.removesuffix(".gz").endswith(".jsonl")


def find_sources(inputs: Sequence[Path]) -> list[Source]:
    """Files of the inputs as they were given, those of a folder (all below it, see IN_FOLDERS) sorted.

    Raises ConfigError where an input is not there, has no such file, or gives one a second time.
    """
    found: dict[Path, Source] = {}
    for given in inputs:
        paths = [given]
        if given.is_dir():
            paths = sorted(path for path in given.rglob("*") if path.name.endswith(IN_FOLDERS) and path.is_file())
        if not paths or not given.exists():
            rule = f"must be a file, or a folder with files *{', *'.join(IN_FOLDERS)}"
            raise ConfigError(Problem("INPUT", str(given), rule, "README.md"))
        for path in paths:
            if path.resolve() in found:
                raise ConfigError(Problem("INPUT", str(path), "is given twice", "each file once"))
            name = path.relative_to(given).as_posix() if given.is_dir() else path.name
            found[path.resolve()] = Source(path, name, path.stat().st_size)
    return list(found.values())


def file_sha256(path: Path, on_bytes: Callable[[int], None] = lambda count: None) -> str:
    """In hexadecimal. on_bytes: told how many bytes were read, block by block."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            on_bytes(len(block))
    return digest.hexdigest()


def documents(source: Source, key: str, first: int, on_bytes: Callable[[int], None]) -> Iterator[str]:
    """Texts of a file from document number `first` on: of a JSON Lines file `key` of each line, else the whole file.

    on_bytes: told how many bytes of the file are behind the document that comes. Raises ConfigError naming file and
    line where something is not UTF-8, not JSON, or has no text.
    """
    gzipped = source.path.suffix == ".gz"
    try:
        with source.path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if gzipped else nullcontext(raw) as file:
            if not source.has_lines:
                if first == 0:
                    text = file.read().decode()
                    on_bytes(source.size_bytes)
                    yield text
                return
            behind = 0
            for number, line in islice(enumerate(file), first, None):
                on_bytes(raw.tell() - behind)
                behind = raw.tell()
                yield _text(source, number + 1, line, key)
    except UnicodeDecodeError as error:
        raise ConfigError(Problem("INPUT", str(source.path), f"is not UTF-8: {error}", "a file of text")) from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise ConfigError(Problem("INPUT", str(source.path), f"is no whole gzip file: {error}", "gzip -t")) from None


def _text(source: Source, number: int, line: bytes, key: str) -> str:
    """Of one line; empty where it is blank. Half a surrogate pair, which JSON can escape and UTF-8 cannot say, becomes
    U+FFFD."""
    where = f"{source.path}:{number}"
    if not line.strip():
        return ""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ConfigError(Problem("INPUT", where, f"is not UTF-8: {error}", "a line of UTF-8")) from None
    except ValueError as error:
        raise ConfigError(Problem("INPUT", where, f"is not JSON: {error}", '{"text": "..."} on each line')) from None
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
        keys = ", ".join(row) if isinstance(row, dict) else type(row).__name__
        rule = f"has no text under --key {key}; it has {keys}"
        texts = [name for name, value in row.items() if isinstance(value, str)] if isinstance(row, dict) else []
        raise ConfigError(Problem("INPUT", where, rule, f"--key {texts[0]}" if texts else '{"text": "..."}'))
    return str(row[key]).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
