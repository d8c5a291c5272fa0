"""Fixed index tables with which one rank packs, reads and reorders the counts of its hops.

Counts are kept by block: all rows of one chunk from one source for one expert. Which blocks exist follows from the
places of the ranks alone, so every reordering of rows is a fixed permutation of blocks and a cumulative sum of counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from piper_hpc.comm.hierarchy import Hierarchy, HopChain


@dataclass(frozen=True)
class LevelTable:
    """One hop. Counts before it are [chunks, sources, targets, slots], after it the same of the next level.

    peers: ranks in its group; send_blocks: blocks in sending order (chunk, peer, source, target, slot), int64
    [chunks * blocks]; send_positions: the position (rank * slots + slot) of each of them; peer_of_block: of each block
    of a chunk, int64 [blocks]; peer_of_source: by source after the hop; by_peer: order that brings (chunk, peer) to
    (peer, chunk), by_chunk: back.
    A message of counts: to each peer those of local rows (last hop), of its blocks by chunk, and of its deduplicated
    rows by chunk. message: index into (local, counts, rows) flattened; to_peer, from_peer: its length by peer; arrived:
    index into what was received that gives (local, counts after the hop, rows) flattened; shape: of those counts.
    """

    peers: int
    send_blocks: torch.Tensor
    send_positions: torch.Tensor
    peer_of_block: torch.Tensor
    peer_of_source: torch.Tensor
    by_peer: torch.Tensor
    by_chunk: torch.Tensor
    message: torch.Tensor
    to_peer: list[int]
    from_peer: list[int]
    arrived: torch.Tensor
    shape: tuple[int, int, int, int]


@dataclass(frozen=True)
class Tables:
    """All tables of one rank. chunks: parts of the tokens that are sent one after the other; 0: all rows are local.

    By position (rank * slots + slot) of an expert, [ranks * slots]: is_local, whether its rank is on this rank's node;
    local_block, its block among local rows; peer_of_position, the peer of the first hop; first_block, its place in
    sending order of a chunk. local_positions: positions on this node. expert_blocks: blocks of all received rows
    (local, then chunks) by slot, then source, then chunk: the order of flat.
    """

    chain: HopChain
    chunks: int
    slots: int
    levels: tuple[LevelTable, ...]
    is_local: torch.Tensor
    local_block: torch.Tensor
    local_positions: torch.Tensor
    peer_of_position: torch.Tensor
    first_block: torch.Tensor
    expert_blocks: torch.Tensor


def make_tables(
    hierarchy: Hierarchy, rank: int, *, chunks: int, slots: int, dedup: bool, device: torch.device
) -> Tables:
    """The tables of `rank` for experts in `slots` slots a rank."""
    chain = hierarchy.chain(rank)
    chunks = chunks if hierarchy.depth > 1 else 0
    last = hierarchy.depth - 1
    levels = tuple(
        _level(chain, level, chunks, slots, local=level == last, rows=dedup and level == 0, device=device)
        for level in range(hierarchy.depth)
    )
    local = [target * slots + slot for target in chain.local for slot in range(slots)]
    local_block = torch.zeros(hierarchy.places.ranks * slots, dtype=torch.int64)
    local_block[local] = torch.arange(len(local))
    is_local = torch.zeros_like(local_block, dtype=torch.bool)
    is_local[local] = True
    first_block = torch.empty_like(local_block)
    first_block[_sending_order(chain, 0, slots)] = torch.arange(len(first_block))
    arriving = [(slot, source, -1) for source in chain.local for slot in range(slots)] + [
        (slot, source, chunk) for chunk in range(chunks) for source in chain.sources[-1] for slot in range(slots)
    ]
    return Tables(
        chain=chain,
        chunks=chunks,
        slots=slots,
        levels=levels,
        is_local=is_local.to(device),
        local_block=local_block.to(device),
        local_positions=_index(local, device),
        peer_of_position=levels[0].peer_of_block,
        first_block=first_block.to(device),
        expert_blocks=_index(sorted(range(len(arriving)), key=arriving.__getitem__), device),
    )


def _level(
    chain: HopChain, level: int, chunks: int, slots: int, *, local: bool, rows: bool, device: torch.device
) -> LevelTable:
    peers, arriving = len(chain.hops[level].group), chain.arriving[level]
    local_values = peers * slots if local else 0
    blocks = len(chain.sources[level]) * len(chain.domains[level]) * slots
    block_peer = _block_peers(chain, level, slots)
    in_order = _sending_order(chain, level, slots)
    positions = [target * slots + slot for target in chain.domains[level] for slot in range(slots)]
    of_peer: list[list[int]] = [[] for _ in range(peers)]
    for block in in_order:
        of_peer[block_peer[block]].append(block)
    message: list[int] = []
    to_peer: list[int] = []
    for peer in range(peers):
        before = len(message)
        message += range(peer * slots, (peer + 1) * slots) if local else ()
        message += (local_values + chunk * blocks + block for chunk in range(chunks) for block in of_peer[peer])
        message += (local_values + chunks * blocks + chunk * peers + peer for chunk in range(chunks) if rows)
        to_peer.append(len(message) - before)
    # What is received: from each peer its local rows' counts, its blocks by chunk, its rows by chunk.
    inner = len(chain.domains[level + 1]) * slots
    starts, from_peer = [0], []
    for peer in range(peers):
        from_peer.append(slots * local + chunks * arriving[peer] * inner + chunks * rows)
        starts.append(starts[-1] + from_peer[peer])
    arrived = [starts[peer] + slot for peer in range(peers) for slot in range(slots * local)]
    for chunk in range(chunks):
        for peer in range(peers):
            start = starts[peer] + slots * local + chunk * arriving[peer] * inner
            arrived += range(start, start + arriving[peer] * inner)
    arrived += [starts[peer + 1] - chunks + chunk for chunk in range(chunks) if rows for peer in range(peers)]
    return LevelTable(
        peers=peers,
        send_blocks=_index([chunk * blocks + block for chunk in range(chunks) for block in in_order], device),
        send_positions=_index([positions[block % len(positions)] for block in in_order] * chunks, device),
        peer_of_block=_index(block_peer, device),
        peer_of_source=_index([peer for peer, count in enumerate(arriving) for _ in range(count)], device),
        by_peer=_index([chunk * peers + peer for peer in range(peers) for chunk in range(chunks)], device),
        by_chunk=_index([peer * chunks + chunk for chunk in range(chunks) for peer in range(peers)], device),
        message=_index(message, device),
        to_peer=to_peer,
        from_peer=from_peer,
        arrived=_index(arrived, device),
        shape=(chunks, sum(arriving), len(chain.domains[level + 1]), slots),
    )


def _block_peers(chain: HopChain, level: int, slots: int) -> list[int]:
    """The peer of each block (source, target, slot) of a chunk before hop `level`."""
    of_target = [peer for peer in chain.hops[level].peer_of_target for _ in range(slots)]
    return of_target * len(chain.sources[level])


def _sending_order(chain: HopChain, level: int, slots: int) -> list[int]:
    """Blocks of a chunk by peer, then as they are."""
    peers = _block_peers(chain, level, slots)
    return sorted(range(len(peers)), key=peers.__getitem__)


def _index(values: Sequence[int], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def regroup(counts: torch.Tensor, blocks: torch.Tensor, rows: int) -> torch.Tensor:
    """Index that takes rows, which stand block by block, in the order `blocks`: int64 [rows], without a sort.

    counts: rows of each block, int64 [blocks]; blocks: a permutation or part of them; rows: of all blocks taken.
    """
    sizes = counts.index_select(0, blocks)
    starts = (counts.cumsum(0) - counts).index_select(0, blocks)
    shift = starts - (sizes.cumsum(0) - sizes)
    return torch.repeat_interleave(shift, sizes, output_size=rows) + torch.arange(rows, device=counts.device)
