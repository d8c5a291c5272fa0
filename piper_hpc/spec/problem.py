"""A broken rule as errors report it: key, value, the rule, and a value that works."""

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


class SpecError(ValueError):
    """Facts that contradict one another: one or more broken rules."""

    def __init__(self, *problems: Problem) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))
