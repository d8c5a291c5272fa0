"""Plain frozen facts with units: model, cluster, layout, and what is predicted. Torch-free."""

from piper_hpc.spec.cluster import BENCHMARK_VERSION, DATA_SHEET, Calibration, ClusterSpec, Curve, Tier
from piper_hpc.spec.layout import Layout, RankMap, RankPlace
from piper_hpc.spec.model import ModelSpec
from piper_hpc.spec.placement import Placement
from piper_hpc.spec.prediction import TERMS, Prediction, Workload

__all__ = [
    "BENCHMARK_VERSION",
    "DATA_SHEET",
    "TERMS",
    "Calibration",
    "ClusterSpec",
    "Curve",
    "Layout",
    "ModelSpec",
    "Placement",
    "Prediction",
    "RankMap",
    "RankPlace",
    "Tier",
    "Workload",
]
