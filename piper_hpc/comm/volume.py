"""What a plan sends, counted: rows, bytes and messages of one rank by the widest link that each crosses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from piper_hpc.comm.hierarchy import Places
from piper_hpc.spec.all_to_all import INDEX_BYTES, LEVELS


@dataclass(frozen=True)
class Sent:
    """Part of one message of a dispatch. peer: index into the expert group, of the rank itself for what it keeps; rows:
    of tokens; choices: whose metadata (row index and weight) goes along, as they share rows."""

    peer: int
    rows: int = 0
    choices: int = 0


@dataclass
class Traffic:
    """Sent over the links of one level. payload_bytes: rows alone; metadata_bytes: the row index and weight of each
    deduplicated choice (counts, whose size no routing changes, are in neither); messages: those that hold rows."""

    rows: int = 0
    payload_bytes: int = 0
    metadata_bytes: int = 0
    messages: int = 0


def volume(sent: Iterable[Sent], places: Places, rank: int, *, row_bytes: int, weight_bytes: int) -> dict[str, Traffic]:
    """What `rank` (index into the group at `places`) sends to others in one dispatch, and receives in its combine, by
    level of spec.LEVELS. row_bytes: of one row; weight_bytes: of one weight, in the type that it is sent in."""
    traffic = {level: Traffic() for level in LEVELS}
    for each in sent:
        if each.peer != rank:
            of_level = traffic[places.tier(rank, each.peer)]
            of_level.rows += each.rows
            of_level.payload_bytes += each.rows * row_bytes
            of_level.metadata_bytes += each.choices * (INDEX_BYTES + weight_bytes)
            of_level.messages += each.rows > 0
    return traffic


def rows_to(sent: Iterable[Sent], ranks: int) -> list[int]:
    """Rows that a rank sends to each rank of its group in one dispatch, those it keeps included, [ranks]."""
    rows = [0] * ranks
    for each in sent:
        rows[each.peer] += each.rows
    return rows
