"""Every algorithm against flat on any machine and any routing, many ranks in one process."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from piper_hpc.comm.hierarchy import Hierarchy, Places
from piper_hpc.spec import ALGORITHMS, ExpertPlacement
from tests.comm.lockstep import Switchboard, dispatcher
from tests.comm.test_hierarchy import RACKS, machine, with_cards
from tests.full import full

HIDDEN = 4
DEDUP = tuple(name for name, algorithm in ALGORITHMS.items() if algorithm.dedup)
PLAIN = tuple(name for name in ALGORITHMS if name not in ("flat", *DEDUP))
VARIANTS = [(1, "none"), (2, "own_first"), (4, "far_first")]


@dataclass(frozen=True)
class Problem:
    """What every rank routes: expert_ids, tokens, weights and slopes of the loss by rank, and where experts are."""

    placement: ExpertPlacement
    expert_ids: list[torch.Tensor]
    tokens: list[torch.Tensor]
    weights: list[torch.Tensor]
    slopes: list[torch.Tensor]


@dataclass(frozen=True)
class Outcome:
    """What one rank saw: rows and their ends, the combined tokens, and the gradients of tokens and weights."""

    rows: torch.Tensor
    offsets: torch.Tensor
    combined: torch.Tensor
    token_gradient: torch.Tensor
    weight_gradient: torch.Tensor


def problem(places: Places, *, slots: int, top_k: int, load: str, dtype: torch.dtype, seed: int) -> Problem:
    """A routing of up to 9 tokens a rank. Loads: even; hot (all choose the same experts, of one rank where it has
    enough); idle (half of the ranks have no tokens); limited (a token chooses experts of one node alone where that has
    enough)."""
    generator = torch.Generator().manual_seed(seed)
    experts = slots * places.ranks
    shuffled = torch.randperm(experts, generator=generator).tolist()
    placement = ExpertPlacement(3, tuple(at // slots for at in shuffled), tuple(at % slots for at in shuffled))
    ids, tokens, weights, slopes = [], [], [], []
    for rank in range(places.ranks):
        count = int(torch.randint(0, 10, (), generator=generator))
        count = 0 if load == "idle" and rank % 2 else count
        chosen = [torch.randperm(experts, generator=generator) for _ in range(count)]
        if load in ("hot", "limited"):
            home = [places.node_of_rank[owner] for owner in placement.rank_of_expert]
            for token, order in enumerate(chosen):
                node = home[0] if load == "hot" else home[int(order[0])]
                near = [expert for expert in order.tolist() if home[expert] == node]
                near = sorted(near) if load == "hot" else near
                chosen[token] = torch.tensor(near + [expert for expert in order.tolist() if home[expert] != node])
        ids.append(torch.stack(chosen)[:, :top_k] if chosen else torch.zeros(0, top_k, dtype=torch.int64))
        tokens.append(torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64).to(dtype))
        weights.append(torch.rand(count, top_k, generator=generator, dtype=torch.float64).to(dtype))
        slopes.append(torch.randn(count, HIDDEN, generator=generator, dtype=torch.float64).to(dtype))
    return Problem(placement, ids, tokens, weights, slopes)


def solve(
    algorithm: str, places: Places, given: Problem, board: Switchboard | None = None, **options: Any
) -> list[Outcome]:
    """Dispatch, experts that scale by their id, combine, and the backward of a loss that weighs every value."""
    board, hierarchy = Switchboard(places.ranks), Hierarchy(algorithm, places)

    def rank_outcome(rank: int) -> Outcome:
        mine = dispatcher(board, algorithm, places, rank, hierarchy, **options)
        tokens, weights = given.tokens[rank].clone().requires_grad_(), given.weights[rank].clone().requires_grad_()
        begun, handle = mine.dispatch(tokens, given.expert_ids[rank], weights, given.placement)
        rows = handle.rows(begun)
        sizes = torch.diff(handle.offsets, prepend=torch.zeros(1, dtype=torch.int32)).long()
        scale = torch.tensor([1.0 + expert / 8 for expert in given.placement.experts_of(rank)], dtype=rows.dtype)
        combined = mine.combine(rows * scale.repeat_interleave(sizes)[:, None], handle)
        (combined * given.slopes[rank]).sum().backward()
        assert tokens.grad is not None and weights.grad is not None
        return Outcome(rows.detach(), handle.offsets, combined.detach(), tokens.grad, weights.grad)

    return board.run(rank_outcome)


@settings(max_examples=20, deadline=None)
@given(
    racks=RACKS,
    slots=st.integers(1, 3),
    top_k=st.integers(1, 5),
    load=st.sampled_from(["even", "hot", "idle", "limited"]),
    seed=st.integers(0, 10**6),
)
def test_padding_adds_rows_of_zeros_alone(racks: list[list[int]], slots: int, top_k: int, load: str, seed: int) -> None:
    """Every expert gets blocks of one length, that of the largest; sums and gradients are flat's bit for bit."""
    places = machine(racks)
    given = problem(
        places, slots=slots, top_k=min(top_k, slots * places.ranks), load=load, dtype=torch.float32, seed=seed
    )
    padded, flat = (solve(name, places, given) for name in ("flat_padded", "flat"))
    equal_results(padded, flat)
    largest = max(int(torch.bincount(ids.reshape(-1), minlength=1).max()) for ids in given.expert_ids)
    for mine, theirs in zip(padded, flat, strict=True):
        assert mine.offsets.tolist() == [places.ranks * largest * (slot + 1) for slot in range(slots)]
        assert torch.equal(mine.rows[mine.rows.any(1)], theirs.rows)


def equal_rows(found: list[Outcome], expected: list[Outcome]) -> None:
    """The same rows in the same order, bit for bit."""
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.rows, theirs.rows) and torch.equal(mine.offsets, theirs.offsets)


def equal_results(found: list[Outcome], expected: list[Outcome]) -> None:
    """The same sums and gradients, bit for bit."""
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine.combined, theirs.combined)
        assert torch.equal(mine.token_gradient, theirs.token_gradient)
        assert torch.equal(mine.weight_gradient, theirs.weight_gradient)


def close_results(found: list[Outcome], expected: list[Outcome], tolerance: float) -> None:
    """The same sums and gradients within `tolerance` of their norm over all ranks."""
    for name in ("combined", "token_gradient", "weight_gradient"):
        got, want = (torch.cat([getattr(each, name) for each in ranks]).double() for ranks in (found, expected))
        assert float((got - want).norm()) <= tolerance * float(want.norm()), name


@settings(max_examples=25, deadline=None)
@given(
    racks=RACKS,
    algorithm=st.sampled_from(PLAIN + DEDUP),
    variant=st.sampled_from(VARIANTS),
    slots=st.integers(1, 3),
    top_k=st.integers(1, 5),
    load=st.sampled_from(["even", "hot", "idle", "limited"]),
    cards=st.integers(0, 3),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    seed=st.integers(0, 10**6),
)
def test_every_algorithm_does_what_flat_does(
    racks: list[list[int]],
    algorithm: str,
    variant: tuple[int, str],
    slots: int,
    top_k: int,
    load: str,
    cards: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Without pre-reduction bit for bit in everything; with it rows bit for bit and sums within rounding."""
    places = with_cards(machine(racks), cards, seed)
    given = problem(
        places, slots=slots, top_k=min(top_k, slots * places.ranks), load=load, dtype=dtype, seed=seed
    )  # fmt: skip
    expected = solve("flat", places, given)
    found = solve(algorithm, places, given, chunks=variant[0], overlap=variant[1])
    equal_rows(found, expected)
    if algorithm in PLAIN:
        equal_results(found, expected)
    else:
        close_results(found, expected, {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 2e-2}[dtype])


@cache
def large(racks: tuple[tuple[int, ...], ...]) -> tuple[Places, Problem, list[Outcome]]:
    """A large machine, a problem on it, and what flat makes of it."""
    places = machine([list(nodes) for nodes in racks])
    given = problem(places, slots=1, top_k=6, load="even", dtype=torch.float32, seed=1)
    return places, given, solve("flat", places, given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("algorithm", "racks"),
    [
        pytest.param("halo", ((8,) * 8,), marks=full),
        pytest.param("flat_dedup", ((8,) * 8,), marks=full),
        ("halo_dedup", ((8,) * 8,)),
        ("halo3_dedup", ((8,) * 4,) * 3),
    ],
    ids=["halo-64", "flat_dedup-64", "halo_dedup-64", "halo3_dedup-96"],
)
def test_large_worlds(algorithm: str, racks: tuple[tuple[int, ...], ...]) -> None:
    """8 nodes of 8 ranks, and 96 ranks in three racks."""
    places, given, expected = large(racks)
    found = solve(algorithm, places, given)
    equal_rows(found, expected)
    (equal_results if algorithm in PLAIN else lambda a, b: close_results(a, b, 1e-6))(found, expected)


def in_stated_order(algorithm: str, places: Places, given: Problem, rank: int, terms: torch.Tensor) -> torch.Tensor:
    """Sums by token of `terms` [tokens, top_k, hidden], by definition: within a node (of `flat_dedup`: a rank) by
    logical expert, those sums by node within a rack (of `halo3_dedup`), those by rack, and the own node's
    before them all. Every sum is taken in float32 and rounded to the rows' dtype where it leaves its node or rack."""
    placement, dtype = given.placement, given.tokens[rank].dtype
    node = range(places.ranks) if algorithm == "flat_dedup" else places.node_of_rank
    rack = places.rack_of_rank if algorithm == "halo3_dedup" else node
    results = []
    for token, chosen in enumerate(given.expert_ids[rank].tolist()):
        own, far = torch.zeros(HIDDEN), torch.zeros(HIDDEN)
        of_nodes: dict[tuple[int, int], torch.Tensor] = {}
        for choice in sorted(range(len(chosen)), key=chosen.__getitem__):
            owner = placement.rank_of_expert[chosen[choice]]
            if node[owner] == node[rank]:
                own = own + terms[token, choice].float()
            else:
                at = rack[owner], node[owner]
                of_nodes[at] = of_nodes.get(at, torch.zeros(HIDDEN)) + terms[token, choice].float()
        for one in sorted({at for at, _ in of_nodes}):
            of_rack = torch.zeros(HIDDEN)
            for at in sorted(of_nodes):
                of_rack = of_rack + of_nodes[at].to(dtype).float() if at[0] == one else of_rack
            far = far + of_rack.to(dtype).float()
        results.append((own + far).to(dtype))
    return torch.stack(results) if results else given.tokens[rank]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("algorithm", "racks"),
    [
        ("flat_dedup", [[3, 2, 3]]),
        ("halo_dedup", [[3, 2, 3]]),
        ("halo_dedup", [[2, 2], [2, 2]]),
        ("halo3_dedup", [[2, 1], [2, 2], [1, 2]]),
    ],
    ids=["flat_dedup-323", "halo_dedup-323", "halo_dedup-22-22", "halo3_dedup-21-22-12"],
)
def test_pre_reduced_sums_are_taken_in_the_stated_order(
    algorithm: str, racks: list[list[int]], dtype: torch.dtype
) -> None:
    """Of combine, and of the backward of dispatch, bit for bit; with weights that are powers of two: their products are
    exact, so only the order of sums tells."""
    places = machine(racks)
    given = problem(places, slots=2, top_k=8, load="even", dtype=dtype, seed=4)
    given = replace(given, weights=[torch.exp2(torch.floor(4 * each.float())).to(dtype) for each in given.weights])
    flat, found = solve("flat", places, given), solve(algorithm, places, given, chunks=2)
    for rank, outcome in enumerate(found):
        scale = (1.0 + given.expert_ids[rank] / 8).to(dtype).unsqueeze(-1)
        weights = given.weights[rank].unsqueeze(-1)
        outputs = (given.tokens[rank].unsqueeze(1) * scale).float() * weights.float()
        gradients = given.slopes[rank].unsqueeze(1) * weights * scale
        assert torch.equal(outcome.combined, in_stated_order(algorithm, places, given, rank, outputs))
        assert torch.equal(outcome.token_gradient, in_stated_order(algorithm, places, given, rank, gradients))
    for name in ("combined", "token_gradient"):
        pairs = zip(flat, found, strict=True)
        assert any(not torch.equal(getattr(a, name), getattr(b, name)) for a, b in pairs), "order must matter"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("algorithm", PLAIN + DEDUP)
def test_no_placement_inside_a_domain_changes_a_bit(algorithm: str, dtype: torch.dtype) -> None:
    """Without deduplication of all ranks, with it of a domain's: a node's, or a rank's of `flat_dedup`."""
    places = machine([[2, 2], [1, 3]])
    given = problem(places, slots=2, top_k=5, load="even", dtype=dtype, seed=7)
    domains = [range(places.ranks)] if algorithm in PLAIN else domains_of(algorithm, places)
    moved = list(zip(given.placement.rank_of_expert, given.placement.slot_of_expert, strict=True))
    for domain in domains:
        held = [expert for expert, (rank, _) in enumerate(moved) if rank in domain]
        for expert, place in zip(held, [moved[expert] for expert in (*held[1:], held[0])], strict=True):
            moved[expert] = place
    other = replace(given, placement=ExpertPlacement(4, *map(tuple, zip(*moved, strict=True))))
    assert other.placement.rank_of_expert != given.placement.rank_of_expert or algorithm == "flat_dedup"
    equal_results(solve(algorithm, places, other, chunks=2), solve(algorithm, places, given, chunks=2))


def domains_of(algorithm: str, places: Places) -> list[list[int]]:
    """The ranks among which a deduplicated algorithm sums before anything leaves them."""
    if algorithm == "flat_dedup":
        return [[rank] for rank in range(places.ranks)]
    nodes = sorted(set(places.node_of_rank))
    return [[rank for rank in range(places.ranks) if places.node_of_rank[rank] == node] for node in nodes]


@pytest.mark.parametrize("algorithm", ["halo", "halo3", "flat_dedup", "halo_dedup", "halo3_dedup"])
def test_a_plan_is_used_again_without_counts(algorithm: str) -> None:
    """Forward again with the plan, and backward: the calls that a plan makes are made once."""
    places = machine([[2, 2], [2, 2]])
    given = problem(places, slots=1, top_k=3, load="even", dtype=torch.float32, seed=2)
    board, hierarchy = Switchboard(places.ranks), Hierarchy(algorithm, places)

    def again(rank: int) -> list[int]:
        mine = dispatcher(board, algorithm, places, rank, hierarchy, chunks=1)
        calls, seen = board.calls[rank], [0]
        plan = mine.plan(given.expert_ids[rank], given.placement)
        seen.append(len(calls))
        outputs = []
        for _ in range(2):
            tokens, weights = given.tokens[rank].clone().requires_grad_(), given.weights[rank].clone().requires_grad_()
            begun, handle = mine.dispatch(tokens, given.expert_ids[rank], weights, given.placement, plan)
            rows = handle.rows(begun)
            combined = mine.combine(rows, handle)
            seen.append(len(calls))
            combined.sum().backward()
            seen.append(len(calls))
            outputs.append(combined)
        assert torch.equal(outputs[0], outputs[1])
        with pytest.raises(ValueError, match="a plan for placement 3 was given with placement 4"):
            moved = ExpertPlacement(4, given.placement.rank_of_expert, given.placement.slot_of_expert)
            mine.dispatch(tokens, given.expert_ids[rank], weights, moved, plan)
        return [after - before for before, after in pairwise(seen)]

    levels = hierarchy.depth
    # Rows: one all-to-all a level and the own node's, there and back; weights: one a level but the last; each way the
    # same.
    rows, weights = 2 * (levels + 1), (levels - 1) * ALGORITHMS[algorithm].dedup
    for planning, *travels in board.run(again):
        assert travels == [rows + weights] * 4
        assert planning == {"halo": 2, "halo3": 3, "flat_dedup": 3, "halo_dedup": 3, "halo3_dedup": 6}[algorithm]


def test_missing_weights_gradient_would_show() -> None:
    """The comparison can fail: one weight's gradient off by 1e-5."""
    places = machine([[2, 2]])
    given = problem(places, slots=1, top_k=2, load="even", dtype=torch.float64, seed=3)
    outcomes = solve("halo_dedup", places, given)
    first = outcomes[0]
    wrong = first.weight_gradient * (1 + 1e-5)
    spoiled = [Outcome(first.rows, first.offsets, first.combined, first.token_gradient, wrong), *outcomes[1:]]
    with pytest.raises(AssertionError, match="weight_gradient"):
        close_results(spoiled, outcomes, 1e-6)
