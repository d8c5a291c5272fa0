"""The FLOP formula: its conventions, its modules, and closed forms. Published figures: analysis.validation.exact."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model import FLOP_CONVENTION, flops, flops_per_token
from piper_hpc.resource_model.flops import CAUSAL, CONVENTIONS, forward_flops, keys_seen, layer_flops
from tests.presets import preset
from tests.resource_model.clusters import TINY


def test_an_mtp_module_is_counted_where_the_model_has_one_and_the_convention_wants_it() -> None:
    trained = preset("deepseek_v3", "model.mtp_layers=1")
    main = flops_per_token(preset("deepseek_v3"), 4096)
    module = flops_per_token(trained, 4096) - main
    assert module == pytest.approx(3 * flops.mtp_flops(trained, 4096), rel=1e-12)
    assert flops_per_token(trained, 4096, CONVENTIONS["causal_without_mtp"]) == main


def test_narayanan_closed_form_of_gpt() -> None:
    """arXiv 2104.04473 Eq 3 without recompute, non-causal: 72 L h^2 (1 + s / 6h + V / 12 L h) a token."""
    gpt = preset("gpt3_175b")
    layers, hidden, vocab, sequence = gpt.layers, gpt.hidden, gpt.vocab, 2048
    closed = 72 * layers * hidden**2 * (1 + sequence / (6 * hidden) + vocab / (12 * layers * hidden))
    assert flops_per_token(gpt, sequence, CONVENTIONS["noncausal"]) == pytest.approx(closed, rel=1e-12)


def test_a_token_costs_the_sum_of_its_modules_three_times() -> None:
    layer = flops.projection_flops(TINY) + flops.score_flops(TINY, 64) + flops.expert_flops(TINY)
    assert flops_per_token(TINY, 64) == 3 * (4 * layer + flops.head_flops(TINY))


def test_dense_and_shared_feed_forwards_are_counted_in_their_layers() -> None:
    spec = preset("deepseek_v3")
    modules = forward_flops(spec, 4096)
    assert modules.dense == 3 * 2 * 3 * 7168 * 18432
    assert modules.shared == 58 * 2 * 3 * 7168 * 2048
    assert modules.routed == 8 * modules.shared
    # The residual of Arctic stands in every layer beside the experts.
    assert forward_flops(preset("arctic"), 4096).dense == 35 * 2 * 3 * 7168 * 7168


@pytest.mark.parametrize(
    ("window", "kind", "convention", "keys"),
    [
        (0, "sliding", "causal", 2048),
        (0, "sliding", "noncausal", 4096),
        (8192, "chunked", "causal", 2048),
        (1024, "sliding", "causal", 1024 - 128),
        (1024, "chunked", "causal", 512),
        (1024, "sliding", "noncausal", 1024),
        (1024, "sliding", "causal_unwindowed", 2048),
    ],
)
def test_keys_that_a_query_sees(window: int, kind: str, convention: str, keys: float) -> None:
    assert keys_seen(4096, window, kind, CONVENTIONS[convention]) == keys


@pytest.mark.parametrize("kind", ["sliding", "chunked"])
def test_keys_seen_is_the_mean_of_the_mask(kind: str) -> None:
    """Exactly half a key a query less than the mask's mean: the diagonal counts half, as in s / 2."""
    sequence, window = 64, 16

    def sees(query: int) -> int:
        return min(query + 1, window) if kind == "sliding" else query % window + 1

    mean = sum(sees(query) for query in range(sequence)) / sequence
    assert keys_seen(sequence, window, kind) == pytest.approx(mean, abs=0.5)


@given(sequence=st.integers(1, 1 << 17), window=st.integers(0, 1 << 17))
def test_a_window_only_takes_work_away(sequence: int, window: int) -> None:
    for kind in ("sliding", "chunked"):
        assert 0 < keys_seen(sequence, window, kind) <= keys_seen(sequence)
        assert keys_seen(sequence, window, kind) <= keys_seen(sequence, window, kind, CONVENTIONS["noncausal"])


@given(top_k=st.integers(1, 7), layers=st.integers(1, 40), sequence=st.integers(1, 8192))
def test_more_of_anything_costs_more(top_k: int, layers: int, sequence: int) -> None:
    spec = dataclasses.replace(TINY, top_k=top_k, layers=layers)
    cost = flops_per_token(spec, sequence)
    assert flops_per_token(dataclasses.replace(spec, top_k=top_k + 1), sequence) > cost
    assert flops_per_token(dataclasses.replace(spec, layers=layers + 1), sequence) > cost
    assert flops_per_token(spec, sequence + 1) > cost
    # Experts that are not chosen cost no FLOPs (nor does the router, by convention).
    assert flops_per_token(dataclasses.replace(spec, experts=spec.experts * 2), sequence) == cost


def test_modules_add_up_over_layers() -> None:
    spec = preset("llama4_maverick")
    windows = spec.windows
    whole = sum(layer_flops(spec, 32768, moe=spec.is_moe(n), window=windows[n]).total for n in range(spec.layers))
    assert forward_flops(spec, 32768).total == pytest.approx(whole + flops.head_flops(spec), rel=1e-12)


def test_the_convention_says_what_it_counts() -> None:
    for word in ("causal", "top-k experts", "head", "no embedding, router or norms", "recompute not counted"):
        assert word in FLOP_CONVENTION
    assert len({each.text for each in CONVENTIONS.values()}) == len(CONVENTIONS)
    assert (CAUSAL.causal, CAUSAL.windows, CAUSAL.mtp) == (True, True, True)
