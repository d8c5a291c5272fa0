"""The folders that data=tokens names: which they are, and what is wrong with them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from piper_hpc.config.errors import Problem
from piper_hpc.config.schema import DataConfig
from piper_hpc.tokens.folder import TokenIndex, TokensError


def token_sources(data: DataConfig) -> list[tuple[Path, float]]:
    """The folders of data=tokens and the weights of their samples."""
    given = [(each.path, each.weight) for each in data.sources] if data.path is None else [(data.path, 1.0)]
    return [(Path(folder).expanduser(), weight) for folder, weight in given]


def token_problems(data: DataConfig) -> Iterator[Problem]:
    """What data=tokens asks for; of one tokenizer, as ids of another mean something else."""
    if data.name != "tokens":
        if data.sources:
            folders = [each.path for each in data.sources]
            yield Problem("data.sources", folders, "is for data=tokens", f"data=tokens data.path={folders[0]}")
        if data.document_starts == "mask":
            rule = "is for data=tokens: bytes have no documents"
            yield Problem("data.document_starts", "mask", rule, "data.document_starts=learn")
        return
    if (data.path is None) == (not data.sources):
        rule = "one folder in data.path, or several in data.sources: one of the two"
        yield Problem("data.path", data.path, rule, "data.path=FOLDER data.sources=[]")
        return
    tokenizers: dict[str, Path] = {}
    for number, (folder, weight) in enumerate(token_sources(data)):
        if not 0 < weight < math.inf:
            key = f"data.sources[{number}].weight"
            yield Problem(
                key,
                weight,
                f"must be a number greater than 0, of {folder}",
                f"data.sources=[{{path:{folder},weight:1}}]",
            )
        try:
            tokenizers.setdefault(TokenIndex.of_whole(folder).tokenizer_sha256, folder)
        except TokensError as error:
            yield from error.problems
    if len(tokenizers) > 1:
        listed = ", ".join(f"{folder} by {sha256[:8]}" for sha256, folder in tokenizers.items())
        rule = f"must be of one tokenizer, and are of {len(tokenizers)}: {listed}"
        yield Problem("data.sources", [str(each) for each in tokenizers.values()], rule, "data.path=FOLDER")
