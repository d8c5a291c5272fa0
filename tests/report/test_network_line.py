"""The line on the network of a run, from the record as ranks leave it."""

from __future__ import annotations

from pathlib import Path

import pytest

from piper_hpc.report import network
from piper_hpc.report.write import write
from piper_hpc.runs import RunFolder
from piper_hpc.spec.fabric import Fabric, Traffic
from piper_hpc.tasks.network import document

GIB = 1 << 30
OFI, SOCKET = Fabric("NET/OFI", "cxi"), Fabric("NET/Socket", interfaces=("hsn0",))
CARDS = [*(Traffic(f"cxi{card}", "cxi", 5 * GIB, 5 * GIB) for card in range(4)), Traffic("bond0", "socket", GIB, 0)]


def recorded(run: RunFolder, *found: object) -> RunFolder:
    job = run.manifest()["job"] | {"network": document(*found)}  # type: ignore[arg-type]
    run.write_manifest(run.manifest() | {"job": job})
    return run


def test_a_run_names_library_and_bytes_by_interface(run: RunFolder) -> None:
    said, traffic = dict.fromkeys(("n1", "n2"), OFI), dict.fromkeys(("n1", "n2"), CARDS)
    recorded(run, "cxi", said, traffic, 2)
    assert network.line(run) == "network: NET/OFI cxi; 40.0 GiB over cxi0-3, 2.00 GiB over bond0"
    assert network.warnings(run) == []
    assert network.of(run)["libraries"] == [{"library": "NET/OFI", "provider": "cxi", "interfaces": [], "nodes": 2}]
    assert "| network | NET/OFI cxi; 40.0 GiB over cxi0-3, 2.00 GiB over bond0 |" in write(run)[-1].read_text()


def test_a_fallback_is_in_line_warning_and_report(run: RunFolder) -> None:
    said = {"n1": OFI, "n2": SOCKET}
    recorded(run, "cxi", said, {"n1": CARDS, "n2": [Traffic("hsn0", "socket", 9 * GIB, 0)]}, 2)
    assert network.line(run).startswith(
        "network: NET/OFI cxi on 1 of 2 nodes, NET/Socket hsn0 on 1 of 2 nodes; 20.0 GiB"
    )
    (told,) = network.warnings(run)
    assert told == "slow network: NET/Socket hsn0 on 1 of 2 nodes (n2), where cxi was expected"
    assert told in write(run)[-1].read_text()


SILENT = {"a": None, "b": None}
GLOO = {"a": None, "b": Fabric("gloo", "", ("eth0",))}
SOME = [Traffic(f"cxi{card}", "cxi", 1024, 0) for card in (0, 1, 3)]


@pytest.mark.parametrize(
    ("found", "line"),
    [
        ((None, {}, {}, 1), "none was crossed, all ranks are on one node"),
        ((None, SILENT, {}, 2), "the library did not name it; no interface counted anything"),
        ((None, GLOO, {"a": [Traffic("eth0", "socket", 8, 9)]}, 2), "gloo eth0 on 1 of 2 nodes; 8 B over eth0"),
        (("cxi", dict.fromkeys("ab", OFI), {"a": SOME}, 2), "NET/OFI cxi; 3.00 KiB over cxi0-1,3"),
    ],
)
def test_what_is_not_known_is_said(run: RunFolder, found: tuple[object, ...], line: str) -> None:
    assert network.line(recorded(run, *found)) == f"network: {line}"


def test_records_of_earlier_versions_have_no_line(run: RunFolder) -> None:
    assert network.line(run) == "" and network.warnings(run) == []
    assert "| network |" not in write(run)[-1].read_text()


def test_a_run_that_never_started_has_no_line(tmp_path: Path) -> None:
    assert network.line(RunFolder.create(tmp_path)) == ""
