"""The simulated timeline of a plan's best layout as a file for Perfetto."""

from __future__ import annotations

import os
from pathlib import Path

from piper_hpc.planner.search import Plan
from piper_hpc.resource_model.errors import ResourceModelError
from piper_hpc.resource_model.predict import timeline
from piper_hpc.resource_model.schedule import write_chrome_trace
from piper_hpc.spec import EXECUTIONS, ClusterSpec, ModelSpec, Problem, SpecError

KEY = "plan.trace"
WORKS = f"{KEY}=timeline.json"


def check_path(name: str, working_directory: Path) -> Path:
    """The file that is written at the end. SpecError where it cannot be, before a long search."""
    path = working_directory / name
    if path.is_dir():
        raise SpecError(Problem(KEY, name, "must be a file, and is a folder", f"{KEY}={Path(name) / 'timeline.json'}"))
    if not path.parent.is_dir():
        raise SpecError(Problem(KEY, name, f"must lie in a folder that exists, and {path.parent} does not", WORKS))
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise SpecError(Problem(KEY, name, "must be writable by you", WORKS))
    return path


def write(plan: Plan, model: ModelSpec, cluster: ClusterSpec, path: Path) -> None:
    """Write the pipeline of the best layout's step, one process per pipeline rank. SpecError where there is none."""
    if not plan.candidates:
        reasons = "; ".join(f"{reason}: {count}" for reason, count in plan.rejected.items())
        rule = f"no layout fits, so there is no timeline ({reasons})"
        raise SpecError(Problem(KEY, str(path), rule, "more cluster.nodes, or a smaller model"))
    layout = plan.candidates[0].layout
    try:
        write_chrome_trace(timeline(model, cluster, layout, plan.workload, EXECUTIONS[plan.executor]), path)
    except ResourceModelError as error:
        raise SpecError(Problem(KEY, str(path), str(error), f"{KEY}=null")) from error
    except OSError as error:
        raise SpecError(Problem(KEY, str(path), f"cannot be written: {error.strerror}", WORKS)) from error
