"""`all_to_all=auto`: the fastest of the nearest measured cells, what stands in for them, and what is said of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from piper_hpc.resource_model.eager.all_to_all import AllToAllModel, select_by_model, select_measured
from piper_hpc.spec import ALGORITHMS, AllToAllCell, AllToAllConfig, MeasuredAllToAll

KIB, MIB = 1024.0, 1024.0 * 1024
ACROSS = (8, 4, 2)


def cell(size: float, *, shape: tuple[int, int, int] = ACROSS, top_k: int = 8, imbalance: float = 1.0) -> AllToAllCell:
    return AllToAllCell(*shape, size, 2 * KIB, top_k, 64, imbalance)


def measured(algorithm: str, size: float, seconds: float, *, shape: tuple[int, int, int] = ACROSS, top_k: int = 8,
             imbalance: float = 1.0, chunks: int = 0) -> MeasuredAllToAll:  # fmt: skip
    asked = vars(cell(size, shape=shape, top_k=top_k, imbalance=imbalance))
    return MeasuredAllToAll(**asked, algorithm=algorithm, seconds=seconds, spread=0.05, chunks=chunks)


TABLE = (
    measured("flat", 16 * KIB, 0.010), measured("halo_dedup", 16 * KIB, 0.030),
    measured("flat", 4 * MIB, 0.400), measured("halo_dedup", 4 * MIB, 0.200, chunks=4),
    measured("halo_dedup", 4 * MIB, 0.180, chunks=2), measured("halo", 4 * MIB, 0.350),
    measured("flat", 4 * MIB, 0.300, top_k=1), measured("halo_dedup", 4 * MIB, 0.330, top_k=1),
)  # fmt: skip


FASTER = {"flat": 0.10, "halo_dedup": 0.105}


def ask(size: float, *, shape: tuple[int, int, int] = ACROSS, top_k: int = 8, imbalance: float = 1.0):  # type: ignore[no-untyped-def]
    return select_measured(TABLE, cell(size, shape=shape, top_k=top_k, imbalance=imbalance))


def test_size_top_k_and_chunks_decide() -> None:
    assert ask(16 * KIB).config.algorithm == "flat"
    large = ask(4 * MIB)
    assert large.config == AllToAllConfig("halo_dedup", 2)
    assert list(large.seconds) == ["halo_dedup/2", "halo_dedup/4", "halo", "flat"]
    assert ask(4 * MIB, top_k=1).config.algorithm == "flat"
    assert "4194 kB a rank, top_k 8, imbalance 1.00" in large.why and not large.notes


def test_between_two_cells_seconds_are_interpolated() -> None:
    """Of those measured in both cells: flat takes 0.01 to 0.4 s, halo_dedup 0.03 to 0.2 s."""
    table = [row for row in TABLE if row.chunks in (0, 4)]
    table = [measured(row.algorithm, row.logical_bytes, row.seconds) for row in table if row.top_k == 8]

    def at(size: float) -> str:
        found = select_measured(table, cell(size))
        assert found is not None and len(found.rests_on) == 2
        return found.config.algorithm

    # Flat grows 40-fold and halo_dedup 6.7-fold: they meet at log 3 / log 6 = 0.613 of the way, 491 KiB.
    assert [at(400 * KIB), at(600 * KIB)] == ["flat", "halo_dedup"]


def test_a_model_of_the_right_form_interpolates_without_error() -> None:
    """Latency and bytes: seconds are no line on log-log axes, but over a model with half of each they are constant."""

    def seconds(name: str, size: float) -> float:
        return {"flat": 0.01 + size / 1e7, "halo_dedup": 0.03 + size / 2.5e7}[name]

    table = [measured(name, size, seconds(name, size)) for name in ("flat", "halo_dedup") for size in (KIB, 16 * MIB)]
    for size in (8 * KIB, 256 * KIB, 320 * KIB, 4 * MIB):
        found = select_measured(
            table, cell(size), expected=lambda config, where: seconds(config.algorithm, where.logical_bytes) / 2
        )
        assert found is not None
        assert found.seconds == pytest.approx({name: seconds(name, size) for name in found.seconds})
    plain = select_measured(table, cell(256 * KIB))
    assert plain is not None and plain.seconds["flat"] != pytest.approx(seconds("flat", 256 * KIB), rel=0.2)


def test_another_group_stands_in_with_a_note_if_it_crosses_the_same_links() -> None:
    larger = ask(4 * MIB, shape=(16, 4, 2))
    assert larger.config.algorithm == "halo_dedup"
    assert larger.notes == (
        "all-to-all of groups of 16 ranks on 4 nodes in 2 racks: not measured; groups of 8 ranks on 4 nodes in 2 racks "
        "stand in",
    )
    assert ask(4 * MIB, shape=(4, 1, 1)) is None, "no cell of a group inside a node"
    assert select_measured((), cell(1e6)) is None


def test_a_stand_in_is_scaled_by_what_the_cost_model_finds_for_the_asked_group() -> None:
    """Measured on two nodes, where flat is a little faster; each node more costs flat a tenth, halo_dedup nothing."""
    pair = {name: measured(name, MIB, seconds, shape=(4, 2, 1)) for name, seconds in FASTER.items()}

    def expected(config: AllToAllConfig, where: AllToAllCell) -> float:
        return 1.0 + 0.1 * where.nodes * (config.algorithm == "flat")

    for nodes, algorithm in ((2, "flat"), (3, "halo_dedup"), (64, "halo_dedup")):
        found = select_measured(pair.values(), cell(MIB, shape=(2 * nodes, nodes, 1)), expected=expected)
        assert found is not None and found.config.algorithm == algorithm and bool(found.notes) == (nodes > 2)
    assert found.seconds["flat"] == pytest.approx(0.10 * 7.4 / 1.2)
    unscaled = select_measured(pair.values(), cell(MIB, shape=(128, 64, 1)))
    assert unscaled is not None and unscaled.config.algorithm == "flat", "without a model the ranking is taken as it is"


def test_repeats_of_a_cell_count_by_their_mean() -> None:
    """Loads of one imbalance are one cell to `auto`; whichever was measured last decides no more than the others."""
    repeats = [measured("flat", MIB, seconds) for seconds in (0.3, 0.1)]
    found = select_measured([*repeats, measured("halo_dedup", MIB, 0.15)], cell(MIB))
    assert found is not None and found.config.algorithm == "halo_dedup" and found.seconds["flat"] == pytest.approx(0.2)


def test_without_a_table_the_cost_model_decides_and_says_so() -> None:
    links = AllToAllModel(1e-3, 0.0, 1e-5, 1e-3, 1e-10, 1e-7, 1e-7, 1e-10, source="links of a made-up cluster")
    large = select_by_model(links, cell(4 * MIB))
    assert large.config.algorithm in ("halo_dedup", "halo3_dedup")
    assert "by the cost model, from links of a made-up cluster" in large.why
    assert select_by_model(links, AllToAllCell(*ACROSS, 1 * KIB, 128.0, 8, 64)).config.algorithm == "flat"
    inside = AllToAllCell(4, 1, 1, 4 * MIB, 2 * KIB, 1, 64)
    assert select_by_model(links, inside).config.algorithm == "flat", "nothing to gain in a node"


times = st.dictionaries(st.sampled_from(list(ALGORITHMS)), st.floats(1e-4, 1.0), min_size=1)
points = st.tuples(st.sampled_from([KIB, 16 * KIB, MIB]), st.sampled_from([1, 8]), st.sampled_from([1.0, 2.0, 4.0]))


@given(st.dictionaries(points, times, min_size=1), st.data())
def test_at_a_measured_cell_nothing_is_faster_than_the_choice(
    cells: dict[tuple[float, int, float], dict[str, float]], data: st.DataObject
) -> None:
    table = [
        measured(name, size, seconds, top_k=top_k, imbalance=imbalance)
        for (size, top_k, imbalance), timed in cells.items()
        for name, seconds in timed.items()
    ]
    size, top_k, imbalance = data.draw(st.sampled_from(sorted(cells)))
    found = select_measured(table, cell(size, top_k=top_k, imbalance=imbalance))
    assert found is not None
    timed = cells[size, top_k, imbalance]
    assert timed[found.config.algorithm] == min(timed.values())


@given(st.floats(1.0, 1e9), st.integers(1, 16), st.floats(1.0, 16.0))
def test_every_question_across_nodes_gets_an_answer_from_the_table(size: float, top_k: int, imbalance: float) -> None:
    found = ask(size, top_k=top_k, imbalance=imbalance)
    assert found.config.algorithm in {row.algorithm for row in TABLE} and found.why and found.rests_on
    assert found.seconds == pytest.approx(dict(sorted(found.seconds.items(), key=lambda item: item[1])))
