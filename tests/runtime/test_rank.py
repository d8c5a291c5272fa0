"""A rank's place is read from the scheduler's variables, and never guessed."""

from __future__ import annotations

import pytest

from piper_hpc.runtime.rank import RankEnvironment, local_variables

STEP = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "n3",
    "SLURM_JOB_ID": "42",
    "SLURM_STEP_ID": "1",
    "SLURM_TOPOLOGY_ADDR": "spine.rack2.n3",
    "SLURM_RESTART_COUNT": "2",
    "MASTER_ADDR": "n1",
}


def test_a_slurm_step():
    place = RankEnvironment.read(STEP)
    assert place == RankEnvironment(5, 8, 1, "n3", ("spine", "rack2"), "42", "1", 2, "n1", task=5)
    assert place.rack == "rack2"
    assert place.rendezvous_id == "42.1.2"


def test_without_topology_or_requeue():
    bare = {key: value for key, value in STEP.items() if "TOPOLOGY" not in key and "RESTART" not in key}
    place = RankEnvironment.read(bare)
    assert (place.rack, place.attempt) == ("", 0)


def test_a_missing_master_address_is_an_error_not_localhost():
    with pytest.raises(RuntimeError, match="MASTER_ADDR"):
        RankEnvironment.read(STEP | {"MASTER_ADDR": ""})


def test_no_scheduler_is_an_error_not_a_world_of_one():
    with pytest.raises(RuntimeError, match="srun"):
        RankEnvironment.read({})


def test_a_local_rank_inside_a_slurm_allocation_is_local():
    place = RankEnvironment.read(STEP | local_variables(rank=2, ranks=4, job_id="7"))
    assert (place.rank, place.ranks, place.node, place.job_id) == (2, 4, "localhost", "7")
