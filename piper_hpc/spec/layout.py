"""Degrees of parallelism (Layout), and the map from a rank to its stage, replica, expert shard, node and rack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, Protocol

from piper_hpc.spec.recompute import Recompute
from piper_hpc.spec.schedules import stage_of


class Degrees(Protocol):
    """What formulas read of a layout: numbers of one `Layout`, or the broadcasting arrays of a grid of layouts."""

    @property
    def ep(self) -> Any: ...
    @property
    def etp(self) -> Any: ...
    @property
    def tp(self) -> Any: ...
    @property
    def cp(self) -> Any: ...
    @property
    def dp(self) -> Any: ...
    @property
    def zero(self) -> Any: ...
    @property
    def micro_batch(self) -> Any: ...
    @property
    def dense_dp(self) -> Any: ...
    @property
    def recomputed(self) -> Recompute: ...
    @property
    def pp(self) -> int: ...
    @property
    def vpp(self) -> int: ...
    @property
    def schedule(self) -> str: ...
    @property
    def all_to_all(self) -> str: ...
    @property
    def placement(self) -> str: ...


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism and the choices that go with them.

    ranks = pp * dp * ep * etp; `dp` counts replicas of an expert. Everything that is not an expert is replicated
    over `dense_dp` = ranks / (pp * tp * cp) ranks. `micro_batch` is in sequences per rank. stage_layers: how many
    layers each global stage holds, where they are not split evenly; overlap_shared: whether shared experts run while
    routed rows are on their way to experts, and their backward while the rows' gradients are.
    """

    pp: int = 1
    vpp: int = 1
    ep: int = 1
    etp: int = 1
    tp: int = 1
    cp: int = 1
    dp: int = 1
    zero: int = 0
    schedule: str = "1f1b"
    micro_batch: int = 1
    recompute: str = "none"
    all_to_all: str = "flat"
    placement: str = "linear"
    stage_layers: tuple[int, ...] = ()
    overlap_shared: bool = True

    @property
    def ranks(self) -> int:
        """Ranks in the job."""
        return self.pp * self.dp * self.ep * self.etp

    @property
    def dense_dp(self) -> int:
        """Data-parallel size of attention, router, norms, embedding and head."""
        return self.ranks // (self.pp * self.tp * self.cp)

    @property
    def recomputed(self) -> Recompute:
        """What `recompute` names, part by part."""
        return Recompute.parse(self.recompute)

    def micro_batches(self, global_batch: int) -> int:
        """Micro-batches M of one step for `global_batch` sequences (global_batch = micro_batch * M * dense_dp)."""
        return global_batch // (self.micro_batch * self.dense_dp)

    @property
    def stages(self) -> int:
        """Pipeline stages: vpp of them on every pipeline rank."""
        return self.pp * self.vpp

    def layers_by_stage(self, layers: int) -> tuple[range, ...]:
        """Global layer indices of each stage: as `stage_layers` says, else as even as it goes, see `split_layers`."""
        return consecutive(self.stage_layers) if self.stage_layers else split_layers(layers, self.stages)

    def name(self) -> str:
        """A short name for tables, for example `pp2-ep2-dp1-mb4-1f1b`."""
        return f"pp{self.pp}-ep{self.ep}-dp{self.dp}-mb{self.micro_batch}-{self.schedule}"


def split_layers(layers: int, stages: int) -> tuple[range, ...]:
    """Global layer indices of each stage, contiguous; the first `layers % stages` stages hold one more."""
    small, extra = divmod(layers, stages)
    return consecutive([small + (stage < extra) for stage in range(stages)])


def consecutive(counts: Sequence[int]) -> tuple[range, ...]:
    """Ranges of these lengths, one after the other from 0."""
    return tuple(range(low, high) for low, high in pairwise(accumulate(counts, initial=0)))


@dataclass(frozen=True)
class RankPlace:
    """Where one rank stands: in the layout (pipeline rank, replica, expert shard) and in the cluster (node, rack, NIC).

    stages: global pipeline stages that it holds, by chunk, vpp of them; nic: number, on its node, of the network card
    that this rank shares with its neighbours there.
    """

    rank: int
    pipeline_rank: int
    stages: tuple[int, ...]
    replica: int
    shard: int
    node: int
    rack: int
    nic: int


@dataclass(frozen=True)
class RankMap:
    """Rank -> place, for every rank. Expert shards are adjacent ranks, then replicas, then stages.

    `node_of_rank` and `rack_of_node` are indices from 0; the order of expert shards first keeps an expert group
    inside the smallest domain that holds it, where the ranks of each domain are adjacent (placement `pack` sees to
    that). ranks_per_nic: neighbours on a node that share a network card; the rails of a hierarchical all-to-all join
    cards of equal number where they can.
    """

    layout: Layout
    node_of_rank: tuple[int, ...]
    rack_of_node: tuple[int, ...]
    ranks_per_nic: int = 1

    @staticmethod
    def block(layout: Layout, ranks_per_node: int, rack_of_node: Sequence[int]) -> RankMap:
        """Fill nodes one after the other, as `srun --distribution=block` does."""
        nodes = tuple(rank // ranks_per_node for rank in range(layout.ranks))
        return RankMap(layout, nodes, tuple(rack_of_node))

    @cached_property
    def places(self) -> tuple[RankPlace, ...]:
        """The place of every rank, in rank order."""
        shards = self.layout.ep * self.layout.etp
        seen: Counter[int] = Counter()
        local_rank = []
        for node in self.node_of_rank:
            local_rank.append(seen[node])
            seen[node] += 1
        layout = self.layout
        held = [
            tuple(stage_of(layout.schedule, rank, chunk, layout.pp) for chunk in range(layout.vpp))
            for rank in range(layout.pp)
        ]
        return tuple(
            RankPlace(
                rank=rank,
                pipeline_rank=(pipeline_rank := rank // (shards * layout.dp)),
                stages=held[pipeline_rank],
                replica=rank // shards % self.layout.dp,
                shard=rank % shards,
                node=self.node_of_rank[rank],
                rack=self.rack_of_node[self.node_of_rank[rank]],
                nic=local_rank[rank] // self.ranks_per_nic,
            )
            for rank in range(self.layout.ranks)
        )

    def ranks_where(
        self, *, pipeline_rank: int | None = None, replica: int | None = None, shard: int | None = None
    ) -> list[int]:
        """Ranks at the given coordinates; a coordinate left out is free."""
        return [
            place.rank
            for place in self.places
            if (pipeline_rank is None or place.pipeline_rank == pipeline_rank)
            and (replica is None or place.replica == replica)
            and (shard is None or place.shard == shard)
        ]

    def expert_group(self, rank: int) -> list[int]:
        """The ranks that share one copy of a stage's experts with `rank`."""
        place = self.places[rank]
        return self.ranks_where(pipeline_rank=place.pipeline_rank, replica=place.replica)

    def replica_group(self, rank: int) -> list[int]:
        """The ranks that hold the same experts as `rank`."""
        place = self.places[rank]
        return self.ranks_where(pipeline_rank=place.pipeline_rank, shard=place.shard)

    def stage_group(self, rank: int) -> list[int]:
        """All ranks of the stage of `rank`: the data-parallel group of its dense parameters."""
        return self.ranks_where(pipeline_rank=self.places[rank].pipeline_rank)

    def pipeline_group(self, rank: int) -> list[int]:
        """The ranks that pass activations to one another, first stage first."""
        place = self.places[rank]
        return self.ranks_where(replica=place.replica, shard=place.shard)

    def tier(self, source: int, target: int) -> str:
        """The widest link between two ranks: `self`, `node`, `rack` (other node, same rack) or `system`."""
        a, b = self.places[source], self.places[target]
        if a.rank == b.rank:
            return "self"
        if a.node == b.node:
            return "node"
        return "rack" if a.rack == b.rack else "system"
