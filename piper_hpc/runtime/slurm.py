"""Questions to Slurm's commands, each with a time-out: a busy controller answers late, a lost one never."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TIMEOUT_S = 30.0
ADDRESS = ("SLURM_CONF", "SLURM_CONF_SERVER")
"""Variables by which Slurm's commands find their controller where it is not in the usual place."""


def address(environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Those of ADDRESS that are set."""
    return {key: environ[key] for key in ADDRESS if key in environ}


@dataclass(frozen=True)
class Answer:
    """What a command printed; reason: in one line, why it failed, empty where it did not."""

    text: str
    reason: str = ""

    @property
    def ok(self) -> bool:
        """Whether it answered."""
        return not self.reason


def ask(words: Sequence[str], environment: Mapping[str, str], timeout_s: float | None = None) -> Answer:
    """Run a command. environment: beside this process's; timeout_s: TIMEOUT_S where not given.

    Raises nothing: a command that is not there, fails or does not answer in time says so in the answer.
    """
    patience_s = TIMEOUT_S if timeout_s is None else timeout_s
    try:
        ended = subprocess.run(
            words, env=os.environ | dict(environment), capture_output=True, text=True, check=False, timeout=patience_s
        )
    except FileNotFoundError:
        return Answer("", f"there is no {words[0]} on the PATH")
    except subprocess.TimeoutExpired:
        return Answer("", f"{words[0]} gave no answer in {patience_s:g} s")
    if ended.returncode:
        return Answer(ended.stdout, " ".join(ended.stderr.split()) or f"{words[0]} ended with code {ended.returncode}")
    return Answer(ended.stdout)
