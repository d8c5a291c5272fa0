"""Which ranks measure an exchange together: one pair for each tier of links, one family of groups for each size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from piper_hpc.spec import RankMap, Tier

_TIER_ORDER = {"self": 0, Tier.NODE.value: 1, Tier.RACK.value: 2, Tier.SYSTEM.value: 3}


@dataclass(frozen=True)
class GroupFamily:
    """Disjoint groups of `size` ranks that exchange at the same time; the widest link in each is of tier `tier`."""

    size: int
    tier: str
    groups: tuple[tuple[int, ...], ...]

    @property
    def ranks(self) -> list[int]:
        """All ranks that take part."""
        return sorted(rank for group in self.groups for rank in group)


def widest_tier(ranks: RankMap, group: Sequence[int]) -> str:
    """The widest tier of links between any two ranks of a group."""
    return max((ranks.tier(a, b) for a, b in combinations(group, 2)), key=_TIER_ORDER.__getitem__, default="self")


def pairs(ranks: RankMap) -> dict[str, tuple[int, int]]:
    """The first pair of ranks of each tier that the placement has, near tiers first."""
    return {family.tier: (family.groups[0][0], family.groups[0][1]) for family in pair_families(ranks)}


def pair_families(ranks: RankMap) -> list[GroupFamily]:
    """For each tier of links as many disjoint pairs of ranks as are found one after the other, near tiers first."""
    found: dict[str, list[tuple[int, int]]] = {}
    taken: dict[str, set[int]] = {}
    for pair in combinations(range(len(ranks.places)), 2):
        tier = ranks.tier(*pair)
        if taken.setdefault(tier, set()).isdisjoint(pair):
            found.setdefault(tier, []).append(pair)
            taken[tier].update(pair)
    return [GroupFamily(2, tier, tuple(found[tier])) for tier in sorted(found, key=_TIER_ORDER.__getitem__)]


def group_families(ranks: RankMap) -> list[GroupFamily]:
    """One family for each (size, tier) that training can form, smallest first.

    Sizes are the divisors of the number of ranks. Contiguous ranks come first, as expert groups are formed; ranks a
    stride apart, as replicas are, add the wider tiers. All groups of a family run at once, because the groups of a
    training step do: they share links as they will then.
    """
    world = len(ranks.places)
    families: dict[tuple[int, str], GroupFamily] = {}
    for size in (n for n in range(2, world + 1) if world % n == 0):
        for stride in (s for s in range(1, world // size + 1) if world % (size * s) == 0):
            block = size * stride
            groups = [
                tuple(range(start + offset, start + block, stride))
                for start in range(0, world, block)
                for offset in range(stride)
            ]
            tiers = [widest_tier(ranks, group) for group in groups]
            tier = max(tiers, key=_TIER_ORDER.__getitem__)
            widest = tuple(group for group, own in zip(groups, tiers, strict=True) if own == tier)
            families.setdefault((size, tier), GroupFamily(size, tier, widest))
    return sorted(families.values(), key=lambda family: (family.size, _TIER_ORDER[family.tier]))


def pipeline_families(ranks: RankMap) -> dict[int, GroupFamily]:
    """Ranks in a stage -> the pairs of neighbouring stages that send at the same time, as a pipeline does it.

    Rank r sends to rank r + s, in stages of s contiguous ranks: those of every other stage to those of the next. Stages
    of one rank in a world of two are left out: that is one pair alone.
    """
    world = len(ranks.places)
    families = {}
    for size in (n for n in range(1, world // 2 + 1) if world % n == 0 and world > 2):
        senders = [rank for rank in range(world - size) if rank // size % 2 == 0]
        groups = tuple((rank, rank + size) for rank in senders)
        tier = max((ranks.tier(*group) for group in groups), key=_TIER_ORDER.__getitem__)
        families[size] = GroupFamily(2, tier, groups)
    return families
