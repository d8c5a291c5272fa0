"""What measuring code was recorded, and at which BENCHMARK_VERSION: a calibration's version speaks for the code.

    python -m tests.microbench.record_measured_code            # after raising piper_hpc.spec.BENCHMARK_VERSION
    python -m tests.microbench.record_measured_code "REASON"   # a waiver: the change alters no measured time

The code is what measures (piper_hpc/microbench), and the exchanges and the router that it times. Its digest is of the
syntax trees of all definitions without docstrings, comments, annotations and imports, in no order: formatting, words,
moved definitions and renamed modules or aliases do not change it.
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from piper_hpc.spec import BENCHMARK_VERSION

PACKAGE = Path(__file__).parents[2] / "piper_hpc"
MEASURING = ("microbench", "comm", "model/router.py")
RECORD = Path(__file__).with_name("measured_code.json")


def digest(folders: Iterable[Path] = tuple(PACKAGE / folder for folder in MEASURING)) -> str:
    """Of all modules under `folders`."""
    files = [file for folder in folders for file in ([folder] if folder.is_file() else folder.rglob("*.py"))]
    definitions = sorted(text for file in files for text in _definitions(ast.parse(file.read_text())))
    return hashlib.sha256("\n".join(definitions).encode()).hexdigest()[:16]


def _definitions(module: ast.Module) -> Iterator[str]:
    """The module's statements as text, one by one."""
    aliases = {
        alias.asname: alias.name.split(".")[-1]
        for node in ast.walk(module)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if alias.asname
    }
    for statement in module.body:
        text = _text(statement, aliases)
        if text and not text.startswith("Assign([Name(__all__"):
            yield text


def _text(node: Any, aliases: dict[str, str]) -> str:
    """A tree as text that no version of Python changes: fields that are empty are left out. Empty where nothing is
    left: an import, a docstring, a block of imports for type checkers."""
    if isinstance(node, list):
        parts = [_text(each, aliases) for each in node]
        return f"[{', '.join(part for part in parts if part)}]" if any(parts) else ""
    if not isinstance(node, ast.AST):
        return "" if node is None else repr(node)
    documented = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    if documented or isinstance(node, (ast.Import, ast.ImportFrom, ast.expr_context)):
        return ""
    if isinstance(node, ast.Name):
        return f"Name({aliases.get(node.id, node.id)})"
    fields = {name: value for name, value in ast.iter_fields(node) if name not in ("annotation", "returns", "kind")}
    texts = {name: _text(value, aliases) for name, value in fields.items()}
    if isinstance(node, ast.If) and not texts["body"] and not texts["orelse"]:
        return ""
    return f"{type(node).__name__}({', '.join(text for text in texts.values() if text)})"


def known(record: dict[str, Any]) -> set[str]:
    """The digests that the record allows at its benchmark_version."""
    return {record["digest"], *(waiver["digest"] for waiver in record["waivers"])}


def recorded(record: dict[str, Any], now: str, version: int, reason: str, date: str) -> dict[str, Any]:
    """The record with the digest `now`: as that of a new version, else as a waiver. Raises ValueError without one."""
    if version != record["benchmark_version"]:
        return {"benchmark_version": version, "digest": now, "waivers": []}
    if now in known(record):
        return record
    if not reason:
        raise ValueError(
            f"measuring code has changed and BENCHMARK_VERSION is {version} as before: raise it in piper_hpc/spec/"
            'cluster.py, or say why no measured time changes: python -m tests.microbench.record_measured_code "REASON"'
        )
    return record | {"waivers": [*record["waivers"], {"digest": now, "reason": reason, "date": date}]}


def main(words: list[str]) -> int:
    """Record the code as it stands; exit code 2 where a reason is missing."""
    today = datetime.now(timezone.utc).date().isoformat()
    record = json.loads(RECORD.read_text())
    try:
        written = recorded(record, digest(), BENCHMARK_VERSION, " ".join(words).strip(), today)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    RECORD.write_text(json.dumps(written, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
