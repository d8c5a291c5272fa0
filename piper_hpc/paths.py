"""Where data lies: the project's own beside the package in a checkout, or inside it when installed from a wheel; and a
user's own in the folder that PIPER_CONF names."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def data_folder(name: str) -> Path:
    """The folder `conf` or `sbatch_templates`."""
    checkout = _PACKAGE.parent / name
    return checkout if (_PACKAGE.parent / "pyproject.toml").exists() else _PACKAGE / "_data" / name


OWN_FOLDER = "PIPER_CONF"
"""Variable with a folder of a user's own: groups as its sub-folders, `cluster/mysite.yaml`, and batch scripts."""


def own_folder() -> Path | None:
    """The user's folder, where one is named."""
    named = os.environ.get(OWN_FOLDER)
    return Path(named).expanduser() if named else None


def batch_templates(name: str) -> Iterator[Path]:
    """Where a batch script `name` may lie, first come first: an absolute path, the user's folder, the package."""
    own = own_folder()
    if own is not None:
        yield from (own / name, own / "sbatch_templates" / name)
    yield data_folder("sbatch_templates") / name


def batch_template(name: str) -> Path | None:
    """The batch script `name`; None where there is none."""
    return next((path for path in batch_templates(name) if path.is_file()), None)
