"""How much less sure a prediction is where it uses measurements of fewer nodes, or of smaller groups."""

from __future__ import annotations

from collections.abc import Iterator

from piper_hpc.resource_model.topology import NODE
from piper_hpc.spec import TIERS, ClusterSpec

GROWTH = 0.25
"""An interval's ends move apart from the prediction by 2**GROWTH, 1.19, with each doubling beyond the measured.

Latency and rate of a link are those of a quiet, small part of the network. What a larger part may add are levels of
switches, each of which joins 16 or more of the parts below it (4 doublings) and at worst is tapered 2:1, the usual
choice of those that taper at all: a factor of 2 in 4 doublings. A reasoned rule: no published and no own run was
looked at to choose it.
"""


def growth(beyond: float) -> float:
    """The factor, at least 1, by which seconds may be off either way. beyond: nodes or ranks over those measured."""
    return float(max(1.0, beyond) ** GROWTH)


def nodes_beyond(cluster: ClusterSpec) -> float:
    """Nodes of the cluster over those that its calibration was measured on; 1 where it has no more, and for data
    sheets."""
    return max(1.0, cluster.nodes / (cluster.calibration.nodes or cluster.nodes))


def tier_beyond(cluster: ClusterSpec, tier: str) -> float:
    """The same for messages over a tier of links: those inside a node are alike however many nodes there are."""
    return nodes_beyond(cluster) if TIERS.index(tier) > NODE else 1.0


def notes(cluster: ClusterSpec) -> Iterator[str]:
    """What a prediction says where it is of another number of nodes than was measured."""
    measured = cluster.calibration.nodes
    if measured in (None, cluster.nodes):
        return
    note = f"calibration: measured on {measured} node{'s' if measured != 1 else ''}, used on {cluster.nodes}"
    if (factor := growth(nodes_beyond(cluster))) > 1:
        note += (
            ": messages between nodes keep the latency and rate of their links, groups larger than any measured are "
            f"scaled from the largest, and the 90 % intervals of both are wider by a factor of {factor:.3g} either way"
        )
    yield note
