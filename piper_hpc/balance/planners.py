"""Planners of expert placements: pure functions of counts, so that all ranks come to the same plan.

The paper's (arXiv 2605.05049, Section VI, Algorithm 2) swaps between the ranks with the most and the fewest rows; `lpt`
packs by falling load (Graham's longest processing time first, with equally many experts a rank), brings the packing as
near to the old placement as it can, and improves both that and the old placement by single swaps, priced.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from piper_hpc.balance.loads import Counts, LayerSeconds, Ranks, rank_rows
from piper_hpc.spec.workload import Routing

Planner = Callable[[Counts, Ranks, LayerSeconds], Ranks]
"""(counts [samples, experts], rank of each expert, seconds) -> rank of each expert, each rank with as many as before.
Deterministic: ties go to the lowest number."""

ROUNDS = 100
"""Swaps at most of the paper's algorithm (T there)."""
SWAPS = 16
"""Swaps at most of `improved`: what they cannot mend, a fresh packing can."""
MOVE_SHARE = 0.01
"""What saves less than this part of the layer's seconds is not done: it would be noise of the samples."""


def swap(counts: Counts, ranks: Ranks, seconds: LayerSeconds) -> Ranks:
    """Algorithm 2 of the paper on the sums of all samples: while it helps, the pair of experts of the busiest and of
    the idlest rank whose swap brings their loads nearest."""
    items, ranks = counts.sum(axis=0), ranks.copy()
    for _ in range(ROUNDS):
        loads = np.bincount(ranks, weights=items, minlength=seconds.prices.ep).astype(np.int64)
        high, low = int(loads.argmax()), int(loads.argmin())
        gap = loads[high] - loads[low]
        of_high, of_low = np.flatnonzero(ranks == high), np.flatnonzero(ranks == low)
        after = np.abs(gap - 2 * (items[of_high][:, None] - items[of_low][None, :]))
        best = int(after.argmin())
        if high == low or after.flat[best] >= gap:
            break
        first, second = of_high[best // len(of_low)], of_low[best % len(of_low)]
        ranks[first], ranks[second] = low, high
    return ranks


def lpt(counts: Counts, ranks: Ranks, seconds: LayerSeconds) -> Ranks:
    """The better of the old placement and of a fresh packing, both improved by swaps; the fresh one where it saves
    MOVE_SHARE more, as it moves more."""
    kept, fresh = (
        improved(counts, start, seconds) for start in (ranks, nearest(packed(counts, seconds.prices.ep), ranks))
    )
    return fresh if seconds(counts, fresh) < seconds(counts, kept) * (1 - MOVE_SHARE) else kept


def packed(counts: Counts, ep: int) -> Ranks:
    """Experts by falling load to the rank with the least rows that has room, [experts]."""
    items = counts.sum(axis=0)
    room, loads = np.full(ep, len(items) // ep), np.zeros(ep, np.int64)
    ranks = np.zeros(len(items), np.int64)
    for expert in np.argsort(-items, kind="stable"):
        rank = int(np.where(room > 0, loads, np.iinfo(np.int64).max).argmin())
        ranks[expert] = rank
        loads[rank] += items[expert]
        room[rank] -= 1
    return ranks


def nearest(wanted: Ranks, ranks: Ranks) -> Ranks:
    """`wanted` with its ranks renumbered so that most experts stay where they are."""
    from scipy.optimize import linear_sum_assignment  # a third of a second; Balancer imports it before steps are timed

    ep = int(ranks.max()) + 1
    stay = np.zeros((ep, ep), np.int64)
    np.add.at(stay, (wanted, ranks), 1)
    _, renumbered = linear_sum_assignment(stay, maximize=True)
    return np.asarray(renumbered, np.int64)[wanted]


def improved(counts: Counts, ranks: Ranks, seconds: LayerSeconds) -> Ranks:
    """The best single swap of an expert of a busiest rank, again and again while it saves MOVE_SHARE."""
    ranks, now_s = ranks.copy(), seconds(counts, ranks)
    for _ in range(SWAPS):
        tried = _best_swap(counts, ranks, seconds)
        if tried is None:
            break
        then_s = seconds(counts, tried)
        if then_s >= now_s * (1 - MOVE_SHARE):
            break
        ranks, now_s = tried, then_s
    return ranks


CANDIDATES = 4
"""Swaps that are priced in a round: those that leave the fewest rows on the busiest ranks."""
PARTNERS = 8
"""Ranks, the idlest ones, with whose experts those of the busiest rank may be swapped."""


def _best_swap(counts: Counts, ranks: Ranks, seconds: LayerSeconds) -> Ranks | None:
    """`ranks` with the cheapest of a few swaps; None where one rank holds everything."""
    ep = seconds.prices.ep
    rows = rank_rows(counts, ranks, ep)
    # The rank that is the busiest in the samples with most to gain.
    excess = np.zeros(ep)
    np.add.at(excess, rows.argmax(axis=1), rows.max(axis=1) - rows.mean(axis=1))
    high = int(excess.argmax())
    idlest = [rank for rank in np.argsort(rows.sum(axis=0), kind="stable").tolist() if rank != high][:PARTNERS]
    mine, others = np.flatnonzero(ranks == high), np.flatnonzero(np.isin(ranks, idlest))
    if not len(others):
        return None
    # Busiest rank of each sample after each swap, [samples, mine, others]: of the two ranks that change, and the rest.
    by_rank = np.where(np.arange(ep) == high, -1, rows)
    order = np.sort(by_rank, axis=1)
    busiest = np.where(rows[:, ranks[others]] == order[:, -1:], order[:, -2:-1], order[:, -1:]) if ep > 2 else 0
    moved = counts[:, mine][:, :, None] - counts[:, others][:, None, :]
    here, there = rows[:, high][:, None, None] - moved, rows[:, ranks[others]][:, None, :] + moved
    rest = np.broadcast_to(busiest, rows[:, ranks[others]].shape)[:, None, :] if ep > 2 else 0
    after = np.maximum(np.maximum(here, there), rest).sum(axis=0)
    best: tuple[float, Ranks] | None = None
    for flat in np.argsort(after, axis=None, kind="stable")[:CANDIDATES]:
        first, second = mine[flat // len(others)], others[flat % len(others)]
        tried = ranks.copy()
        tried[first], tried[second] = ranks[second], ranks[first]
        price_s = seconds(counts, tried)
        if best is None or price_s < best[0]:
            best = price_s, tried
    assert best is not None
    return best[1]


PLANNERS: Mapping[str, Planner] = {"lpt": lpt, "swap": swap}
"""By the name in parallelism.migration; `auto` is the first."""


def evened(routing: Routing, experts: int, ep: int) -> Routing:
    """The routing as it is once experts have moved: its shares by expert, packed, as a histogram of adjacent experts.

    Where it has no histogram, as if the busiest rank's share were spread evenly over that rank's experts, and the rest
    over all others.
    """
    each = experts // ep
    if routing.histogram:
        shares = np.array(routing.histogram) / sum(routing.histogram)
    else:
        busiest = float(routing.load(ep)) / ep
        shares = np.array([busiest / each] * each + [(1 - busiest) / max(1, experts - each)] * (experts - each))
    ranks = packed(np.round(shares * 2**40).astype(np.int64)[None], ep)
    return replace(routing, histogram=tuple(shares[np.argsort(ranks, kind="stable")].tolist()))
