"""The cases: parameters, bytes, Eq 1-5 and 10 of arXiv 2605.05049, FLOPs a token, and what follows from printed runs.

Nothing here was fitted or timed. `A1` .. `A13` are figures of the paper, X-MoE and DeepSeek, `pin` what others publish
as FLOPs of a token. Where a source prints a rounded size, the integer is what its own formula gives at its own shapes.
Models are the presets of `conf/model/`; two of Table IV's have none and stand here as bare shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import isclose
from typing import Any

from analysis.validation.published.facts import presets
from piper_hpc.cluster import accelerator, preset
from piper_hpc.resource_model import flops_per_token
from piper_hpc.resource_model.all_to_all import AllToAllRouting, dedup_ratio
from piper_hpc.resource_model.flops import CONVENTIONS, TRAINING_OVER_FORWARD, forward_flops
from piper_hpc.resource_model.paper import (
    paper_1f1b_bytes,
    paper_1f1b_imbalance_bytes,
    paper_checkpointed_bytes,
    paper_expert_parallel_bytes,
    paper_gpipe_bytes,
    paper_layer_state_bytes,
    paper_migration_bytes,
    paper_unpartitioned_bytes,
    xmoe_layer_activation_bytes,
)
from piper_hpc.resource_model.topology import topology_of
from piper_hpc.spec import ModelSpec, Workload

PAPER = "arXiv 2605.05049"
XMOE = "arXiv 2508.13337"
DEEPSEEK = "arXiv 2505.09343"
FLOP_UNIT = "GFLOP a token"
PIN_TOLERANCE = 0.002
"""Of a published FLOP figure: a ratio of two rounded figures."""


@dataclass(frozen=True)
class Case:
    """A figure with one right value.

    expected: what the source says; given: the model's answer, both in `unit`; within: how far they may be apart (0: not
    at all; else half of the last printed digit, or PIN_TOLERANCE of a FLOP figure).
    """

    id: str
    source: str
    what: str
    unit: str
    expected: float
    given: float
    within: float = 0.0

    @property
    def heading(self) -> tuple[str, str, str, str]:
        """What cases that are printed together have in common: id, source, unit, tolerance."""
        return self.id, self.source, self.unit, self.tolerance

    @property
    def tolerance(self) -> str:
        """`within` in words."""
        if not self.within:
            return "exact"
        relative = self.within / self.expected
        return f"within {100 * relative:g} %" if isclose(relative, PIN_TOLERANCE) else f"± {self.within:g}"

    @property
    def holds(self) -> bool:
        """Whether the answer is right."""
        return abs(self.given - self.expected) <= self.within * (1 + 1e-9)


def bare(name: str, experts: int, hidden: int, ffn: int) -> ModelSpec:
    """One layer of a model that no preset describes: what the bytes of its experts need."""
    heads = hidden // 64
    return ModelSpec(name, 1, hidden, heads, heads, 64, experts, top_k=1, expert_ffn=ffn, vocab=32_000)


def parameters() -> Iterator[Case]:
    """A1, A2: L (n_mat E d f + 4 d^2), the papers' count, and X-MoE's of what a token meets."""
    known = presets()
    as_run = replace(known["deepseek_v2"], experts=162, expert_groups=0, groups_per_token=0)
    for model, what, expected in (
        (known["mixtral_8x7b"], "Mixtral 8x7B", 47_244_640_256),
        (known["mixtral_8x22b_l60"], "Mixtral 8x22B of 60 layers", 154_014_842_880),
        (known["llama4_scout"], "Llama 4 Scout without shared expert", 101_669_928_960),
        (as_run, "DeepSeek-V2, 160 + 2 shared experts", 235_615_027_200),
    ):
        yield Case("A1", f"{PAPER} Fig 12", what, "parameters", expected, model.paper_parameters)
    for experts, expected in (
        (16, 110_729_625_600),
        (32, 218_103_808_000),
        (64, 432_852_172_800),
        (128, 862_348_902_400),
        (256, 1_721_342_361_600),
    ):
        counted = known[f"m10b_e{experts}"].paper_parameters
        yield Case("A2", f"{PAPER} Fig 14", f"M10B of {experts} experts", "parameters", expected, counted)
    for size, total, active in (
        ("small", 10_804_527_104, 1_438_646_272),
        ("medium", 59_307_458_560, 5_578_424_320),
        ("large", 216_207_982_592, 12_331_253_760),
        ("super", 585_646_473_216, 30_446_452_736),
    ):
        model, what = known[f"xmoe_{size}"], f"X-MoE {size.title()}"
        yield Case("A2", XMOE, what, "parameters", total, model.paper_parameters)
        yield Case("A2", XMOE, f"{what}, active", "parameters", active, model.paper_active_parameters)
    padded = replace(known["xmoe_super"], layers=64).paper_parameters
    yield Case("A2", f"{PAPER} Fig 10", "X-MoE Super padded to 64 layers", "parameters", 614_448_758_784, padded)


def migration() -> Iterator[Case]:
    """A3: what each of 8 GPUs sends when all experts of a layer move."""
    known = presets()
    for model, what, expected in (
        (bare("switch_base", 128, 768, 2048), "Switch-Base", 1_207_959_552),
        (known["mixtral_8x7b"], "Mixtral 8x7B", 2_818_572_288),
        (known["mixtral_8x22b"], "Mixtral 8x22B", 4_831_838_208),
        (known["grok_1"], "Grok-1", 9_663_676_416),
        (bare("glam", 64, 8192, 32768), "GLaM 1.2T", 103_079_215_104),
        (known["deepseek_v2"], "DeepSeek-V2", 7_549_747_200),
        (known["deepseek_v3"], "DeepSeek-V3", 22_548_578_304),
    ):
        yield Case("A3", f"{PAPER} Table IV", what, "bytes", expected, paper_migration_bytes(model, ep=8))


def activation() -> Iterator[Case]:
    """A4: one MoE layer as X-MoE counts it."""
    layer = xmoe_layer_activation_bytes(presets()["xmoe_large"], micro_batch=1, sequence=4096)
    yield Case("A4", XMOE, "a layer of X-MoE Large, 1.125 GiB", "bytes", 1_207_959_552, layer)


def domain() -> Iterator[Case]:
    """A5: Eq 10, g N_h."""
    frontier = topology_of(preset.cluster("frontier", 1024, accelerator.load("mi250x_gcd")))
    yield Case("A5", f"{PAPER} Eq 10", "ep behind one switch of Frontier", "ranks", 32, frontier.switch or 0)


def equations() -> Iterator[Case]:
    """A6, A7: Eq 1-5 at b = 32, s = 4096, PP = 4, EP = 8, M = 16."""
    model, pp, ep, count = presets()["mixtral_8x7b"], 4, 8, 16
    for id, attention, unpartitioned, expert_parallel, gpipe, stages, imbalance in (
        (
            *("A6", "eager", 3_951_369_912_320, 2_628_519_985_152, 657_129_996_288),
            (187_636_383_744, 148_511_916_032, 109_387_448_320, 70_262_980_608),
            117_373_403_136,
        ),
        (
            *("A7", "flash", 1_752_615_092_224, 429_765_165_056, 107_441_291_264),
            (50_214_207_488, 45_445_283_840, 40_676_360_192, 35_907_436_544),
            14_306_770_944,
        ),
    ):
        given: dict[str, Any] = {"batch": 32, "sequence": 4096, "flash": attention == "flash"}
        answers = [
            ("Eq 1, one device", unpartitioned, paper_unpartitioned_bytes(model, **given)),
            ("Eq 2, ep=8", expert_parallel, paper_expert_parallel_bytes(model, **given, ep=ep)),
            ("Eq 3, pp=4 ep=8, GPipe", gpipe, paper_gpipe_bytes(model, **given, pp=pp, ep=ep)),
        ]
        pipeline = given | {"pp": pp, "ep": ep, "micro_batches": count}
        for stage, expected in enumerate(stages):
            held = paper_1f1b_bytes(model, **pipeline, stage=stage)
            answers.append((f"Eq 4, pp=4 ep=8, 1F1B, stage {stage}", expected, held))
        answers.append(("Eq 5, stage 0 over stage 3", imbalance, paper_1f1b_imbalance_bytes(model, **pipeline)))
        for what, expected, answer in answers:
            yield Case(id, f"{PAPER} Eq 1-5, Mixtral 8x7B, {attention} attention", what, "bytes", expected, answer)


def figure_10() -> Iterator[Case]:
    """A8: the smallest layout by number of GPUs, and its EP."""
    source, best = f"{PAPER} Fig 10", ((256, 4, 70_934_069_248), (512, 8, 52_143_587_328), (1024, 16, 42_748_346_368))
    sizes = {gpus: _sizes(gpus) for gpus, _, _ in best}
    for gpus, _, size in best:
        smallest = min(sizes[gpus].values())
        yield Case("A8", source, f"smallest layout of 615B, {gpus} GPUs", "bytes", size, smallest)
    for gpus, ep, _ in best:
        found = min(sizes[gpus], key=sizes[gpus].__getitem__)
        yield Case("A8", source, f"its ep, {gpus} GPUs", "ranks", ep, found)


def _sizes(gpus: int) -> dict[int, int]:
    """Bytes by EP in the form of Fig 10: X-MoE Super padded to 64 layers, four sequences of 4096, PP <= L."""
    model = replace(presets()["xmoe_super"], layers=64)
    degrees = [ep for ep in (4, 8, 16, 32, 64, 128, 256) if gpus // ep <= model.layers]
    return {ep: paper_checkpointed_bytes(model, 4, 4096, pp=gpus // ep, ep=ep) for ep in degrees}


def flops() -> Iterator[Case]:
    """A9, A10: the closed form over released shapes, to its last printed digit."""
    shapes = "closed form over released shapes"
    for id, name, sequence, convention, expected, within in (
        ("A9", "deepseek_v3", 4096, "causal", 249.8, 0.05),
        ("A9", "qwen3_235b_a22b", 4096, "causal", 148.0, 0.05),
        ("A9", "qwen3_30b_a3b", 4096, "causal", 23.0, 0.05),
        ("A9", "kimi_k2", 4096, "causal", 204.5, 0.05),
        ("A9", "llama3_8b", 8192, "causal", 51.47, 0.005),
        ("A9", "llama3_70b", 8192, "causal", 449.2, 0.05),
        ("A9", "llama3_405b", 8192, "causal", 2524.0, 0.05),
        ("A10", "deepseek_v3", 4096, "noncausal", 280.5, 0.05),
        ("A10", "llama3_70b", 8192, "noncausal", 481.4, 0.05),
    ):
        yield _flops_case(id, shapes, name, sequence, convention, expected, min(within, PIN_TOLERANCE * expected))


def pins() -> Iterator[Case]:
    """What others print: TFLOP/s over tokens/s of a GPU."""
    bridge, insights = "Megatron Bridge's performance summary", f"{DEEPSEEK} Table 4, causal and non-causal TFLOP/s"
    for source, name, sequence, convention, expected in (
        (insights, "deepseek_v3", 4096, "causal", 249.7),
        (insights, "deepseek_v3", 4096, "noncausal", 280.2),
        ("CSCS: 440 TFLOP/s at 7,600 tokens/s of a GPU", "llama3_8b", 8192, "noncausal", 57.9),
        (bridge, "deepseek_v3 with MTP", 4096, "causal", 260.0),
        (bridge, "qwen3_235b_a22b", 4096, "causal", 148.0),
        (bridge, "qwen3_30b_a3b", 4096, "causal", 23.0),
        (bridge, "kimi_k2", 4096, "causal", 204.4),
        (bridge, "gpt_oss_120b", 4096, "causal", 32.6),
        (bridge, "llama3_8b", 8192, "causal", 51.5),
        (bridge, "llama3_70b", 8192, "causal", 449.0),
        (bridge, "llama3_405b", 8192, "causal", 2524.0),
    ):
        yield _flops_case("pin", source, name, sequence, convention, expected, PIN_TOLERANCE * expected)
    modules, expected = forward_flops(presets()["gpt_oss_120b"], 4096), 27.2
    matrices = TRAINING_OVER_FORWARD * (modules.projections + modules.routed) / 1e9
    older, what = f"{bridge}, older releases", "gpt_oss_120b, matrices of layers alone"
    yield Case("pin", older, what, FLOP_UNIT, expected, matrices, PIN_TOLERANCE * expected)


def _flops_case(
    id: str, source: str, name: str, sequence: int, convention: str, expected: float, within: float
) -> Case:
    stem, _, mtp = name.partition(" with ")
    model = replace(presets()[stem], mtp_layers=1) if mtp else presets()[stem]
    what = f"{name}, {sequence} tokens, {convention}"
    given = flops_per_token(model, sequence, CONVENTIONS[convention]) / 1e9
    return Case(id, source, what, FLOP_UNIT, expected, given, within)


def deduplication() -> Iterator[Case]:
    """A11: rows left when a token enters a node once, uniform routing of 8 in 256."""
    for nodes, share in ((4, 0.4518), (2, 0.2491)):
        left = float(dedup_ratio(nodes, AllToAllRouting(experts=256, top_k=8)))
        yield Case("A11", XMOE, f"rows left by deduplication, {nodes} nodes", "of all rows", share, left, within=5e-5)


def public_run() -> Iterator[Case]:
    """A12: 15,360 sequences of 4,096 tokens in 19.926 s on 2,048 GPUs."""
    tokens_per_s = Workload(global_batch=15_360, sequence=4096).tokens / 19.926
    daily, each = tokens_per_s * 86_400 / 1e9, tokens_per_s / 2048
    yield Case("A12", DEEPSEEK, "DeepSeek-V3's public run", "1e9 tokens a day", 272.80, daily, within=0.005)
    yield Case("A12", DEEPSEEK, "the same, of one GPU", "tokens/s", 1541.7, each, within=0.05)


def states() -> Iterator[Case]:
    """A13: experts of a rank and the attention that all ranks repeat, at 16 B a parameter."""
    for experts, pp, ep, gigabytes in (
        (16, 4, 16, 40.27),
        (32, 4, 32, 40.27),
        (64, 8, 32, 33.55),
        (128, 4, 128, 40.27),
        (256, 4, 256, 40.27),
    ):
        what = f"M10B of {experts} experts, pp={pp} ep={ep}"
        model = presets()[f"m10b_e{experts}"]
        state = float(paper_layer_state_bytes(model, ep) * model.layers / pp) / 1e9
        yield Case("A13", f"{PAPER} Fig 14, states of a GPU", what, "GB", gigabytes, state, within=0.005)


GROUPS = (
    *(parameters, migration, activation, domain, equations, figure_10),
    *(flops, deduplication, public_run, states, pins),
)


def cases() -> list[Case]:
    """All of them, in the order in which they are printed."""
    return [case for group in GROUPS for case in group()]
