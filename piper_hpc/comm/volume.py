"""What a plan sends, counted: rows, bytes and messages of one rank by the widest link that each crosses."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from piper_hpc.comm.levels import Chain, Places
from piper_hpc.comm.routes import RoutePlan
from piper_hpc.spec.exchange import INDEX_BYTES, LEVELS

TIERS = LEVELS
"""Links by width: inside a node, between nodes of a rack, between racks. What a rank keeps crosses none."""


@dataclass
class Traffic:
    """Sent over the links of one tier. payload_bytes: rows alone; metadata_bytes: the row index and weight that a
    deduplicated choice takes along (counts, whose size no routing changes, are in neither); messages: parts of
    exchanges that hold rows."""

    rows: int = 0
    payload_bytes: int = 0
    metadata_bytes: int = 0
    messages: int = 0


def volume(plan: RoutePlan, chain: Chain, places: Places, *, row_bytes: int, weight_bytes: int) -> dict[str, Traffic]:
    """What the rank of `chain` sends in one dispatch of `plan`, by tier; what it receives in one combine.

    row_bytes: of one row; weight_bytes: of one weight, which travels in the type that it has.
    """
    sent = {tier: Traffic() for tier in TIERS}
    for legs in plan.routes:
        for leg in legs:
            group = chain.hops[leg.level].group
            for traffic, rows in _abroad(sent, chain.rank, group, leg.send, places):
                traffic.rows += rows
                traffic.payload_bytes += rows * row_bytes
                traffic.messages += rows > 0
    for parcel in plan.sharing.parcels if plan.sharing is not None else ():
        for traffic, choices in _abroad(sent, chain.rank, chain.hops[parcel.level].group, parcel.send, places):
            traffic.metadata_bytes += choices * (INDEX_BYTES + weight_bytes)
    return sent


def rows_to(plan: RoutePlan, chain: Chain, ranks: int) -> list[int]:
    """Rows that the rank of `chain` sends to each rank in one dispatch of `plan`, those it keeps included, [ranks]."""
    sent = [0] * ranks
    for legs in plan.routes:
        for leg in legs:
            for peer, rows in zip(chain.hops[leg.level].group, leg.send, strict=True):
                sent[peer] += rows
    return sent


def _abroad(
    sent: dict[str, Traffic], rank: int, group: tuple[int, ...], counts: list[int], places: Places
) -> Iterable[tuple[Traffic, int]]:
    for peer, count in zip(group, counts, strict=True):
        if peer != rank:
            yield sent[places.tier(rank, peer)], count
