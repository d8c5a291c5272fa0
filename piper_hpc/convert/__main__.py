"""Weights of a Hugging Face model into a checkpoint to train on from, and a checkpoint into a model's folder.

    python -m piper_hpc.convert to-checkpoint MODEL CHECKPOINT
    python -m piper_hpc.convert to-model CHECKPOINT MODEL --config config.json

MODEL is a folder with config.json and safetensors, as it is downloaded. A checkpoint made of one starts at step 0 with
Adam's moments at zero: train on with `model=hf model.path=MODEL/config.json train.resume_from=CHECKPOINT`, at any
layout. A tensor that both know goes there and back bit for bit. Nothing is downloaded and nothing unpickled. Exit
codes: 0 done, 2 a mistake in what was asked or in the files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from piper_hpc.cli.errors import run_command
from piper_hpc.config import ConfigError, Problem
from piper_hpc.convert.weights import Converted, to_checkpoint, to_model

SHARD_BYTES = 5_000_000_000
DTYPES = ("float32", "bfloat16", "float16")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m piper_hpc.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(dest="way", required=True)
    into = ways.add_parser("to-checkpoint", help="a Hugging Face model into a checkpoint")
    into.add_argument("source", metavar="MODEL", type=Path)
    into.add_argument("target", metavar="CHECKPOINT", type=Path, help="a folder that is not there yet")
    beginning = "beginning of names of tensors that the model has no place for, such as model.layers.61 (may repeat)"
    into.add_argument("--leave-out", metavar="NAME", action="append", default=[], help=beginning)
    back = ways.add_parser("to-model", help="a checkpoint into a Hugging Face model")
    back.add_argument("source", metavar="CHECKPOINT", type=Path)
    back.add_argument("target", metavar="MODEL", type=Path, help="a folder that is not there yet")
    back.add_argument("--config", metavar="FILE", type=Path, required=True, help="the config.json of the model")
    back.add_argument("--dtype", choices=DTYPES, help="of the weights; left out: as they are in the checkpoint")
    for way in (into, back):
        way.add_argument("--shard-bytes", metavar="N", type=int, default=SHARD_BYTES, help="most of a file (5 GB)")
        way.add_argument("--json", action="store_true", help="what was written as one JSON document")
    chosen = parser.parse_args(arguments)
    return run_command(lambda: _convert(chosen))


def _convert(chosen: argparse.Namespace) -> int:
    if chosen.shard_bytes < 1:
        raise ConfigError(Problem("--shard-bytes", chosen.shard_bytes, "must be at least 1", "no --shard-bytes"))
    try:
        chosen.target.mkdir(parents=True, exist_ok=False)
    except FileExistsError:
        rule = "is there already: nothing is written over"
        raise ConfigError(Problem("target", str(chosen.target), rule, f"{chosen.target}-new")) from None
    try:
        done = _converted(chosen)
    except BaseException:
        for path in chosen.target.iterdir():
            path.unlink()
        chosen.target.rmdir()
        raise
    if chosen.json:
        print(json.dumps({"files": done.files, "tensors": done.tensors, "left_out": done.left_out}))
    else:
        size = sum(done.files.values()) / 1e9
        left = f"; {len(done.left_out)} tensors were left out" if done.left_out else ""
        Console().print(f"{done.tensors} tensors in {len(done.files)} files, {size:.3g} GB: {chosen.target}{left}")
    return 0


def _converted(chosen: argparse.Namespace) -> Converted:
    try:
        if chosen.way == "to-checkpoint":
            return to_checkpoint(
                chosen.source, chosen.target, shard_bytes=chosen.shard_bytes, leave_out=chosen.leave_out
            )
        dtype = getattr(torch, chosen.dtype) if chosen.dtype else None
        return to_model(chosen.source, chosen.target, chosen.config, dtype=dtype, shard_bytes=chosen.shard_bytes)
    except (OSError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        rule = f"cannot be converted: {error}"
        raise ConfigError(
            Problem("source", str(chosen.source), rule, "a folder with config.json and safetensors")
        ) from None


if __name__ == "__main__":
    sys.exit(main())
