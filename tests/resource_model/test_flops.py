"""The FLOP formula against published figures (conventions: causal, head included, router and embedding not)."""

from __future__ import annotations

import pytest

from piper_hpc.resource_model import FLOP_CONVENTION, flops, flops_per_token
from piper_hpc.spec import ModelSpec
from tests.resource_model.clusters import TINY


def gqa(
    layers: int, hidden: int, heads: int, kv_heads: int, experts: int, top_k: int, ffn: int, vocab: int
) -> ModelSpec:
    """A released model with heads of 128; a dense one has a single expert."""
    return ModelSpec("released", layers, hidden, heads, kv_heads, 128, experts, top_k, ffn, vocab)


@pytest.mark.parametrize(
    ("model", "sequence", "gflops"),
    [
        (gqa(94, 4096, 64, 4, 128, 8, 1536, 151_936), 4096, 148.0),
        (gqa(48, 2048, 32, 4, 128, 8, 768, 151_936), 4096, 23.0),
        (gqa(32, 4096, 32, 8, 1, 1, 14336, 128_256), 8192, 51.47),
        (gqa(80, 8192, 64, 8, 1, 1, 28672, 128_256), 8192, 449.2),
        (gqa(126, 16384, 128, 8, 1, 1, 53248, 128_256), 8192, 2524.0),
    ],
    ids=["Qwen3-235B", "Qwen3-30B", "Llama-3-8B", "Llama-3-70B", "Llama-3-405B"],
)
def test_published_gflops_per_token(model: ModelSpec, sequence: int, gflops: float) -> None:
    assert flops_per_token(model, sequence) / 1e9 == pytest.approx(gflops, rel=1e-3)


def test_a_token_costs_the_sum_of_its_modules_three_times() -> None:
    layer = flops.projection_flops(TINY) + flops.score_flops(TINY, 64) + flops.expert_flops(TINY)
    assert flops_per_token(TINY, 64) == 3 * (4 * layer + flops.head_flops(TINY))


def test_the_convention_says_what_it_counts() -> None:
    for word in ("causal", "top-k experts", "head", "no embedding, router or norms", "recompute not counted"):
        assert word in FLOP_CONVENTION
