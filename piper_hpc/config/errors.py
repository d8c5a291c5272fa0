"""The error of a command's bad input: lists every broken rule with key, value and a value that works."""

from __future__ import annotations

from piper_hpc.spec.problem import Problem, SpecError


class ConfigError(SpecError):
    """One or more broken rules; ends a command with exit code 2 and submits nothing."""


__all__ = ["ConfigError", "Problem"]
