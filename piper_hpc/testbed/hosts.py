"""The testbed's block in /etc/hosts: names of the nodes, and which testbed folder owns them."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping
from pathlib import Path

HOSTS = Path("/etc/hosts")
BEGIN = "# piper_hpc.testbed begin: "  # followed by the folder of the testbed that it belongs to
END = "# piper_hpc.testbed end"


def add(folder: Path, names: Mapping[str, str]) -> None:
    """Write the block: `names` to addresses, on behalf of the testbed in `folder`."""
    block = [f"{BEGIN}{folder}", *(f"{address} {name}" for name, address in names.items()), END]
    _write([*_outside(), *block])


def remove() -> None:
    """Take the block out; the rest of the file stays as it is."""
    if owner() is not None:
        _write(_outside())


def owner() -> Path | None:
    """The folder of the testbed whose block stands in the file."""
    for line in _lines():
        if line.startswith(BEGIN):
            return Path(line.removeprefix(BEGIN).strip())
    return None


def first_conflict(names: Mapping[str, str]) -> str | None:
    """The first of these names that somebody else's line defines."""
    for line in _outside():
        for word in line.partition("#")[0].split()[1:]:
            if word in names:
                return word
    return None


def _lines() -> list[str]:
    return HOSTS.read_text().splitlines()


def _outside() -> list[str]:
    kept, ours = [], False
    for line in _lines():
        ours = ours or line.startswith(BEGIN)
        if not ours:
            kept.append(line)
        ours = ours and line != END
    return kept


def _write(lines: list[str]) -> None:
    text = "\n".join(lines) + "\n"
    fresh = HOSTS.with_name(HOSTS.name + ".piper")
    fresh.write_text(text)
    fresh.chmod(HOSTS.stat().st_mode & 0o777)
    try:
        os.replace(fresh, HOSTS)  # a reader sees the old file or the new one
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        fresh.unlink()  # in a container the file is a mount of its own, and can only be written in place
        HOSTS.write_text(text)
