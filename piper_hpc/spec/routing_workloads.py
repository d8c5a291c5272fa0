"""Routings W0 to W7: names from Megatron-LM's imbalance workloads (its pull request 7488), parameters this project's.

A routing is one global draw, a function of (workload, seed, step) and of its size alone: every layout and algorithm
sees the same logical routing, and every rank takes its own tokens of it. Every token has `top_k` distinct experts.

    W0 balanced      every expert gets the same number of assignments (+-1), from every source
    W1 hot experts   max(1, E/32) experts, picked by the draw, get the share p = min(1/2, hot/k) of all assignments
    W2 hot rank      the same share for the first E/8 experts: one rank at ep=8
    W3 spread hot    as many hot experts and the same share, at stride 8
    W4 ragged        sources hold unequal numbers of tokens, 1:4; targets are balanced
    W5 zero load     the last E/8 experts get nothing, and the first source has no tokens
    W6 rotating      W2, whose block of hot experts moves every 4 steps
    W7 burst         W0 with one step of W2 in 16
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

WORKLOADS = ("W0", "W1", "W2", "W3", "W4", "W5", "W6", "W7")

Ids = NDArray[np.int64]
Weights = NDArray[np.float32]

HOT_SHARE = 0.5
PARTS = 8
"""Hot and idle blocks are one part in so many of the experts; W3's stride."""
ROTATION_STEPS = 4
BURST_STEPS = 16
SHARES_FROM = 8
"""Steps whose draws make the mean shares by expert."""


@dataclass(frozen=True)
class HotExperts:
    """Which experts are hot, and how many of each token's choices are theirs on average."""

    experts: tuple[int, ...]
    choices: float


def is_burst(step: int) -> bool:
    """Whether W7's step is one of W2: the last of every 16."""
    return step % BURST_STEPS == BURST_STEPS - 1


def hot_experts(workload: str, *, experts: int, top_k: int, step: int = 0, seed: int = 0) -> HotExperts | None:
    """The hot experts of one step; None where no expert is hot. Raises ValueError as `draw` does."""
    _check(workload, experts, top_k)
    part = max(1, experts // PARTS)
    if workload == "W1":
        count = max(1, experts // 32)
        hot = _generator(seed, step, "W1").permutation(experts)[:count].tolist()
    elif workload == "W2" or (workload == "W7" and is_burst(step)):
        hot = list(range(part))
    elif workload == "W6":
        start = (step // ROTATION_STEPS) % max(1, experts // part) * part
        hot = list(range(start, start + part))
    elif workload == "W3":
        hot = list(range(0, experts, PARTS))[:part]
    else:
        return None
    # A hot expert takes one choice of a token at most, and the others must hold what is left of its choices.
    choices = min(HOT_SHARE * top_k, len(hot))
    return HotExperts(tuple(sorted(hot)), float(max(choices, top_k - (experts - len(hot)))))


def source_tokens(workload: str, *, ranks: int, tokens: int) -> list[int]:
    """Tokens that each source holds, [ranks]; `tokens` of a mean source."""
    if workload == "W4" and ranks > 1:
        # The first half of the sources is light: whole nodes differ, not only the ranks of each.
        light = round(2 * tokens / 5)
        half = ranks // 2
        return [light] * half + [tokens] * (ranks % 2) + [2 * tokens - light] * half
    if workload == "W5" and ranks > 1:
        each, more = divmod(tokens * ranks, ranks - 1)
        return [0] + [each + (source < more) for source in range(ranks - 1)]
    return [tokens] * ranks


def draw(
    workload: str, *, experts: int, top_k: int, ranks: int, tokens: int, rank: int, step: int = 0, seed: int = 0
) -> tuple[Ids, Weights]:
    """(expert_ids int64, weights float32), both [tokens of the rank, top_k]: one rank's part of the global draw.

    tokens: of a mean source, see `source_tokens`; weights of a token add up to 1. Raises ValueError for an unknown
    workload, and where a token cannot have `top_k` distinct experts.
    """
    held = source_tokens(workload, ranks=ranks, tokens=tokens)
    first = sum(held[:rank])
    ids = global_draw(workload, experts=experts, top_k=top_k, tokens=sum(held), step=step, seed=seed)
    weights = _generator(seed, step, "weights").uniform(0.5, 1.5, size=(sum(held), top_k))
    mine = slice(first, first + held[rank])
    return ids[mine], (weights[mine] / weights[mine].sum(1, keepdims=True)).astype(np.float32)


@lru_cache(maxsize=16)
def global_draw(
    workload: str,
    *,
    experts: int,
    top_k: int,
    tokens: int,
    step: int = 0,
    seed: int = 0,
    hot_step: int | None = None,
) -> Ids:
    """Experts of all tokens of all sources, int64 [tokens, top_k], not to be written to. Raises ValueError as `draw`
    does.

    hot_step: the step whose experts are hot, where that is another: W1 draws others every step.
    """
    picked = step if hot_step is None else hot_step
    hot = hot_experts(workload, experts=experts, top_k=top_k, step=picked, seed=seed)
    generator = _generator(seed, step, "routing")
    if hot is not None:
        return _skewed(hot, experts, top_k, tokens, generator)
    working = experts - max(1, experts // PARTS) if workload == "W5" and experts > 1 else experts
    return _balanced(max(working, top_k), top_k, tokens, generator)


def drawn_shares(workload: str, experts: int, top_k: int, tokens: int) -> tuple[float, ...]:
    """Share of all choices that each expert gets on average of steps of `tokens` tokens, [experts]. Raises ValueError
    as `draw` does."""
    size = {"experts": experts, "top_k": top_k, "tokens": tokens, "hot_step": 0 if workload == "W1" else None}
    drawn = [global_draw(workload, step=step, seed=1, **size).ravel() for step in range(SHARES_FROM)]
    counts = np.bincount(np.concatenate(drawn), minlength=experts)
    return tuple((counts / counts.sum()).tolist())


def imbalance(
    workload: str, *, experts: int, top_k: int, ranks: int, tokens: int, step: int = 0, seed: int = 0
) -> float:
    """Load imbalance: rows that the busiest rank receives or sends in a dispatch over the mean rank's, at least 1.

    Experts are in contiguous blocks.

    What it sends, it receives in the combine. 1 where there is no row.
    """
    held = source_tokens(workload, ranks=ranks, tokens=tokens)
    ids = global_draw(workload, experts=experts, top_k=top_k, tokens=sum(held), step=step, seed=seed)
    received = np.bincount(ids.reshape(-1) * ranks // experts, minlength=ranks)
    busiest = max(int(received.max()), top_k * max(held))
    return float(busiest / received.mean()) if received.sum() else 1.0


def reach_probability_by_domain(
    workload: str, *, experts: int, top_k: int, domains: int, step: int = 0, seed: int = 0
) -> list[float]:
    """Probability that a token has at least one expert in a domain, [domains]; experts in contiguous, equal blocks.

    Their sum over top_k is the share r(N) of rows left by deduplication: for balanced routing
    N (1 - C(E - E/N, k) / C(E, k)) / k. Of W5, whose working experts are fewer, likewise.
    """
    hot = hot_experts(workload, experts=experts, top_k=top_k, step=step, seed=seed)
    idle = max(1, experts // PARTS) if workload == "W5" and experts > 1 else 0
    if hot is None:
        hot = HotExperts((), 0.0)
    working = max(experts - idle, top_k)
    size = experts // domains
    whole = int(hot.choices)
    found = []
    for domain in range(domains):
        members = range(domain * size, (domain + 1) * size)
        of_hot = sum(expert in members for expert in hot.experts)
        of_rest = sum(expert < working for expert in members) - of_hot
        rest = working - len(hot.experts)
        missed = 0.0
        for choices, share in ((whole, 1 - (hot.choices - whole)), (whole + 1, hot.choices - whole)):
            if share:
                avoid = _p_miss(len(hot.experts), of_hot, choices) * _p_miss(rest, of_rest, top_k - choices)
                missed += share * avoid
        found.append(1 - missed)
    return found


def _check(workload: str, experts: int, top_k: int) -> None:
    if workload not in WORKLOADS:
        raise ValueError(f"workload={workload}: must be one of {', '.join(WORKLOADS)}, for example W0")
    if not 1 <= top_k <= experts:
        raise ValueError(f"top_k={top_k}: must be from 1 to experts={experts}, for example {min(8, experts)}")


Purpose = Literal["routing", "weights", "W1"]


def _generator(seed: int, step: int, purpose: Purpose) -> np.random.Generator:
    return np.random.default_rng([seed, step, ("routing", "weights", "W1").index(purpose)])


def _balanced(experts: int, top_k: int, tokens: int, generator: np.random.Generator) -> Ids:
    """Permutations of all experts, one after the other, cut into tokens: equal loads in every stretch of tokens, and
    every token a uniform choice."""
    rounds = -(-tokens * top_k // experts)
    order = np.argsort(generator.random((rounds, experts)), axis=1)
    # Where a token takes the end of one permutation and the start of the next, the next one puts off what it has.
    for previous in range(rounds - 1 if experts % top_k else 0):
        end = (previous + 1) * experts
        left = end % top_k
        if left:
            held = order[previous, experts - left :]
            after = order[previous + 1]
            clash = np.isin(after[: top_k - left], held)
            spare = np.flatnonzero(~np.isin(after, held))
            spare = spare[spare >= top_k - left][: clash.sum()]
            wrong = np.flatnonzero(clash)
            after[wrong], after[spare] = after[spare], after[wrong].copy()
    return order.reshape(-1)[: tokens * top_k].reshape(tokens, top_k).astype(np.int64)


def _skewed(hot: HotExperts, experts: int, top_k: int, tokens: int, generator: np.random.Generator) -> Ids:
    """Of each token's choices `hot.choices` on average among the hot experts, the others among the rest, both
    uniform."""
    hottest = np.array(hot.experts)
    rest = np.setdiff1d(np.arange(experts), hottest)
    whole = int(hot.choices)
    more = generator.random(tokens) < hot.choices - whole
    of_hot = np.argsort(generator.random((tokens, len(hottest))), axis=1)
    of_rest = np.argsort(generator.random((tokens, len(rest))), axis=1)
    counts = whole + more
    at = np.arange(top_k)[None, :]
    is_hot = at < counts[:, None]
    hot_at = np.minimum(at, len(hottest) - 1)
    rest_at = np.clip(at - counts[:, None], 0, max(len(rest) - 1, 0))
    chosen_hot = hottest[np.take_along_axis(of_hot, np.broadcast_to(hot_at, (tokens, top_k)), axis=1)]
    if not len(rest):
        return chosen_hot.astype(np.int64)
    chosen_rest = rest[np.take_along_axis(of_rest, rest_at, axis=1)]
    return np.where(is_hot, chosen_hot, chosen_rest).astype(np.int64)


def _p_miss(among: int, marked: int, drawn: int) -> float:
    """Probability that `drawn` of `among` without replacement hit none of `marked`: C(a - m, d) / C(a, d)."""
    return math.comb(among - marked, drawn) / math.comb(among, drawn)
