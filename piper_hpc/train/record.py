"""What one rank knows of a step, as a record of fixed length, and the one message that brings all of them to rank 0.

A record is an element of a NumPy structured array: it is sent as its bytes, and rank 0 reads the gathered bytes as an
array over ranks, so that nothing of it is ever a Python object for each rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from piper_hpc.parallel.meter import SentBytes
from piper_hpc.profiling.spans import BACKWARD, FORWARD, WAIT, Message, Span, self_seconds
from piper_hpc.spec.all_to_all import LEVELS
from piper_hpc.spec.layout import Layout
from piper_hpc.spec.prediction import TERMS
from piper_hpc.spec.schedules import stage_of

TIMED_REGIONS = tuple(term.removesuffix("_s") for term in TERMS if term not in ("p2p_s", "bubble_s", "other_s"))
"""Terms that a rank times by itself. Waits are split into terms once the senders' post times are known."""

OTHER = "other"
"""Regions that no other term claims, timed too: what `other_s`, a remainder, is held against."""

OWN_SENDS = -1
"""In place of a message's kind: a wait for this rank's own sends to leave, or no wait at all."""

Numbers = int | np.ndarray


@dataclass(frozen=True)
class RecordShape:
    """What fixes a record's length: micro-batches of a step, experts, and stages and layers of each pipeline rank.

    timed: whether what is inside the step was timed; else a record has no waits and no posts, and its `seconds` say
    nothing.
    """

    micro_batches: int
    experts: int
    stages: tuple[tuple[int, ...], ...]
    layers: tuple[tuple[int, ...], ...]
    timed: bool = True

    @staticmethod
    def of(layout: Layout, micro_batches: int, *, layers: int, experts: int, timed: bool = True) -> RecordShape:
        """That of a model of `layers` layers, held as `layout` says."""
        held = layout.layers_by_stage(layers)
        stages = tuple(
            tuple(stage_of(layout.schedule, rank, chunk, layout.pp) for chunk in range(layout.vpp))
            for rank in range(layout.pp)
        )
        layers_of = tuple(tuple(layer for stage in of_rank for layer in held[stage]) for of_rank in stages)
        return RecordShape(micro_batches, experts, stages, layers_of, timed)

    @property
    def passes(self) -> int:
        """Micro-batches times chunks of a rank."""
        return self.micro_batches * len(self.stages[0])

    @property
    def waits(self) -> int:
        """The most waits: two receives and two sends a pass, and the one at the end of the step."""
        return 4 * self.passes + 1 if self.timed else 0

    @property
    def posts(self) -> int:
        """Messages a rank may post: two a pass, and its arrival at the end of the step."""
        return 2 * self.passes + 1 if self.timed else 0

    @cached_property
    def holders(self) -> tuple[np.ndarray, np.ndarray]:
        """Pipeline rank, and chunk of that rank, of every global stage, each int [stages]."""
        place = {stage: (rank, chunk) for rank, held in enumerate(self.stages) for chunk, stage in enumerate(held)}
        ranks, chunks = zip(*(place[stage] for stage in sorted(place)), strict=True)
        return np.array(ranks), np.array(chunks)

    def sender(self, kind: Numbers, stage: Numbers) -> tuple[np.ndarray, np.ndarray]:
        """Pipeline rank and chunk that post what stage `stage` receives; of other kinds, those of the stage itself."""
        kinds, ranks, chunks = np.asarray(kind), *self.holders
        source = np.asarray(stage) + (kinds == BACKWARD) - (kinds == FORWARD)
        return ranks[source], chunks[source]

    def post_index(self, kind: Numbers, stage: Numbers, micro_batch: Numbers) -> np.ndarray:
        """Where its sender's `posts_s` has a message to `stage`; the one of kind ALL_RANKS is the last."""
        chunk = self.sender(kind, stage)[1]
        index = np.maximum(kind, 0) * self.passes + chunk * self.micro_batches + micro_batch
        return np.minimum(index, self.posts - 1)

    @cached_property
    def dtype(self) -> np.dtype[np.void]:
        """Of one rank's record. Times are on rank 0's clock.

        seconds: self time of each of TIMED_REGIONS, and of OTHER; posts_s: when a message was posted, NaN where it was
        not; waits: from when to when, and for which message (kind OWN_SENDS, start and end 0 where there is none);
        loss, aux_loss: this rank's shares of the step's; payload_bytes, metadata_bytes: what its dispatches and
        combines sent to other ranks, both ways, by LEVELS; expert_tokens: [layers of this pipeline rank, experts]
        choices that it routed.
        """
        wait = [("start_s", "f8"), ("end_s", "f8"), ("kind", "i4"), ("stage", "i4"), ("micro_batch", "i4")]
        numbers = ("loss", "aux_loss", "grad_norm", "peak_memory_bytes", "rss_bytes", "migration_s", "migration_bytes")
        return np.dtype(
            [
                ("start_s", "f8"),
                ("end_s", "f8"),
                ("seconds", np.dtype([(name, "f8") for name in (*TIMED_REGIONS, OTHER)])),
                *((name, "f8") for name in numbers),
                ("payload_bytes", "f8", (len(LEVELS),)),
                ("metadata_bytes", "f8", (len(LEVELS),)),
                ("posts_s", "f8", (self.posts,)),
                ("waits", np.dtype(wait), (self.waits,)),
                ("expert_tokens", "i4", (max(map(len, self.layers)), self.experts)),
            ],
            align=True,
        )


@dataclass(frozen=True)
class Records:
    """The records of all ranks in rank order: `ranks` is a structured array [ranks] of `shape.dtype`."""

    shape: RecordShape
    ranks: np.ndarray


def rank_record(
    shape: RecordShape,
    spans: Sequence[Span],
    posts: Mapping[Message, float],
    offset_s: float,
    *,
    sent: SentBytes,
    expert_tokens: np.ndarray,
    **numbers: float,
) -> np.ndarray:
    """The record, a structured array [1], of a step whose first span encloses it.

    offset_s brings this rank's clock to rank 0's; expert_tokens: int [layers of this rank, experts]; numbers: the
    fields of one number each, see `RecordShape.dtype`.
    """
    made = np.zeros(1, shape.dtype)
    record: Any = made[0]
    record["start_s"], record["end_s"] = spans[0].start_s + offset_s, spans[0].end_s + offset_s
    seconds = self_seconds(spans)
    record["seconds"] = tuple(seconds.get(name, 0.0) for name in (*TIMED_REGIONS, OTHER))
    for name, value in numbers.items():
        record[name] = value
    for name in ("payload_bytes", "metadata_bytes"):
        record[name] = [getattr(sent, name)[level] for level in LEVELS]
    record["posts_s"] = np.nan
    for message, posted_s in posts.items():
        record["posts_s"][shape.post_index(message.kind, message.stage, message.micro_batch)] = posted_s + offset_s
    record["waits"]["kind"] = OWN_SENDS
    for index, span in enumerate(span for span in spans if span.name == WAIT):
        label = Message(OWN_SENDS) if span.message is None else span.message
        about = (label.kind, label.stage, label.micro_batch)
        record["waits"][index] = (span.start_s + offset_s, span.end_s + offset_s, *about)
    record["expert_tokens"][: len(expert_tokens)] = expert_tokens
    return made


def gather(record: np.ndarray, shape: RecordShape, device: torch.device) -> Records | None:
    """The records of all ranks, on rank 0; None on the others. Collective: one message a rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return Records(shape, record)
    mine = torch.from_numpy(record.view(np.uint8)).to(device)
    if dist.get_rank() != 0:
        dist.gather(mine, dst=0)
        return None
    received = mine.new_empty(dist.get_world_size(), mine.numel())
    dist.gather(mine, list(received), dst=0)
    return Records(shape, received.cpu().numpy().view(shape.dtype)[:, 0])
