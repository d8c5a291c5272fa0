"""Convert weights: every tensor of the model from one kind of files to the other, a shard in memory at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from piper_hpc.comm import FlatDispatcher
from piper_hpc.config import ConfigError, Problem
from piper_hpc.config.hugging_face import from_hf
from piper_hpc.convert.model_files import CONFIG, ModelFiles, in_shards, put, write_shards
from piper_hpc.convert.names import FAMILIES, Family, Place, place_of
from piper_hpc.model import Stage
from piper_hpc.model.names import logical_tensors
from piper_hpc.profiling.clock import CpuClock
from piper_hpc.profiling.spans import Recorder
from piper_hpc.runs.checkpoints import OF_TRAINING, Origin, Sidecar
from piper_hpc.spec import ModelSpec, Recompute
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.train.checkpoint.read import spans
from piper_hpc.train.checkpoint.state import Part
from piper_hpc.train.checkpoint.write import file_name, write_file

DERIVED = re.compile(r".*rotary_emb\.inv_freq")
"""Tensors of old files that follow from the configuration."""


KEPT_WIDE = "e_score_correction_bias"
"""A router's bias keeps its type: it moves in steps that a narrow one has no numbers for."""


@dataclass(frozen=True)
class Converted:
    """What was written: files with their bytes, how many tensors, and those of the source that were left out."""

    files: dict[str, int]
    tensors: int
    left_out: tuple[str, ...] = ()


def shapes_of(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Logical name -> shape of every parameter, and of the routers' state."""
    everything = ExpertPlacement.linear(max(spec.experts, 1), 1)
    stage = Stage(
        spec,
        range(spec.layers),
        sequence=2,
        aux_scale=0.0,
        dispatcher=FlatDispatcher(),
        placements=[everything] * spec.layers,
        recorder=Recorder(CpuClock()),
        recompute=Recompute(),
        device=torch.device("meta"),
        dtype=torch.float32,
    )
    experts = [range(spec.experts)] * spec.layers
    named = dict(logical_tensors(stage.named_parameters(), experts)) | stage.state()
    return {name: tuple(tensor.shape) for name, tensor in named.items()}


def family_of(config: dict[str, Any]) -> Family:
    """How the files of this configuration name things. Raises ConfigError for a family that is not converted."""
    name = config.get("model_type")
    if name not in FAMILIES:
        rule = f"has weights that are not converted; must be one of {', '.join(FAMILIES)}"
        raise ConfigError(Problem(f"{CONFIG}: model_type", name, rule, '"model_type": "mixtral"'))
    return FAMILIES[name]


def to_checkpoint(source: Path, target: Path, *, shard_bytes: int, leave_out: Sequence[str] = ()) -> Converted:
    """The model in the folder `source` as a checkpoint `target`, an empty folder, to train on from: step 0, no moments.

    Tensors keep their type. leave_out: beginnings of names that the file may have beyond what the model has. Raises
    ConfigError for a model that does not train, a tensor that is missing, of another shape, or left over.
    """
    config = json.loads((source / CONFIG).read_text())
    spec, family, files = from_hf(config), family_of(config), ModelFiles(source)
    places = {name: place_of(family, spec, name) for name in shapes_of(spec)}
    used = {place.tensor for place in places.values()}
    rest = [name for name in files.file_of if name not in used and not DERIVED.fullmatch(name)]
    unknown = [name for name in rest if not name.startswith(tuple(leave_out))] if leave_out else rest
    if unknown:
        rule = f"of {len(unknown)} tensors that are no part of what trains, the first"
        raise ConfigError(Problem("MODEL", unknown[0], rule, f"--leave-out {unknown[0].rsplit('.', 2)[0]}"))
    written = []
    for number, shard in enumerate(in_shards(_ours(files, places, shapes_of(spec)), shard_bytes)):
        parts = [Part(f"model.{name}", tuple(each.shape), 0, each.shape[0], each) for name, each in shard]
        written.append(write_file(target / file_name(number), parts))
    Sidecar(
        step=0,
        samples=0,
        optimizer_steps=0,
        origin=Origin(None, "float32", json.loads(json.dumps(asdict(spec))), {}, []),
        tensors={name: shape for each in written for name, shape in each.shapes.items()},
        files=tuple(each.file for each in written),
    ).write(target)
    sizes = {each.file.name: each.file.size_bytes for each in written}
    return Converted(sizes, len(places), tuple(sorted(set(rest))))


def _ours(
    files: ModelFiles, places: dict[str, Place], shapes: dict[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    for name, place in places.items():
        values = files.read(place)
        if tuple(values.shape) != shapes[name]:
            rule = f"has shape {list(values.shape)} where the configuration says {list(shapes[name])}"
            raise ConfigError(Problem("MODEL", place.tensor, rule, f"the {CONFIG} that belongs to these weights"))
        yield name, values


def to_model(
    source: Path, target: Path, config_path: Path, *, dtype: torch.dtype | None, shard_bytes: int
) -> Converted:
    """The checkpoint `source`, of any layout, as a model's folder `target`, which is empty.

    config_path: the config.json of the model, whose facts must be the checkpoint's; dtype: of the weights, None: as
    stored. Raises ConfigError, and CheckpointError for a checkpoint that is not whole.
    """
    config_json = config_path.read_text()
    config = json.loads(config_json)
    spec, family, sidecar = from_hf(config), family_of(config), Sidecar.of_whole(source)
    # How training balances its routers is no part of a model's files.
    facts = sidecar.origin.model
    trained = replace(spec, **{fact: facts[fact] for fact in OF_TRAINING if fact in facts})
    if differences := sidecar.origin.disagreements(trained, seed=sidecar.origin.seed, dtype=sidecar.origin.dtype):
        raise ConfigError(*differences)
    stored = spans(source, sidecar)
    by_tensor: dict[str, list[tuple[str, Place]]] = {}
    for name in shapes_of(spec):
        place = place_of(family, spec, name)
        by_tensor.setdefault(place.tensor, []).append((name, place))

    def whole(name: str) -> torch.Tensor:
        rows = []
        for span in stored[f"model.{name}"]:
            with safe_open(source / span.file.name, framework="pt") as file:
                rows.append(file.get_tensor(f"model.{name}"))
        return torch.cat(rows)

    def theirs() -> Iterator[tuple[str, torch.Tensor]]:
        for tensor, parts in by_tensor.items():
            first = whole(parts[0][0])
            wanted = first.dtype if dtype is None or tensor.endswith(KEPT_WIDE) else dtype
            into = _empty(parts[0][1], first, spec, wanted)
            for name, place in parts:
                put(place, whole(name).to(into.dtype), into)
            yield tensor, into

    return Converted(write_shards(target, theirs(), config_json, shard_bytes), len(by_tensor))


def _empty(place: Place, first: torch.Tensor, spec: ModelSpec, dtype: torch.dtype) -> torch.Tensor:
    """The file's tensor of which `first` lies at `place`."""
    shape = list(first.shape[::-1] if place.transposed else first.shape)
    if place.width:
        shape[-1] = 2 * place.width  # gate and up
    return torch.empty([spec.experts, *shape] if place.expert is not None else shape, dtype=dtype)
