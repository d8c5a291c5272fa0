"""Which network a run used: one line, and why it may be the wrong one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

from piper_hpc.report.units import size
from piper_hpc.runs import RunFolder
from piper_hpc.spec.fabric import Fabric

SHOWN = 4
"""Groups of interfaces in the line, those that sent most."""


def line(run: RunFolder) -> str:
    """What the ranks' library said, and bytes sent by interface, over all nodes; empty of records without it."""
    found = of(run)
    if not found:
        return ""
    if found["nodes"] == 1:
        return "network: none was crossed, all ranks are on one node"
    libraries = [(Fabric(each["library"], each["provider"], tuple(each["interfaces"])), each["nodes"])
                 for each in found["libraries"]]  # fmt: skip
    everywhere = len(libraries) == 1 and libraries[0][1] == found["nodes"]
    names = [f"{fabric}" if everywhere else f"{fabric} on {count} of {found['nodes']} nodes"
             for fabric, count in libraries]  # fmt: skip
    sent = [f"{size(total)} over {name}" for name, total in _groups(found["interfaces"])]
    return "network: " + "; ".join([
        ", ".join(names) or "the library did not name it",
        ", ".join(sent[:SHOWN]) or "no interface counted anything",
    ])  # fmt: skip


def warnings(run: RunFolder) -> list[str]:
    """Lines that say where the run did not use the network that its cluster has."""
    return [f"slow network: {why}" for why in of(run).get("fallbacks", ())]


def of(run: RunFolder) -> dict[str, Any]:
    found: dict[str, Any] = run.manifest().get("job", {}).get("network", {})
    return found


def _groups(interfaces: Iterable[dict[str, Any]]) -> list[tuple[str, int]]:
    """Interfaces whose names differ by their last number as one, `hsn0-3`, with the bytes sent; most bytes first."""
    sent: Counter[str] = Counter()
    numbers: dict[str, list[int]] = {}
    for each in interfaces:
        stem, number = re.fullmatch(r"(.*?)(\d*)", each["interface"]).groups()  # type: ignore[union-attr]
        sent[stem] += each["sent_bytes"]
        numbers.setdefault(stem, []).extend([int(number)] if number else [])
    return [(f"{stem}{_ranges(numbers[stem])}", total) for stem, total in sent.most_common() if total]


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3,5` of 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, each)) for each in runs)
