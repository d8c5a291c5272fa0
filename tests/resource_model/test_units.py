"""Keys of predictions and plans end in their unit; a bare name is a count, a degree or a share between 0 and 1."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from piper_hpc.planner import plan
from piper_hpc.planner.axes import Axes
from piper_hpc.resource_model import analytical
from piper_hpc.spec import Layout
from tests.resource_model.test_analytical import MEGATRON, MOE, WORKLOAD, cluster

UNITS = ("_s", "_bytes", "_per_s", "_flops", "_pct", "_per_token")
SHARES = {"mfu", "bubble_fraction", "share"}
WHOLE_OF_A_GROUP = {"memory": "bytes by stage", "intervals": "as the key that each is the interval of"}


def numbers(document: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number of a document with the key that names it."""
    if isinstance(document, dict):
        for name, value in document.items():
            if name not in WHOLE_OF_A_GROUP:
                yield from numbers(value, name)
    elif isinstance(document, (list, tuple)):
        for value in document:
            yield from numbers(value, key)
    elif isinstance(document, (int, float)) and not isinstance(document, bool):
        yield key, document


def assert_units(document: dict[str, Any]) -> None:
    for key, value in numbers(document):
        if key in SHARES or key.endswith("_share"):
            assert 0 <= value <= 1, f"{key}={value}"
        elif not key.endswith(UNITS):  # counts and degrees
            assert float(value).is_integer(), f"{key}={value} has no unit and is no count"


def test_every_fraction_of_a_prediction_says_its_unit() -> None:
    predicted = analytical.predict(MOE, cluster(32), Layout(pp=4, ep=4, dp=2), WORKLOAD, MEGATRON)
    assert_units(predicted.document())
    assert set(predicted.intervals) <= {*predicted.terms, "step_time_s", "tokens_per_s", "mfu"}


def test_every_fraction_of_a_plan_says_its_unit() -> None:
    axes = Axes.of({name: [getattr(Layout(), name)] for name in vars(Axes.shipped())} | {"ep": [4, 8], "pp": [1, 2]})
    document = plan(MOE, cluster(16), WORKLOAD, axes=axes, executor="megatron", candidates=2).document()
    assert document["candidates"]
    seconds = document.pop("seconds")  # the contract's own name for how long the search took
    assert seconds > 0
    assert_units(document)
