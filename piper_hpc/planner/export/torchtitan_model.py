"""Models that torchtitan ships: [model] name and flavor by their sizes."""

from __future__ import annotations

from dataclasses import dataclass

from piper_hpc.spec import ModelSpec


@dataclass(frozen=True)
class Flavor:
    """[model] name and flavor of torchtitan. flex: FlexAttention, which excludes context parallelism."""

    name: str
    flavor: str
    flex: bool = False


FLAVORS = {
    # layers, hidden, heads, kv_heads, dense_first, experts, top_k, expert_ffn, dense_ffn, shared experts
    (32, 4096, 32, 8, 0, 0, 0, 0, 14336, 0): Flavor("llama3", "8B"),
    (80, 8192, 64, 8, 0, 0, 0, 0, 28672, 0): Flavor("llama3", "70B"),
    (126, 16384, 128, 8, 0, 0, 0, 0, 53248, 0): Flavor("llama3", "405B"),
    (27, 2048, 16, 16, 1, 64, 6, 1408, 10944, 2): Flavor("deepseek_v3", "16B", flex=True),
    (60, 5120, 128, 128, 1, 160, 6, 1536, 12288, 2): Flavor("deepseek_v3", "236B", flex=True),
    (61, 7168, 128, 128, 3, 256, 8, 2048, 18432, 1): Flavor("deepseek_v3", "671B", flex=True),
    (48, 2048, 32, 4, 0, 128, 8, 768, 0, 0): Flavor("qwen3", "30B-A3B"),
    (94, 4096, 64, 4, 0, 128, 8, 1536, 0, 0): Flavor("qwen3", "235B-A22B"),
}
"""By sizes, of torchtitan v0.2.2, `torchtitan/models/*/__init__.py`."""


def flavor_of(model: ModelSpec) -> Flavor | None:
    """What torchtitan calls a model of these sizes; None where it ships none."""
    dense = model.dense_ffn if model.dense_layers else 0
    moe = (model.experts, model.top_k, model.expert_ffn) if model.experts else (0, 0, 0)
    sizes = (model.layers, model.hidden, model.heads, model.kv_heads, model.dense_first if model.experts else 0)
    return FLAVORS.get((*sizes, *moe, dense, model.shared_experts))
