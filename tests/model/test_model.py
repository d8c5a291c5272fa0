"""Model parts: grouped against looped experts, names and first values, the router's sums, alignment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from piper_hpc.comm import FlatDispatcher
from piper_hpc.model import Stage
from piper_hpc.model.experts import Experts, grouped_mm, looped_mm
from piper_hpc.model.names import initialise, logical_tensors
from piper_hpc.model.router import Router, balancing_loss, count_choices
from piper_hpc.profiling.clock import CpuClock
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec import ModelSpec
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.recompute import Recompute
from tests.model.whole import whole_model

CPU = torch.device("cpu")
MODEL = ModelSpec(
    "m", layers=2, hidden=16, heads=2, kv_heads=1, head_dim=8, experts=4, top_k=2, expert_ffn=24, vocab=32
)


def stage(layers: range, placement: ExpertPlacement, shard: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Parameters of one rank's stage by logical name."""
    built = Stage(
        MODEL,
        layers,
        sequence=8,
        aux_scale=0.0,
        dispatcher=FlatDispatcher(),
        placements=[placement] * MODEL.layers,
        recorder=Recorder(CpuClock()),
        recompute=Recompute(),
        device=CPU,
        dtype=torch.float32,
    )
    experts = [placement.experts_of(shard)] * MODEL.layers
    initialise(built, experts, layers=MODEL.layers, seed=seed)
    return dict(logical_tensors(built.named_parameters(), experts))


@pytest.mark.parametrize("sizes", [[3, 0, 5, 1], [0, 0, 9, 0], [0, 0, 0, 0]], ids=str)
def test_grouped_products_equal_the_loop_bit_for_bit(sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    offsets = torch.tensor(sizes).cumsum(0).to(torch.int32)
    results = []
    for multiply in (grouped_mm, looped_mm):
        generator.manual_seed(0)
        rows = torch.randn(sum(sizes), 16, generator=generator, requires_grad=True)
        weights = torch.randn(4, 16, 24, generator=generator, requires_grad=True)
        product = multiply(rows, weights, offsets)
        (product * torch.arange(24.0)).sum().backward()
        results.append((product.detach(), rows.grad, weights.grad))
    for grouped, looped in zip(*results, strict=True):
        assert torch.equal(grouped, looped)


def test_first_values_depend_on_seed_and_name_alone() -> None:
    whole = stage(range(2), ExpertPlacement.linear(4, 1), 0)
    assert len(whole) == 3 + 2 * (2 + 4 + 1 + 4 * 3)
    parts: dict[str, torch.Tensor] = {}
    permuted = ExpertPlacement(1, (1, 0, 0, 1), (0, 1, 0, 1))
    for layer in range(2):
        for shard in range(2):
            parts |= stage(range(layer, layer + 1), permuted, shard)
    assert parts.keys() == whole.keys()
    assert all(torch.equal(parts[name], whole[name]) for name in whole)
    other = stage(range(2), ExpertPlacement.linear(4, 1), 0, seed=1)
    assert not torch.equal(other["layers.0.experts.2.w1"], whole["layers.0.experts.2.w1"])
    assert not torch.equal(whole["layers.0.experts.1.w1"], whole["layers.0.experts.2.w1"])


def test_parameters_are_as_many_as_the_facts_say() -> None:
    whole = stage(range(2), ExpertPlacement.linear(4, 1), 0)
    assert sum(tensor.numel() for tensor in whole.values()) == MODEL.parameters


def test_router_counts_every_choice_normalises_weights_and_remembers_nothing() -> None:
    router = Router(MODEL, 0.25, device=CPU, dtype=torch.float64)
    hidden = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    first, again = router(hidden), router(hidden)
    assert first.expert_ids.shape == first.weights.shape == (21, 2)
    torch.testing.assert_close(first.weights.sum(-1), torch.ones(21, dtype=torch.float64))
    assert first.counts.tolist() == torch.bincount(first.expert_ids.flatten(), minlength=4).tolist()
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_one_expert_a_token_is_weighted_by_its_probability_so_that_the_gate_learns_from_the_task() -> None:
    """y = p(x) E(x), arXiv 2101.03961 Eq 2; normalised over one choice, every weight would be 1."""
    router = Router(replace(MODEL, top_k=1), 0.0, device=CPU, dtype=torch.float64)
    hidden = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weights = router(hidden).weights
    weights.square().sum().backward()
    gate = router.gate.weight.detach().clone().requires_grad_()
    likeliest = (hidden @ gate.T).softmax(-1).amax(-1)
    likeliest.square().sum().backward()
    torch.testing.assert_close(weights.detach(), likeliest.detach().view(-1, 1))
    torch.testing.assert_close(router.gate.weight.grad, gate.grad)
    assert gate.grad is not None and gate.grad.norm() > 1e-2


def test_balancing_loss_is_one_for_even_and_experts_over_top_k_for_collapsed_routing() -> None:
    even = torch.full((1, 8, 4), 0.25)
    assert balancing_loss(even, torch.tensor([[4, 4, 4, 4]]), 2).item() == pytest.approx(1.0)
    collapsed = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(1, 8, 4)
    assert balancing_loss(collapsed, torch.tensor([[8, 8, 0, 0]]), 2).item() == pytest.approx(2.0)


def test_choices_are_counted_by_sequence() -> None:
    ids = torch.tensor([[[0, 1], [0, 2]], [[3, 1], [3, 0]]])
    assert count_choices(ids, 4).tolist() == [[2, 1, 1, 0], [1, 1, 0, 2]]


def test_balancing_loss_reaches_the_gate_through_the_weights() -> None:
    """Gradient of the whole equals the gradient of the explicit sum of both losses."""
    hidden = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    router = Router(replace(MODEL, router_aux_coef=0.1), 5.0, device=CPU, dtype=torch.float64)
    gradients = []
    for attached in (True, False):
        router.gate.weight.grad = None
        if attached:
            (router(hidden).weights ** 2).sum().backward()
        else:
            probabilities = (hidden @ router.gate.weight.T).softmax(-1)
            top, ids = probabilities.topk(2, dim=-1)
            balance = balancing_loss(probabilities, count_choices(ids, 4), 2).sum()
            (((top / top.sum(-1, keepdim=True)) ** 2).sum() + 0.5 * balance).backward()
        gradients.append(router.gate.weight.grad.clone())
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(("dtype", "width", "works"), [(torch.float32, 30, 32), (torch.bfloat16, 36, 40)])
def test_width_that_grouped_products_refuse_is_named(dtype: torch.dtype, width: int, works: int) -> None:
    spec = replace(MODEL, hidden=32, expert_ffn=width)
    with pytest.raises(ValueError, match=rf"expert_ffn={width}.*{works}"):
        Experts(spec, 2, device=CPU, dtype=dtype)


def test_a_bias_on_the_choice_moves_against_the_load_and_changes_no_weight() -> None:
    """b += rate * sign(mean - load), arXiv 2408.15664 algorithm 1; weights are the scores without it."""
    spec = replace(
        MODEL, router_score="sigmoid", normalised_weights=False, selection_bias=True, selection_bias_rate=0.5
    )
    router = Router(spec, 0.0, device=CPU, dtype=torch.float32)
    hidden = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0))
    scores = router.gate(hidden).sigmoid().flatten(0, 1)
    before = router(hidden)
    router.after_step(torch.tensor([9, 1, 5, 5]))
    assert router.selection_bias.tolist() == [-0.5, 0.5, 0.0, 0.0]
    after = router(hidden)
    assert torch.equal(after.expert_ids, (scores + router.selection_bias).topk(2, dim=-1).indices)
    assert after.counts[0] < before.counts[0] and after.counts[1] > before.counts[1]
    torch.testing.assert_close(after.weights, scores.gather(1, after.expert_ids))


def test_groups_limit_the_choice() -> None:
    """Of two groups the one with the best expert, or under a bias the one whose two best are better together."""
    router = Router(replace(MODEL, expert_groups=2, groups_per_token=1), 0.0, device=CPU, dtype=torch.float32)
    scores = torch.tensor([[[0.5, 0.1, 0.4, 0.35]]])
    assert sorted(router._selected(scores).flatten().tolist()) == [0, 1]
    spec = replace(MODEL, expert_groups=2, groups_per_token=1, selection_bias=True)
    router = Router(spec, 0.0, device=CPU, dtype=torch.float32)
    assert sorted(router._selected(scores).flatten().tolist()) == [2, 3]


def test_a_loss_over_the_global_batch_takes_the_load_of_the_step_before() -> None:
    spec = replace(MODEL, router_aux="global_batch", router_aux_coef=0.5, router_z_coef=0.0)
    router = Router(spec, 2.0, device=CPU, dtype=torch.float64)
    hidden = torch.randn(3, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    shares = router.gate(hidden).softmax(-1).mean(1).sum(0)
    assert router(hidden).aux_loss.item() == pytest.approx(2.0 * 0.5 * shares.sum().item())  # even before the first
    router.after_step(torch.tensor([4, 0, 2, 2]))
    load = torch.tensor([2.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    assert router(hidden).aux_loss.item() == pytest.approx((load * shares).sum().item())


def test_the_z_loss_is_the_squared_log_of_the_sum_of_exponentials() -> None:
    router = Router(replace(MODEL, router_aux_coef=0.0, router_z_coef=0.1), 0.25, device=CPU, dtype=torch.float64)
    hidden = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = 0.25 * 0.1 * router.gate(hidden).exp().sum(-1).log().square().mean(1).sum()
    torch.testing.assert_close(router(hidden).aux_loss, expected.detach())


def test_recomputed_layers_count_what_they_route_once() -> None:
    stages = [whole_model(MODEL, 8, recompute) for recompute in ("none", "full")]
    tokens = torch.randint(0, MODEL.vocab, (2, 8), generator=torch.Generator().manual_seed(0))
    counted = []
    for built in stages:
        initialise(built, [range(4)] * 2, layers=2, seed=0)
        built(tokens).sum().backward()
        counted.append([layer.routed for layer in built.moe_layers().values()])
    assert all(len(routed) == 1 for of_stage in counted for routed in of_stage)
    assert all(torch.equal(one[0], other[0]) for one, other in zip(*counted, strict=True))
