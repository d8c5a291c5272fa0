"""Measuring code does not change without a new BENCHMARK_VERSION, or a waiver that says why none is needed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from piper_hpc.spec import BENCHMARK_VERSION
from tests.microbench.record_measured_code import RECORD, digest, known, recorded

CODE = '''"""What it measures."""
from torch import distributed as dist
from piper_hpc.comm.family import Family


def timed(rows: int) -> float:
    """Seconds."""
    return dist.all_to_all(rows) + 0.5  # half


class Cell:
    rows: int = 3
'''


def test_measuring_code_is_of_its_version_or_waived() -> None:
    record = json.loads(RECORD.read_text())
    assert record["benchmark_version"] == BENCHMARK_VERSION, (
        "BENCHMARK_VERSION was raised: record the code that it stands for with "
        "python -m tests.microbench.record_measured_code"
    )
    assert digest() in known(record), (
        "code under piper_hpc/microbench or piper_hpc/comm has changed. Where rows of before and after are not "
        "comparable, raise BENCHMARK_VERSION in piper_hpc/spec/cluster.py and run "
        "python -m tests.microbench.record_measured_code; where no measured time changes, record why: "
        'python -m tests.microbench.record_measured_code "REASON"'
    )
    assert all(waiver["reason"] and waiver["date"] for waiver in record["waivers"])


def of(folder: Path, **modules: str) -> str:
    folder.mkdir()
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    return digest([folder])


def test_words_places_and_aliases_do_not_count(tmp_path: Path) -> None:
    same = {
        "as it is": {"timing": CODE},
        "another module": {"moved": CODE},
        "two modules": dict(zip(("a", "b"), CODE.split("class"), strict=True)),
        "other words": {"timing": CODE.replace("Seconds.", "Of a call.").replace("# half", "# of one")},
        "another form": {"timing": CODE.replace("(rows: int) -> float", "(\n    rows,\n)")},
        "another alias": {
            "timing": CODE.replace("distributed as dist", "distributed").replace("dist.", "distributed.")
        },
        "another import": {"timing": CODE.replace("piper_hpc.comm.family", "piper_hpc.exchange.family")},
    }
    same["two modules"]["b"] = "class" + same["two modules"]["b"]
    assert len({of(tmp_path / name, **modules) for name, modules in same.items()}) == 1


@pytest.mark.parametrize(
    ("before", "after"), [("0.5", "0.25"), ("rows) +", "rows) -"), ("= 3", "= 4"), ("all_to_all", "all_gather")]
)
def test_what_is_computed_counts(tmp_path: Path, before: str, after: str) -> None:
    assert of(tmp_path / "a", timing=CODE) != of(tmp_path / "b", timing=CODE.replace(before, after))


def test_recording_asks_for_a_version_or_a_reason() -> None:
    record = {"benchmark_version": 6, "digest": "a", "waivers": []}
    assert recorded(record, "a", 6, "", "2026-11-28") == record
    with pytest.raises(ValueError, match="raise it"):
        recorded(record, "b", 6, "", "2026-11-28")
    waived = recorded(record, "b", 6, "a name", "2026-11-28")
    assert known(waived) == {"a", "b"} and waived["waivers"][0]["reason"] == "a name"
    assert recorded(waived, "c", 7, "", "2026-11-29") == {"benchmark_version": 7, "digest": "c", "waivers": []}
