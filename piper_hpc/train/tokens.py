"""Folders of token ids opened on every rank, with the proof that all read the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from piper_hpc.spec import Problem, SpecError
from piper_hpc.tokens.folder import TokensError, TokenStream

Found = tuple[str, list[str], tuple[Problem, ...]]
"""(node, digest of each folder's index, what is wrong with one)."""


def open_on_all_ranks(folders: Sequence[Path], node: str) -> list[TokenStream]:
    """Each folder as this rank sees it. Collective over the default group.

    node: this rank's, for the error. Raises SpecError on all ranks where one of them lacks a shard, or has an index of
    other bytes; an index has the digests of its shards, which are not read again.
    """
    streams: list[TokenStream] = []
    mine: Found = (node, [], ())
    try:
        streams = [TokenStream(folder) for folder in folders]
        mine = (node, [stream.index.sha256 for stream in streams], ())
    except TokensError as error:
        mine = (node, [], error.problems)
    found = [mine] * dist.get_world_size()
    dist.all_gather_object(found, mine)
    for rank, (its_node, digests, problems) in enumerate(found):
        if problems:
            raise SpecError(*(replace(each, rule=f"on {its_node}: {each.rule}") for each in problems))
        if digests != found[0][1]:
            rule = f"rank {rank} on {its_node} would read other tokens than rank 0 on {found[0][0]}"
            works = "data.path=FOLDER on a file system that all nodes share"
            raise SpecError(Problem("data.path", [str(folder) for folder in folders], rule, works))
    return streams
