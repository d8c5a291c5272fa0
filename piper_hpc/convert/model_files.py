"""The safetensors of a Hugging Face model's folder, read a tensor at a time and written in shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from piper_hpc.config import ConfigError, Problem
from piper_hpc.convert.names import Place

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
WHOLE = "model.safetensors"
PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Types of weights that are numbers by themselves; the others need scales, which lie beside them."""


class ModelFiles:
    """The tensors of a folder with `model.safetensors` or an index of several. Raises ConfigError naming the file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, Any] = {}
        index = folder / INDEX
        try:
            if index.exists():
                self.file_of: dict[str, str] = json.loads(index.read_text())["weight_map"]
            else:
                with safe_open(folder / WHOLE, framework="pt") as file:
                    self.file_of = dict.fromkeys(file.keys(), WHOLE)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            rule = f"must be the folder of a model with {WHOLE} or {INDEX} ({error})"
            raise ConfigError(Problem("MODEL", str(folder), rule, "the folder that was downloaded")) from None

    def read(self, place: Place) -> torch.Tensor:
        """What lies there, as ours. Raises ConfigError where the file lacks it or has it in a type with scales."""
        stored = self._slice(place.tensor)
        values: torch.Tensor = stored[:] if place.expert is None else stored[place.expert : place.expert + 1][0]
        if values.dtype not in PLAIN:
            rule = f"is of type {values.dtype}: weights must be plain numbers"
            raise ConfigError(Problem(place.tensor, str(values.dtype), rule, "the same model in bfloat16"))
        values = values[..., columns(place)]
        return values.T.contiguous() if place.transposed else values.contiguous()

    def _slice(self, name: str) -> Any:
        try:
            file = self.file_of[name]
            if file not in self._open:
                self._open[file] = safe_open(self.folder / file, framework="pt")
            return self._open[file].get_slice(name)
        except (KeyError, OSError, SafetensorError) as error:
            rule = f"is in no file of {self.folder} ({error})"
            raise ConfigError(Problem("MODEL", name, rule, "a folder with every file of the model")) from None


def columns(place: Place) -> slice:
    """Which of a tensor's last dimension are ours."""
    end = place.start + place.width * place.step if place.width else None
    return slice(place.start, end, place.step)


def put(place: Place, ours: torch.Tensor, into: torch.Tensor) -> None:
    """Write our tensor into the file's whole one, where it lies."""
    target = into if place.expert is None else into[place.expert]
    target[..., columns(place)] = ours.T if place.transposed else ours


def write_shards(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], config_json: str, shard_bytes: int
) -> dict[str, int]:
    """Write `tensors` as files of at most `shard_bytes` (one tensor at least), their index and config.json.

    folder: empty; a file is there once it is whole. Returns bytes by file.
    """
    drafts: list[tuple[Path, list[str]]] = []
    for shard in in_shards(tensors, shard_bytes):
        draft = folder / f".shard-{len(drafts):05d}"
        save_file(dict(shard), draft, {"format": "pt"})
        drafts.append((draft, [name for name, _ in shard]))
    weight_map: dict[str, str] = {}
    sizes: dict[str, int] = {}
    for number, (draft, names) in enumerate(drafts, 1):
        name = WHOLE if len(drafts) == 1 else f"model-{number:05d}-of-{len(drafts):05d}.safetensors"
        draft.rename(folder / name)
        weight_map |= dict.fromkeys(names, name)
        sizes[name] = (folder / name).stat().st_size
    if len(drafts) > 1:
        document = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(document, indent=2))
    (folder / CONFIG).write_text(config_json)
    return sizes


def in_shards(
    tensors: Iterable[tuple[str, torch.Tensor]], shard_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Tensors in order, cut into lists of at most so many bytes, or of one tensor."""
    shard: list[tuple[str, torch.Tensor]] = []
    held = 0
    for name, tensor in tensors:
        if shard and held + tensor.nbytes > shard_bytes:
            yield shard
            shard, held = [], 0
        shard.append((name, tensor))
        held += tensor.nbytes
    if shard:
        yield shard
