"""What task=plan plans for if the user does not say: the model's own sequence, and a batch that fills the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.config import Experiment
from piper_hpc.config.workload import AS_SET, MOST_TOKENS, filling_batch, planned_workload, set_by_user
from tests.presets import experiment


def asked(*overrides: str) -> Experiment:
    return experiment("task=plan", *overrides)


def planned(*overrides: str) -> tuple[int, int, dict[str, str]]:
    found, source = planned_workload(asked(*overrides), ["task=plan", *overrides])
    return found.workload.sequence, found.workload.global_batch, source


@given(st.integers(1, 100_000), st.sampled_from([128, 2048, 4096, 8192, 32768, 1_000_000]))
def test_a_filling_batch_gives_every_rank_as_many_sequences_and_no_step_too_many_tokens(ranks: int, sequence: int):
    each, left = divmod(filling_batch(ranks, sequence), ranks)
    assert left == 0 and 1 <= each <= 8
    assert each == 1 or each * ranks * sequence <= MOST_TOKENS
    assert each == 8 or (each + 1) * ranks * sequence > MOST_TOKENS


@pytest.mark.parametrize(
    ("overrides", "given"),
    [
        (["task=plan", "model=olmoe", "cluster.nodes=4", "trainer=1"], set()),
        (["train.sequence=64"], {"sequence"}),
        (["++train.global_batch=64"], {"global_batch"}),
        (["train=paper"], {"sequence", "global_batch"}),
        (["experiment=paper_mixtral"], {"sequence", "global_batch"}),
        (["train.steps=64", "train.routing.skew=2"], set()),
    ],
)
def test_what_the_user_set_is_read_from_the_command(overrides: list[str], given: set[str]):
    assert set_by_user(overrides) == given


def test_the_model_and_the_machine_say_what_the_user_does_not():
    sequence, batch, source = planned("model=deepseek_v3", "cluster=dgx_h100", "cluster.nodes=256")
    assert (sequence, batch) == (4096, 8 * 2048)
    assert source == {
        "sequence": "model.sequence, of deepseek_v3's pre-training",
        "global_batch": "8 for each of 2,048 ranks",
    }
    sequence, batch, source = planned("model=deepseek_v3", "cluster=dgx_h100", "cluster.nodes=1024")
    assert (sequence, batch) == (4096, 2 * 8192)
    assert source["global_batch"] == "2 for each of 8,192 ranks, for at most 67,108,864 tokens a step"
    _, batch, source = planned("model=llama3_405b", "cluster=dgx_h100", "cluster.nodes=2048")
    assert batch == 16384
    assert source["global_batch"] == "1 for each of 16,384 ranks, the fewest that give each of them work"
    assert planned("model=olmoe", "cluster=dgx_h100", "task.ranks=[8,16]")[1] == 8 * 16


def test_what_is_set_stays_and_the_rest_follows_from_it():
    assert planned("model=olmoe", "cluster=dgx_h100", "train.sequence=512")[:2] == (512, 8 * 128)
    sequence, batch, source = planned("model=olmoe", "cluster=dgx_h100", "train.global_batch=24")
    assert (sequence, batch, source["global_batch"]) == (4096, 24, AS_SET)
    assert planned("model=olmoe", "cluster=dgx_h100", "train=paper") == (
        *(4096, 1024),
        {"sequence": AS_SET, "global_batch": AS_SET},
    )
    assert planned("model=olmoe", "model.sequence=777")[0] == 777


def test_a_model_without_a_sequence_of_its_own_is_planned_as_it_is_trained():
    sequence, batch, source = planned("model=tiny")
    assert (sequence, batch) == (128, 32)
    assert source["sequence"] == source["global_batch"] == "as training has it, because tiny has no model.sequence"
    assert planned("model=tiny", "train.global_batch=64")[2]["global_batch"] == AS_SET
