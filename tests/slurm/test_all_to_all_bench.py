"""The all-to-all benchmark's ranks on a real Slurm: one small cell, from srun to its verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from piper_hpc.microbench.dispatch.cells import Variant
from piper_hpc.runs import RunFolder
from piper_hpc.studies.all_to_all.measure import run_stage
from piper_hpc.studies.all_to_all.rows import cells
from piper_hpc.studies.all_to_all.stages import Stage, cell, part
from piper_hpc.studies.all_to_all.verdicts import verdicts
from piper_hpc.testbed.state import Testbed

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.timeout(200)]


def test_a_cell_over_shaped_links(testbed: Testbed, tmp_path: Path) -> None:
    """Four nodes in two racks: counted bytes are on the links' counters, and everybody's result is flat's."""
    variants = [Variant("flat"), Variant("halo_dedup", 2), Variant("halo3_dedup", 2)]
    options = {"nodes": len(testbed.nodes), "ranks_per_node": testbed.ranks_per_node}
    stage = Stage("small", options, [part([cell("W0", tokens=128)], variants, 6.0, 6)], mpi=False)
    run = RunFolder.create(tmp_path)
    run_stage(run, stage, testbed.document() | {"nodes": [vars(node) for node in testbed.nodes]})
    (measured,) = cells(run.measurements())
    assert [timed.name for timed in measured.variants] == ["flat", "halo_dedup/2", "halo3_dedup/2"]
    flat, two, three = measured.variants
    assert flat.row["group"] == {"ranks": 8, "nodes": 4, "racks": 2} and flat.row["machine"] == "small"
    assert flat.link_overhead == pytest.approx(1.02, abs=0.05) and two.link_overhead == pytest.approx(1.03, abs=0.06)
    racks = [timed.row["bytes_by_level"]["system"] for timed in (flat, two, three)]
    assert racks[0] > 1.8 * racks[1] > 1.8 * racks[2] > 0
    found = {verdict.what: verdict for verdict in verdicts([measured])}
    assert found["results equal flat's"].met
    assert "halo3_dedup over halo_dedup" in found and "deduplicated HALO over flat" not in found
