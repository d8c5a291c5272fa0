"""Predictions of points: before they are measured, and again later, by the model as it then is."""

from __future__ import annotations

from collections.abc import Iterable
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


def predictions(points: Iterable[Point], cluster: ClusterSpec) -> list[dict[str, Any]]:
    """A row for each point."""
    rows = []
    for point in points:
        found = predict(point.model, cluster, point.layout, point.workload).document()
        rows.append({"operator": PREDICTED, "point": point.name} | {key: found[key] for key in KEPT})
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
