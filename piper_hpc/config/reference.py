"""`python -m piper_hpc.config.reference [--check]`: write docs/configuration.md from the schema and the table of
docs/models.md from the presets, or say which is old.

A key's meaning is the comment behind its line in schema.py, and where it is a group of keys the docstring of its class.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import io
import itertools
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from omegaconf import MISSING

from piper_hpc.config import model_table, schema
from piper_hpc.paths import data_folder
from piper_hpc.spec import ModelSpec, executor

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE, MODELS = DOCS / "configuration.md", DOCS / "models.md"
COMMAND = "python -m piper_hpc.config.reference"

HEAD = f"""# Configuration reference

Written by `{COMMAND}` from `piper_hpc/config/schema.py`; do not edit it by hand.

A key is set as an override, `train.steps=20`, and a group is chosen by its option, `model=olmoe`. An option is a file
`conf/GROUP/OPTION.yaml` that sets some keys of its group; what it leaves out has the default below. "By the option"
means that there is no default: every option shipped sets the key. `python -m piper_hpc.launch --cfg job` prints every
key with the value that a command would use, and a key that is not listed here ends with exit code 2.
"""


TRAINS = """What this project's executor can train; plans know more, see `plan.axes`:

| axis | values that train |
|---|---|
"""

Row = tuple[str, str, str, str]
"""Key, type, default, meaning."""


SOURCE = Path(schema.__file__).read_text(encoding="utf-8")
TOKENS = tokenize.generate_tokens(io.StringIO(SOURCE).readline)
COMMENTS = {token.start[0]: token.string.lstrip("# ") for token in TOKENS if token.type == tokenize.COMMENT}
"""Line number -> the comment at its end."""
CLASSES = {node.name: node for node in ast.parse(SOURCE).body if isinstance(node, ast.ClassDef)}
PLAN = yaml.safe_load((data_folder("conf") / "plan" / "default.yaml").read_text(encoding="utf-8"))
DEFAULTS_ELSEWHERE = {
    "ModelConfig": {fact.name: fact.default for fact in dataclasses.fields(ModelSpec)},
    "PlanConfig": PLAN,
    "AxesConfig": PLAN["axes"],
}
"""Defaults that are not in the schema itself: class of the group -> key -> value."""


def keys(name: str, prefix: str) -> Iterator[Row]:
    """Every key of the dataclass `name`, those of dataclasses inside it after their own line."""
    defaults = {field.name: _default(field) for field in dataclasses.fields(getattr(schema, name))}
    defaults |= DEFAULTS_ELSEWHERE.get(name, {})
    for node in CLASSES[name].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        key, annotation = ast.unparse(node.target), ast.unparse(node.annotation)
        if name == "Config" and annotation in CLASSES:
            continue  # a group, with a section of its own
        lines = range(node.lineno, (node.end_lineno or node.lineno) + 1)
        meaning = " ".join(COMMENTS[line] for line in lines if line in COMMENTS)
        inner = next((one for one in CLASSES if re.search(rf"\b{one}\b", annotation)), None)
        if inner is not None:
            meaning = meaning or ast.get_docstring(CLASSES[inner]) or ""
            annotation = annotation.replace(inner, "keys below")
        if not meaning:
            raise ValueError(f"{name}.{key}: needs a comment behind its line in schema.py that says what it means")
        default = "" if inner else _shown(defaults[key])
        yield f"`{prefix}{key}`", annotation.replace(" | ", " or ").replace("None", "null"), default, meaning
        if inner is not None:
            yield from keys(inner, f"{prefix}{key}." + ("NAME." if "dict" in annotation else ""))


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if value is dataclasses.MISSING or value == MISSING:
        return "by the option"
    return f"`{json.dumps(value)}`" if not isinstance(value, str) else f"`{value}`"


def options(group: str) -> Iterator[str]:
    """One line an option of a group: its name, and the first sentence of the comment that its file begins with."""
    for path in sorted((data_folder("conf") / group).glob("*.yaml")):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = itertools.takewhile(
            lambda line: line.startswith("#"), (line for line in lines if "@package" not in line)
        )
        sentence = " ".join(line.lstrip("# ") for line in comment).split(". ")[0].rstrip(".")
        yield f"- `{group}={path.stem}`: {sentence}"


def page() -> str:
    """The whole page."""
    parts = [HEAD, _table("The command itself", "", keys("Config", ""))]
    for field in dataclasses.fields(schema.Config):
        name = str(field.type)
        if name in CLASSES:
            about = ast.get_docstring(CLASSES[name]) or ""
            parts.append(_table(f"`{field.name}`", about, keys(name, f"{field.name}.")))
            parts.append("\n".join(["Options:", "", *options(field.name)]) + "\n")
        if field.name == "parallelism":
            trains = ((one.axis, ", ".join(map(_shown, one.trains or ["any"]))) for one in executor.support())
            parts.append(TRAINS + "".join(f"| `{axis}` | {values} |\n" for axis, values in trains))
    heading = ["## `experiment`", "", "Options that choose several groups at once:", ""]
    parts.append("\n".join([*heading, *options("experiment")]) + "\n")
    return "\n".join(parts)


def _table(title: str, about: str, rows: Iterator[Row]) -> str:
    lines = [
        f"## {title}",
        "",
        *([about, ""] if about else []),
        "| key | type | default | meaning |",
        "|---|---|---|---|",
    ]
    lines += ["| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command; exit code 1 where --check finds a page stale."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 where a page would differ")
    check, stale = parser.parse_args().check, False
    for path, wanted in ((PAGE, page()), (MODELS, model_table.in_page(MODELS.read_text(encoding="utf-8")))):
        same = path.is_file() and path.read_text(encoding="utf-8") == wanted
        stale |= not same
        if check:
            print(f"{path} is up to date" if same else f"{path} is stale: run {COMMAND}")
        else:
            path.write_text(wanted, encoding="utf-8")
            print(f"wrote {path}")
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
