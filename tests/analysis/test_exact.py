"""The command `python -m analysis.validate exact`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.validate import main
from analysis.validation.exact import Case, cases, command

RIGHT = Case("A1", "a source", "something", "bytes", 1_000, 1_000)
WRONG = Case("A2", "a source", "something else", "GFLOP a token", 100.0, 100.3, 0.2)


def test_every_case_is_printed_and_holds(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exact"]) == 0
    printed = capsys.readouterr().out
    assert f"{len(cases())} of {len(cases())} cases hold" in printed
    assert "FAIL" not in printed
    for figure in ("1,721,342,361,600", "103,079,215,104", "117,373,403,136", "0.451777", "249.811"):
        assert figure in printed


def test_the_document_has_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exact", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["passed"], document["summary"]["failed"]) == (1, True, 0)
    assert [(row["id"], row["what"]) for row in document["cases"]] == [(case.id, case.what) for case in cases()]
    assert all(abs(row["given"] - row["expected"]) <= row["within"] * (1 + 1e-9) for row in document["cases"])


def test_one_wrong_case_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(command, "cases", lambda: [RIGHT, WRONG])
    assert main(["exact"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if "something" in line] == ["OK", "FAIL"]
    assert "1 of 2 cases hold" in lines
    assert any("within 0.2 %" in line for line in lines)
    assert main(["exact", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["summary"] == {"cases": 2, "failed": 1}


def test_the_command_that_it_names_for_other_counts_exists() -> None:
    assert (Path(__file__).parents[2] / command.TRANSFORMERS_COUNTS_COMMAND.partition("ARGS=")[2]).exists()
