"""The checkpoints of a run as their sidecars describe them: which are whole, which is the newest, which are kept.

A checkpoint is a folder `step-N` of safetensors files and one `checkpoint.json`, which is written last: a folder
without it is none. Nothing here or in the reader unpickles, so that a checkpoint of a colleague can be read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from piper_hpc.spec.all_to_all import AllToAllConfig
from piper_hpc.spec.layout import RankMap
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.problem import Problem, SpecError

SIDECAR = "checkpoint.json"
SCHEMA_VERSION = 1
LABELS = ("name", "counting")
"""Of a model's facts those that only say how it is called and counted."""
OF_TRAINING = ("router_aux", "router_aux_coef", "router_z_coef", "selection_bias_rate")
"""Those that say how it is trained: weights that came from elsewhere do not know them."""

FACT_DEFAULTS = {fact.name: fact.default for fact in fields(ModelSpec)}
"""What an older checkpoint says of a fact that came after it."""

DIGEST_BYTES = 32
BLOCK_BYTES = 1 << 22
"""How much of a file is hashed at once."""

_NAME = re.compile(r"step-(\d{8,})(?:\.(\d+))?")
_log = logging.getLogger(__name__)


class CheckpointError(SpecError):
    """A checkpoint that cannot be written, read, or gone on from: folder, what is wrong, and what works."""

    @staticmethod
    def of(path: Path, rule: str) -> CheckpointError:
        """What is wrong with the checkpoint `path`; the rule names the file."""
        works = "train.resume_from with an older checkpoint of its folder, or train.resume_from=null"
        return CheckpointError(Problem("train.resume_from", str(path), rule, works))


@dataclass(frozen=True)
class StoredFile:
    """One safetensors file: its size, the BLAKE2b (RFC 7693) of its bytes, and which rows [start, stop) of each tensor
    are in it."""

    name: str
    size_bytes: int
    blake2b: str
    rows: Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class Origin:
    """What wrote a checkpoint, in plain JSON types. Training draws no random numbers after the first weights and the
    order of samples, both functions of the seed, so that there is no generator's state beside it.

    seed: None where weights came from elsewhere; dtype: of master weights and moments; all_to_all: `{"ranks",
    "algorithm", "chunks"}` of each expert group for which `auto` chose.
    """

    seed: int | None
    dtype: str
    model: dict[str, Any]
    rank_map: dict[str, Any]
    all_to_all: list[dict[str, Any]]

    @staticmethod
    def of(
        model: ModelSpec,
        rank_map: RankMap,
        configs: Mapping[tuple[int, ...], AllToAllConfig] | None,
        *,
        seed: int,
        dtype: str,
    ) -> Origin:
        """configs: ranks of an expert group -> what `auto` chose for it; None where the layout names an algorithm.
        dtype: of the weights that are computed with."""
        chosen = [{"ranks": ranks} | asdict(config) for ranks, config in (configs or {}).items()]
        return Origin(seed, _master_type(dtype), _plain(asdict(model)), _plain(asdict(rank_map)), _plain(chosen))

    def same_place(self, rank_map: RankMap) -> bool:
        """Whether it was written at this layout on nodes of this shape: where training can go on bit for bit."""
        return self.rank_map == _plain(asdict(rank_map))

    def configs(self) -> dict[tuple[int, ...], AllToAllConfig]:
        """The inverse of `of`'s configs."""
        return {tuple(each["ranks"]): AllToAllConfig(each["algorithm"], each["chunks"]) for each in self.all_to_all}

    def disagreements(self, model: ModelSpec, *, seed: int | None, dtype: str) -> list[Problem]:
        """Why a run of these facts cannot go on from here: each fact that differs, with the value that it must have.

        dtype: of the weights that are computed with; bfloat16 and float32 have the same master weights.
        """
        seeds = {} if self.seed is None else {"train.seed": (seed, self.seed)}
        free = LABELS if self.seed is not None else (*LABELS, *OF_TRAINING)
        wanted = (
            seeds
            | {"train.dtype": (_master_type(dtype), self.dtype)}
            | {
                f"model.{key}": (value, self.model.get(key, FACT_DEFAULTS.get(key)))
                for key, value in _plain(asdict(model)).items()
                if key not in free
            }
        )
        return [
            Problem(key, value, f"must be {stored!r}, as in the checkpoint to go on from", f"{key}={stored}")
            for key, (value, stored) in wanted.items()
            if value != stored
        ]


@dataclass(frozen=True)
class Sidecar:
    """`checkpoint.json`: where training stood, what wrote it, the shape of every tensor, and the files.

    step: steps done; samples: of the data order used; optimizer_steps: updates, fewer where steps were skipped;
    rank_of_expert: by layer, where experts were that had moved, [layers][experts] ranks of an expert group; empty where
    none had. Tensors have logical names, so that any placement reads them.
    """

    step: int
    samples: int
    optimizer_steps: int
    origin: Origin
    tensors: Mapping[str, tuple[int, ...]]
    files: tuple[StoredFile, ...]
    rank_of_expert: Sequence[Sequence[int]] = ()

    def write(self, folder: Path) -> None:
        """Make the folder a whole checkpoint, in one move, once all of its files are on disk."""
        document = _plain(asdict(self))
        text = json.dumps({"schema_version": SCHEMA_VERSION, "blake2b": _digest(document)} | document)
        draft = folder / f".{SIDECAR}.draft"
        with draft.open("w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(folder)
        os.replace(draft, folder / SIDECAR)
        sync_folder(folder)

    @staticmethod
    def read(folder: Path) -> Sidecar:
        """Raises CheckpointError where there is none, or where it is torn, altered or of another schema_version."""
        try:
            document = json.loads((folder / SIDECAR).read_bytes())
            version, digest = document.pop("schema_version"), document.pop("blake2b")
        except FileNotFoundError:
            raise CheckpointError.of(folder, f"{SIDECAR} is missing: it is no whole checkpoint") from None
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError.of(folder, f"{SIDECAR} cannot be read ({error})") from None
        if version != SCHEMA_VERSION:
            rule = f"{SIDECAR} has schema_version {version!r}, read here is {SCHEMA_VERSION}"
            raise CheckpointError.of(folder, rule)
        if digest != _digest(document):
            raise CheckpointError.of(folder, f"{SIDECAR} is not as it was written: its blake2b differs")
        try:
            files = tuple(StoredFile(**each) for each in document.pop("files"))
            return Sidecar(origin=Origin(**document.pop("origin")), files=files, **document)
        except (TypeError, KeyError) as error:
            raise CheckpointError.of(folder, f"{SIDECAR} has not the keys that it must have ({error})") from None

    @staticmethod
    def of_whole(folder: Path) -> Sidecar:
        """Read it, and see that every file is there in its size. Raises CheckpointError naming the file."""
        sidecar = Sidecar.read(folder)
        for each in sidecar.files:
            try:
                size_bytes = (folder / each.name).stat().st_size
            except OSError as error:
                raise CheckpointError.of(folder, f"{each.name} is missing ({error.strerror})") from None
            if size_bytes != each.size_bytes:
                rule = f"{each.name} has {size_bytes} bytes, {each.size_bytes} were written"
                raise CheckpointError.of(folder, rule)
        return sidecar


def newest(folder: Path) -> Path | None:
    """The newest whole checkpoint of `folder`, or `folder` where it is one itself; None where there is none.

    What is newer and torn is skipped, with a warning in the log.
    """
    if (folder / SIDECAR).is_file():
        return folder
    for path in reversed(_all(folder)):
        try:
            Sidecar.of_whole(path)
        except CheckpointError as error:
            _log.warning("%s is skipped: %s", path, error.problems[0].rule)
        else:
            return path
    return None


def new_folder(folder: Path, step: int) -> Path:
    """Make an empty folder for the checkpoint after `step` steps, beside what a torn or altered one may have left."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"step-{step:08d}"
    number = 0
    while True:
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
            path = folder / f"step-{step:08d}.{number}"
        else:
            sync_folder(folder)
            return path


def prune(folder: Path, keep: int, newest_whole: Path, *, keep_every: int = 0, inodes: int | None = None) -> None:
    """Keep the `keep` newest whole checkpoints (0: all), and remove what was left torn before `newest_whole`.

    keep_every: those of every so many steps stay too, 0: none. inodes: the most files and folders of all, with the
    next one; the oldest go first beyond it, whatever else would keep them. The newest whole one stays in any case.

    A whole one loses its sidecar first: a kill leaves it torn, never half of it for whole. A folder of another kind,
    which has a `.metadata` of torch's own, stays.
    """
    older = [path for path in _all(folder) if _order(path) < _order(newest_whole)]
    whole = [path for path in older if (path / SIDECAR).is_file()]
    torn = [path for path in older if path not in whole and not (path / ".metadata").exists()]
    surplus = whole[: max(0, len(whole) - (keep - 1))] if keep else []
    surplus = [path for path in surplus if not keep_every or _order(path)[0] % keep_every]
    if inodes is not None:
        each = len(list(newest_whole.iterdir())) + 1
        most = max(0, inodes // each - 2)  # beside the newest and the next
        kept = [path for path in whole if path not in surplus]
        surplus += kept[: max(0, len(kept) - most)]
    for path in surplus:
        (path / SIDECAR).unlink()
        sync_folder(path)
    for path in [*surplus, *torn]:
        shutil.rmtree(path)


def file_digest(path: Path) -> str:
    """BLAKE2b (RFC 7693) of a file's bytes, 32 bytes in hexadecimal."""
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _all(folder: Path) -> list[Path]:
    """Folders with a checkpoint's name, oldest first."""
    return sorted((path for path in folder.glob("step-*") if _NAME.fullmatch(path.name)), key=_order)


def _order(path: Path) -> tuple[int, int]:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1]), int(found[2] or 0)


def _master_type(dtype: str) -> str:
    """The type of master weights and moments beside weights of this type."""
    return "float64" if dtype == "float64" else "float32"


def _digest(document: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(document, sort_keys=True).encode(), digest_size=DIGEST_BYTES).hexdigest()


def _plain(value: Any) -> Any:
    """The value as JSON gives it back: tuples are lists, keys are strings."""
    return json.loads(json.dumps(value))
