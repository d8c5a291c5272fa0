"""Metrics of a training step: each rank's record, gathered on rank 0 in one message and reduced to one row."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import torch
import torch.distributed as dist

from piper_hpc.parallel.meter import SentBytes
from piper_hpc.profiling.spans import ALL_RANKS, FORWARD, WAIT, Message, Span, self_seconds, split_wait_s
from piper_hpc.spec.all_to_all import LEVELS
from piper_hpc.spec.layout import RankMap
from piper_hpc.spec.prediction import TERMS

TIMED_REGIONS = tuple(term.removesuffix("_s") for term in TERMS if term not in ("p2p_s", "bubble_s", "other_s"))
"""Regions that a rank times by itself. Waits are split into terms once the senders' post times are known."""


@dataclass(frozen=True)
class RecordShape:
    """What fixes the length of a rank's message: passes of a step (micro-batches times chunks), layers and experts."""

    passes: int
    layers: int
    experts: int

    @property
    def waits(self) -> int:
        """The most waits: two receives and two sends a pass, and the one at the end of the step."""
        return 4 * self.passes + 1

    @property
    def posts(self) -> int:
        """Messages a rank may post: two a pass, and its arrival at the end of the step."""
        return 2 * self.passes + 1


@dataclass(frozen=True)
class RankRecord:
    """One rank's view of one step. Times are on rank 0's clock.

    seconds: self time of each of MEASURED; posts: when a message was posted; waits: (start, end, message or None);
    loss, aux_loss: this rank's shares of the step's; expert_tokens: [layers][experts] choices this rank routed;
    sent: what its dispatches and combines sent to other ranks, both ways.
    """

    start_s: float
    end_s: float
    seconds: dict[str, float]
    posts: dict[Message, float]
    waits: list[tuple[float, float, Message | None]]
    loss: float
    aux_loss: float
    grad_norm: float
    peak_memory_bytes: float
    rss_bytes: float
    expert_tokens: list[list[int]]
    sent: SentBytes = field(default_factory=SentBytes)


def rank_record(spans: Sequence[Span], posts: dict[Message, float], offset_s: float, **facts: Any) -> RankRecord:
    """The record of a step whose first span encloses it; `offset_s` brings this rank's clock to rank 0's."""
    seconds = self_seconds(spans)
    return RankRecord(
        start_s=spans[0].start_s + offset_s,
        end_s=spans[0].end_s + offset_s,
        seconds={name: seconds.get(name, 0.0) for name in TIMED_REGIONS},
        posts={message: posted + offset_s for message, posted in posts.items()},
        waits=[(s.start_s + offset_s, s.end_s + offset_s, s.message) for s in spans if s.name == WAIT],
        **facts,
    )


def encode(record: RankRecord, shape: RecordShape) -> list[float]:
    """A record as a flat list of floats, equally long on every rank, for one gather; NaN where there is nothing."""
    posts = [math.nan] * (4 * shape.posts)
    for index, (message, posted) in enumerate(record.posts.items()):
        posts[4 * index : 4 * index + 4] = [posted, *_numbers(message)]
    waits = [math.nan] * (5 * shape.waits)
    for index, (start, end, waited) in enumerate(record.waits):
        waits[5 * index : 5 * index + 5] = [start, end, *_numbers(waited)]
    return [
        record.start_s,
        record.end_s,
        *(record.seconds[name] for name in TIMED_REGIONS),
        record.loss,
        record.aux_loss,
        record.grad_norm,
        record.peak_memory_bytes,
        record.rss_bytes,
        *(record.sent.payload_bytes[level] for level in LEVELS),
        *(record.sent.metadata_bytes[level] for level in LEVELS),
        *posts,
        *waits,
        *(float(tokens) for layer in record.expert_tokens for tokens in layer),
    ]


def _numbers(message: Message | None) -> tuple[int, int, int]:
    return (-1, -1, -1) if message is None else (message.kind, message.stage, message.micro_batch)


def decode(numbers: Sequence[float], shape: RecordShape) -> RankRecord:
    """The inverse of `encode`."""
    rest = iter(numbers)

    def take(count: int) -> list[float]:
        return [next(rest) for _ in range(count)]

    start_s, end_s = take(2)
    seconds = dict(zip(TIMED_REGIONS, take(len(TIMED_REGIONS)), strict=True))
    loss, aux_loss, grad_norm, peak, rss = take(5)
    sent = SentBytes(*(dict(zip(LEVELS, take(len(LEVELS)), strict=True)) for _ in range(2)))
    posted = [take(4) for _ in range(shape.posts)]
    posts = {Message(*map(int, numbers)): at for at, *numbers in posted if not math.isnan(at)}
    waited = [take(5) for _ in range(shape.waits)]
    waits = [
        (start, end, None if numbers[0] < 0 else Message(*map(int, numbers)))
        for start, end, *numbers in waited
        if not math.isnan(start)
    ]
    expert_tokens = [[int(tokens) for tokens in take(shape.experts)] for _ in range(shape.layers)]
    ranks_own = (loss, aux_loss, grad_norm, peak, rss)
    return RankRecord(start_s, end_s, seconds, posts, waits, *ranks_own, expert_tokens, sent)


def gather(record: RankRecord, shape: RecordShape, device: torch.device) -> list[RankRecord] | None:
    """The records of all ranks in rank order, on rank 0; None on the others. One message a rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [record]
    mine = torch.tensor(encode(record, shape), dtype=torch.float64, device=device)
    if dist.get_rank() != 0:
        dist.gather(mine, dst=0)
        return None
    received = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.gather(mine, received, dst=0)
    return [decode(numbers.tolist(), shape) for numbers in received]


def terms_of(rank: int, records: Sequence[RankRecord], rank_map: RankMap) -> dict[str, float]:
    """Seconds of one rank's step by term; they add up to the time between its start and its end.

    A wait is split where its sender posted the message: before that it is bubble, after it is transfer. The message
    of the clipping is posted by the last rank to arrive: the wait before belongs to the pipeline's end.
    """
    record = records[rank]
    holder = {stage: other for other in rank_map.pipeline_group(rank) for stage in rank_map.places[other].stages}
    terms = {f"{name}_s": seconds for name, seconds in record.seconds.items()} | {"p2p_s": 0.0, "bubble_s": 0.0}
    for start, end, message in record.waits:
        if message is None:
            terms["p2p_s"] += end - start
        elif message.kind == ALL_RANKS:
            before, after = split_wait_s(start, end, max(each.posts[message] for each in records))
            terms["bubble_s"] += before
            terms["grad_reduce_s"] += after
        else:
            sender = holder[message.stage - 1 if message.kind == FORWARD else message.stage + 1]
            before, after = split_wait_s(start, end, records[sender].posts[message])
            terms["bubble_s"] += before
            terms["p2p_s"] += after
    terms["other_s"] = record.end_s - record.start_s - sum(terms.values())
    return {term: terms[term] for term in TERMS}


def summarise(records: Sequence[RankRecord], rank_map: RankMap, *, tokens: int) -> dict[str, Any]:
    """The measured part of a row of metrics.

    The terms are those of the critical stage, the one with the longest busy time (its step without bubble and p2p), as
    the mean over its ranks; `stages` has them for every stage. Their `other_s` makes them add up to `step_time_s`, the
    time from the first rank's start to the last rank's end. `exchange` has what all ranks sent, counted from their
    plans (rows, and beside them the metadata of those that choices share), and the critical stage's dispatch and
    combine, of which the executor hides nothing.
    """
    step_time_s = max(each.end_s for each in records) - min(each.start_s for each in records)
    by_rank = [terms_of(rank, records, rank_map) for rank in range(len(records))]
    stages = [_mean_terms(by_rank, rank_map.ranks_where(pipeline_rank=stage)) for stage in range(rank_map.layout.pp)]
    for terms in stages:
        terms["other_s"] += step_time_s - sum(terms.values())
    critical = max(range(len(stages)), key=lambda stage: -stages[stage]["bubble_s"] - stages[stage]["p2p_s"])
    return {
        "loss": sum(each.loss for each in records),
        "aux_loss": sum(each.aux_loss for each in records),
        "grad_norm": records[0].grad_norm,
        "tokens": tokens,
        "step_time_s": step_time_s,
        "tokens_per_s": tokens / step_time_s,
        "peak_memory_bytes": [int(each.peak_memory_bytes) for each in records],
        "rss_bytes": [int(each.rss_bytes) for each in records],
        "expert_load": _expert_load(records),
        "rank_load": _rank_load(records, rank_map),
        "exchange": {
            "payload_bytes": _summed(each.sent.payload_bytes for each in records),
            "metadata_bytes": _summed(each.sent.metadata_bytes for each in records),
            "exposed_s": stages[critical]["dispatch_s"] + stages[critical]["combine_s"],
        },
        "critical_stage": critical,
        **stages[critical],
        "stages": stages,
    }


def _summed(sent: Iterable[dict[str, float]]) -> dict[str, int]:
    """Bytes of all ranks by level."""
    ranks = list(sent)
    return {level: int(sum(each[level] for each in ranks)) for level in LEVELS}


def _mean_terms(by_rank: Sequence[dict[str, float]], ranks: Sequence[int]) -> dict[str, float]:
    return {term: fmean(by_rank[rank][term] for rank in ranks) for term in TERMS}


def _expert_load(records: Sequence[RankRecord]) -> list[float]:
    """Load imbalance of experts, [layers]: tokens of the busiest expert over the mean expert's; at least 1."""
    layers = zip(*(each.expert_tokens for each in records), strict=True)
    totals = [[sum(tokens) for tokens in zip(*layer, strict=True)] for layer in layers]
    return [max(tokens) * len(tokens) / sum(tokens) for tokens in totals]


def _rank_load(records: Sequence[RankRecord], rank_map: RankMap) -> list[float]:
    """Load imbalance of ranks, [layers]: rows received by the busiest rank of an expert group over the group's mean
    (at least 1), averaged over groups.

    A rank holds adjacent experts. What it received is that of the whole step.
    """
    ep = rank_map.layout.ep
    loads: list[list[float]] = [[] for _ in records[0].expert_tokens]
    for ranks in sorted({tuple(rank_map.expert_group(rank)) for rank in range(len(records))}):
        for layer, found in enumerate(loads):
            totals = [
                sum(tokens) for tokens in zip(*(records[rank].expert_tokens[layer] for rank in ranks), strict=True)
            ]
            if sum(totals):
                held = len(totals) // ep
                shards = [sum(totals[first : first + held]) for first in range(0, len(totals), held)]
                found.append(max(shards) * ep / sum(totals))
    return [fmean(found) for found in loads]
