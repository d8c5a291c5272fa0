"""Decides after each step whether experts move: threshold first, then predicted gain against predicted cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from piper_hpc.balance.loads import LayerSeconds, Ranks, busiest_stage_s, imbalance, least_imbalance
from piper_hpc.balance.planners import PLANNERS
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.layout import Layout
from piper_hpc.spec.migration import AUTO, MigrationPrices, MigrationSettings
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.schedules import stage_of
from piper_hpc.spec.workload import Workload

SAMPLES = 16
"""Micro-batches of a step that are counted at most, over all replicas: what rides on the step's one reduction."""
LEAST_HELD = 0.5
"""Where a plan lost more of its gain than this leaves on the next window, loads do not last, and nothing moves."""
MOST_REST = 7
"""Windows without a look after looks in vain: 1, 3, 7, 7, ... Planning has its price too."""
REMEMBERED = 4
"""Looks at how plans held whose mean counts: loads that turn now and then look steady in between."""
PLANNED_SAMPLES = 16
"""Of a window's micro-batches, evenly spread, those that a plan is made from: planning is to cost little itself."""


def counted_samples(replicas: int, micro_batches: int) -> list[tuple[int, int]]:
    """(replica, micro-batch) of each sample, evenly spread over all of a step."""
    every = replicas * micro_batches
    taken = min(SAMPLES, every)
    return [divmod(index * every // taken, micro_batches) for index in range(taken)]


@dataclass(frozen=True)
class Decision:
    """What a look at the loads found, by the prices given; `placements` are the new ones, None where experts stay.

    imbalance, after, bound: of the worst layer's window, as it is, as planned, and the least that any placement without
    replicas can have; gain_s: seconds of a step that the plan saves on the window it was made from; held: share of such
    a gain that a window's plan kept on the next window's counts, from 0 to 1, the mean of the last looks;
    horizon_steps: steps of whole gain that are worth as much as all steps to come, of which each window keeps `held` of
    the one before; moved: experts that change their rank, over all layers; cost_s: to move them. Where nothing moves,
    all is of the plan that did not pay; where past plans did not hold, of the window before's, on this window's counts.
    """

    imbalance: float
    after: float
    bound: float
    gain_s: float
    held: float
    horizon_steps: float
    moved: int
    cost_s: float
    placements: tuple[ExpertPlacement, ...] | None

    def document(self) -> dict[str, Any]:
        """For the row of the step: all but the placements."""
        record = {name: value for name, value in vars(self).items() if name != "placements"}
        return record | {"migrated": self.placements is not None}


class Balancer:
    """Keeps the counts of two windows of steps, plans at the end of each, and says where experts go. The same on every
    rank that sees the same counts."""

    def __init__(
        self,
        settings: MigrationSettings,
        prices: MigrationPrices,
        placements: Sequence[ExpertPlacement],
        stages: Sequence[Sequence[int]],
        *,
        micro_batches: int,
        steps: int,
    ) -> None:
        """placements: by layer, where experts are; stages: layers of each pipeline rank; micro_batches: of a step;
        steps: at which training ends."""
        import scipy.optimize  # noqa: F401 - what planners solve with: here, not inside the step of the first look

        name = next(iter(PLANNERS)) if settings.planner == AUTO else settings.planner
        self.placements = tuple(placements)
        self._planner = PLANNERS[name]
        self._settings, self._prices, self._stages = settings, prices, stages
        self._seconds = LayerSeconds(prices)
        self._micro_batches, self._steps = micro_batches, steps
        self._kept: deque[float] = deque(maxlen=REMEMBERED)
        self._rest = self._resting = 0
        self._window: deque[npt.NDArray[np.int64]] = deque(maxlen=2 * settings.every)

    def is_look(self, step: int) -> bool:
        """Whether a window ends with step `step`, counted from 0."""
        return (step + 1) % self._settings.every == 0

    def after_step(self, step: int, routed: npt.NDArray[np.int64]) -> Decision | None:
        """What is decided after step `step`, counted from 0; None between looks and below the threshold.

        routed: int [samples, layers, experts]. With new placements, the caller moves the experts.
        """
        self._window.append(routed)
        every = self._settings.every
        if len(self._window) < 2 * every or not self.is_look(step):
            return None
        if self._resting:
            self._resting -= 1
            return None
        before, now = (np.concatenate(list(self._window)[part]) for part in (slice(every), slice(every, None)))
        ranks = [np.array(placement.rank_of_expert) for placement in self.placements]
        found = [imbalance(now[:, layer], ranks[layer], self._prices.ep) for layer in range(len(ranks))]
        worst = int(np.argmax(found))
        if found[worst] < self._settings.threshold:
            return None
        told = self._plan(before, ranks)
        held = self._held(before, now, ranks, told)
        horizon_steps, plan = 0.0, ranks
        if held >= LEAST_HELD:
            horizon_steps, told = horizon(held, every, self._steps - step - 1), self._plan(now, ranks)
            plan = [
                new if self._pays(now, layer, ranks[layer], new, horizon_steps) else ranks[layer]
                for layer, new in enumerate(told)
            ]
        pays = _moved(ranks, plan) > 0 and self._gain_s(now, ranks, plan) * horizon_steps > self._cost_s(ranks, plan)
        if pays:
            told = plan
            self.placements = tuple(
                placement if (old == new).all() else placement.moved(new.tolist())
                for placement, old, new in zip(self.placements, ranks, plan, strict=True)
            )
        self._rest = 0 if pays else min(2 * self._rest + 1, MOST_REST)
        self._resting = self._rest
        return Decision(
            imbalance=found[worst],
            after=imbalance(now[:, worst], told[worst], self._prices.ep),
            bound=least_imbalance(now[:, worst], self._prices.ep),
            gain_s=self._gain_s(now, ranks, told),
            held=held,
            horizon_steps=horizon_steps,
            moved=_moved(ranks, told),
            cost_s=self._cost_s(ranks, told),
            placements=self.placements if pays else None,
        )

    def _plan(self, counts: npt.NDArray[np.int64], ranks: Sequence[Ranks]) -> list[Ranks]:
        """The planner's placement of every layer above the threshold; the old one where it saves nothing."""
        plan = []
        taken = counts[np.linspace(0, len(counts) - 1, min(len(counts), PLANNED_SAMPLES)).astype(int)]
        for layer, old in enumerate(ranks):
            of_layer, new = taken[:, layer], old
            if imbalance(of_layer, old, self._prices.ep) >= self._settings.threshold:
                new = self._planner(of_layer, old, self._seconds)
            saves = self._seconds(of_layer, new) < self._seconds(of_layer, old)
            plan.append(new if saves else old)
        return plan

    def _pays(self, counts: npt.NDArray[np.int64], layer: int, old: Ranks, new: Ranks, horizon_steps: float) -> bool:
        """Whether a layer by itself, with all that its stage does beside it, is worth its moves."""
        saved_s = self._seconds(counts[:, layer], old) - self._seconds(counts[:, layer], new)
        saved_s *= self._micro_batches / len(counts)
        return saved_s * horizon_steps > busiest_moves(old, new) * self._prices.expert_s

    def _cost_s(self, ranks: Sequence[Ranks], plan: Sequence[Ranks]) -> float:
        """Seconds that the moves take: stages move theirs beside each other, the layers of one in turn."""
        by_layer = [busiest_moves(old, new) * self._prices.expert_s for old, new in zip(ranks, plan, strict=True)]
        return busiest_stage_s(by_layer, self._stages)

    def _gain_s(self, counts: npt.NDArray[np.int64], ranks: Sequence[Ranks], plan: Sequence[Ranks]) -> float:
        """Seconds of a step that `plan` saves on these counts: of the slowest stage, before and after."""
        old, new = (
            busiest_stage_s([self._seconds(counts[:, layer], one) for layer, one in enumerate(each)], self._stages)
            for each in (ranks, plan)
        )
        return (old - new) * self._micro_batches / len(counts)

    def _held(
        self,
        before: npt.NDArray[np.int64],
        now: npt.NDArray[np.int64],
        ranks: Sequence[Ranks],
        plan: Sequence[Ranks],
    ) -> float:
        """Of what `plan`, made of `before`, gains there, the share that it gains on `now`, from 0 to 1; the mean of
        this look's and the last ones' that had something to gain, 0 where none had."""
        promised_s, kept_s = (self._gain_s(counts, ranks, plan) for counts in (before, now))
        if promised_s > 0:
            self._kept.append(min(1.0, max(0.0, kept_s / promised_s)))
        return sum(self._kept) / len(self._kept) if self._kept else 0.0


def _moved(ranks: Sequence[Ranks], plan: Sequence[Ranks]) -> int:
    """Experts that change their rank, over all layers."""
    return sum(int((old != new).sum()) for old, new in zip(ranks, plan, strict=True))


def busiest_moves(old: Ranks, new: Ranks) -> int:
    """Experts that leave the rank which most leave; as many arrive there."""
    return int(np.bincount(old[old != new], minlength=1).max())


def horizon(held: float, every: int, left: int) -> float:
    """Steps of whole gain that the `left` steps to come are worth, where of a window of `every` steps the next keeps
    `held`: every * sum over windows w from 1 of held^w, the last window in part."""
    windows, rest = divmod(left, every)
    powers = held ** np.arange(1, windows + 2)
    return float(every * powers[:-1].sum() + rest * powers[-1])


@dataclass(frozen=True)
class Migration:
    """What a run has to know to let experts move."""

    settings: MigrationSettings
    prices: MigrationPrices

    def balancer(
        self,
        model: ModelSpec,
        layout: Layout,
        workload: Workload,
        steps: int,
        rank_of_expert: Sequence[Sequence[int]] = (),
    ) -> Balancer:
        """One for a run of `steps` steps. rank_of_expert: by layer, where experts begin; in order where it is empty, or
        of an expert group of another size."""
        held = layout.layers_by_stage(model.layers)
        stages = [
            [layer for chunk in range(layout.vpp) for layer in held[stage_of(layout.schedule, rank, chunk, layout.pp)]]
            for rank in range(layout.pp)
        ]
        micro_batches = layout.micro_batches(workload.global_batch)
        linear = ExpertPlacement.linear(model.experts, layout.ep)
        placements = [linear] * model.layers
        if rank_of_expert and max(rank_of_expert[0]) + 1 == layout.ep:
            placements = [linear.moved(ranks) for ranks in rank_of_expert]
        return Balancer(
            self.settings,
            self.prices,
            placements,
            stages,
            micro_batches=micro_batches,
            steps=steps,
        )
