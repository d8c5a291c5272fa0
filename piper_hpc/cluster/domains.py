"""Switches above each node, from `scontrol show topology`, from a file, or by clustering measured message times.

A node's SwitchPath names its switches from far to near, for example ("spine", "rack1"). Nodes of equal path share a
leaf switch; nodes whose paths begin alike share the farther ones.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, groupby
from math import gcd

import numpy as np
import numpy.typing as npt

from piper_hpc.spec import Topology

SwitchPath = tuple[str, ...]

MIN_TIME_RATIO = 1.25
"""Nodes are of two domains where messages between them take this many times what they take inside."""


def expand_hostlist(names: str) -> list[str]:
    """The names of a Slurm host list: `n[1-3,07],login` is n1, n2, n3, n07, login. Widths of numbers are kept."""
    found: list[str] = []
    for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", names):
        head, bracket, rest = part.partition("[")
        if not bracket:
            found.append(part)
            continue
        inside, _, tail = rest.partition("]")
        for piece in inside.split(","):
            low, dash, high = piece.partition("-")
            numbers = range(int(low), int(high) + 1) if dash else [low]
            for number in numbers:
                text = f"{number:0{len(low)}d}" if isinstance(number, int) else number
                found += [f"{head}{text}{end}" for end in (expand_hostlist(tail) if tail else [""])]
    return found


def paths_from_scontrol(text: str) -> dict[str, SwitchPath]:
    """Node -> path, from what `scontrol show topology` prints (of topology/tree, or of topology/block)."""
    above: dict[str, str] = {}
    leaf_of: dict[str, str] = {}
    for line in text.splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        name = words.get("SwitchName") or words.get("BlockName")
        if name is None:
            continue
        children = words.get("Switches")
        if children:
            above |= {child: name for child in expand_hostlist(children)}
        else:  # a node below several leaf switches counts to the first
            leaf_of = {node: name for node in expand_hostlist(words.get("Nodes", ""))} | leaf_of
    return {node: _path_to_root(leaf, above) for node, leaf in leaf_of.items()}


def _path_to_root(leaf: str, above: Mapping[str, str]) -> SwitchPath:
    path = [leaf]
    while path[-1] in above and above[path[-1]] not in path:
        path.append(above[path[-1]])
    return tuple(reversed(path))


def paths_from_hostlists(switches: Mapping[str, str]) -> dict[str, SwitchPath]:
    """Node -> path, from a file's host list of each leaf switch."""
    return {node: (switch,) for switch, names in switches.items() for node in expand_hostlist(names)}


def paths_from_message_times(seconds: npt.NDArray[np.float64]) -> list[SwitchPath]:
    """Path of each node, from seconds of equal messages between every two of them, [nodes, nodes] and symmetric.

    Hierarchical clustering with average linkage (UPGMA) over the logarithm of times. The tree is cut at its
    first gap of MIN_TIME_RATIO or more; then the domains found are clustered in turn. Nodes between which no gap shows
    are all of one domain.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    nodes = len(seconds)
    if nodes < 3:
        return [("domain0",)] * nodes
    logarithms = np.log(np.maximum((seconds + seconds.T) / 2, 1e-9))
    distances = logarithms - logarithms[~np.eye(nodes, dtype=bool)].min()
    np.fill_diagonal(distances, 0.0)
    tree = linkage(squareform(distances, checks=False), method="average")
    heights = tree[:, 2]
    # The first merge has nothing below it: two nodes at least are of one domain.
    gaps = np.diff(heights)
    if gaps.max() < np.log(MIN_TIME_RATIO):
        return [("domain0",)] * nodes
    first = int(np.argmax(gaps >= np.log(MIN_TIME_RATIO)))
    cut = (heights[first] + heights[first + 1]) / 2
    labels = fcluster(tree, cut, criterion="distance")
    order = list(dict.fromkeys(labels.tolist()))
    domain = np.array([order.index(label) for label in labels])
    members = [np.flatnonzero(domain == number) for number in range(len(order))]
    between = np.array([[seconds[np.ix_(a, b)].mean() for b in members] for a in members])
    farther = paths_from_message_times(between)
    if len(set(farther)) == 1:
        farther = [()] * len(order)
    return [(*(f"far{name.removeprefix('domain')}" for name in farther[d]), f"domain{d}") for d in domain]


def pack(paths: Sequence[SwitchPath], group_nodes: int = 1) -> list[int]:
    """An order of nodes (indices into `paths`) in which domains are blocks, and groups stay inside them.

    Each `group_nodes` nodes in the order, from the first, are a group. As many groups as can be lie below one leaf
    switch; of what is left, as many as can be below one switch of the next level, and so on. Otherwise nodes keep the
    order in which they are given.
    """
    depth = max(map(len, paths), default=0)

    def order(level: int, members: list[int]) -> tuple[list[int], list[int]]:
        """Whole groups among the members, nearest first, and the nodes that are left."""
        grouped, left = [], members
        if level < depth:
            domains: dict[SwitchPath, list[int]] = {}
            for member in members:
                domains.setdefault(paths[member][: level + 1], []).append(member)
            parts = [order(level + 1, inside) for inside in domains.values()]
            grouped = [member for whole, _ in parts for member in whole]
            # Those of which most are left come first, so that a group of leftovers spans few domains.
            left = [member for _, rest in sorted(parts, key=lambda part: -len(part[1])) for member in rest]
        whole = len(left) // group_nodes * group_nodes
        return grouped + left[:whole], left[whole:]

    grouped, left = order(0, list(range(len(paths))))
    return grouped + left


def narrowed_to_allocation(topology: Topology, leaf_of_node: Sequence[object], ranks_per_node: int) -> Topology:
    """The topology of the nodes that were granted: its switch is the block of ranks that never crosses a real one, and
    so is its rack where it has no switches.

    leaf_of_node: the leaf switch of each node, in rank order. Where a job has 3, 4 and 1 nodes of switches of 4, no
    block of whole nodes does; where it has 2 and 2, blocks of 2 do. A topology without both stays as it is.
    """
    ends = list(accumulate(len(list(run)) for _, run in groupby(leaf_of_node)))
    leaf = "switch" if topology.switch else "rack"
    size = getattr(topology, leaf)
    if size is None or len(ends) == 1:
        return topology
    block = gcd(size, *(end * ranks_per_node for end in ends[:-1]))
    return replace(topology, **{leaf: block if block % topology.node == 0 else topology.node})
