"""The paper Piper (arXiv 2605.05049): its cases of arithmetic, and equations that have no printed figure."""

from __future__ import annotations

import pytest

from analysis.validation.exact import Case, cases
from piper_hpc.resource_model.paper import paper_all_to_all_s, paper_fits, paper_layout_holds, paper_mfu
from tests.presets import preset

CASES = cases()


@pytest.mark.parametrize("case", CASES, ids=[f"{case.id} {case.what}" for case in CASES])
def test_what_arithmetic_decides(case: Case) -> None:
    assert case.given == pytest.approx(case.expected, rel=0, abs=case.within)
    assert case.holds


def test_every_case_of_the_paper_is_there() -> None:
    assert {case.id for case in CASES} == {*(f"A{number}" for number in range(1, 14)), "pin"}
    # Only what is printed rounded may be off, and by no more than FLOP figures are.
    assert all(case.within <= 2e-3 * case.expected * (1 + 1e-9) for case in CASES)
    assert all(isinstance(case.given, int) for case in CASES if case.within == 0)


def test_all_to_all_bound_of_equation_6() -> None:
    # 4 b s k d / (EP B_NIC) = 4 * 32 * 4096 * 2 * 4096 / (8 * 25e9)
    assert paper_all_to_all_s(preset("mixtral_8x7b"), 32, 4096, 8, 25e9) == pytest.approx(0.021474836480)


def test_mfu_of_equation_12_gives_no_credit_for_overlap() -> None:
    # 6 s of compute and 2 s of exchange at a bubble of 20 %: a step of 10 s
    assert paper_mfu(4e15, 1e14, 8, compute_s=6.0, exchange_s=2.0, bubble=0.2) == pytest.approx(4e15 / (1e14 * 8 * 10))


def test_conditions_of_equations_7_to_11_on_frontier() -> None:
    # 8 GPUs a node and four nodes below a switch: EP 32 is the widest that Eq 10 allows.
    model = preset("mixtral_8x7b")
    assert all(paper_layout_holds(model, pp=4, ep=8, nodes=4, gpus_per_node=8, nodes_per_switch=4).values())
    broken = paper_layout_holds(model, pp=33, ep=64, nodes=4, gpus_per_node=8, nodes_per_switch=4)
    assert not any(broken.values())
    assert paper_fits(64 * 10**9, 64 * 10**9) and not paper_fits(64 * 10**9 + 1, 64 * 10**9)
