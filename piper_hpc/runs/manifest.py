"""Provenance: who ran what, when, from which code, with which versions, in which environment."""

from __future__ import annotations

import getpass
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from piper_hpc.spec.secrets import SECRET_NAME, hidden

PACKAGES = ("piper-hpc", "torch", "numpy", "hydra-core", "omegaconf", "submitit", "wandb", "mpi4py")
# An allow-list: tokens and keys live in the environment too.
PREFIXES = (
    *("NCCL_", "RCCL_", "TORCH_NCCL_", "CCL_", "GLOO_", "MPICH_", "FI_", "UCX_"),
    *("OMP_", "MKL_", "HSA_", "ROCR_", "ZE_"),
)
NAMES = ("CUDA_VISIBLE_DEVICES", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_JOB_PARTITION", "SLURM_CONF")


def versions() -> dict[str, str]:
    """Installed versions of what shapes a result."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def environment() -> dict[str, str]:
    """The variables that shape a result, and no others; secrets neither in their names nor in their values."""
    shaping = {k: v for k, v in sorted(os.environ.items()) if k.startswith(PREFIXES) or k in NAMES}
    return {k: hidden(v) for k, v in shaping.items() if not SECRET_NAME.search(k)}


def git() -> dict[str, Any] | None:
    """Commit of the code, and whether the tree differs from it; None outside a checkout."""
    folder = Path(__file__).resolve().parent

    def ask(*words: str) -> str:
        command = ["git", "-C", str(folder), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return None


def provenance() -> dict[str, Any]:
    """What the launcher knows about itself."""
    return {
        "user": getpass.getuser(),
        "host": platform.node(),
        "command": [hidden(word) for word in sys.argv],
        "git": git(),
        "versions": versions(),
        "environment": environment(),
    }
