"""The error of the testbed's commands: key, value, the rule that it breaks, and a value that works."""

from __future__ import annotations

BAD_INPUT = 2  # nothing was changed
FAILED = 1  # something was tried, failed, and was taken back


class Fault(Exception):
    """Ends the command with `exit_code` and one message: key, value, rule, and a value or command that works."""

    def __init__(self, key: str, value: object, rule: str, works: str, exit_code: int = BAD_INPUT) -> None:
        super().__init__(f"{key}={value}: {rule}; works: {works}")
        self.key = key
        self.value = value
        self.rule = rule
        self.works = works
        self.exit_code = exit_code

    def document(self) -> dict[str, object]:
        """The same for `--json`."""
        return {"key": self.key, "value": str(self.value), "rule": self.rule, "works": self.works}
