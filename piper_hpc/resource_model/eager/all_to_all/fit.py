"""The constants of the all-to-all model from measured cells, and its errors in cells that they were not fitted to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from piper_hpc.resource_model.eager.all_to_all.cost_terms import CostTerms, cost_terms
from piper_hpc.resource_model.eager.all_to_all.model import AllToAllModel
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.spec import MeasuredAllToAll

Array = npt.NDArray[np.float64]

FITTED = (
    *("call_s", "exchange_s", "message_s", "plan_s"),
    *("node_s_per_byte", "rack_s_per_byte", "system_s_per_byte", "copy_s_per_byte", "serial", "beside"),
)
"""The constants, in the order of the fit."""

LEAST_ROWS = 2 * len(FITTED)
"""Fewer rows say too little of so many constants."""

LEAN = 0.02
"""Weight of a constant's distance, in powers of e, from where the fit began, against one row's relative error: it
decides only what the rows leave open, such as the rate of a link that nothing crossed."""

OUTLIER = 0.1
"""Relative error from which a row pulls the fit with its sign alone (soft L1)."""


@dataclass(frozen=True)
class Judgement:
    """Predictions of measured cells. errors: predicted over measured minus 1, by row; mean, median, worst: of their
    absolute values; bias: their mean."""

    errors: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Mean absolute error, as a ratio."""
        return float(np.abs(self.errors).mean())

    @property
    def median(self) -> float:
        """Median absolute error, as a ratio."""
        return float(np.median(np.abs(self.errors)))

    @property
    def worst(self) -> float:
        """Largest absolute error, as a ratio."""
        return float(np.abs(self.errors).max())

    @property
    def bias(self) -> float:
        """Mean error, as a ratio: above 0 where predictions are too long."""
        return float(np.mean(self.errors))


def judge(model: AllToAllModel, rows: Sequence[MeasuredAllToAll]) -> Judgement:
    """Compare predictions with `rows`, which should be none of those that the model was fitted to."""
    predicted = model.seconds_of(_terms(rows))
    return Judgement(tuple((predicted / np.array([row.seconds for row in rows]) - 1).tolist()))


@lru_cache(maxsize=32)
def _fit(rows: tuple[MeasuredAllToAll, ...]) -> AllToAllModel:
    from scipy.optimize import least_squares

    terms, measured = _terms(rows), np.array([row.seconds for row in rows])

    def residuals(at: Array, start: Array) -> Array:
        predicted = AllToAllModel(**_constants(_values(at, start))).seconds_of(terms)
        return np.concatenate([np.log(predicted / measured), LEAN * at])

    found = []
    for start in _starts(terms, measured):
        bounds = (np.full(len(FITTED), -12.0), _ceilings(start))
        solved = least_squares(
            residuals, np.zeros(len(FITTED)), args=(start,), loss="soft_l1", f_scale=OUTLIER, bounds=bounds
        )
        found.append((solved.cost, start, solved))
    _, start, solved = min(found, key=lambda each: each[0])
    values = _values(solved.x, start)
    errors = solved.fun[: len(rows)]
    # The covariance of the logarithms, from the curvature at the solution (the lean included).
    variance = float(errors @ errors) / max(len(rows) - len(FITTED), 1)
    widths = 1.645 * np.sqrt(variance * np.diag(np.linalg.pinv(solved.jac.T @ solved.jac)))
    ends = zip(FITTED, _values(solved.x - widths, start), _values(solved.x + widths, start), strict=True)
    return AllToAllModel(
        **_constants(values),
        spread=float(np.expm1(1.645 * np.sqrt(variance))),
        source=f"{len(rows)} measured exchanges of {_listed(rows)}",
        measured=True,
        intervals={name: (float(low), float(high)) for name, low, high in ends},
    )


def fit_all_to_all_model(rows: Sequence[MeasuredAllToAll]) -> AllToAllModel:
    """Fit all constants to `rows` at once, in relative error, each of them above 0; the same rows are fitted once.

    Rows should be of one machine with all its ranks at work. What they leave open (a link that nothing crossed, the
    cost of a message where all groups are of one size) stays near its start. Raises ResourceModelError for fewer than
    LEAST_ROWS rows.
    """
    if len(rows) < LEAST_ROWS:
        raise ResourceModelError(
            f"all-to-all model: {len(rows)} measured exchanges are too few for {len(FITTED)} constants; measure at "
            f"least {LEAST_ROWS}"
        )
    return _fit(tuple(rows))


def _terms(rows: Sequence[MeasuredAllToAll]) -> CostTerms:
    return CostTerms.stack([cost_terms(row.algorithm, row, row.chunks) for row in rows])


def _constants(values: Array) -> Mapping[str, Any]:
    """Values in the order of FITTED by name."""
    return dict(zip(FITTED, values.tolist(), strict=True))


def _values(at: Array, start: Array) -> Array:
    """Constants at logarithms `at` over `start`; p of the sum counts from 1."""
    values = start * np.exp(at)
    values[-1] += 1
    return values


def _ceilings(start: Array) -> Array:
    """serial is a share; p beyond 8 is a maximum."""
    ceilings = np.full(len(FITTED), 12.0)
    ceilings[-2:] = np.log(np.array([1.0, 7.0]) / start[-2:])
    return np.maximum(ceilings, 1e-9)


def _starts(terms: CostTerms, measured: Array) -> list[Array]:
    """Constants from which fits begin, each in the order of FITTED: the fixed part from the quickest row; the slowest
    row's bytes bound by one link or by all.

    A link that nothing waits for has no slope, so that every fit stays near the links that it began with.
    """
    fixed = measured.min()
    per_collective = fixed / 2 / max(float(np.asarray(terms.collectives)[measured.argmin()]), 1.0)
    slow = measured.argmax()
    loads = terms.hops[slow].sum(axis=0)
    full = np.where(loads > 0, measured[slow] / 2 / np.maximum(loads, 1.0), 0.0)
    full = np.where(loads > 0, full, full.max())
    away = np.arange(len(full)) > 0
    rates_of_starts = [full * np.where(away, 1.0, 0.2)]
    rates_of_starts += [full * np.where(np.arange(len(full)) == link, 1.0, 0.2) for link in range(len(full))]
    return [
        np.array([fixed / 2, per_collective, per_collective / 10, fixed / 2, *rates, rates.min() / 10, 0.5, 1.0])
        for rates in rates_of_starts
    ]


def _listed(rows: Sequence[MeasuredAllToAll]) -> str:
    shapes = sorted({(row.ranks, row.nodes, row.racks) for row in rows})
    return ", ".join(f"{ranks} ranks on {nodes} nodes in {racks} racks" for ranks, nodes, racks in shapes)
