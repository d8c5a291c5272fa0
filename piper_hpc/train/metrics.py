"""The row of metrics of a training step from the records of all ranks: arithmetic on arrays over ranks, no loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from piper_hpc.profiling.spans import ALL_RANKS, split_wait_s
from piper_hpc.spec.all_to_all import LEVELS
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.layout import Layout
from piper_hpc.spec.prediction import TERMS
from piper_hpc.train.record import OTHER, OWN_SENDS, TIMED_REGIONS, Records


def terms_by_rank(records: Records, layout: Layout) -> dict[str, np.ndarray]:
    """Seconds of each rank's step by term, each [ranks]; they add up to the time between its start and its end.

    A wait is split where its sender posted the message: before that it is bubble, after it is transfer. The message
    of the step's end is posted by the last rank to arrive: the wait before belongs to the pipeline's end. A term of a
    rank that waited for a message which nobody posted is NaN.
    """
    shape, ranks = records.shape, records.ranks
    waits = ranks["waits"]
    start_s, end_s, kind = (waits[name] for name in ("start_s", "end_s", "kind"))
    # Ranks are ordered by pipeline rank first (RankMap), and a pipeline's ranks stand at equal places of their stages.
    stride = len(ranks) // layout.pp
    sender = shape.sender(kind, waits["stage"])[0] * stride + np.arange(len(ranks))[:, None] % stride
    posts_s = ranks["posts_s"].copy()
    posts_s[:, -1] = posts_s[:, -1].max(axis=0)
    posted_s = posts_s[sender, shape.post_index(kind, waits["stage"], waits["micro_batch"])]
    before_s, after_s = split_wait_s(start_s, end_s, np.where(kind == OWN_SENDS, start_s, posted_s))
    terms = {f"{name}_s": ranks["seconds"][name].copy() for name in TIMED_REGIONS}
    terms["bubble_s"] = before_s.sum(axis=1)
    terms["p2p_s"] = np.where(kind == ALL_RANKS, 0.0, after_s).sum(axis=1)
    terms["grad_reduce_s"] += np.where(kind == ALL_RANKS, after_s, 0.0).sum(axis=1)
    terms["other_s"] = ranks["end_s"] - ranks["start_s"] - sum(terms.values())
    return {term: terms[term] for term in TERMS}


def summarise(
    records: Records, layout: Layout, *, tokens: int, placements: Sequence[ExpertPlacement] | None = None
) -> dict[str, Any]:
    """The measured part of a row of metrics. placements: by layer, where experts were in the step; None: in order.

    `exchange` has what all ranks sent, counted from their plans (rows, and beside them the metadata of those that
    choices share), and where steps are timed the critical stage's dispatch and combine, of which the executor hides
    nothing; so have timed steps what `_stages` gives.
    """
    ranks = records.ranks
    step_time_s = float(ranks["end_s"].max() - ranks["start_s"].min())
    expert_load, rank_load = _loads(records, layout, placements)
    exchange: dict[str, Any] = {name: _by_level(ranks[name]) for name in ("payload_bytes", "metadata_bytes")}
    row = {
        "loss": float(ranks["loss"].sum()),
        "aux_loss": float(ranks["aux_loss"].sum()),
        "grad_norm": float(ranks["grad_norm"][0]),
        "tokens": tokens,
        "step_time_s": step_time_s,
        "tokens_per_s": tokens / step_time_s,
        "peak_memory_bytes": ranks["peak_memory_bytes"].astype(int).tolist(),
        "rss_bytes": ranks["rss_bytes"].astype(int).tolist(),
        "expert_load": expert_load.tolist(),
        "rank_load": rank_load.tolist(),
        "exchange": exchange,
    }
    if records.shape.timed:
        row |= _stages(records, layout, step_time_s)
        exchange["exposed_s"] = row["dispatch_s"] + row["combine_s"]
    return row


def _stages(records: Records, layout: Layout, step_time_s: float) -> dict[str, Any]:
    """The terms of a row: of the critical stage, and in `stages` those of every stage.

    The critical stage is the one with the longest busy time (its step without bubble and p2p), and its terms are the
    mean over its ranks. Their `other_s` makes them add up to `step_time_s`, the time from the first rank's start to the
    last rank's end. `other_self_s` is what the critical stage's ranks measured in regions of no other term: `other_s`
    is that and the time before the stage's ranks began and after they ended.
    """
    by_stage = {term: each.reshape(layout.pp, -1).mean(axis=1) for term, each in terms_by_rank(records, layout).items()}
    by_stage["other_s"] += step_time_s - sum(by_stage.values())
    stages = [{term: float(each[stage]) for term, each in by_stage.items()} for stage in range(layout.pp)]
    critical = int(np.argmin(by_stage["bubble_s"] + by_stage["p2p_s"]))
    other_self_s = records.ranks["seconds"][OTHER].reshape(layout.pp, -1)[critical].mean()
    return {
        "critical_stage": critical,
        **stages[critical],
        "other_self_s": float(other_self_s),
        "stages": stages,
    }


def migrated(records: Records) -> dict[str, Any]:
    """Bytes that all ranks sent when experts moved after the step, and the seconds of the slowest."""
    ranks = records.ranks
    return {"bytes": int(ranks["migration_bytes"].sum()), "seconds": float(ranks["migration_s"].max())}


def _by_level(sent: np.ndarray) -> dict[str, int]:
    """Bytes of all ranks by level, from [ranks, levels]."""
    return dict(zip(LEVELS, sent.sum(axis=0).astype(int).tolist(), strict=True))


def tokens_by_group(records: Records, layout: Layout) -> np.ndarray:
    """Choices of each expert, int64 [dp, layers, experts]: by expert group of the stage that holds the layer."""
    expert_tokens, layers = records.ranks["expert_tokens"], records.shape.layers
    # The ranks of an expert group are adjacent, and a stage has dp of them: [pp, dp, layers of one rank, experts].
    by_rank = expert_tokens.reshape(layout.pp, layout.dp, -1, *expert_tokens.shape[1:])
    # int32 holds what one group chooses in a step (2^31 tokens for one expert), and adds up three times as fast.
    by_stage = by_rank.sum(axis=2, dtype=np.int32)
    held = [groups[:, : len(numbers)] for groups, numbers in zip(by_stage, layers, strict=True)]
    return np.concatenate(held, axis=1, dtype=np.int64)[:, np.argsort(np.concatenate(layers))]


def _loads(
    records: Records, layout: Layout, placements: Sequence[ExpertPlacement] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Load imbalance in the whole step of experts and of ranks, each [layers] and at least 1.

    Experts: tokens of the busiest expert over the mean expert's. Ranks: rows received by the busiest rank of an expert
    group over the group's mean, averaged over groups.
    """
    groups = tokens_by_group(records, layout)
    if placements is not None:
        by_rank = np.array([[e for rank in range(layout.ep) for e in one.experts_of(rank)] for one in placements])
        groups = np.take_along_axis(groups, by_rank[None], axis=2)
    shards = groups.reshape(*groups.shape[:2], layout.ep, -1).sum(axis=3)
    return _imbalance(groups.sum(axis=0)), _imbalance(shards).mean(axis=0)


def _imbalance(counts: np.ndarray) -> np.ndarray:
    """The largest over the mean, along the last axis; 1 where nothing is counted, as in layers without experts."""
    mean = counts.mean(axis=-1)
    largest: np.ndarray = np.where(mean > 0, counts.max(axis=-1) / np.maximum(mean, 1e-300), 1.0)
    return largest
