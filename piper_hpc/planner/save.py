"""A plan as an option of the group `parallelism`, which `task=train` accepts."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path

import yaml

from piper_hpc.paths import data_folder
from piper_hpc.planner.search import Plan
from piper_hpc.spec import Layout, Prediction, Problem, SpecError, executor

KEY = "plan.save"


def folder_of_user(working_directory: Path) -> Path:
    """Where a user's own options lie, beside those that are shipped: `conf/` where the command runs."""
    return working_directory / "conf"


def check_name(name: str, working_directory: Path) -> Path:
    """The file that option `name` becomes. SpecError for a name that is none, or that is taken."""
    works = f"{KEY}=my_plan"
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        rule = "must be a name of letters, digits, _ and -, beginning with a letter"
        raise SpecError(Problem(KEY, name, rule, works))
    shipped = data_folder("conf") / "parallelism" / f"{name}.yaml"
    path = folder_of_user(working_directory) / "parallelism" / f"{name}.yaml"
    if shipped.exists() or path.exists():
        taken = path if path.exists() else shipped
        raise SpecError(Problem(KEY, name, f"is taken by {taken}: a saved plan replaces no other", works))
    return path


def best_of_executor(name: str, plan: Plan, trainable_plan: Plan) -> Prediction:
    """The best of `trainable_plan`, which is for this project's executor. SpecError where it has none, with the reason.

    plan: the plan of the command, perhaps for another executor.
    """
    if trainable_plan.candidates:
        return trainable_plan.candidates[0]
    if plan.candidates:
        missing = executor.missing_of_layout(plan.candidates[0].layout)
        axes = ", ".join(f"{each.key.removeprefix('parallelism.')}={each.value}" for each in missing)
        rule = f"the executor has no layout that fits; the best plan needs what it lacks: {axes}"
    else:
        rule = "no layout fits: " + "; ".join(f"{reason}: {count}" for reason, count in trainable_plan.rejected.items())
    raise SpecError(Problem(KEY, name, rule, "more cluster.nodes, or a smaller model"))


def save(plan: Plan, best: Prediction, path: Path) -> None:
    """Write the option: what differs from the defaults, and where it comes from. dp follows from the ranks."""
    default = asdict(Layout())
    degrees = {key: value for key, value in asdict(best.layout).items() if key != "dp" and value != default[key]}
    origin = (
        f"# Planned for {plan.model['name']} on {best.layout.ranks} ranks of {plan.cluster}, "
        f"{plan.workload.global_batch} sequences of {plan.workload.sequence} tokens:\n"
        f"# {best.step_time_s:.4g} s a step, {best.tokens_per_s:,.0f} tokens/s predicted.\n"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(origin + yaml.safe_dump({"pp": best.layout.pp} | degrees, sort_keys=False), encoding="utf-8")
