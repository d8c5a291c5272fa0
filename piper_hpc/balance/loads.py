"""Rows of experts and ranks, and what of a layer's time depends on where its experts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from piper_hpc.spec.migration import MigrationPrices

Counts = npt.NDArray[np.int64]
"""Choices of each expert of one layer by sample, [samples, experts]; a sample is a micro-batch of one expert group."""

Ranks = npt.NDArray[np.int64]
"""By expert: the rank of the expert group that holds it, [experts]."""


def rank_rows(counts: Counts, ranks: Ranks, ep: int) -> npt.NDArray[np.int64]:
    """Rows of each rank, [samples, ep]."""
    held = ranks[:, None] == np.arange(ep)
    return np.asarray((counts.astype(np.float64) @ held).astype(np.int64))  # exact up to 2^53, and uses BLAS


def imbalance(counts: Counts, ranks: Ranks, ep: int) -> float:
    """Rows of the busiest rank over the mean's, the mean over samples that have any; 1 where none has."""
    rows = rank_rows(counts, ranks, ep)
    rows = rows[rows.sum(axis=1) > 0]
    return float((rows.max(axis=1) / rows.mean(axis=1)).mean()) if len(rows) else 1.0


def least_imbalance(counts: Counts, ep: int) -> float:
    """What no placement with equally many experts a rank and no replicas beats, mean over samples: the rank with the
    hottest expert holds experts / ep - 1 others, at best the idlest; and 1."""
    others = counts.shape[1] // ep - 1
    return _of_samples(counts, ep, np.sort(counts, axis=1)[:, :others].sum(axis=1))


def hottest_expert(counts: Counts, ep: int) -> float:
    """What no placement without replicas beats, however many experts a rank has: ep times the largest expert's share,
    and 1; mean over samples."""
    return _of_samples(counts, ep, np.zeros(len(counts), np.int64))


def _of_samples(counts: Counts, ep: int, beside: npt.NDArray[np.int64]) -> float:
    """Mean over samples with rows of what the hottest expert and `beside` it [samples] make of a rank's load."""
    totals = counts.sum(axis=1)
    loads = (counts.max(axis=1) + beside)[totals > 0] * ep / totals[totals > 0]
    return float(np.maximum(1.0, loads).mean()) if len(loads) else 1.0


@dataclass(frozen=True)
class LayerSeconds:
    """Seconds of a layer, summed over samples, as far as they depend on where its experts are.

    The busiest rank's rows cost `prices.row_s` each; those that enter or leave a domain of several ranks,
    `row_s` of its level, at the busiest domain. With deduplication a token enters a domain once: of T tokens with
    top_k choices each T (1 - prod(1 - q_e)) do, q_e being the share of the tokens that choose expert e of the domain,
    as if choices were independent. Tokens are spread evenly over ranks.
    """

    prices: MigrationPrices

    def __call__(self, counts: Counts, ranks: Ranks) -> float:
        """counts [samples, experts]; ranks [experts]."""
        prices = self.prices
        seconds = prices.row_s * float(rank_rows(counts, ranks, prices.ep).max(axis=1, initial=0).sum())
        for level in prices.levels:
            domain = np.asarray(level.domain_of_rank)[ranks]
            domains = int(max(level.domain_of_rank)) + 1
            rows = self._once_a_token(counts, domain, domains) if level.dedup else rank_rows(counts, domain, domains)
            inside = np.bincount(level.domain_of_rank, minlength=domains) / prices.ep
            entering, leaving = rows * (1 - inside), (rows.sum(axis=1, keepdims=True) - rows) * inside
            seconds += level.row_s * float(np.maximum(entering, leaving).max(axis=1, initial=0).sum())
        return seconds

    def _once_a_token(self, counts: Counts, domain: Ranks, domains: int) -> npt.NDArray[np.float64]:
        tokens = np.maximum(counts.sum(axis=1, keepdims=True) / self.prices.top_k, 1.0)
        missed = np.log1p(-np.minimum(counts / tokens, 1 - 1e-12))
        by_domain = np.stack([missed[:, domain == one].sum(axis=1) for one in range(domains)], axis=1)
        return np.asarray(tokens * -np.expm1(by_domain))


def busiest_stage_s(seconds: Sequence[float], stages: Sequence[Sequence[int]]) -> float:
    """Of seconds by layer those of the slowest pipeline rank, which the others wait for; stages: its layers."""
    return max(sum(seconds[layer] for layer in layers) for layers in stages)
