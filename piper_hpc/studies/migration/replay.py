"""Planners of placements on loads that are known: how even each makes ranks, and at what price. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from piper_hpc.balance.balancer import Balancer
from piper_hpc.balance.loads import hottest_expert, imbalance, least_imbalance
from piper_hpc.balance.planners import PLANNERS
from piper_hpc.cluster import data_sheet, preset
from piper_hpc.report.load import UsageError
from piper_hpc.resource_model.eager.migration import migration_prices, moved_bytes
from piper_hpc.spec import TRAINED, ClusterSpec, ExpertPlacement, Layout, ModelSpec, Workload
from piper_hpc.spec.migration import MigrationPrices, MigrationSettings
from piper_hpc.spec.routing_workloads import global_draw

Loads = npt.NDArray[np.int64]
"""Choices of each expert by step, sample and layer: [steps, samples, layers, experts]."""

STEPS, SAMPLES, LAYERS = 48, 2, 2
SEQUENCE, RECIPE = 4096, "bfloat16"
EVERY, THRESHOLD = 4, 1.1


@dataclass(frozen=True)
class Replayed:
    """One planner on one load. All loads are of the busiest rank over the mean, the mean over layers, micro-batches and
    steps.

    before: with experts in order; after: as the balancer would have moved them, from the first step on; bound: what no
    placement with equally many experts a rank has beaten in any step; hottest: the same without that condition; moves,
    bytes: of all migrations, of one replica; share: of before - bound, the part that is gained.
    """

    load: str
    planner: str
    before: float
    after: float
    bound: float
    hottest: float
    migrations: int
    experts: int
    bytes: float

    @property
    def share(self) -> float | None:
        """None where there is nothing to gain."""
        possible = self.before - self.bound
        return (self.before - self.after) / possible if possible > 0.01 else None


def made(workload: str, model: ModelSpec, ep: int, *, steps: int = STEPS, seed: int = 0) -> Loads:
    """The loads of a workload W0 to W7 in micro-batches of SEQUENCE tokens a rank; W1's hot experts stay."""
    tokens, hot_step = SEQUENCE * ep, 0 if workload == "W1" else None

    def counts(step: int, sample: int, layer: int) -> npt.NDArray[np.int64]:
        # Layers have hot experts of their own; micro-batches of a layer share them, and draw what W1 leaves open alike.
        drawn = global_draw(
            workload, experts=model.experts, top_k=model.top_k, tokens=tokens, step=step * SAMPLES + sample
            if workload == "W1" else step, seed=seed + layer, hot_step=hot_step,
        )  # fmt: skip
        return np.bincount(drawn.ravel(), minlength=model.experts)

    return np.array(
        [
            [[counts(step, sample, layer) for layer in range(LAYERS)] for sample in range(SAMPLES)]
            for step in range(steps)
        ]
    )


def prices(site: str, model: ModelSpec, ep: int) -> MigrationPrices:
    """By the data sheets of a site of conf/cluster: one micro-batch of a sequence on each rank of an expert group."""
    config = preset.config(site)
    calibration = data_sheet.calibration_of_cluster(config, RECIPE)
    if calibration is None:
        raise UsageError(f"--site {site}: its file has no data sheet to take prices from; use --site frontier")
    nodes = -(-ep // config.ranks_per_node)
    cluster = ClusterSpec(
        name=site,
        nodes=nodes,
        ranks_per_node=min(ep, config.ranks_per_node),
        rack_of_node=(0,) * nodes,
        memory_bytes=2**40,  # nothing is asked of it
        calibration=calibration,
        topology=data_sheet.topology_of(config),
    )
    workload = Workload(ep, SEQUENCE, TRAINED[RECIPE])
    return migration_prices(model, cluster, Layout(ep=ep), workload)


def replay(load: str, loads: Loads, model: ModelSpec, given: MigrationPrices) -> Iterable[Replayed]:
    """Each planner, as the balancer would have used it."""
    linear = ExpertPlacement.linear(model.experts, given.ep)
    for name in PLANNERS:
        balancer = Balancer(
            MigrationSettings(name, EVERY, THRESHOLD),
            given,
            [linear] * loads.shape[2],
            [list(range(loads.shape[2]))],
            micro_batches=loads.shape[1],
            steps=len(loads),
        )
        after, migrations, experts = [], 0, 0
        for step, counts in enumerate(loads):
            after.append(_mean(counts, [placement.rank_of_expert for placement in balancer.placements], given.ep))
            decision = balancer.after_step(step, counts)
            if decision is not None and decision.placements is not None:
                migrations, experts = migrations + 1, experts + decision.moved
        by_layer = [loads[:, :, layer].reshape(-1, model.experts) for layer in range(loads.shape[2])]
        yield Replayed(
            load,
            name,
            before=float(np.mean([_mean(each, [linear.rank_of_expert] * loads.shape[2], given.ep) for each in loads])),
            after=float(np.mean(after)),
            bound=float(np.mean([least_imbalance(counts, given.ep) for counts in by_layer])),
            hottest=float(np.mean([hottest_expert(counts, given.ep) for counts in by_layer])),
            migrations=migrations,
            experts=experts,
            bytes=experts * moved_bytes(model, TRAINED[RECIPE], copies=1, zero=0),
        )


def _mean(counts: npt.NDArray[np.int64], ranks: Sequence[Sequence[int]], ep: int) -> float:
    return float(np.mean([imbalance(counts[:, layer], np.array(of_layer), ep) for layer, of_layer in enumerate(ranks)]))
