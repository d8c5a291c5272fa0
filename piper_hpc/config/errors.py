"""Bad input, said so that it can be put right: key, value, the rule it breaks, and a value that works."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Problem:
    """One broken rule. `works` is an override, ready to paste."""

    key: str
    value: Any
    rule: str
    works: str

    def __str__(self) -> str:
        return f"{self.key} = {self.value!r}: {self.rule}; this works: {self.works}"


class ConfigError(ValueError):
    """One or more broken rules; ends a command with exit code 2 and submits nothing."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))
