"""Text into a folder of token ids that data=tokens reads.

    python -m piper_hpc.prepare --tokenizer tokenizer.json --eos '</s>' --out tokens TEXT...

TEXT is a file or a folder: each line of *.jsonl (or *.jsonl.gz) is a document, and every other file (or .gz) is one.
Nothing is downloaded. The same command goes on where it was ended, and where it had finished checks every shard. Exit
codes: 0 done, 2 a mistake in what was asked or in the text, 130 interrupted; shards that were finished then stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from piper_hpc.cli.errors import run_command
from piper_hpc.config import ConfigError, Problem
from piper_hpc.prepare.documents import Source, file_sha256, find_sources
from piper_hpc.prepare.shards import Written, folder_of_one_writer, write
from piper_hpc.prepare.tokenizing import Tokenizer
from piper_hpc.tokens.folder import TokenIndex

SHARD_TOKENS = 1 << 28
UINT16_IDS = 1 << 16


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m piper_hpc.prepare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("inputs", nargs="+", metavar="INPUT", type=Path, help="files of text, or folders of them")
    parser.add_argument("--tokenizer", metavar="FILE.json", type=Path, required=True, help="of Hugging Face tokenizers")
    parser.add_argument("--out", metavar="FOLDER", type=Path, required=True, help="where the tokens go")
    parser.add_argument("--eos", metavar="TOKEN", help="the token behind every document; left out: none")
    parser.add_argument("--key", default="text", help="of a JSON line's text (text)")
    fills = "a shard ends with the document that brings it to N tokens (2^28)"
    parser.add_argument("--shard-tokens", metavar="N", type=int, default=SHARD_TOKENS, help=fills)
    parser.add_argument("--json", action="store_true", help="what was written as one JSON document")
    chosen = parser.parse_args(arguments)
    return run_command(lambda: _prepare(chosen))


def _prepare(chosen: argparse.Namespace) -> int:
    if chosen.shard_tokens < 1:
        raise ConfigError(Problem("--shard-tokens", chosen.shard_tokens, "must be at least 1", "no --shard-tokens"))
    tokenizer, sources = Tokenizer(chosen.tokenizer, chosen.eos), find_sources(chosen.inputs)
    try:
        with folder_of_one_writer(chosen.out), _progress() as progress:
            written = _written(chosen, tokenizer, sources, progress)
    except OSError as error:
        works = "the same command once that is mended: it goes on behind the last shard"
        raise ConfigError(Problem("--out", str(chosen.out), str(error), works)) from None
    index = written.index
    if chosen.json:
        print(json.dumps(index.document() | {"path": str(chosen.out), "kept_shards": written.kept}))
        return 0
    said = f"{index.tokens} tokens of {index.documents} documents in {len(index.shards)} shards"
    kept = f", {written.kept} of them as they were" if written.kept else ""
    print(f"{chosen.out}: {said}{kept}; ids up to {index.max_id}")
    print(f"next: python -m piper_hpc.launch data=tokens data.path={chosen.out} model.vocab={index.vocab}")
    return 0


def _written(
    chosen: argparse.Namespace, tokenizer: Tokenizer, sources: Sequence[Source], progress: Progress
) -> Written:
    size_bytes = sum(source.size_bytes for source in sources)
    digesting = progress.add_task("reading", total=size_bytes)
    digests = [file_sha256(each.path, lambda count: progress.advance(digesting, count)) for each in sources]
    begun = TokenIndex(
        dtype="uint16" if tokenizer.vocab <= UINT16_IDS else "uint32",
        vocab=tokenizer.vocab,
        eos=tokenizer.eos,
        made_from={
            "tokenizer": {"name": chosen.tokenizer.name, "sha256": file_sha256(chosen.tokenizer)},
            "library": tokenizer.library,
            "eos": chosen.eos,
            "key": chosen.key,
            "shard_tokens": chosen.shard_tokens,
            "sources": [
                {"name": source.name, "size_bytes": source.size_bytes, "sha256": sha256}
                for source, sha256 in zip(sources, digests, strict=True)
            ],
        },
    )
    tokenizing = progress.add_task("tokenizing", total=size_bytes)
    written = write(chosen.out, begun, sources, tokenizer, on_bytes=lambda count: progress.advance(tokenizing, count))
    progress.update(tokenizing, completed=size_bytes)
    return written


def _progress() -> Progress:
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    return Progress(TextColumn("{task.description:10}"), *columns, console=Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())
