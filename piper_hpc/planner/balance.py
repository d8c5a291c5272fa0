"""Layers of each pipeline stage, so that embedding and head count as the work that they are."""

from __future__ import annotations

from piper_hpc.spec import Layout
from piper_hpc.spec.layout import split_layers
from piper_hpc.spec.schedules import holders


def balanced_layers(layout: Layout, layers: int, layer_s: float, first_s: float, last_s: float) -> tuple[int, ...]:
    """`Layout.stage_layers` with which the busiest pipeline rank has least to do; () where the even split has no more.

    layer_s: of one layer; first_s, last_s: what the first and the last stage have beside their layers. Every stage has
    a layer; each one left goes to the rank that has least with it, which no other order beats, as layers are alike.
    """
    rank_of, last = holders(layout.schedule, layout.pp, layout.vpp), layout.stages - 1
    ends = [(stage == 0) * first_s + (stage == last) * last_s for stage in range(layout.stages)]

    def busiest(counts: list[int]) -> float:
        work = [0.0] * layout.pp
        for rank, count, end in zip(rank_of, counts, ends, strict=True):
            work[rank] += count * layer_s + end
        return max(work)

    counts = [1] * layout.stages
    rank_s = [0.0] * layout.pp
    for rank, end in zip(rank_of, ends, strict=True):
        rank_s[rank] += layer_s + end
    for _ in range(layers - layout.stages):
        rank = min(range(layout.pp), key=rank_s.__getitem__)
        rank_s[rank] += layer_s
        own = [stage for stage in range(layout.stages) if rank_of[stage] == rank]
        counts[min(own, key=lambda stage: counts[stage] * layer_s + ends[stage])] += 1
    even = [len(each) for each in split_layers(layers, layout.stages)]
    return tuple(counts) if busiest(counts) < busiest(even) * (1 - 1e-9) else ()
