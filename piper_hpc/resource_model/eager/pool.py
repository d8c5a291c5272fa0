"""Bytes that a dispatcher of several levels keeps from one exchange to the next: `comm.transport.BufferPool`."""

from __future__ import annotations

from piper_hpc.resource_model.all_to_all import domain_load
from piper_hpc.spec import Algorithm, AllToAllCell, get_algorithm, reach_probability


def pool_bytes(cell: AllToAllCell, algorithm: str) -> int:
    """Bytes of the buffers of one rank after a step; 0 for `flat`, which keeps none.

    Rows for the own node are sent once. The others (remote) take one hop a level: what a rank receives at one hop it
    relays at the next, and combine brings it back the same way. Without deduplication choices are sent at every hop;
    with it a token is one row in each domain that it enters, until the last hop, and combine adds up what the others
    unpack. The rank is the busiest one: its experts are sent `imbalance` times the mean, and it relays its share of
    what its innermost domain is sent; what it sends itself, and relays in wider domains, is that of balanced routing.
    """
    found = get_algorithm(algorithm)
    if not found.domains:
        return 0
    choices, domains = cell.logical_bytes / cell.row_bytes, _levels(found, cell)
    if not domains:
        return round((1 + cell.imbalance) * choices * cell.row_bytes)  # out and in: nothing is relayed
    inmost, others = domains[-1], 1 - 1 / domains[-1]  # what a rank sends its own domain is not relayed
    load = float(domain_load(cell.imbalance, cell.ranks / inmost, cell.ranks))
    remote = choices * others
    wider = [_entering(cell, number) if found.dedup else remote for number in domains[:-1]]
    even, hot = (_entering(cell, inmost, each) * others if found.dedup else remote * each for each in (1.0, load))
    sent = [*wider, even]
    ends = (choices - remote + sent[0]) + cell.imbalance * choices
    relayed, packed = sum(wider) + hot, sum(sent[1:]) + remote * load
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


def _entering(cell: AllToAllCell, domains: int, load: float = 1.0) -> float:
    """Rows of one rank where each of its tokens enters each of `domains` domains once: all that it reaches. One with
    `load` times the mean's choices is reached as if it had so many times the experts."""
    tokens = cell.logical_bytes / cell.row_bytes / cell.top_k
    experts = min(cell.experts, cell.experts / domains * load)
    return tokens * domains * float(reach_probability(experts, cell.experts, cell.top_k))
