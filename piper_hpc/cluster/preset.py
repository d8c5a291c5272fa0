"""A ClusterSpec from a file of conf/cluster without Hydra: for published runs and benchmarks of the planner."""

from __future__ import annotations

from functools import lru_cache
from typing import cast

from omegaconf import OmegaConf

from piper_hpc.cluster import data_sheet
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.paths import data_folder
from piper_hpc.spec import DATA_SHEET, Accelerator, Calibration, ClusterSpec


@lru_cache(maxsize=256)
def config(name: str) -> ClusterConfig:
    """The preset `name`, typed; its nodes are those of the file."""
    file = data_folder("conf") / "cluster" / f"{name}.yaml"
    merged = OmegaConf.merge(OmegaConf.structured(ClusterConfig), OmegaConf.load(file))
    return cast(ClusterConfig, OmegaConf.to_object(merged))


def cluster(name: str, ranks: int, accelerator: Accelerator) -> ClusterSpec:
    """As many hosts of the preset `name` as hold `ranks`, of this device; a smaller job has part of one host.

    Nothing of it was measured: its calibration is empty, and prices come from the accelerator.
    """
    preset = config(name)
    nodes = -(-ranks // preset.ranks_per_node)
    return ClusterSpec(
        name=name,
        nodes=nodes,
        ranks_per_node=preset.ranks_per_node,
        rack_of_node=(0,) * nodes,
        memory_bytes=accelerator.memory_bytes,
        calibration=Calibration(DATA_SHEET, "", accelerator.peak_flops["bfloat16"]),
        topology=data_sheet.topology_of(preset),
        links=data_sheet.links_of(preset),
        accelerator=accelerator,
    )
