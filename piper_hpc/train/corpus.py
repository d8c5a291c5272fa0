"""The corpus: bytes of many files in one file of the cache, the same bytes on every rank.

A corpus is named by the SHA-256 of its bytes and never replaced, since jobs that run may have it mapped. An index by
the source files' names, sizes and times says which corpus they make; the digest was taken while it was written. A
start therefore reads no corpus: a file of the size and time that the index has is the file that was written.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from piper_hpc.spec import Problem, SpecError

EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "__pycache__"}
CHUNK_BYTES = 1 << 22
SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Corpus:
    """Bytes of many files in one file on disk, and where it came from. sha256: of the bytes, in hexadecimal."""

    path: Path
    files: int
    size_bytes: int
    sha256: str


def standard_library_files() -> list[Path]:
    """Python's own source files on this machine, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return sorted(
        path for path in root.rglob("*.py") if not EXCLUDED_FOLDERS.intersection(path.relative_to(root).parts)
    )


def find_files(pattern: str) -> list[Path]:
    """Files of a folder (all below it), of one path, or of a glob pattern, sorted.

    Raises FileNotFoundError naming the pattern where there are none.
    """
    root = Path(pattern).expanduser()
    found = root.rglob("*") if root.is_dir() else (Path(name) for name in glob.glob(str(root), recursive=True))
    files = sorted(path for path in found if path.is_file())
    if not files:
        raise FileNotFoundError(
            f"data.path={pattern}: no file matches; give a folder, a file or a glob such as 'text/**/*.txt'"
        )
    return files


def prepare_corpus(files: Sequence[Path], cache: Path) -> Corpus:
    """Concatenate `files` into one file under `cache`, or find that they were, see above.

    Safe with many processes at once, also of other jobs: each writes a temporary file, the first to finish names its
    own, and the others take that one.
    """
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    index = cache / f"corpus-{key}.json"
    found = _indexed(index, len(files))
    if found is not None:
        return found
    cache.mkdir(parents=True, exist_ok=True)
    made = _written(files, cache)
    about = {
        "schema_version": SCHEMA_VERSION,
        "corpus": made.path.name,
        "sha256": made.sha256,
        "size_bytes": made.size_bytes,
        "mtime_ns": made.path.stat().st_mtime_ns,
        "files": [[name, size] for name, size, _ in facts],
    }
    partial = _temporary(cache)
    partial.write_text(json.dumps(about))
    os.replace(partial, index)
    return made


def _indexed(index: Path, files: int) -> Corpus | None:
    """The corpus that an index names; None where there is none, or it is no longer the file that was written."""
    try:
        about: dict[str, Any] = json.loads(index.read_text())
        path = index.with_name(about["corpus"])
        facts = path.stat()
        if (facts.st_size, facts.st_mtime_ns) == (about["size_bytes"], about["mtime_ns"]):
            return Corpus(path, files, facts.st_size, about["sha256"])
    except (FileNotFoundError, ValueError, KeyError):  # never made, torn, or of an earlier version
        pass
    return None


def _written(files: Sequence[Path], cache: Path) -> Corpus:
    """The bytes of `files`, hashed as they are written, under a name that no other bytes have or ever had."""
    partial, digest, size_bytes = _temporary(cache), hashlib.sha256(), 0
    try:
        with partial.open("wb") as out:
            for path in files:
                text = path.read_bytes()
                out.write(text)
                digest.update(text)
                size_bytes += len(text)
        sha256 = digest.hexdigest()
        # A link, unlike a rename, refuses a name that is taken: what stands there may be mapped by a job.
        path = cache / f"corpus-{sha256[:16]}.bin"
        while True:
            try:
                os.link(partial, path)
                break
            except FileExistsError:
                if path.stat().st_size == size_bytes and _sha256(path) == sha256:
                    break
                path = cache / f"corpus-{sha256[:16]}-{os.urandom(4).hex()}.bin"  # torn, or changed by hand
    finally:
        partial.unlink()
    return Corpus(path, len(files), size_bytes, sha256)


def _temporary(cache: Path) -> Path:
    """A new empty file, in the cache so that it can be linked there; readable as other files are."""
    descriptor, name = tempfile.mkstemp(prefix="corpus-", suffix=".partial", dir=cache)
    os.close(descriptor)
    Path(name).chmod(0o644)
    return Path(name)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def prepare_on_all_ranks(files: Sequence[Path], cache: Path, node: str, *, first_on_node: bool) -> Corpus:
    """`prepare_corpus`, and the proof that every rank reads the same bytes. Collective over the default group.

    Rank 0 writes the corpus first, then one rank of each node that does not see rank 0's cache, so that a node reads
    its files once. node: this rank's, for the error. Raises SpecError on all ranks where one of them has other bytes.
    """
    if dist.get_rank() == 0:
        prepare_corpus(files, cache)
    dist.barrier()
    if first_on_node:
        prepare_corpus(files, cache)
    dist.barrier()
    mine = prepare_corpus(files, cache)
    found: list[tuple[str, Corpus]] = [(node, mine)] * dist.get_world_size()
    dist.all_gather_object(found, (node, mine))
    first_node, first = found[0]
    for rank, (its_node, other) in enumerate(found):
        if other.sha256 != first.sha256:
            rule = (
                f"rank {rank} on {its_node} would read it ({_said(other)}), and rank 0 on {first_node} {first.path} "
                f"({_said(first)}): all ranks must train on the same bytes"
            )
            works = "data.path=FOLDER on a file system that all nodes share"
            raise SpecError(Problem("data", str(other.path), rule, works))
    return mine


def _said(corpus: Corpus) -> str:
    return f"{corpus.size_bytes} bytes, sha256 {corpus.sha256[:16]}"
