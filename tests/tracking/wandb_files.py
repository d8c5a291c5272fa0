"""What wandb's own reader reads in the files of an offline run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

Records = list[dict[str, Any]]


def offline_runs(folder: Path) -> list[Path]:
    """The offline runs under a folder, oldest first."""
    return sorted(folder.glob("wandb/offline-run-*"))


def read(offline_run: Path) -> Records:
    """All records of one."""
    (log,) = offline_run.glob("run-*.wandb")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(log)]
    shown = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    return [json.loads(line) for line in shown.stdout.splitlines()]


def history(records: Records) -> Records:
    """The rows, in their order."""
    return [record["history"]["item"] for record in records if record["type"] == "history"]
