"""Bytes that a dispatcher of several levels keeps from one exchange to the next: `comm.transport.BufferPool`."""

from __future__ import annotations

from piper_hpc.spec import Algorithm, AllToAllCell, get_algorithm, reach_probability


def pool_bytes(cell: AllToAllCell, algorithm: str) -> int:
    """Bytes of the buffers of one rank after a step; 0 for `flat`, which keeps none.

    Rows for the own node are sent once. The others (remote) take one hop a level: what a rank receives at one hop it
    relays at the next, and combine brings it back the same way. Of balanced routing, but for the rows that arrive at
    the busiest rank's experts. Without deduplication choices are sent at every hop; with it a token is one row in each
    domain that it enters, until the last hop, and combine adds up what the others unpack.
    """
    found = get_algorithm(algorithm)
    if not found.domains:
        return 0
    choices, domains = cell.logical_bytes / cell.row_bytes, _levels(found, cell)
    remote = choices * (1 - 1 / domains[-1]) if domains else 0.0
    sent = [*(_entering(cell, number) if found.dedup else remote for number in domains), remote]
    if found.dedup and domains:
        sent[-2] -= _entering(cell, domains[-1]) / domains[-1]  # a token's own node is not sent to
    ends = (choices - remote + sent[0]) + cell.imbalance * choices
    relayed, packed = sum(sent[:-1]), sum(sent[1:])
    returned, unpacked = packed, 0.0 if found.dedup else relayed
    return round((ends + relayed + packed + returned + unpacked) * cell.row_bytes)


def _levels(algorithm: Algorithm, cell: AllToAllCell) -> list[int]:
    """Domains at each level before the last, widest first; one that joins nothing is left out (comm.hierarchy)."""
    counts: list[int] = []
    for domain in reversed(algorithm.domains):
        number = {"rank": cell.ranks, "node": cell.nodes, "rack": cell.racks}[domain]
        if number > 1 and (not counts or number < counts[0]):
            counts.insert(0, number)
    return counts


def _entering(cell: AllToAllCell, domains: int) -> float:
    """Rows of one rank where each of its tokens enters each of `domains` domains once: all that it reaches."""
    tokens = cell.logical_bytes / cell.row_bytes / cell.top_k
    return tokens * domains * float(reach_probability(cell.experts / domains, cell.experts, cell.top_k))
