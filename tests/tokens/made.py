"""Folders of tokens made by hand, byte by byte as docs/record.md says, and not by the code that writes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def made(folder: Path, shards: Sequence[Sequence[Sequence[int]]], *, tokenizer: str = "ab" * 32) -> Path:
    """A folder of the documents of each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = []
    for number, documents in enumerate(shards):
        ids = np.array([each for document in documents for each in document], "<u2")
        name = f"shard-{number:05d}"
        (folder / f"{name}.bin").write_bytes(ids.tobytes())
        np.save(folder / f"{name}.docs.npy", np.cumsum([len(document) for document in documents]).astype("<i8"))
        facts.append(
            {"name": name, "tokens": len(ids), "documents": len(documents), "max_id": int(ids.max()), "ends": [0, 1]}
            | {"bin_sha256": "", "docs_sha256": ""}
        )
    index = {
        "schema_version": 1,
        "dtype": "uint16",
        "vocab": 1000,
        "eos": None,
        "made_from": {"tokenizer": {"name": "tokenizer.json", "sha256": tokenizer}},
        "shards": facts,
    }
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def counted(folder: Path, tokens: int, first: int = 0, document: int = 7) -> Path:
    """Ids that count up from `first`, in documents of seven and two shards."""
    ids = list(range(first, first + tokens))
    documents = [ids[start : start + document] for start in range(0, tokens, document)]
    half = max(1, len(documents) // 2)
    return made(folder, [part for part in (documents[:half], documents[half:]) if part])
