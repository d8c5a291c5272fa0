"""What a row says of precision, routing, recomputation and its framework, and what is taken where it does not."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from analysis.validation.published.request import Refused
from analysis.validation.published.rows import PublishedRun
from piper_hpc.spec import EXECUTIONS, Execution, ModelSpec, Routing

Assumed = dict[str, str]
LAST_YEAR_BEFORE_FLASH = 2022
"""Publications up to this year ran attention that stores its scores, and no distributed optimizer; before it weight
gradients were added up by a kernel of their own (Apex's fused accumulation is of the end of 2021)."""


def before_flash_attention(run: PublishedRun, model: ModelSpec, accelerator: str) -> bool:
    """Whether a run is of the time before flash attention: by its arXiv year, else dense on an A100."""
    if run.year is not None:
        return run.year <= LAST_YEAR_BEFORE_FLASH
    return model.experts == 0 and accelerator.startswith("a100")


def zero_stage(run: PublishedRun, similar_runs: Sequence[PublishedRun], before_flash: bool, assumed: Assumed) -> int:
    """ZeRO stage: stated, that of similar runs, else 0 before distributed optimizers were common and 1 since."""
    stage = stated(run, similar_runs, "zero_stage")
    if stage is None:
        stage = 0 if before_flash else 1
        assumed["zero_stage"] = (
            f"{stage}: {'a publication up to 2022' if before_flash else 'a distributed optimizer is usual'}"
        )
    if not 0 <= stage <= 3:
        raise Refused(f"zero_stage={run.cells['zero_stage']}: must be 0, 1, 2 or 3")
    return stage


def stated(run: PublishedRun, similar_runs: Sequence[PublishedRun], column: str) -> int | None:
    """A number that the run states, else the one that all similar runs stating it agree on; None without either."""
    if (own := run.number(column)) is not None:
        return own
    values = {value for other in similar_runs if (value := other.number(column)) is not None}
    return values.pop() if len(values) == 1 else None


def recipe(run: PublishedRun, framework: str, assumed: Assumed) -> str:
    """The precision recipe, a name of RECIPES. Raises Refused for a precision below 8 bits or one unheard of."""
    text = run.text("precision").lower()
    if "fp4" in text or "int8" in text:
        raise Refused(f"precision={run.cells['precision']}: must be fp32, bf16, fp16 or fp8")
    if "fp8" in text or "float8" in text or "hybrid" in text:
        return "fp8_deepseek" if framework == "deepseek" or "deepseek" in text else "fp8_mixed"
    if re.search(r"bf16|fp16|float16|half|mixed|amp", text) or not text:
        accumulates = framework in ("megatron", "deepseek")
        name = "mixed_18" if accumulates else "mixed_16"
        assumed["recipe"] = f"{name}: gradients add up in {'fp32' if accumulates else '16 bits'} in {framework}"
        return name
    if re.search(r"fp32|float32|tf32", text):
        return "float32"
    raise Refused(f"precision={run.cells['precision']}: must be fp32, bf16, fp16 or fp8")


def routing(run: PublishedRun, document: Sequence[PublishedRun], method: str, assumed: Assumed) -> Routing:
    """How tokens meet experts: stated, else as the document's notes say for the whole set, else dropless."""
    if method == "X-MoE":
        assumed["routing"] = "dropless: X-MoE keeps no padding"
        return Routing("dropless")
    for text, origin in (
        (f"{run.text('routing')} {run.cells['notes']}".lower(), ""),
        (" ".join(other.cells["notes"] for other in document).lower(), "as elsewhere in its document"),
    ):
        if found := re.search(r"capacity[- ]factor[ =:]*([\d.]*\d)|\bcf[ =:]*([\d.]*\d)", text):
            factor = float(found.group(1) or found.group(2))
            if origin:
                assumed["routing"] = f"capacity factor {factor:g}, {origin}"
            return Routing("drop", capacity_factor=factor)
    text = run.text("routing").lower()
    if re.search(r"balanc|forced|uniform", text):
        return Routing("forced")
    if "drop" in text and "dropless" not in text:
        assumed["routing"] = "capacity factor 1: not stated"
        return Routing("drop", capacity_factor=1.0)
    if "dropless" not in text:
        assumed["routing"] = "dropless: not stated"
    return Routing("dropless")


def recompute(run: PublishedRun) -> str:
    """`none`, `selective`, `full` or parts joined by +, as stated; empty where it is not."""
    text = run.text("recompute").lower()
    if re.match(r"none|no\b|off|false|disabled", text):
        return "none"
    if "full" in text or "all layers" in text:
        return "full"
    parts = {
        "norm": r"norm",
        "mla_up": r"mla.?up|up.?proj",
        "activation": r"swiglu|gelu|activation func|moe_act|\bact\b",
        "attention": r"core.?att|attention|\battn",
        "moe": r"\bmoe\b|expert",
    }
    named = [part for part, pattern in parts.items() if re.search(pattern, text)]
    return "+".join(named) or ("selective" if "selective" in text else "")


def execution(
    run: PublishedRun, framework: str, method: str, before_flash: bool, tp: int, assumed: Assumed
) -> Execution:
    """The framework's way of a step; sequence parallelism as stated, else with tp > 1 since 2023 and never before."""
    before_fusion = before_flash and run.year is not None and run.year < LAST_YEAR_BEFORE_FLASH
    era = "megatron_2021" if before_fusion else "megatron_2022" if before_flash else "megatron"
    base = EXECUTIONS["piper" if framework == "piper" else era]
    said = re.search(r"\+ ?(sp|sequence parallel)\b", f"{run.text('recompute')} {run.cells['notes']}", re.I)
    split = bool(said) or (not before_flash and tp > 1 and framework in ("megatron", "fsdp"))
    if tp > 1 and not said:
        assumed["sequence_parallel"] = f"{'on' if split else 'off'}: not stated"
    overlaps = framework == "deepseek" or method == "MegaScale-MoE"
    if overlaps:
        assumed["overlap_experts"] = "on: the system's own feature"
    prefetches = bool(re.search(r"fsdp ?2|torchtitan", f"{method} {run.cells['source']}", re.I))
    return replace(base, sequence_parallel=split, overlap_experts=overlaps, overlap_shards=prefetches)


ALL_TO_ALL = (
    # a pattern on framework and method, the algorithm
    (r"^deepseek", "halo_dedup", "tokens cross the network once a node (arXiv 2412.19437)"),
    (r"X-MoE$", "halo_dedup", "redundant copies bypassed (arXiv 2508.13337)"),
    (r"^piper", "halo", "HALO (arXiv 2605.05049)"),
)


def all_to_all(run: PublishedRun, framework: str, method: str, assumed: Assumed) -> str:
    """The all-to-all that the dispatcher column or the system's name stands for, else flat."""
    if re.search(r"deep-?ep|hybrid-?ep", run.text("dispatcher"), re.I):
        assumed["all_to_all"] = f"halo_dedup: {run.text('dispatcher')} sends a token once a node"
        return "halo_dedup"
    for pattern, name, why in ALL_TO_ALL:
        if re.search(pattern, f"{framework} {method}"):
            assumed["all_to_all"] = f"{name}: {why}"
            return name
    return "flat"
