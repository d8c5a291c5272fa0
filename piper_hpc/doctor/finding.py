"""One thing that was looked at."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

State = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, what was found, and where it is not well how to mend it. where: a node's name,
    empty for this machine."""

    subject: str
    state: State
    found: str
    mend: str = ""
    where: str = ""

    def document(self) -> dict[str, Any]:
        """As plain JSON types."""
        return asdict(self)


def ok(subject: str, found: str) -> Finding:
    """It is well."""
    return Finding(subject, "ok", found)


def warning(subject: str, found: str, mend: str) -> Finding:
    """Some of what one may want will not work."""
    return Finding(subject, "warning", found, mend)


def failed(subject: str, found: str, mend: str) -> Finding:
    """Runs will not work."""
    return Finding(subject, "failed", found, mend)
