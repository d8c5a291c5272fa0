"""Orders without tables: every place once, shares met at every moment, and the same on every machine."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.tokens.order import MOST_PARTS, Mix, Permutation


@given(size=st.integers(1, 300), key=st.tuples(st.integers(0, 2**40), st.integers(0, 9)))
def test_every_place_is_visited_once(size: int, key: tuple[int, ...]) -> None:
    order = Permutation(size, key)
    assert sorted(order[position] for position in range(size)) == list(range(size))


def test_a_large_permutation_needs_no_table() -> None:
    size = 10**12
    order = Permutation(size, (0,))
    found = [order[position] for position in range(0, size, size // 100)]
    assert len(set(found)) == len(found) and all(0 <= each < size for each in found)
    assert 0.3 * size < sum(found) / len(found) < 0.7 * size
    for outside in (-1, size):
        with pytest.raises(IndexError):
            order[outside]


def test_the_order_never_changes() -> None:
    """A run that goes on on another machine, or with another numpy, reads what the first would have."""
    assert [Permutation(10, (0, 0, 0))[position] for position in range(10)] == PINNED
    assert [Permutation(10**9, (7, 1, 3))[position] for position in range(3)] == PINNED_LARGE


PINNED = [2, 3, 9, 4, 8, 5, 0, 6, 1, 7]
PINNED_LARGE = [141715828, 652113070, 556528184]


def test_keys_give_different_orders() -> None:
    keys = [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)]
    orders = {tuple(Permutation(50, key)[position] for position in range(50)) for key in keys}
    assert len(orders) == len(keys)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_small_orders_are_drawn_evenly(size: int) -> None:
    """Where 0 goes to, over many keys: each place about as often."""
    draws = 2000
    found = Counter(Permutation(size, (key,))[0] for key in range(draws))
    assert set(found) == set(range(size))
    assert all(abs(count - draws / size) < 5 * (draws / size) ** 0.5 for count in found.values())


@given(weights=st.lists(st.integers(1, 200), min_size=1, max_size=6))
def test_a_source_is_never_one_sample_from_its_share(weights: list[int]) -> None:
    mix, total = Mix([float(weight) for weight in weights]), sum(weights)
    given_so_far = [0] * len(weights)
    for sample in range(2 * mix.period):
        source, number = mix[sample]
        assert number == given_so_far[source], "a source's own samples come in order, none left out"
        given_so_far[source] += 1
        for weight, count in zip(weights, given_so_far, strict=True):
            assert abs(count - weight * (sample + 1) / total) < 1
    assert given_so_far == [2 * mix.period * weight // total for weight in weights]


@pytest.mark.parametrize(
    ("weights", "parts"),
    [
        ([1.0], [1]),
        ([0.7, 0.3], [7, 3]),
        ([0.1, 0.2, 0.3], [1, 2, 3]),
        ([1.0, 1.0, 1.0], [1, 1, 1]),
        ([0.05, 0.95], [1, 19]),
        ([3.0, 0.5], [6, 1]),
    ],
)
def test_decimal_weights_are_met_exactly(weights: list[float], parts: list[int]) -> None:
    assert Mix(weights).parts == parts


@pytest.mark.parametrize("weights", [[0.123456789, 0.876543211], [1e-9, 1.0], [0.333333, 0.333334, 0.333333]])
def test_other_weights_are_rounded_to_parts_and_none_is_lost(weights: list[float]) -> None:
    parts = Mix(weights).parts
    assert min(parts) >= 1 and MOST_PARTS <= sum(parts) <= MOST_PARTS + len(parts)
    for part, weight in zip(parts, weights, strict=True):
        assert abs(part / sum(parts) - weight / sum(weights)) <= 1 / MOST_PARTS
