"""How the all-to-all benchmark goes through its stages: failures, interrupts, and what its jobs are asked to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from piper_hpc.runs import RunFolder, Status
from piper_hpc.studies import jobs
from piper_hpc.studies.all_to_all import measure
from piper_hpc.studies.all_to_all.measure import BenchError
from piper_hpc.studies.all_to_all.stages import Stage, smoke, stages
from piper_hpc.submit.script import script


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path)


@pytest.fixture
def up_and_down(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What became of each stage's machine, in place of a testbed."""
    seen: list[str] = []

    @contextmanager
    def machine(stage: Stage) -> Iterator[None]:
        seen.append(f"{stage.name} up")
        try:
            yield
        finally:
            seen.append(f"{stage.name} down")

    monkeypatch.setattr(measure, "machine", machine)
    return seen


def test_a_stage_that_fails_does_not_keep_the_others_from_it(
    run: RunFolder, up_and_down: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def run_stage(run: RunFolder, stage: Stage) -> None:
        if stage.name == "4x2":
            raise BenchError("4x2: failed oom rank 3", "oom")
        measured.append(stage.name)

    monkeypatch.setattr(measure, "run_stage", run_stage)
    with pytest.raises(BenchError, match="4x2: failed oom"):
        measure.measure(run, stages())
    assert measured == ["4x4", "4x2, 2 racks"]
    assert up_and_down == [f"{name} {word}" for name in ("4x2", *measured) for word in ("up", "down")]
    assert (run.status().state, run.status().failure_class) == ("failed", "oom")


def test_an_interrupt_cancels_the_job_and_takes_the_testbed_down(
    run: RunFolder, up_and_down: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cancelled = []

    def interrupted(job: RunFolder) -> Status:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "observe", interrupted)
    monkeypatch.setattr(jobs, "cancel", lambda job: cancelled.append((job.path, list(up_and_down))))
    monkeypatch.setattr(measure, "run_stage", lambda run, stage: jobs.ended(run))
    with pytest.raises(KeyboardInterrupt):
        measure.measure(run, [*smoke(), *stages()])
    assert cancelled == [(run.path, ["2x2 up"])], "once, while its machine was up"
    assert up_and_down == ["2x2 up", "2x2 down"]
    assert run.status().state == "cancelled"


def test_a_stages_job_is_one_of_the_testbed(run: RunFolder) -> None:
    """MPI is asked for by the environment, which the site's template hands to srun."""
    four = next(stage for stage in stages() if stage.name == "4x4")
    text = script(measure._cluster(four, mpi=True), run, "python", "command")
    for line in ("#SBATCH --nodes=4", "#SBATCH --ntasks-per-node=4", "export SLURM_MPI_TYPE=pmi2",
                 "export UCX_TLS=tcp,self", "export UCX_NET_DEVICES=eth0"):  # fmt: skip
        assert line in text.splitlines()
    assert "pmi2" not in script(measure._cluster(four, mpi=False), run, "python", "command")
