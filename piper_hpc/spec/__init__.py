"""Plain frozen facts with units: model, cluster, layout, and what is predicted. Torch-free."""

from piper_hpc.spec.accelerator import Accelerator, Efficiency
from piper_hpc.spec.all_to_all import (
    ALGORITHMS,
    ALL_TO_ALLS_PER_STEP,
    AUTO,
    CHUNKS,
    DISPATCH_COMBINE,
    FLAT,
    INDEX_BYTES,
    LEVELS,
    METADATA_BYTES,
    OVERLAP,
    OVERLAPS,
    WEIGHT_BYTES,
    Algorithm,
    AllToAllCell,
    AllToAllConfig,
    MeasuredAllToAll,
    Overlap,
    get_algorithm,
    reach_probability,
)
from piper_hpc.spec.cluster import (
    BENCHMARK_VERSION,
    DATA_SHEET,
    TIERS,
    Calibration,
    ClusterSpec,
    Curve,
    Link,
    Tier,
    Topology,
)
from piper_hpc.spec.execution import EXECUTIONS, Execution
from piper_hpc.spec.expert_placement import ExpertPlacement
from piper_hpc.spec.fits import Estimate, Fit
from piper_hpc.spec.layout import Degrees, Layout, RankMap, RankPlace
from piper_hpc.spec.model import LayerParameters, ModelSpec
from piper_hpc.spec.prediction import TERMS, Prediction
from piper_hpc.spec.problem import Problem, SpecError
from piper_hpc.spec.recompute import Recompute
from piper_hpc.spec.workload import RECIPES, TRAINED, Recipe, Routing, Workload

__all__ = [
    "ALGORITHMS",
    "ALL_TO_ALLS_PER_STEP",
    "AUTO",
    "BENCHMARK_VERSION",
    "CHUNKS",
    "DATA_SHEET",
    "DISPATCH_COMBINE",
    "EXECUTIONS",
    "FLAT",
    "INDEX_BYTES",
    "LEVELS",
    "METADATA_BYTES",
    "OVERLAP",
    "OVERLAPS",
    "RECIPES",
    "TERMS",
    "TIERS",
    "TRAINED",
    "WEIGHT_BYTES",
    "Accelerator",
    "Algorithm",
    "AllToAllCell",
    "AllToAllConfig",
    "Calibration",
    "ClusterSpec",
    "Curve",
    "Degrees",
    "Efficiency",
    "Estimate",
    "Execution",
    "ExpertPlacement",
    "Fit",
    "LayerParameters",
    "Layout",
    "Link",
    "MeasuredAllToAll",
    "ModelSpec",
    "Overlap",
    "Prediction",
    "Problem",
    "RankMap",
    "RankPlace",
    "Recipe",
    "Recompute",
    "Routing",
    "SpecError",
    "Tier",
    "Topology",
    "Workload",
    "get_algorithm",
    "reach_probability",
]
