"""Which ends of an attempt are tried again: by class, and by whether the attempt brought the run on. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

ONCE = ("comm", "hang", "rendezvous", "killed", "lost")
"""Classes that may be chance: the next attempt is tried, and where it ends so again, none."""
TAKEN = ("preempted", "node_fail")
"""Classes in which the job had no part."""
IN_VAIN = 3
"""How many attempts in a row may be taken away before they saved a step."""


@dataclass(frozen=True)
class Ended:
    """How an attempt ended; new_steps: that it added to the run's newest checkpoint."""

    failure_class: str | None
    new_steps: int


@dataclass(frozen=True)
class Decision:
    """Whether the run goes on by itself, and why."""

    again: bool
    why: str


def decide(earlier: Sequence[Ended], ended: Ended) -> Decision:
    """Whether an attempt follows one that ended so; earlier: the attempts before it, first one first."""
    what = ended.failure_class
    if what == "timeout":
        if ended.new_steps > 0:
            return Decision(True, f"it saved {ended.new_steps} new steps")
        return Decision(False, "it is not tried again: no new step was saved before the time limit")
    if what in TAKEN:
        vain = 0
        for each in reversed([*earlier, ended]):
            if each.new_steps > 0 or each.failure_class not in TAKEN:
                break
            vain += 1
        if vain < IN_VAIN:
            return Decision(True, "the job had no part in it")
        return Decision(False, f"it is not tried again: {vain} attempts in a row saved no step")
    if what in ONCE:
        if earlier and earlier[-1].failure_class in ONCE:
            return Decision(False, f"it is not tried again: the attempt before ended as {earlier[-1].failure_class}")
        return Decision(True, "it is tried once more")
    return Decision(False, f"it is not tried again: {what} would come again")
