"""The testbed as a scaled machine: the ratio of communication to compute is kept, and what is not is said."""

from __future__ import annotations

from dataclasses import asdict

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.config import check_experiment, register
from piper_hpc.paths import data_folder
from piper_hpc.resource_model.all_to_all import AllToAllRouting, dedup_ratio
from piper_hpc.testbed import options, presets, profile, scaling
from piper_hpc.testbed.faults import Fault
from piper_hpc.testbed.options import Options
from piper_hpc.testbed.scaling import Layer

FRONTIER = presets.machine("frontier")
DEEPSEEK = presets.layer("deepseek_v2")


def test_frontiers_flop_per_byte() -> None:
    assert FRONTIER.flops_per_s == 1e14
    assert FRONTIER.flops_per_s / FRONTIER.bytes_per_s["nic"] == 8000
    assert FRONTIER.flops_per_s / FRONTIER.bytes_per_s["node"] == 2000
    assert DEEPSEEK.flops_per_byte == 2 * 3 * 1536 / 2
    found = scaling.scale(FRONTIER, DEEPSEEK, Options(), flops_per_s=2.9e10)
    assert found.wanted["nic"] == pytest.approx(8000 / 4608) and found.wanted["node"] == pytest.approx(2000 / 4608)
    # Values of 4 bytes for 2: half as many FLOP a byte on either side of the ratio.
    assert found.bytes_per_s["nic"] == pytest.approx(2.9e10 / 4000)
    assert found.rates_mbit(Options()) == {"node": 464.0, "nic": 116.0, "rack": 232.0}


@given(
    flops=st.floats(1e8, 1e13),
    ffn=st.integers(1, 60_000),
    matrices=st.sampled_from([2, 3]),
    experts=st.integers(1, 512),
    nodes=st.integers(1, 16),
    data=st.data(),
)
def test_every_ratio_is_kept_or_said_not_to_be(
    flops: float, ffn: int, matrices: int, experts: int, nodes: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, experts))
    layer = Layer("any", 30, 4096, experts, top_k, ffn, matrices, 2)
    asked = Options(nodes=nodes, racks=1)
    found = scaling.scale(FRONTIER, layer, asked, flops)
    for kind in scaling.KINDS:
        has = scaling.balance(flops, found.bytes_per_s[kind], found.layer.flops_per_byte)
        limited = any(text.startswith(f"{kind}:") for text in found.limited)
        assert limited or has == pytest.approx(found.wanted[kind])
    rows = {row.quantity: row for row in scaling.table(found, asked)}
    assert rows["experts a token (top_k)"].outcome == scaling.KEPT
    assert (rows["expert_ffn"].outcome == scaling.KEPT) == (ffn >= 512) and found.layer.expert_ffn >= 512
    assert found.layer.top_k <= found.layer.experts <= experts
    assert found.layer.experts % scaling.expert_ranks(found.layer.experts, asked.ranks) == 0
    assert all(row.note for row in rows.values() if row.outcome == scaling.LOST)


@given(st.integers(1, 64), st.integers(1, 300), st.data())
def test_what_deduplication_leaves_is_the_resource_models(nodes: int, experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, min(experts, 16)))
    assert scaling.rows_left(nodes, experts, top_k) == pytest.approx(
        float(dedup_ratio(nodes, AllToAllRouting(experts, top_k)))
    )


def test_the_scaled_model_is_accepted_by_the_trainer(tmp_path) -> None:
    asked = Options(profile="frontier", model="deepseek_v2")
    found = scaling.scale(FRONTIER, DEEPSEEK, asked, 2.9e10)
    profile.write(tmp_path, found)
    words = profile.command(tmp_path, found, asked).split()[3:]
    assert words[:2] == ["--config-dir", str(tmp_path / "conf")]
    register()
    with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
        composed = compose("config", overrides=[f"hydra.searchpath=[{tmp_path / 'conf'}]", *words[2:]])
    trained = check_experiment(composed)
    assert (trained.model.top_k, trained.model.expert_ffn, trained.model.experts) == (6, 1536, 24)
    assert trained.layout is not None and trained.layout.ep == 8
    assert asdict(found.layer)["hidden"] == trained.model.hidden == 256


@pytest.mark.parametrize("machine", [name for name in presets.names("cluster") if name not in ("local", "testbed")])
def test_every_machine_whose_links_and_devices_are_known_can_be_scaled(machine: str) -> None:
    try:
        found = presets.machine(machine)
    except Fault as fault:
        assert machine in ("leonardo_booster", "slurm") and fault.exit_code == 2
        return
    assert found.flops_per_s > 1e13 and found.bytes_per_s["node"] > found.bytes_per_s["system"] > 1e9
    assert all(found.sources.values())
    for model in ("mixtral_8x7b", "qwen3_30b_a3b", "xmoe_small"):
        assert not scaling.scale(found, presets.layer(model), Options(), 2.9e10).limited


@pytest.mark.parametrize(
    ("given_options", "key", "rule", "works"),
    [
        ({"profile": "frontier"}, "--profile", "go together", "--model deepseek_v2"),
        ({"model": "deepseek_v2"}, "--model", "go together", "--profile frontier"),
        (
            {"profile": "frontier", "model": "tiny", "nic_mbit_per_s": "9"},
            "--nic-mbit-per-s", "decided by --profile", "up without --nic-mbit-per-s",
        ),
        ({"achieved_tflop_per_s": "100"}, "--achieved-tflop-per-s", "that --profile names", "--profile frontier"),
        (
            {"profile": "frontier", "model": "tiny", "achieved_tflop_per_s": "fast"},
            "--achieved-tflop-per-s", "number of TFLOP/s", "--achieved-tflop-per-s 100",
        ),
        ({"profile": "summit", "model": "tiny"}, "--profile", "machine with a data sheet", "--profile frontier"),
        ({"profile": "local", "model": "tiny"}, "--profile", "machine with a data sheet", "--profile frontier"),
        ({"profile": "frontier", "model": "llama3_8b"}, "--model", "with experts", "--model deepseek_v2"),
    ],
)  # fmt: skip
def test_bad_profiles_name_the_rule_and_what_works(
    given_options: dict[str, str], key: str, rule: str, works: str
) -> None:
    with pytest.raises(Fault) as caught:
        profile.of(options.parse(given_options, cores=2, memory_mib=24_000))
    assert caught.value.exit_code == 2 and caught.value.key == key
    assert rule in caught.value.rule and works in caught.value.works


def test_an_unknown_device_rate_may_be_given() -> None:
    assert presets.machine("leonardo_booster", 150.0).flops_per_s == 150e12


def test_up_again_with_one_profile_is_the_same_testbed_whatever_was_measured() -> None:
    asked = Options(profile="frontier", model="deepseek_v2")
    assert asked.matches({**asked.document(), "nic_mbit_per_s": 123.4, "memory_mib": 1040})
    assert not asked.matches({**asked.document(), "nodes": 2})
    assert not Options().matches({**Options().document(), "nic_mbit_per_s": 123.4})
