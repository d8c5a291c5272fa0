"""Logs of ranks in one stream: prefixes, torn lines, late files, later attempts, and how much is read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from piper_hpc.cli import logs
from piper_hpc.cli.logs import ALL, BATCH, POLL_S, Tails, follow_logs, whose_log
from piper_hpc.runs import RunFolder, Status
from tests.test_jobs import run_jobs, whole


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path, "a-run")


def say(run: RunFolder, rank: int, text: str, attempt: int = 0) -> None:
    with run.log(attempt, rank).open("a") as log:
        log.write(text)


def news(tails: Tails) -> str:
    return "".join(tails.news())


def test_ranks_are_merged_in_order_with_a_prefix_each_line(run):
    for rank in (10, 2, 0):
        say(run, rank, f"one of {rank}\ntwo of {rank}\n")
    assert news(Tails(run, ALL)) == "".join(
        f"rank {r} | {word} of {r}\n" for r in (0, 2, 10) for word in ("one", "two")
    )


def test_one_rank_is_shown_as_it_is(run):
    say(run, 1, "a\n")
    say(run, 0, "b\nc")
    assert "".join(Tails(run, "0").all_there_is()) == "b\nc"


def test_a_torn_line_is_held_back_until_its_end_or_the_last(run):
    tails = Tails(run, ALL)
    say(run, 0, "first\nhal")
    assert news(tails) == "rank 0 | first\n"
    assert news(tails) == ""
    say(run, 0, "f\nnever end")
    assert news(tails) == "rank 0 | half\n"
    assert "".join(tails.all_there_is()) == "rank 0 | never end\n"
    assert "".join(tails.all_there_is()) == ""


def test_a_character_that_is_torn_in_two_stays_whole(run):
    tails, text = Tails(run, "0"), "µ\n".encode()
    run.log(0, 0).write_bytes(text[:1])
    assert news(tails) == ""
    run.log(0, 0).write_bytes(text)
    assert news(tails) == "µ\n"


def test_a_line_longer_than_a_block_is_one_line(run, monkeypatch):
    monkeypatch.setattr(logs, "BLOCK_BYTES", 8)
    say(run, 0, "x" * 30 + "\nnext\n")
    assert "".join(Tails(run, "0").all_there_is()) == "x" * 30 + "\nnext\n"


def test_late_ranks_and_later_attempts_are_found(run):
    tails = Tails(run, ALL)
    assert news(tails) == ""
    say(run, 1, "late\n")
    assert news(tails) == "rank 1 | late\n"
    say(run, 1, "last word")
    say(run, 0, "again\n", attempt=1)
    assert news(tails) == "rank 1 | last word\n-- attempt 1 --\nrank 0 | again\n"


def test_a_log_that_was_written_anew_is_read_anew(run):
    tails = Tails(run, "0")
    say(run, 0, "long long line\n")
    assert news(tails) == "long long line\n"
    run.log(0, 0).write_text("new\n")
    assert news(tails) == "new\n"


def test_only_files_that_grew_are_opened_and_many_are_looked_at_seldom(run, monkeypatch):
    for rank in range(600):
        say(run, rank, "x\n")
    tails = Tails(run, ALL)
    news(tails)
    opened: list[str] = []
    original = Path.open

    def counted(self: Path, *arguments: object, **named: object) -> object:
        opened.append(self.name)
        return original(self, *arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", counted)
    assert news(tails) == "" and opened == []
    monkeypatch.undo()
    say(run, 37, "y\n")
    monkeypatch.setattr(Path, "open", counted)
    assert news(tails) == "rank 37 | y\n" and opened == ["rank-37.log"]
    assert tails.pause_s() == pytest.approx(0.6)
    assert Tails(run, "0").pause_s() == POLL_S


def test_following_ends_with_the_run_and_what_it_printed_last(run, monkeypatch):
    steps = iter((lambda: say(run, 0, "a\n"), lambda: say(run, 1, "b\nc")))
    monkeypatch.setattr(logs.time, "sleep", lambda seconds: next(steps)())
    looks = iter((False, False, True))
    shown: list[str] = []
    follow_logs(Tails(run, ALL), lambda: next(looks), shown.append)
    assert "".join(shown) == "rank 0 | a\nrank 1 | b\nrank 1 | c\n"


@pytest.mark.parametrize("word", ["-1", "1.5", "everyone", "", "²"])
def test_a_word_that_names_no_log_is_refused(word):
    with pytest.raises(argparse.ArgumentTypeError, match="no rank"):
        whose_log(word)


@pytest.mark.parametrize("name", ["slurm-42.out", "supervisor.log"])
def test_what_a_job_prints_outside_its_ranks(tmp_path, monkeypatch, capsys, name):
    run = whole(tmp_path, "a-run")
    run.logs.mkdir()
    (run.logs / name).write_text("module: not found\n")
    assert run_jobs(monkeypatch, "logs", "a-run", "--rank", BATCH, "--runs", str(tmp_path)) == 0
    assert capsys.readouterr().out == "module: not found\n"


@pytest.mark.parametrize("options", [(), ("-f",)])
def test_the_command(tmp_path, monkeypatch, capsys, options):
    run = whole(tmp_path, "a-run")
    say(run, 0, "zero\n")
    say(run, 1, "one")
    where = ("--runs", str(tmp_path), *options)
    assert run_jobs(monkeypatch, "logs", "a-run", "--rank", "all", *where) == 0
    assert capsys.readouterr().out == "rank 0 | zero\nrank 1 | one\n"
    assert run_jobs(monkeypatch, "logs", "a-run", *where) == 0
    assert capsys.readouterr().out == ("rank 0 | zero\nrank 1 | one\n" if options else "zero\n")
    assert run_jobs(monkeypatch, "logs", "a-run", "--rank", "0", "--json", *where) == 0
    path = str(run.log(0, 0))
    assert json.loads(capsys.readouterr().out) == {"run_id": "a-run", "path": path, "text": "zero\n"}
    assert run_jobs(monkeypatch, "logs", "a-run", "--rank", "all", "--json", *where) == 0
    document = json.loads(capsys.readouterr().out)
    assert [(log["rank"], log["attempt"], log["text"]) for log in document["logs"]] == [(0, 0, "zero\n"), (1, 0, "one")]
    assert run_jobs(monkeypatch, "logs", "a-run", "--rank", "7", *where) == 2
    assert "there is: ranks 0 to 1" in capsys.readouterr().err


def test_a_run_that_goes_on_is_followed_to_its_end(tmp_path, monkeypatch, capsys):
    run = whole(tmp_path, "a-run")
    run.write_status(Status("running"))
    say(run, 0, "zero\n")

    def end(seconds: float) -> None:
        say(run, 0, "done\n")
        run.write_status(Status("completed"))

    monkeypatch.setattr(logs.time, "sleep", end)
    assert run_jobs(monkeypatch, "logs", "a-run", "-f", "--rank", "0", "--runs", str(tmp_path)) == 0
    assert capsys.readouterr().out == "zero\ndone\n"
    assert run_jobs(monkeypatch, "logs", "a-run", "-f", "--runs", str(tmp_path)) == 0
    assert capsys.readouterr().out.splitlines()[0] == "rank 0 | zero"
