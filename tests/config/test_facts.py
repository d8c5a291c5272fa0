"""Facts with a date: which are older than a year on a given day, and that nothing breaks by it."""

from __future__ import annotations

from datetime import date

import pytest

from piper_hpc.config import facts
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.doctor.__main__ import facts as finding

TODAY = date(2027, 3, 1)
SOURCES = {
    "mem": "site guide (2026-02-27)",
    "qos": "site guide (2026-03-01): 365 days ago",
    "partition": "public scripts (2025-2026)",
    "limits": "site guide (2024-01), live output (2026-05)",
    "peak": "vendor datasheet (2021-06)",
    "nodes": "assumed: of 2048 nodes, 2012 are up",
}


def facts_of(checked: str) -> list[facts.DatedFact]:
    return list(facts.facts_of("cluster/x.yaml", checked, SOURCES))


def test_a_fact_is_as_old_as_its_source_and_what_is_printed_as_its_last_check() -> None:
    assert {fact.key: fact.known for fact in facts_of("2026-11-29")} == {
        "mem": date(2026, 2, 27),
        "qos": date(2026, 3, 1),
        "partition": date(2026, 12, 31),
        "limits": date(2026, 5, 31),
        "peak": date(2026, 11, 29),
        "nodes": date(2026, 11, 29),
    }


def test_an_old_fact_is_named_and_a_new_one_is_not() -> None:
    found = facts.old(facts_of("2026-11-29"), TODAY)
    assert facts.lines(found) == ["2026-02-27  cluster/x.yaml  mem: site guide (2026-02-27)"]
    assert [fact.key for fact in facts.old(facts_of("2026-01-01"), TODAY)] == ["peak", "nodes", "mem"]
    assert list(facts.facts_of("cluster/local.yaml", None, SOURCES)) == []


def test_every_shipped_source_of_clusters_and_devices_is_read() -> None:
    every = facts.shipped()
    assert {fact.file for fact in every} >= {"cluster/frontier.yaml", "accelerator/h100.yaml"}
    assert len(facts.old(every, date(2099, 1, 1))) == len(every)
    assert facts.old(every, date(2020, 1, 1)) == []


def test_time_alone_breaks_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Later(date):
        @classmethod
        def today(cls) -> date:
            return date(2099, 1, 1)

    monkeypatch.setattr(facts, "date", Later)
    assert facts.main([]) == 0
    said = capsys.readouterr().out
    assert "accelerator/h100.yaml  compute_units" in said and "facts are older than a year" in said


def test_the_doctor_says_so_of_the_cluster_at_hand() -> None:
    cluster = ClusterConfig(name="x", checked="2026-11-29", sources=SOURCES)
    (found,) = finding(cluster, TODAY)
    assert found.state == "warning" and "1 of 6" in found.found and "mem" in found.found
    (found,) = finding(cluster, date(2026, 12, 1))
    assert found.state == "ok"
    assert list(finding(ClusterConfig(name="mine"), TODAY)) == []
