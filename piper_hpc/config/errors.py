"""Bad input of a command: every broken rule with its key, value and a value that works."""

from __future__ import annotations

from piper_hpc.spec.problem import Problem, SpecError


class ConfigError(SpecError):
    """One or more broken rules; ends a command with exit code 2 and submits nothing."""


__all__ = ["ConfigError", "Problem"]
