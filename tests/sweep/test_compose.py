"""The points of a command are those of Hydra's own sweeper, and their configurations what Hydra composes of them."""

from __future__ import annotations

from pathlib import Path

import hydra
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.config import ConfigError, check_experiment, register
from piper_hpc.config.identity import identity
from piper_hpc.paths import data_folder
from piper_hpc.sweep.compose import Composer, Grid, grid_of
from tests.full import examples


@pytest.fixture(scope="module", autouse=True)
def composing():
    register()
    with hydra.initialize_config_dir(config_dir=str(Path(data_folder("conf")).absolute()), version_base="1.3"):
        yield


def grid(*words: str) -> Grid:
    found = grid_of(["-m", *words])
    assert found is not None
    return found


# One word of each group at most, and words that depend on the order in which they are given.
WORDS = {
    "model": ["model=tiny", "model=tiny,olmoe", "model={layers:6}"],
    "parallelism": ["parallelism=pp2_ep4", "parallelism=auto,single"],
    "degrees": ["parallelism.pp=1,2,4", "parallelism.dp=null,2", "++parallelism.pp=3"],
    "list": ["parallelism.stage_layers=[2,2],[1,3]", "task.suites=[gemm],[p2p,gemm]"],
    "variables": ["+cluster.environment.A=1,2", "cluster.environment={B:x}", "+cluster.environment={C:y},{D:z}"],
    "text": ["data.path='a b','c,d'", "data.path=${runs}/x,null", r"runs=a\,b,c"],
    "numbers": ["train.seed=range(0,3)", "train.learning_rate=1e-3,2.5e-4", "train.seed=choice(3,5)"],
    "removed": ["~parallelism.stage_layers", "experiment=paper_mixtral"],
    "cluster": ["cluster=testbed,frontier", "cluster=frontier"],
}


@settings(max_examples=examples(6, 12))
@given(st.lists(st.sampled_from(sorted(WORDS)), unique=True, min_size=1, max_size=4).flatmap(
    lambda groups: st.tuples(*(st.sampled_from(WORDS[group]) for group in groups))
))  # fmt: skip
def test_a_point_is_what_hydra_composes_of_its_words(words):
    found = grid(*words)
    composer = Composer(found, "config")
    every = max(1, len(found.words) // examples(4, len(found.words)))
    for index, point in list(enumerate(found.words))[::every]:
        try:
            expected = hydra.compose("config", list(point))
        except HydraException as error:
            with pytest.raises(type(error)):
                composer.config(index)
            continue
        assert composer.config(index) == expected, point
    overrides = OverridesParser.create().parse_overrides(list(words))
    swept = {one.key_or_group for one in overrides if one.is_sweep_override()}
    assert all(set(axes) == swept for axes in found.axes)


def test_points_are_in_order_and_flags_are_kept():
    found = grid_of(
        ["model=tiny,olmoe", "train.steps=3", "--multirun", "train.seed=0,1", "--config-dir", "own", "-cd=x"]
    )
    assert found is not None
    assert found.flags == ("--config-dir", "own", "-cd=x")
    assert found.axes == tuple({"model": model, "train.seed": seed} for model in ("tiny", "olmoe") for seed in (0, 1))
    assert found.words[1] == ("model=tiny", "train.steps=3", "train.seed=1")
    assert grid_of(["train.steps=3"]) is None
    assert grid("train.seed=1,2", "train.seed=3").words == (("train.seed=3",),)  # as given last


def test_a_sweep_without_a_list_of_values_is_refused():
    with pytest.raises(ConfigError, match=r"train\.seed=1,2"):
        grid("train.seed=interval(0,1)")


@pytest.mark.parametrize(
    ("words", "same"),
    [
        (["wait=false", "runs=elsewhere", "tracking=wandb_offline", "sweep.stall_s=5"], True),
        (["cluster.time_min=7", "cluster.account=abc"], True),
        (["train.seed=1"], False),
        (["cluster.partition=other"], False),
        (["train.checkpoint_every=2"], False),
        (["+cluster.environment.NCCL_NET=OFI"], False),
    ],
)
def test_identity_is_of_what_a_run_means(words, same):
    first, second = hydra.compose("config", []), hydra.compose("config", words)
    assert (identity(first) == identity(second)) is same
    # As a record has it, it is the same; a later version's new key makes another.
    check_experiment(second)
