"""The exact cases of the paper Piper (arXiv 2605.05049): integers, no tolerance where the paper leaves none."""

from __future__ import annotations

import pytest

from piper_hpc.planner.measured import paper_expert_domain
from piper_hpc.resource_model import communication, memory
from piper_hpc.resource_model.predict import paper_mfu
from piper_hpc.spec import ModelSpec, Workload

GIB = 2**30


def shape(
    layers: int, experts: int, hidden: int, ffn: int, *, matrices: int = 3, heads: int = 32, top_k: int = 2
) -> ModelSpec:
    """A model of the paper: multi-head attention with heads * head_dim = hidden."""
    return ModelSpec(
        name="paper",
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        experts=experts,
        top_k=top_k,
        expert_ffn=ffn,
        vocab=32000,
        matrices_per_expert=matrices,
    )


MIXTRAL_8X7B = shape(32, 8, 4096, 14336)


def paper_parameters(model: ModelSpec) -> int:
    """L (n_mat E d f + 4 d^2): the paper's count, without router, norms, embedding and head."""
    return model.layers * (model.experts * model.expert_parameters + model.attention_parameters)


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (MIXTRAL_8X7B, 47_244_640_256),
        (shape(60, 8, 6144, 16384), 154_014_842_880),
        (shape(48, 16, 5120, 8192), 101_669_928_960),
        (shape(60, 162, 5120, 1536), 235_615_027_200),
        # M10B of Fig 14, two matrices an expert
        (shape(32, 16, 5120, 20480, matrices=2), 110_729_625_600),
        (shape(32, 32, 5120, 20480, matrices=2), 218_103_808_000),
        (shape(32, 64, 5120, 20480, matrices=2), 432_852_172_800),
        (shape(32, 128, 5120, 20480, matrices=2), 862_348_902_400),
        (shape(32, 256, 5120, 20480, matrices=2), 1_721_342_361_600),
        # X-MoE's four, and Super padded to 64 layers
        (shape(28, 64, 2048, 1408, matrices=2), 10_804_527_104),
        (shape(28, 128, 5120, 1536, matrices=2), 59_307_458_560),
        (shape(28, 256, 7168, 2048, matrices=2), 216_207_982_592),
        (shape(61, 256, 7168, 2560, matrices=2), 585_646_473_216),
        (shape(64, 256, 7168, 2560, matrices=2), 614_448_758_784),
    ],
)
def test_parameters_of_table_i_and_figure_14(model: ModelSpec, parameters: int) -> None:
    assert paper_parameters(model) == parameters


@pytest.mark.parametrize(
    ("experts", "hidden", "ffn", "migrated"),
    [
        (128, 768, 2048, 1_207_959_552),
        (8, 4096, 14336, 2_818_572_288),
        (8, 6144, 16384, 4_831_838_208),
        (8, 6144, 32768, 9_663_676_416),
        (64, 8192, 32768, 103_079_215_104),
        (160, 5120, 1536, 7_549_747_200),
        (256, 7168, 2048, 22_548_578_304),
    ],
)
def test_migration_bytes_of_table_iv(experts: int, hidden: int, ffn: int, migrated: int) -> None:
    assert communication.paper_migration_bytes(shape(1, experts, hidden, ffn), ep=8) == migrated


def test_activation_of_one_layer_of_xmoe_large() -> None:
    large = shape(28, 256, 7168, 2048, matrices=2, top_k=8)
    assert memory.xmoe_layer_activation_bytes(large, micro_batch=1, sequence=4096) == 1.125 * GIB


def test_expert_domain_of_frontier() -> None:
    assert paper_expert_domain(gpus_per_node=8, nodes_per_switch=4) == 32


@pytest.mark.parametrize(
    ("flash", "unpartitioned", "expert_parallel", "gpipe", "stages", "imbalance"),
    [
        (
            False,
            3_951_369_912_320,
            2_628_519_985_152,
            657_129_996_288,
            [187_636_383_744, 148_511_916_032, 109_387_448_320, 70_262_980_608],
            117_373_403_136,
        ),
        (
            True,
            1_752_615_092_224,
            429_765_165_056,
            107_441_291_264,
            [50_214_207_488, 45_445_283_840, 40_676_360_192, 35_907_436_544],
            14_306_770_944,
        ),
    ],
)
def test_equations_1_to_5_for_mixtral_8x7b(
    flash: bool, unpartitioned: int, expert_parallel: int, gpipe: int, stages: list[int], imbalance: int
) -> None:
    model, batch, sequence = MIXTRAL_8X7B, 32, 4096
    assert memory.paper_unpartitioned_bytes(model, batch, sequence, flash=flash) == unpartitioned
    assert memory.paper_expert_parallel_bytes(model, batch, sequence, ep=8, flash=flash) == expert_parallel
    assert memory.paper_gpipe_bytes(model, batch, sequence, pp=4, ep=8, flash=flash) == gpipe
    assert [
        memory.paper_1f1b_bytes(model, batch, sequence, pp=4, ep=8, micro_batches=16, stage=stage, flash=flash)
        for stage in range(4)
    ] == stages
    assert (
        memory.paper_1f1b_imbalance_bytes(model, batch, sequence, pp=4, ep=8, micro_batches=16, flash=flash)
        == imbalance
    )


@pytest.mark.parametrize(
    ("gpus", "ep", "best"), [(256, 4, 70_934_069_248), (512, 8, 52_143_587_328), (1024, 16, 42_748_346_368)]
)
def test_best_layout_of_figure_10(gpus: int, ep: int, best: int) -> None:
    model = shape(64, 256, 7168, 2560, matrices=2, top_k=8)
    sizes = {
        degree: memory.paper_checkpointed_bytes(model, micro_batch=4, sequence=4096, pp=gpus // degree, ep=degree)
        for degree in (4, 8, 16, 32, 64, 128, 256)
        if gpus // degree <= model.layers
    }
    assert min(sizes, key=sizes.__getitem__) == ep
    assert sizes[ep] == best


def test_all_to_all_bound_of_equation_6() -> None:
    # 4 b s k d / (EP B_NIC) = 4 * 32 * 4096 * 2 * 4096 / (8 * 25e9)
    assert communication.paper_all_to_all_s(MIXTRAL_8X7B, 32, 4096, 8, 25e9) == pytest.approx(0.021474836480)


@pytest.mark.parametrize(("nodes", "share"), [(4, 0.4518), (2, 0.2491)])
def test_share_of_rows_left_after_deduplication(nodes: int, share: float) -> None:
    assert communication.deduplicated_share(experts=256, top_k=8, nodes=nodes) == pytest.approx(share, abs=5e-5)


def test_mfu_of_equation_12_gives_no_credit_for_overlap() -> None:
    # 6 s of compute and 2 s of exchange at a bubble of 20 %: a step of 10 s
    assert paper_mfu(4e15, 1e14, 8, compute_s=6.0, exchange_s=2.0, bubble=0.2) == pytest.approx(4e15 / (1e14 * 8 * 10))


def test_tokens_of_the_public_run_of_deepseek_v3() -> None:
    tokens_per_s = Workload(global_batch=15_360, sequence=4096).tokens / 19.926
    assert tokens_per_s * 86_400 / 1e9 == pytest.approx(272.80, abs=0.005)
    assert tokens_per_s / 2048 == pytest.approx(1541.7, abs=0.05)


@pytest.mark.parametrize(
    ("experts", "pp", "ep", "state_gb"), [(16, 4, 16, 40.27), (64, 8, 32, 33.55), (256, 4, 256, 40.27)]
)
def test_state_of_m10b_at_the_layouts_of_figure_14(experts: int, pp: int, ep: int, state_gb: float) -> None:
    model = shape(32, experts, 5120, 20480, matrices=2)
    per_gpu = memory.paper_layer_state_bytes(model, ep) * model.layers / pp
    assert float(per_gpu) / 1e9 == pytest.approx(state_gb, abs=0.005)
