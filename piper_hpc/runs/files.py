"""Documents and rows below one folder: how they are read, and written in one move and with the folder's own mode."""

from __future__ import annotations

import contextlib
import json
import math
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from piper_hpc.spec.problem import Problem, SpecError

SCHEMA_VERSION = 1
BLOCK_BYTES = 4096
PRIVATE, GROUP, FILE = 0o700, 0o070, 0o666
"""Mode of a folder for its user alone; the group's share of a mode; what a file has of its folder's mode."""


class RecordError(SpecError):
    """A file of a run's folder that cannot be read as what it must be: `reason` names the file and the rule."""

    def __init__(self, path: Path, reason: str) -> None:
        self.reason = reason
        works = "a run that `python -m piper_hpc.jobs list` shows without a remark"
        super().__init__(Problem("RUN", str(path), reason, works))


@contextmanager
def understood(run: Files) -> Iterator[None]:
    """Raise RecordError where what is read of a run in this `with` has not the keys and types that it must have."""
    try:
        yield
    except SpecError:
        raise  # it says already what is wrong
    except (AttributeError, LookupError, TypeError, ValueError, ArithmeticError) as error:
        # Each file is JSON of this version; it was written by something else nevertheless.
        raise RecordError(run.path, f"its record cannot be read ({type(error).__name__}: {error})") from error


class Files:
    """A folder's documents (JSON with a schema_version) and rows (JSONL). Readers raise RecordError for a file that is
    torn, unreadable or of another schema_version."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).resolve()

    @property
    def mode(self) -> int:
        """Who may enter, read and write it: the folder's own mode, which its folders and files have too."""
        return self.path.stat().st_mode & 0o777

    def take_umask(self) -> int:
        """Have all that this process and its children make from now on follow the folder's mode; returns the umask that
        was before."""
        return os.umask(0o777 & ~self.mode)

    @contextmanager
    def own_umask(self) -> Iterator[None]:
        """`take_umask` for the length of a `with`."""
        before = self.take_umask()
        try:
            yield
        finally:
            os.umask(before)

    def _read(self, name: str) -> dict[str, Any]:
        return self._json(name, self._text(name)) if (self.path / name).exists() else {}

    def _text(self, name: str) -> str:
        try:
            return (self.path / name).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise RecordError(self.path, f"{name} cannot be read ({first_line(error)})") from error

    def _json(self, name: str, text: str) -> dict[str, Any]:
        try:
            loaded = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise RecordError(self.path, f"{name} is no JSON ({first_line(error)})") from error
        document = self._mapping(name, loaded)
        version = document.get("schema_version", SCHEMA_VERSION)
        if version != SCHEMA_VERSION:
            raise RecordError(self.path, f"{name} has schema_version {version!r}, read here is {SCHEMA_VERSION}")
        return document

    def _mapping(self, name: str, loaded: Any) -> dict[str, Any]:
        if not isinstance(loaded, dict):
            raise RecordError(self.path, f"{name} must hold a mapping of keys to values")
        return loaded

    def _write(self, name: str, document: dict[str, Any]) -> None:
        self._replace(name, json.dumps({"schema_version": SCHEMA_VERSION} | document, indent=2) + "\n")

    def _replace(self, name: str, text: str) -> None:
        path = self.path / name
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            try:
                os.fchmod(file.fileno(), self.mode & FILE)  # drafts of tempfile are the user's alone
                file.write(text)
                file.close()
                os.replace(file.name, path)
            except BaseException:  # a full disk leaves no draft behind
                with contextlib.suppress(OSError):
                    os.unlink(file.name)
                raise

    def _rows(self, name: str) -> list[dict[str, Any]]:
        if not (self.path / name).exists():
            return []
        lines = self._text(name).splitlines(keepends=True)
        # A last line without its newline is a write that a kill cut off.
        return [self._json(name, line) for line in lines if line.endswith("\n") and line.strip()]

    def _append(self, name: str, row: dict[str, Any], attempt: int) -> None:
        line = json.dumps(_finite({"schema_version": SCHEMA_VERSION, "attempt": attempt} | row))
        is_new = not (self.path / name).exists()
        with (self.path / name).open("ab+") as file:
            if is_new:
                os.fchmod(file.fileno(), self.mode & FILE)
            _drop_torn_line(file)
            file.write(f"{line}\n".encode())

    def _make(self, folder: Path) -> Path:
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=PRIVATE)
            set_mode(folder, self.mode)
        return folder


def _drop_torn_line(file: IO[bytes]) -> None:
    """Cut off a last line without its newline, which a kill left: the next row would become part of it."""
    end = file.seek(0, os.SEEK_END)
    kept = end
    while kept:
        start = max(0, kept - BLOCK_BYTES)
        file.seek(start)
        newline = file.read(kept - start).rfind(b"\n")
        if newline >= 0:
            kept = start + newline + 1
            break
        kept = start
    if kept < end:
        file.truncate(kept)


def set_mode(folder: Path, mode: int) -> None:
    """chmod, with the set-group-ID bit as it is: shared projects have it on, and chmod(2) takes it off."""
    folder.chmod(mode & 0o777 | folder.stat().st_mode & stat.S_ISGID)


def _finite(value: Any) -> Any:
    """The value with null for every number that JSON does not have: a diverged loss is no reason for a broken row."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
