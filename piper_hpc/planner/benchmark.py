"""How fast the search is: `python -m piper_hpc.planner.benchmark [--json]`, on one core.

Two figures: complete closed-form predictions a second (every term and every stage's memory of each layout), and the
seconds of a whole plan, its simulations and its documents included. By default DeepSeek-V3 on 16,384 H100.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from piper_hpc.cluster import accelerator, preset
from piper_hpc.config.model import preset as model_preset
from piper_hpc.planner.axes import Axes
from piper_hpc.planner.engines import Megatron
from piper_hpc.planner.search import plan
from piper_hpc.planner.search_spec import SearchSpec
from piper_hpc.spec import RECIPES, ClusterSpec, ModelSpec, Workload


@dataclass(frozen=True)
class SearchTiming:
    """Combinations of the axes, layouts evaluated in full, those of them that fit; seconds of the search.

    core_s: of them, those that the core spent on it: less where others share the core.
    """

    combinations: int
    evaluated: int
    feasible: int
    search_s: float
    core_s: float

    @property
    def predictions_per_s(self) -> float:
        """Complete closed-form predictions in a second of one core."""
        return self.evaluated / self.core_s


def measure(model: ModelSpec, cluster: ClusterSpec, workload: Workload, repeats: int = 1) -> SearchTiming:
    """The search of all shipped axes in closed form, the best of `repeats`."""
    axes = Axes.shipped().of_model(model)
    spec = SearchSpec(model, cluster, workload, axes, (cluster.ranks,))
    search_s, core_s = [], []
    for _ in range(repeats):
        started, spent = time.perf_counter(), time.process_time()
        result = Megatron().search(spec)
        search_s.append(time.perf_counter() - started)
        core_s.append(time.process_time() - spent)
    return SearchTiming(axes.size, result.searched, result.feasible, min(search_s), min(core_s))


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m piper_hpc.planner.benchmark", description=__doc__)
    parser.add_argument("--model", default="deepseek_v3", help="a preset of conf/model")
    parser.add_argument("--cluster", default="dgx_h100", help="a preset of conf/cluster")
    parser.add_argument("--ranks", type=int, default=16384)
    parser.add_argument("--global-batch", type=int, default=15360, help="sequences a step")
    parser.add_argument("--sequence", type=int, default=4096, help="tokens of a sequence")
    parser.add_argument("--recipe", default="mixed_18", choices=sorted(RECIPES))
    parser.add_argument("--repeats", type=int, default=1, help="the best of so many is printed")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    device = accelerator.load_if_public(preset.config(options.cluster).accelerator)
    if device is None:
        print(
            f"error: --cluster {options.cluster}: its device's efficiency is not known; use dgx_h100", file=sys.stderr
        )
        return 2
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cluster = preset.cluster(options.cluster, options.ranks, device)
    workload = Workload(options.global_batch, options.sequence, RECIPES[options.recipe])
    model = model_preset(options.model)
    measured = measure(model, cluster, workload, options.repeats)
    plan_s = plan(model, cluster, workload, executor="megatron").seconds
    if options.json:
        rate = {"predictions_per_s": measured.predictions_per_s, "plan_s": plan_s, "cores": 1}
        print(json.dumps(vars(measured) | rate))
        return 0
    print(
        f"{options.model} on {options.ranks} ranks of {options.cluster}, one core: "
        f"{measured.combinations:,} combinations, "
        f"{measured.evaluated:,} layouts evaluated in full in {measured.search_s:.2f} s, "
        f"{measured.core_s:.2f} s of them on the core: "
        f"{measured.predictions_per_s / 1e6:.2f} million predictions per core second; {measured.feasible:,} fit; "
        f"the whole plan takes {plan_s:.2f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
