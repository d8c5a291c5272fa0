"""`parallelism.all_to_all=auto` in a run: selected on rank 0 for every expert group, and written to the record."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from piper_hpc.comm.hierarchy import Places
from piper_hpc.parallel.dispatcher import AllToAllConfigs, expert_groups
from piper_hpc.resource_model import ResourceModelError
from piper_hpc.resource_model.eager.all_to_all import Selection
from piper_hpc.resource_model.eager.curves import Curves
from piper_hpc.resource_model.eager.dispatch import select
from piper_hpc.runs.checkpoints import Sidecar
from piper_hpc.runtime.group import broadcast_from_rank0
from piper_hpc.spec import AUTO, FLAT, AllToAllCell, AllToAllConfig, Calibration, Layout
from piper_hpc.tasks.context import Context


def selected_configs(
    context: Context, calibration: Calibration | None, layout: Layout, resume_from: Path | None
) -> AllToAllConfigs | None:
    """The config of every expert group of the run, the same on all ranks; None unless the layout says auto. Collective.

    A run that goes on from a checkpoint of the same layout on nodes of the same shape keeps what was chosen then, since
    another algorithm adds up in another order. Where nothing at all is known of the cluster, flat is taken. The record
    says so.
    """
    if layout.all_to_all != AUTO:
        return None
    rank_map = context.rank_map(layout)

    def on_first_rank() -> AllToAllConfigs:
        groups = [ranks for ranks in expert_groups(rank_map) if len(ranks) > 1]
        origin = None if resume_from is None else Sidecar.read(resume_from).origin
        if origin is not None and origin.same_place(rank_map):
            why = f"as {resume_from} was trained, at this layout on nodes of this shape"
            kept = origin.configs()
            selections = {ranks: Selection(kept[ranks], why=why) for ranks in groups}
        else:
            notes = () if origin is None else (f"chosen anew: {resume_from} has another layout or shape of nodes",)
            selections = {}
            for ranks in groups:
                selection = _selection(context, calibration, layout, Places.of(rank_map, ranks))
                selections[ranks] = replace(selection, notes=(*selection.notes, *notes))
        manifest = context.run.manifest()
        record = {"all_to_all": [{"ranks": list(ranks)} | each.document() for ranks, each in selections.items()]}
        context.run.write_manifest(manifest | {"job": manifest["job"] | record})
        return {ranks: each.config for ranks, each in selections.items()}

    return broadcast_from_rank0(on_first_rank)


def _selection(context: Context, calibration: Calibration | None, layout: Layout, places: Places) -> Selection:
    flat = AllToAllConfig(FLAT.name)
    if calibration is None:
        return Selection(flat, why="nothing was measured and no data sheet is given, so that nothing can be compared")
    experiment = context.experiment
    curves = Curves(context.machine.spec(experiment.cluster, calibration), experiment.workload.bytes_per_value)
    row_bytes = float(experiment.model.hidden * experiment.workload.bytes_per_value)
    cell = AllToAllCell(
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
        return select(curves, cell, AUTO)
    except ResourceModelError as error:
        return Selection(flat, why=f"no choice: {error}")
