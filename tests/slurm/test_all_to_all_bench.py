"""The all-to-all benchmark's ranks on a real Slurm: one small cell, from a job to its verdicts."""

from __future__ import annotations

from pathlib import Path

import pytest

from piper_hpc.microbench.dispatch.cells import Variant
from piper_hpc.runs import RunFolder
from piper_hpc.studies.all_to_all.measure import BenchError, run_stage
from piper_hpc.studies.all_to_all.rows import cells
from piper_hpc.studies.all_to_all.stages import Stage, cell, part
from piper_hpc.studies.all_to_all.verdicts import verdicts
from piper_hpc.testbed.state import Testbed

pytestmark = [pytest.mark.slurm, pytest.mark.processes, pytest.mark.timeout(200)]


def small(testbed: Testbed, variants: list[Variant], *, mpi: bool = False) -> Stage:
    """One cell on the testbed that is up."""
    options = {"nodes": len(testbed.nodes), "ranks_per_node": testbed.ranks_per_node}
    return Stage("small", options, [part([cell("W0", tokens=128)], variants, 6.0, 6)], mpi)


def test_a_cell_over_shaped_links(testbed: Testbed, tmp_path: Path) -> None:
    """Four nodes in two racks: counted bytes are on the links' counters, and everybody's result is flat's."""
    variants = [Variant("flat"), Variant("halo_dedup", 2), Variant("halo3_dedup", 2)]
    run = RunFolder.create(tmp_path)
    run_stage(run, small(testbed, variants))
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


def test_mpi_takes_part_by_the_jobs_environment(testbed: Testbed, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path)
    run_stage(run, small(testbed, [Variant("flat"), Variant("mpi")], mpi=True))
    (measured,) = cells(run.measurements())
    flat, mpi = measured.variants
    assert (flat.name, mpi.name) == ("flat", "mpi") and "MPICH" in mpi.row["mpi"]
    assert mpi.link_overhead == pytest.approx(1.03, abs=0.06)  # over the links, not past them
    assert mpi.row["correct"]


def test_a_stage_that_fails_is_classified_as_any_run_is(testbed: Testbed, tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path)
    with pytest.raises(BenchError, match=r"small: failed error rank .*no_such") as failed:
        run_stage(run, small(testbed, [Variant("no_such")]))
    assert failed.value.failure_class == "error"
    (job,) = (RunFolder(path) for path in (run.path / "stages").iterdir())
    assert (job.status().state, job.status().failure_class) == ("failed", "error")
    assert "Traceback" in job.log(0, 0).read_text()
