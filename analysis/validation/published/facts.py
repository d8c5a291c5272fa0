"""The ModelSpec behind a row: the preset of its family, overridden by the row's own columns.

1. A model named as a file of `conf/model/` starts from that preset; another size of a known family starts from the
   family's preset that is nearest in hidden size; any other model starts from nothing.
2. The row's columns override: layers, hidden, heads, kv_heads, ffn, experts, topk, moe_ffn, shared_experts, and
   `vocab N`, `N dense`, `N-matrix experts`, `N layers inferred` in words.
3. What neither states: heads of 128, kv_heads = heads, head_dim = hidden / heads, three matrices (two where the model
   is built like a GPT, or where the size in an MoE's name is nearer to that count), a dense ffn of 4 hidden with two
   matrices and 8/3 hidden with three, vocab 51,200 for a GPT, else 32,000.
4. Multi-token prediction is trained where the notes say MTP, and by DeepSeek itself (arXiv 2412.19437, one module); not
   in a model cut to fewer layers, which keeps dense layers only as far as experts follow.
5. Without layers and hidden (and experts, topk, moe_ffn of an MoE) from 1 or 2 the run is refused.
"""

from __future__ import annotations

import math
import re
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any

import yaml

from analysis.validation.published.names import family, framework, without_parentheses
from analysis.validation.published.request import Refused
from analysis.validation.published.rows import PublishedRun
from piper_hpc.paths import data_folder
from piper_hpc.spec import ModelSpec
from piper_hpc.spec.rope import RopeScaling

_FIELDS = {field.name for field in fields(ModelSpec)}
_SAME_AS = {"gpt": "gpt3", "mtnlg": "gpt3", "megatronturingnlg": "gpt3", "megatron": "gpt3"}
_OTHER_NAMES: tuple[tuple[str, str], ...] = (
    # a pattern on a name in lower case, what stands for it: releases of one architecture, makers, and tuned forms
    (r"^[\w.-]+/", ""),
    (r"^(meta|snowflake|nvidia|databricks|xai)[ -]", ""),
    (r"^llama[ -]?3\.[13](?=\D|$)", "llama3"),
    (r"^deepseek[ -]?(r1|v3\.\d)(-zero|-\d{4})?", "deepseek-v3"),
    (r"^deepseek[ -]?v2\.5", "deepseek-v2"),
    (r"[ -](v\d\.\d|base|instruct|chat|hf|thinking|it|pretrain(ing)?|model|\d{4})(?=[ -]|$)", ""),
)
_PRINTED_SIZE = r"(?<![\w.])a?(\d+(?:\.\d+)?) ?([bt])(?=[ _-]|$)|(?<=[ _-])\d+e(?=[ _-]|$)"
NEAR_SIZE = 0.15
"""A name with a size is a preset without one where total or active parameters are as near as this."""
_LIKE_GPT = r"\bgpt(?!.?oss)|megatron|turing|mt-?nlg|\bopt\b|bloom|falcon|nemotron-?4|starcoder"
"""Families whose feed-forward has two matrices of 4 hidden."""
GPT_VOCAB, OTHER_VOCAB = 51_200, 32_000
LARGEST = {"layers": 2_000, "experts": 100_000}
"""More is a misprint; formulas walk over layers and experts."""
_COLUMNS = {"layers": "layers", "hidden": "hidden", "heads": "heads", "kv_heads": "kv_heads", "experts": "experts",
            "topk": "top_k", "moe_ffn": "expert_ffn", "ffn": "dense_ffn"}  # fmt: skip


@lru_cache(maxsize=1)
def presets() -> dict[str, ModelSpec]:
    """Every model of `conf/model/` that is written as plain facts, by file name."""
    found: dict[str, ModelSpec] = {}
    for path in sorted((data_folder("conf") / "model").glob("*.yaml")):
        facts = _read(path.stem)
        if {"layers", "hidden", "heads"} <= facts.keys() and None not in (facts["layers"], facts["hidden"]):
            facts.setdefault("head_dim", facts.get("qk_nope_dim", 0) + facts.get("qk_rope_dim", 0))
            facts["head_dim"] = facts["head_dim"] or facts["hidden"] // facts["heads"]
            if facts.get("rope_scaling"):
                facts["rope_scaling"] = RopeScaling(**facts["rope_scaling"])
            found[path.stem] = ModelSpec(**{key: value for key, value in facts.items() if key in _FIELDS})
    return found


def _read(stem: str) -> dict[str, Any]:
    """A preset's keys, with those of the presets it is based on."""
    document = yaml.safe_load((data_folder("conf") / "model" / f"{stem}.yaml").read_text()) or {}
    based_on = [name for name in document.pop("defaults", []) if isinstance(name, str) and name != "_self_"]
    return {key: value for base in based_on for key, value in _read(base).items()} | document


def _key(name: str) -> str:
    """A name without case and separators; `MT-NLG 530B` and `GPT 530B` are `gpt3530b`."""
    name = name.lower()
    for pattern, ours in _OTHER_NAMES:
        name = re.sub(pattern, ours, name)
    bare = re.sub(r"single layer|[^a-z0-9]", "", name)
    for other, ours in _SAME_AS.items():
        if bare.startswith(other) and not bare.startswith(ours):
            return ours + bare[len(other) :]
    return bare


def _family_key(name: str) -> str:
    return {"gpt3": "gpt"}.get(_key(family(name)), _key(family(name)).replace("gpt3", "gpt"))


def preset(run: PublishedRun) -> tuple[ModelSpec | None, str]:
    """(preset, whose it is): the model's own, the nearest of its family, or None."""
    name, hidden = without_parentheses(run.cells["model"]), run.degree("hidden")
    known = presets()
    sizes = [float(number) * (1e12 if unit == "t" else 1e9) for number, unit in re.findall(_PRINTED_SIZE, name.lower())
             if number]  # fmt: skip
    unsized = _key(re.sub(_PRINTED_SIZE, "", name.lower()))
    for stem, spec in known.items():
        if _key(stem) == _key(name) or (_key(stem) == unsized and _near(spec, sizes)):
            return spec, f"preset {stem}"
    # Qwen alone names dense and MoE models alike; its MoE names print active parameters.
    dense_qwen = re.match(r"qwen", name, re.I) and not run.moe and not re.search(r"[ -]a\d", name, re.I)
    dense = dense_qwen or run.number("experts") in (0, 1)
    relatives = [stem for stem in known if _family_key(stem.replace("_", "-")) == _family_key(name)]
    relatives = [stem for stem in relatives if not (dense and known[stem].experts)]
    if len(relatives) == 1 and not sizes and not hidden:
        return known[relatives[0]], f"preset {relatives[0]}, the one of its family"
    if not relatives or not hidden or not run.degree("layers"):
        return None, ""
    nearest = min(relatives, key=lambda stem: abs(math.log(known[stem].hidden / hidden)))
    return known[nearest], f"family of preset {nearest}"


def _near(spec: ModelSpec, sizes: list[float]) -> bool:
    counts = (spec.parameters, spec.active_parameters)
    return not sizes or any(abs(count / size - 1) < NEAR_SIZE for size in sizes for count in counts)


def model_facts(run: PublishedRun, vocab: int | None) -> tuple[ModelSpec, dict[str, str]]:
    """The model of a run and what was assumed about it. `vocab`: as stated by the row or by its document, else None.

    Raises Refused where layers, hidden or the experts are known from nowhere, or contradict one another.
    """
    assumed: dict[str, str] = {}
    base, origin = preset(run)
    facts: dict[str, Any] = {ours: value for theirs, ours in _COLUMNS.items() if (value := run.degree(theirs))}
    if found := re.search(r"(\d+) layers inferred", run.words):
        facts["layers"] = int(found.group(1))
    for key, most in LARGEST.items():
        if facts.get(key, 0) > most:
            raise Refused(f"{key}={facts[key]}: must be at most {most}")
    if vocab:
        facts["vocab"] = vocab
    if found := re.search(r"\b([23])-matrix", run.words):
        facts["matrices_per_expert"] = int(found.group(1))
    if base is None:
        spec = _from_columns(run, facts, assumed)
    else:
        assumed["model"] = origin
        spec = _overridden(run, base, facts, assumed)
    return spec, assumed


def _overridden(run: PublishedRun, base: ModelSpec, facts: dict[str, Any], assumed: dict[str, str]) -> ModelSpec:
    if base.attention == "mla":
        facts.pop("kv_heads", None)
        if "heads" in facts:
            facts["kv_heads"] = facts["heads"]
    elif facts.get("heads", base.heads) != base.heads or facts.get("hidden", base.hidden) != base.hidden:
        facts["head_dim"] = facts.get("hidden", base.hidden) // facts.get("heads", base.heads)
        facts.setdefault("kv_heads", facts.get("heads", base.heads))
        if not base.experts and "dense_ffn" not in facts:
            facts["dense_ffn"] = round(base.dense_ffn / base.hidden * facts.get("hidden", base.hidden))
    shared, width = run.number("shared_experts"), facts.get("expert_ffn", base.expert_ffn)
    if shared is not None and base.experts and shared * width != base.shared_experts * base.shared_expert_ffn:
        facts |= {"shared_experts": shared, "shared_expert_ffn": width if shared else 0}
        facts["shared_expert_gate"] = base.shared_expert_gate and shared > 0
    layers = facts.get("layers", base.layers)
    if layers < base.layers:
        stated = re.search(r"(\d+) dense", run.cells["model"])
        last = max(layers - base.moe_every, 0)
        facts["dense_first"] = int(stated.group(1)) if stated else min(base.dense_first, last)
        if layers == 1:
            facts |= {"dense_first": 0, "moe_every": 1}
        facts["mtp_layers"] = 0
        if base.dense_first or base.mtp_layers:
            assumed["layers"] = f"cut to {layers}: {facts['dense_first']} dense first, no multi-token prediction"
    elif re.search(r"(?<!no )(?<!without )\bmtp\b", run.words, re.I) or (
        base.attention == "mla" and framework(run)[0] == "deepseek"
    ):
        facts["mtp_layers"] = max(base.mtp_layers, 1)
        assumed["mtp_layers"] = f"{facts['mtp_layers']}: as its authors train"
    if base.positions and (sequence := run.degree("seq")):
        facts["positions"] = max(base.positions, sequence)
    return _checked(run, lambda: replace(base, **(facts | {"name": without_parentheses(run.cells["model"])})))


def _from_columns(run: PublishedRun, facts: dict[str, Any], assumed: dict[str, str]) -> ModelSpec:
    gpt = family(run.cells["model"]) == "GPT"
    needed = ["layers", "hidden"] + (["top_k", "expert_ffn"] if run.moe else [])
    missing = [next(column for column, ours in _COLUMNS.items() if ours == key) for key in needed if key not in facts]
    if missing:
        raise Refused(
            f"model={run.cells['model']}: has no preset in conf/model/, so that the row must state {', '.join(missing)}"
        )
    hidden = facts["hidden"]
    if "heads" not in facts:
        facts["heads"] = max(hidden // 128, 1)
        assumed["heads"] = f"{facts['heads']}: hidden / 128"
    facts.setdefault("kv_heads", facts["heads"])
    if "vocab" not in facts:
        facts["vocab"] = GPT_VOCAB if gpt else OTHER_VOCAB
        assumed["vocab"] = f"{facts['vocab']}: not stated"
    matrices = 2 if re.search(_LIKE_GPT, run.cells["model"].lower()) else 3
    if run.moe:
        facts.setdefault("matrices_per_expert", _matrices(run, facts, matrices))
        assumed["matrices_per_expert"] = str(facts["matrices_per_expert"])
        shared = run.number("shared_experts") or 0
        facts |= {"shared_experts": shared, "shared_expert_ffn": facts["expert_ffn"] if shared else 0}
    elif "dense_ffn" not in facts:
        facts["dense_ffn"] = 4 * hidden if matrices == 2 else -(-8 * hidden // 768) * 256
        assumed["ffn"] = f"{facts['dense_ffn']}: not stated"
    if gpt:
        facts |= {"norm": "layer", "tied_embeddings": True, "positions": run.degree("seq") or 2048}
        facts |= dict.fromkeys(("attention_bias", "output_bias", "ffn_bias"), True)
    dense = {"experts": 0, "top_k": 0, "expert_ffn": 0}
    given = (
        (dense if not run.moe else {})
        | facts
        | {"name": without_parentheses(run.cells["model"]), "dense_matrices": matrices}
    )
    return _checked(run, lambda: ModelSpec(head_dim=hidden // given["heads"], **given))


def _matrices(run: PublishedRun, facts: dict[str, Any], usual: int) -> int:
    """The count of matrices per expert whose parameters are nearest to the size that the model's name prints."""
    printed = re.search(r"(\d+(?:\.\d+)?) ?([BT])\b", without_parentheses(run.cells["model"]))
    if not printed or re.search(r"\dx\d", without_parentheses(run.cells["model"])):
        return usual
    size = float(printed.group(1)) * (1e9 if printed.group(2) == "B" else 1e12)
    experts = facts["layers"] * facts["experts"] * facts["hidden"] * facts["expert_ffn"]
    others = facts["layers"] * 4 * facts["hidden"] ** 2
    return min((3, 2), key=lambda count: abs(math.log((count * experts + others) / size)))


def _checked(run: PublishedRun, build: Any) -> ModelSpec:
    try:
        spec: ModelSpec = build()
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise Refused(f"model={run.cells['model']}: its facts contradict one another: {error}") from None
    return spec
