"""Published rows as printed, with their numbers normalised, and the rows of one run together."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType

from analysis.validation.published.metrics import MFU, UNKNOWN, Quantity, in_si, quantity
from piper_hpc.report.load import UsageError

SHIPPED = Path(__file__).with_name("rows.csv")
"""The public rows that the project knows, facts with their sources."""

COLUMNS = (
    *("row_id", "source", "model", "layers", "hidden", "heads", "kv_heads", "ffn"),
    *("experts", "topk", "moe_ffn", "shared_experts", "seq", "global_batch", "micro_batch", "gpu", "num_gpus"),
    *("tp", "pp", "vpp", "ep", "dp", "cp", "precision", "recompute", "metric", "value", "unit"),
    *("etp", "zero_stage", "routing", "dispatcher", "notes"),
)
OF_A_ROW = ("row_id", "metric", "value", "unit")
"""Columns in which the rows of one run differ; all others, notes too, are the run's key."""


_NUMBER = re.compile(
    r"(?P<digits>(\d{1,3}(,\d{3})+|\d+)(\.\d+)?)(?![\d.,])[ -]?(?P<suffix>[km](?![a-z])|)"
    r"[ -]*(x[ -]?)?(?P<word>[^(;]*?)\s*([(;]|$)",
    re.I,
)
_DEVICE_WORDS = (
    r"(nvidia |amd )?((gb|gh|[abhv]|mi)\d{2,3}\w*[ -]?)?((sxm|nvl|oam)\d* ?|pcie ?)?((gpu|gcd|device|chip|rank)s?)?"
)
_UNIT_WORDS = (
    r"(?i:tok(en)?s?|seq(uence)?s?|samples?|examples?|layers?|heads?|routed( experts?)?|experts?|ways?|stages?|chunks?"
    rf"|{_DEVICE_WORDS})"
)
"""What may stand after a number without changing it."""
_SUFFIX = {"": 1, "k": 2**10, "m": 2**20}


@dataclass(frozen=True)
class PublishedRow:
    """One printed value. `cells` are the row's own strings; `value` is in SI units, None for a status or a bad unit.

    scale: the printed unit in SI units.
    """

    cells: Mapping[str, str]
    quantity: Quantity
    value: float | None
    problem: str = ""
    scale: float = 1.0

    @staticmethod
    def of(cells: Mapping[str, str]) -> PublishedRow:
        """Read a row; what cannot be read is kept as its `problem`, never raised."""
        what = quantity(cells["metric"], cells["unit"])
        own = MappingProxyType(dict(cells))
        if what.kind == "status":
            return PublishedRow(own, what, None)
        try:
            printed = float(re.sub(r"^[~≈]|,|%$", "", cells["value"].strip()))
        except ValueError:
            return PublishedRow(own, what, None, f"value={cells['value']}: must be a number")
        if not math.isfinite(printed) or printed <= 0:
            return PublishedRow(own, what, None, f"value={cells['value']}: must be positive and finite")
        if what.kind == UNKNOWN:
            return PublishedRow(own, what, None, what.problem)
        bare_percent = what.name == MFU and (cells["value"].strip().endswith("%") or (not what.unit and printed > 1))
        scale = in_si(1.0, "%" if bare_percent else what.unit)
        if what.name == MFU and printed * scale > 1:
            return PublishedRow(own, what, None, f"value={cells['value']}: must be at most the whole peak")
        return PublishedRow(own, what, printed * scale, scale=scale)

    @property
    def row_id(self) -> str:
        """The stable name of the row."""
        return self.cells["row_id"]

    @property
    def out_of_memory(self) -> bool:
        """Whether a status row says that the run did not fit."""
        return re.search(r"oom|out of memory", self.cells["value"], re.I) is not None

    @property
    def key(self) -> tuple[str, ...]:
        """What makes two rows rows of one run."""
        return tuple(self.cells[column] for column in COLUMNS if column not in OF_A_ROW)


@dataclass(frozen=True)
class PublishedRun:
    """The rows of one run, in file order. Text columns through `text`, whole numbers through `number`."""

    rows: tuple[PublishedRow, ...]

    @property
    def cells(self) -> Mapping[str, str]:
        """The strings that all its rows share."""
        return self.rows[0].cells

    def text(self, column: str) -> str:
        """The column as printed, empty where it says that it was not stated."""
        value = self.cells[column].strip()
        return "" if re.fullmatch(r"(not stated.*|unknown|n/?a|none stated|-|\?|nan|null)", value, re.I) else value

    def number(self, column: str) -> int | None:
        """The whole number that a column states (`2 (DualPipe)` is 2, seq `8K` is 8192), None where it states none.

        After the number may stand a bracket or a word that says what is counted (`64 GPUs`, `4096 tokens`). k and M are
        1024 and 1024^2: sequences, batches and device counts are powers of two. A global batch in tokens (`16M tokens`)
        is divided by seq. What is no positive whole number then (0, 2.5, -1, `3.9M tokens`) is not stated.
        """
        found = _NUMBER.match(self.text(column))
        if not found or not re.fullmatch(_UNIT_WORDS, found["word"]):
            return None
        value = float(found["digits"].replace(",", "")) * _SUFFIX[found["suffix"].lower()]
        in_tokens = found["word"].lower().startswith("tok") or found["suffix"].lower() == "m"
        if column == "global_batch" and in_tokens:
            value /= self.degree("seq") or math.inf
        return int(value) if value.is_integer() and (value or found["digits"].strip("0.,") == "") else None

    def degree(self, column: str) -> int | None:
        """As `number`, for degrees and sizes, which are at least 1."""
        value = self.number(column)
        return value if value else None

    @property
    def moe(self) -> bool:
        """Whether the row names experts."""
        return bool(self.number("experts"))

    @property
    def words(self) -> str:
        """Notes, source and model name, where caveats are told."""
        return " ".join((self.cells["notes"], self.cells["source"], self.cells["model"]))

    def note(self, key: str) -> str:
        """The value of `key=value` in the notes."""
        found = re.search(rf"\b{key}=([^;]+)", self.cells["notes"])
        return found.group(1).strip() if found else ""

    @cached_property
    def document(self) -> str:
        """The publication: its arXiv number, else the first word of the source."""
        found = re.search(r"\b(\d{4}\.\d{4,5})\b", self.cells["source"])
        return found.group(1) if found else self.cells["source"].split(" ")[0]

    @property
    def year(self) -> int | None:
        """The year of the publication, from its arXiv number."""
        return 2000 + int(self.document[:2]) if re.fullmatch(r"\d{4}\.\d{4,5}", self.document) else None

    @property
    def fully_stated(self) -> bool:
        """Whether it states tp, pp, ep, batch, sequence and GPUs; a dense model has no ep to state."""
        columns = ["tp", "pp", "global_batch", "seq", "num_gpus"] + ["ep"] * self.moe
        return all(self.degree(column) for column in columns)


def load(path: str | Path = SHIPPED) -> list[PublishedRow]:
    """The rows of a CSV file. Raises UsageError for a file that is missing, is no CSV, or lacks columns."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            present = [name.strip() for name in reader.fieldnames or ()]
            lacking = [name for name in COLUMNS if name not in present]
            if lacking:
                raise UsageError(
                    f"--rows={path}: must have the columns of the shipped file, but lacks {', '.join(lacking)}; "
                    f"for example {SHIPPED.name}"
                )
            reader.fieldnames = present
            raw = [{name: row.get(name) or "" for name in COLUMNS} for row in reader]
    except OSError as error:
        raise UsageError(
            f"--rows={path}: must be a readable CSV file ({error.strerror}); leave --rows out for the shipped rows"
        ) from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"--rows={path}: must be CSV text in UTF-8 ({error}); for example {SHIPPED.name}") from None
    if not raw:
        raise UsageError(f"--rows={path}: must have at least one row below its header; for example {SHIPPED.name}")
    return [PublishedRow.of(cells) for cells in raw]


def runs(rows: Iterable[PublishedRow]) -> list[PublishedRun]:
    """Rows that differ in nothing but id, metric, value and unit are one run; in order of their first row."""
    grouped: dict[tuple[str, ...], list[PublishedRow]] = {}
    for row in rows:
        grouped.setdefault(row.key, []).append(row)
    return [PublishedRun(tuple(each)) for each in grouped.values()]
