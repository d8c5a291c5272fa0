"""`parallelism.all_to_all=auto` in a run: settled on rank 0 for every expert group, and written to the record."""

from __future__ import annotations

from piper_hpc.comm.levels import Places
from piper_hpc.parallel.exchange import Way, Ways, expert_groups
from piper_hpc.resource_model import ResourceModelError
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.dispatch import settle
from piper_hpc.resource_model.eager.exchange import Choice
from piper_hpc.runtime.group import from_first
from piper_hpc.spec import AUTO, Calibration, ExchangeCell, Layout
from piper_hpc.tasks.context import Context


def ways(context: Context, calibration: Calibration | None, layout: Layout) -> Ways | None:
    """What every expert group of the run takes, the same on all ranks; None unless the layout says auto. Collective.

    Where nothing at all is known of the cluster, flat is taken, and the record says so.
    """
    if layout.all_to_all != AUTO:
        return None
    rank_map = context.rank_map(layout)

    def settled() -> Ways:
        choices = {
            ranks: _choice(context, calibration, layout, Places.of(rank_map, ranks))
            for ranks in expert_groups(rank_map)
            if len(ranks) > 1
        }
        manifest = context.run.manifest()
        told = {"all_to_all": [{"ranks": list(ranks)} | choice.document() for ranks, choice in choices.items()]}
        context.run.write_manifest(manifest | {"job": manifest["job"] | told})
        return {ranks: Way(choice.algorithm, choice.chunks) for ranks, choice in choices.items()}

    return from_first(settled)


def _choice(context: Context, calibration: Calibration | None, layout: Layout, places: Places) -> Choice:
    if calibration is None:
        return Choice("flat", why="nothing was measured and no data sheet is given, so that nothing can be compared")
    experiment = context.experiment
    curves = Curves(context.machine.spec(experiment.cluster, calibration), experiment.workload.bytes_per_value)
    row_bytes = float(experiment.model.hidden * experiment.workload.bytes_per_value)
    cell = ExchangeCell(
        ranks=places.ranks,
        nodes=len(set(zip(places.rack_of_rank, places.node_of_rank, strict=True))),
        racks=len(set(places.rack_of_rank)),
        logical_bytes=layout.micro_batch * experiment.workload.sequence * experiment.model.top_k * row_bytes,
        row_bytes=row_bytes,
        top_k=experiment.model.top_k,
        experts=experiment.model.experts,
        imbalance=max(1.0, float(experiment.workload.routing.load(layout.ep))),
    )
    try:
        return settle(curves, cell, AUTO)
    except ResourceModelError as error:
        return Choice("flat", why=f"no choice: {error}")
