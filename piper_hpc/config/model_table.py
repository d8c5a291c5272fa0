"""The table of docs/models.md: every preset with experts, what its layers are made of, and whether it trains."""

from __future__ import annotations

from collections.abc import Iterator

from piper_hpc.config.model import preset
from piper_hpc.paths import data_folder
from piper_hpc.spec import ModelSpec
from piper_hpc.spec.executor import missing_of_model

BEGIN, END = "<!-- written by piper_hpc.config.reference -->", "<!-- to here -->"
HEAD = """| preset | attention | feed-forward | router | trains |
|---|---|---|---|---|
"""


def in_page(text: str) -> str:
    """The page with its table as presets are now."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table()}{END}{after}"


def table() -> str:
    """One row a preset that has experts, in alphabetical order."""
    names = sorted(path.stem for path in (data_folder("conf") / "model").glob("*.yaml") if path.stem != "hf")
    rows = [row(name, spec) for name in names if (spec := preset(name)).experts]
    return HEAD + "".join(rows)


def row(name: str, spec: ModelSpec) -> str:
    """A preset's line; where it does not train as it is, what it does with."""
    missing = [problem.works for problem in missing_of_model(spec, "bfloat16")]
    trains = f"with `{' '.join(missing)}`" if missing else "yes"
    cells = (
        f"`{name}`",
        *(", ".join(words) for words in (_attention(spec), _feed_forward(spec), _router(spec))),
        trains,
    )
    return "| " + " | ".join(cells) + " |\n"


def _attention(spec: ModelSpec) -> Iterator[str]:
    yield "MLA" if spec.attention == "mla" else "MHA" if spec.heads == spec.kv_heads else "GQA"
    if spec.sliding_window:
        some = f" in {spec.full_attention_every - 1} of {spec.full_attention_every} layers"
        yield f"{spec.window_kind} windows{some if spec.full_attention_every else ''}"
    if spec.attention_sinks:
        yield "sinks"
    if spec.qk_norm != "none":
        yield f"QK norm ({spec.qk_norm})"
    if spec.attention_bias:
        yield "biases"
    if spec.clip_qkv:
        yield "clipped QKV"
    if spec.rope_fraction != 1:
        yield f"RoPE on {spec.rope_fraction:g} of a head"
    if spec.rope_scaling is not None:
        yield f"{spec.rope_scaling.kind} scaling"
    if spec.nope_every:
        yield f"no positions in every {spec.nope_every}th layer"


def _feed_forward(spec: ModelSpec) -> Iterator[str]:
    yield f"{spec.experts} experts" + (", clamped SwiGLU" if spec.swiglu_limit else "")
    if spec.shared_experts:
        yield f"{spec.shared_experts} shared" + (" with a gate" if spec.shared_expert_gate else "")
    if spec.dense_residual_ffn:
        yield "dense residual"
    if spec.dense_first:
        yield f"first {spec.dense_first} dense"
    if spec.moe_every > 1:
        yield f"every {spec.moe_every}. layer"
    if spec.matrices_per_expert == 2:
        yield "no gate"


def _router(spec: ModelSpec) -> Iterator[str]:
    yield f"top {spec.top_k} by {spec.router_score}"
    if spec.expert_groups:
        yield f"{spec.groups_per_token} of {spec.expert_groups} groups"
    if spec.selection_bias:
        yield "bias on the choice"
    if spec.top_k > 1 and not spec.normalised_weights:
        yield "weights not normalised"
    if spec.weighted_input:
        yield "scales the input"
    if spec.router_z_coef:
        yield "z-loss"
