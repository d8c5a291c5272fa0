"""Predictions of points: before they are measured, and again later, by the model as it then is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from piper_hpc.cluster import calibration as calibrations
from piper_hpc.resource_model.predict import predict
from piper_hpc.runs import RunFolder
from piper_hpc.spec import ClusterSpec
from piper_hpc.studies.own_runs.points import POINTS, Point

PREDICTED = "own_runs/predicted"
"""Operator of the rows."""
KEPT = ("step_time_s", "terms", "intervals", "peak_memory_bytes", "bubble_fraction")
COMPUTED = ("attention_s", "router_s", "expert_s", "weight_grad_s")
"""Terms in which a rank computes and waits for nobody, alike in every stage."""


def predictions(points: Iterable[Point], cluster: ClusterSpec) -> list[dict[str, Any]]:
    """A row for each point. Where ranks have a CPU quota, `layers_cpu_s` is what COMPUTED take of it: their seconds if
    waiting saved nothing, times its share."""
    rows, quota = [], cluster.calibration.quota
    unsaved = {key: value for key, value in cluster.calibration.provenance.items() if key != "cpu_share"}
    without = replace(cluster, calibration=replace(cluster.calibration, provenance=unsaved))
    for point in points:
        found = predict(point.model, cluster, point.layout, point.workload).document()
        row = {"operator": PREDICTED, "point": point.name} | {key: found[key] for key in KEPT}
        if quota is not None:
            busy = predict(point.model, without, point.layout, point.workload).terms
            row["layers_cpu_s"] = quota.share * sum(busy[term] for term in COMPUTED)
        rows.append(row)
    return rows


def predicted_again(run: RunFolder, calibration: Path) -> list[dict[str, Any]]:
    """The rows of a run, its points predicted by this calibration and the model as it is. Raises CalibrationError for
    a file that is none."""
    rows = run.measurements()
    names = {row["point"] for row in rows if row["operator"] == PREDICTED}
    ranks = run.manifest()["job"]["rank_map"]
    racks = {place["node"]: place["rack"] for place in ranks}
    cluster = ClusterSpec(
        name=run.config()["cluster"]["name"],
        nodes=len(racks),
        ranks_per_node=len(ranks) // len(racks),
        rack_of_node=tuple(racks[node] for node in sorted(racks)),
        memory_bytes=1 << 62,  # what is measured fits
        calibration=calibrations.load(calibration),
    )
    points = [point for point in POINTS if point.name in names]
    return [row for row in rows if row["operator"] != PREDICTED] + predictions(points, cluster)
