"""Short forms of `make faults`: two kinds at a time, and in make test-all every kind once."""

from __future__ import annotations

import json

import pytest

from piper_hpc.studies.faults.__main__ import main
from piper_hpc.studies.faults.inject import FAULTS
from piper_hpc.studies.faults.judge import kind_of
from tests.full import full

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.untimed, pytest.mark.timeout(900)]

SHORT = ("rank stopped", "memory limit")


def hurt(kinds, folder, capsys) -> None:
    words = [word for kind in kinds for word in ("--only", kind)]
    ended = main(["--as-it-is", "--seeds", f"0:{len(FAULTS)}", "--out", str(folder), "--beside", "4", *words])
    out, err = capsys.readouterr()
    assert ended == 0, out + err
    rows = json.loads((folder / "faults.json").read_text())["rows"]
    assert sorted(row["fault"] for row in rows) == sorted(kinds)


def test_faults_end_or_go_on_by_themselves(testbed, tmp_path, capsys):
    hurt(SHORT, tmp_path, capsys)


@full
def test_so_do_all_others(testbed, tmp_path, capsys):
    hurt([kind for kind in FAULTS if kind not in SHORT], tmp_path, capsys)


def test_seeds_take_turns():
    assert {kind_of(seed) for seed in range(60)} == set(FAULTS)
