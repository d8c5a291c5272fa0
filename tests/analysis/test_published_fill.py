"""The filling rule: what is stated stays, what is arithmetic is computed, what is open becomes candidates."""

from __future__ import annotations

from dataclasses import replace

import pytest

from analysis.validation.published.facts import model_facts
from analysis.validation.published.fill import fill
from analysis.validation.published.flops import convention, flops_per_token, peak_flops
from analysis.validation.published.judge import answer
from analysis.validation.published.request import Outcome, Refused, Request
from analysis.validation.published.rows import PublishedRun, load, runs
from piper_hpc.spec import RECIPES
from tests.analysis.published_rows import run_of, steady


@pytest.fixture(scope="module")
def shipped() -> list[PublishedRun]:
    return runs(load())


def named(shipped: list[PublishedRun], row_id: str) -> PublishedRun:
    return next(run for run in shipped if any(row.row_id == row_id for row in run.rows))


@pytest.mark.slow
def test_every_shipped_run_is_filled_or_refused_with_a_reason(shipped: list[PublishedRun]) -> None:
    refused = []
    for run in shipped:
        try:
            requests = fill(run, shipped)
        except Refused as error:
            refused.append(run.rows[0].row_id)
            assert "must" in str(error)
            continue
        for request in requests:
            layout = request.layout
            assert layout.ranks == request.gpus == layout.dense_dp * layout.pp * layout.tp * layout.cp
            assert request.global_batch % (layout.micro_batch * layout.dense_dp) == 0
            assert request.recipe in RECIPES
            if request.model.experts:
                assert request.model.experts % layout.ep == 0
    no_gpu_count = [f"piper-00{number:02d}" for number in range(6, 15, 2)]
    no_gpu_name = [f"mbr-00{number:02d}" for number in (1, 4, 7, 10)]
    no_schedule = ["primus-0013", "primus-0016"]
    assert refused == no_gpu_count + no_gpu_name + no_schedule


def test_a_stated_run_has_one_filling_and_nothing_open() -> None:
    (request,) = fill(run_of())
    assert vars(request.layout) == {
        "pp": 8, "vpp": 1, "ep": 8, "etp": 1, "tp": 2, "cp": 1, "dp": 2, "zero": 1, "schedule": "1f1b",
        "micro_batch": 1, "recompute": "none", "all_to_all": "flat", "placement": "linear", "stage_layers": (),
        "overlap_shared": True,
    }  # fmt: skip
    assert (request.accelerator, request.cluster, request.routing.mode) == ("h100", "dgx_h100", "forced")
    assert set(request.filled) == {"model", "recipe", "sequence_parallel"}
    assert request.model.parameters == pytest.approx(140.6e9, rel=0.001)


def test_the_dp_column_counts_dense_replicas(shipped: list[PublishedRun]) -> None:
    """MoE Parallel Folding: TP2 PP8 EP8 on 128 GPUs, printed dp 8; two replicas of an expert with ETP 1."""
    (folded, *_) = fill(named(shipped, "mpf-0005"), shipped)
    assert (folded.layout.dense_dp, folded.layout.etp, folded.layout.dp) == (8, 1, 2)
    (unfolded, *_) = fill(named(shipped, "mpf-0004"), shipped)
    assert (unfolded.layout.dense_dp, unfolded.layout.ep, unfolded.layout.etp, unfolded.layout.dp) == (8, 4, 2, 2)


def test_open_fields_are_searched_and_named(shipped: list[PublishedRun]) -> None:
    requests = fill(named(shipped, "mpf-0014"), shipped)
    assert {request.layout.micro_batch for request in requests} == {1, 2, 4, 8}
    assert {(request.layout.schedule, request.layout.vpp) for request in requests} == {("1f1b", 1), ("interleaved", 7)}
    assert {request.layout.recompute for request in requests} == {"none", "selective", "full"}
    for request in requests:
        assert request.filled["micro_batch"].startswith(f"{request.layout.micro_batch}:")
        micro_batches = request.layout.micro_batches(request.global_batch)
        assert request.layout.vpp == 1 or micro_batches % request.layout.pp == 0


def test_twins_of_a_document_fill_before_anything_is_searched(shipped: list[PublishedRun]) -> None:
    """Korthikanti Fig 1 leaves vpp out, Table 5 states 3 for 175B and 530B and none for 1T."""
    for row_id, vpp in (("kor-0029", 3), ("kor-0013", 3), ("kor-0039", 1), ("kor-0001", 1)):
        assert {request.layout.vpp for request in fill(named(shipped, row_id), shipped)} == {vpp}


NO_COLUMNS = dict.fromkeys(("layers", "hidden", "heads", "kv_heads", "ffn", "experts", "topk", "moe_ffn"), "")


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("Llama 3.1 405B", 405.9), ("Llama-3.1-8B", 8.03), ("LLaMA3 70B", 70.6), ("Llama3.3 70B Instruct", 70.6),
        ("meta-llama/Llama-3.1-8B-Instruct", 8.03), ("Mixtral-8x7B-v0.1", 46.7), ("Mixtral 8x7B Instruct", 46.7),
        ("Snowflake Arctic", 478.6), ("Megatron 530B", 529.6), ("DeepSeek V3 671B", 671.0), ("DeepSeek-R1", 671.0),
        ("Qwen3-235B-A22B", 235.1), ("Qwen3 30B A3B", 30.53), ("GPT-OSS 120B", 116.8), ("GPT-OSS", 116.8),
        ("Kimi K2", 1026.4), ("OLMoE-1B-7B", 6.92), ("Llama-4-Scout-17B-16E", 108.6), ("DBRX 132B", 131.6),
    ],
)  # fmt: skip
def test_a_model_is_known_by_any_of_its_names(model: str, billions: float) -> None:
    spec, _ = model_facts(run_of(model=model, **NO_COLUMNS), None)
    total = spec.parameters - spec.mtp_parameters
    assert total / 1e9 == pytest.approx(billions, rel=0.001)


@pytest.mark.parametrize(
    "model", ["gpt-oss-20b", "DeepSeek-V3 16B", "Nemotron-4 340B", "Llama 2 70B", "Mixtral", "Qwen3 8B"]
)
def test_another_size_needs_its_columns(model: str) -> None:
    with pytest.raises(Refused, match="must state"):
        model_facts(run_of(model=model, **NO_COLUMNS), None)


@pytest.mark.parametrize(
    ("model", "layers", "hidden", "heads", "ffn", "matrices"),
    [
        ("Nemotron-4 340B", "96", "18432", "96", 4 * 18432, 2),
        ("Llama 2 7B", "32", "4096", "32", 11008, 3),
        ("Llama 3.2 3B", "28", "3072", "24", 8192, 3),
        ("Qwen3 8B", "36", "4096", "32", 11008, 3),
        ("GPT 5B", "24", "4096", "32", 16384, 2),
    ],
)
def test_a_dense_model_works_without_its_ffn(
    model: str, layers: str, hidden: str, heads: str, ffn: int, matrices: int
) -> None:
    stated = NO_COLUMNS | {"layers": layers, "hidden": hidden, "heads": heads}
    spec, _ = model_facts(run_of(model=model, **stated), None)
    assert (spec.experts, spec.dense_ffn, spec.dense_matrices) == (0, ffn, matrices)


def test_memory_alone_needs_no_device() -> None:
    memory = {"gpu": "8-GPU node (type not stated)", "metric": "peak_memory", "value": "6", "unit": "GB"}
    (request,) = fill(run_of(**memory))
    assert request.accelerator == "h100" and "not stated" in request.filled["accelerator"]
    for changes in ({"metric": "step_time", "unit": "s"}, {"gpu": "V100"}):
        with pytest.raises(Refused, match="gpu="):
            fill(run_of(**memory | changes))


@pytest.mark.parametrize("note", ["method", "system"])
def test_a_baseline_lends_nothing_to_the_system_beside_it(note: str) -> None:
    """The baseline states ZeRO 2, micro-batch 2 and vpp 7; the paper's own system states none of them."""
    baseline = run_of(row_id="b", notes=f"{note}=Megatron-LM", zero_stage="2", micro_batch="2", vpp="7")
    bare = {"zero_stage": "", "micro_batch": "", "vpp": ""}
    own = run_of(row_id="own", notes=f"{note}=Ours", **bare)
    requests = fill(own, [baseline, own])
    assert {request.layout.zero for request in requests} == {1}
    assert {request.layout.micro_batch for request in requests} == {1, 2, 4, 8}
    same = run_of(row_id="same", notes=f"{note}=Megatron-LM", **bare)
    (request,) = fill(same, [baseline, own, same])
    assert (request.layout.zero, request.layout.micro_batch, request.layout.vpp) == (2, 2, 7)


def test_eras_differ_in_attention_states_and_sequence_parallelism(shipped: list[PublishedRun]) -> None:
    (old,) = fill(named(shipped, "kor-0001"), shipped)
    assert (old.execution.flash, old.execution.sequence_parallel, old.layout.zero) == (False, False, 0)
    (split,) = fill(named(shipped, "kor-0002"), shipped)
    assert (split.execution.sequence_parallel, split.layout.recompute) == (True, "selective")
    (new, *_) = fill(named(shipped, "mega-0011"), shipped)
    assert (new.execution.flash, new.layout.zero) == (True, 1)


def test_ulysses_is_context_parallelism_over_the_node(shipped: list[PublishedRun]) -> None:
    """240 GPUs, PP 15: two replicas of eight GPUs each, as section 6.1 of the paper runs it too."""
    for row_id in ("mega-0011", "mega-0021"):
        layouts = {(r.layout.cp, r.layout.dense_dp, r.layout.dp) for r in fill(named(shipped, row_id), shipped)}
        assert layouts == {(8, 2, 2)}


def test_a_note_names_the_searched_set(shipped: list[PublishedRun]) -> None:
    requests = fill(named(shipped, "xmoe-0011"), shipped)
    assert {request.layout.ep for request in requests} == {32, 64, 128, 256}
    assert {request.layout.tp for request in requests} == {1, 2, 4, 8}
    assert {(r.routing.mode, r.routing.capacity_factor) for r in requests} == {("drop", 1.25)}


def test_deepseek_v3_is_as_its_report_says(shipped: list[PublishedRun]) -> None:
    (request,) = fill(named(shipped, "dsv3-0001"), shipped)
    assert (request.layout.schedule, request.layout.vpp, request.layout.dp) == ("dualpipev", 2, 2)
    assert (request.recipe, request.layout.recompute) == ("fp8_deepseek", "norm+mla_up+activation")
    assert request.model.mtp_layers == 1
    assert request.model.parameters - request.model.mtp_parameters == pytest.approx(671.0e9, rel=0.002)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"gpu": "V100"}, "gpu=V100"),
        ({"num_gpus": ""}, r"num_gpus=\(empty\)"),
        ({"num_gpus": "100"}, "num_gpus=100"),
        ({"ep": "3"}, "ep=3"),
        ({"global_batch": "7"}, "global_batch=7"),
        ({"precision": "NVFP4"}, "precision=NVFP4"),
        ({"zero_stage": "4"}, "zero_stage=4"),
        ({"model": "Unheard-of", "hidden": ""}, "must state hidden"),
        ({"heads": "5", "kv_heads": "3"}, "contradict"),
    ],
)
def test_what_cannot_be_assumed_is_refused_with_its_key(changes: dict[str, str], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        fill(run_of(**changes))


def test_an_unknown_model_is_built_from_its_columns() -> None:
    run = run_of(model="Nova-341B", layers="60", hidden="4096", heads="32", kv_heads="8", experts="32", topk="3",
                 moe_ffn="14336", notes="vocab 65536")  # fmt: skip
    model, _ = model_facts(run, 65536)
    assert (model.matrices_per_expert, model.head_dim, model.vocab) == (3, 128, 65536)
    assert model.parameters == pytest.approx(341e9, rel=0.005)
    ungated, assumed = model_facts(run_of(**(dict(run.cells) | {"model": "Nova-229B"})), None)
    assert (ungated.matrices_per_expert, assumed["vocab"]) == (2, "32000: not stated")


def test_cut_models_keep_their_family(shipped: list[PublishedRun]) -> None:
    model, assumed = model_facts(named(shipped, "simu-0013"), None)
    assert (model.layers, model.dense_first, model.attention, model.mtp_layers) == (4, 1, "mla", 0)
    assert "cut to 4" in assumed["layers"]
    single, _ = model_facts(named(shipped, "piper-0021"), None)
    assert (single.layers, single.dense_first, single.moe_layers) == (1, 0, 1)


def test_the_fastest_filling_that_fits_is_taken() -> None:
    """Full recompute is slower and smaller: it is taken only where nothing faster fits."""

    def predict(request: Request) -> Outcome:
        full = request.layout.recompute == "full"
        return Outcome(2.0 if full else 1.0, (40 if full else 70) * request.layout.micro_batch, 80)

    run = run_of(recompute="", micro_batch="")
    chosen = answer(run, [run], predict)
    assert chosen.request is not None and chosen.request.layout.recompute in ("none", "selective")
    tight = answer(run, [run], lambda request: replace(predict(request), capacity_bytes=50))
    assert tight.request is not None and (tight.request.layout.recompute, tight.request.layout.micro_batch) == (
        "full",
        1,
    )
    none = answer(run, [run], lambda request: replace(predict(request), capacity_bytes=5))
    assert none.outcome is not None and (none.outcome.fits, none.outcome.peak_memory_bytes) == (False, 40)


def test_the_convention_of_flops_is_what_two_rates_imply() -> None:
    """A run that prints both tokens/s and TFLOP/s tells how it counts; else the source does."""
    (request,) = fill(run_of())
    causal = flops_per_token(request, "causal")
    assert flops_per_token(request, "noncausal") > 1.02 * causal
    both = [run_of(metric="tokens_per_s_per_gpu", value="1000", unit="tok/s/GPU").rows[0],
            run_of(metric="tflops_per_gpu", value=str(causal * 1000 / 1e12), unit="TFLOP/s").rows[0]]  # fmt: skip
    assert convention(PublishedRun(tuple(both)), both[1], request) == "causal_without_mtp"
    assert convention(PublishedRun((both[1],)), both[1], request) == "noncausal_without_mtp"
    hardware = run_of(metric="hw_tflops_per_gpu", value="140", unit="TFLOP/s")
    assert convention(hardware, hardware.rows[0], request) == "hardware"


@pytest.mark.parametrize(
    ("model", "sequence", "way", "gigaflops"),
    [
        ("Qwen3-235B-A22B", 4096, "causal", 148.0),
        ("Qwen3-30B-A3B", 4096, "causal", 23.0),
        ("Kimi-K2", 4096, "causal", 204.4),
        ("GPT-OSS-120B", 4096, "causal", 32.6),
        ("Llama3-8B", 8192, "causal", 51.5),
        ("Llama3-8B", 8192, "noncausal", 57.9),
        ("Llama3-70B", 8192, "causal", 449.2),
        ("Llama3-405B", 8192, "causal", 2524.0),
        ("DeepSeek-V3", 4096, "causal_without_mtp", 249.7),
        ("DeepSeek-V3", 4096, "noncausal_without_mtp", 280.2),
        ("DeepSeek-V3", 4096, "causal", 260.0),
    ],
)
def test_flops_per_token_are_the_published_ones(model: str, sequence: int, way: str, gigaflops: float) -> None:
    empty = {key: "" for key in ("layers", "hidden", "experts", "topk", "moe_ffn")}
    spec, _ = model_facts(run_of(model=model, notes="with MTP" if gigaflops == 260.0 else "", **empty), None)
    (request,) = fill(run_of())
    request = replace(request, model=spec, sequence=sequence)
    assert flops_per_token(request, way) / 1e9 == pytest.approx(gigaflops, rel=0.002)


def test_the_peak_of_mfu_is_the_rows_own() -> None:
    (request,) = fill(run_of())
    assert peak_flops(run_of(notes="method=MCore; peak 989.5 TFLOP/s;"), request) == 989.5e12
    assert peak_flops(run_of(notes="bar labels (figure), 191.5 TFLOP/s peak"), request) == 191.5e12
    assert peak_flops(run_of(), request) == 989e12


def test_an_unstated_batch_is_four_micro_batches_a_stage() -> None:
    run = run_of(global_batch="")
    chosen = answer(run, [run], steady)
    assert chosen.request is not None
    assert chosen.request.layout.micro_batches(chosen.request.global_batch) == 4 * chosen.request.layout.pp


def test_a_dispatcher_names_its_all_to_all() -> None:
    (request,) = fill(run_of(dispatcher="DeepEP"))
    assert request.layout.all_to_all == "halo_dedup" and "DeepEP" in request.filled["all_to_all"]
