"""The workload of task=plan: what the user set, else the model's own sequence and a batch that fills the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from piper_hpc.config.experiment import Experiment
from piper_hpc.spec import Workload

SEQUENCES_PER_RANK = 8
"""Under 1F1B a pipeline of any depth whose ranks have as many spends less than a ninth of the step in its bubble
((pp - 1) / (9 pp - 1)). DeepSeek-V3 had 15,360 sequences on 2,048 GPUs (arXiv 2412.19437)."""

MOST_TOKENS = 2**26
"""Tokens of a step beyond which nobody is known to have trained: 67M, Kimi K2 (arXiv 2507.20534)."""

AS_SET = "as set"


def filling_batch(ranks: int, sequence: int) -> int:
    """Sequences of a step: eight for each rank, fewer where a step would have more than 2^26 tokens, at least one.

    As many for each rank, so that the ranks of any layout can share them.
    """
    return ranks * min(SEQUENCES_PER_RANK, max(1, MOST_TOKENS // (ranks * sequence)))


def set_by_user(overrides: Sequence[str]) -> frozenset[str]:
    """Which of `sequence` and `global_batch` the overrides of a command set: alone, or with all of `train`.

    An experiment, or an option of `train` that was chosen, sets both.
    """
    keys = {override.lstrip("+~").split("=")[0].split("@")[0] for override in overrides}
    facts = ("sequence", "global_batch")
    return frozenset(fact for fact in facts if keys & {"experiment", "train", f"train.{fact}"})


def planned_workload(experiment: Experiment, overrides: Sequence[str]) -> tuple[Experiment, dict[str, str]]:
    """The experiment with the workload that task=plan takes, and by key of `train` where each of it is from.

    A model whose own sequence is not known is planned as it would be trained.
    """
    given = set_by_user(overrides)
    workload, own = experiment.workload, experiment.model_sequence
    source = {fact: AS_SET for fact in given}
    if own is None:
        default = f"as training has it, because {experiment.model.name} has no model.sequence"
        return experiment, {"sequence": default, "global_batch": default} | source
    if "sequence" not in given:
        workload = replace(workload, sequence=own)
        source["sequence"] = f"model.sequence, of {experiment.model.name}'s pre-training"
    if "global_batch" not in given:
        ranks = max(experiment.task.ranks or [experiment.cluster.nodes * experiment.cluster.ranks_per_node])
        workload = replace(workload, global_batch=filling_batch(ranks, workload.sequence))
        source["global_batch"] = _reason(ranks, workload)
    return replace(experiment, workload=workload), dict(sorted(source.items(), reverse=True))


def _reason(ranks: int, workload: Workload) -> str:
    each = workload.global_batch // ranks
    words = f"{each} for each of {ranks:,} ranks"
    if each == SEQUENCES_PER_RANK:
        return words
    if workload.tokens > MOST_TOKENS:
        return f"{words}, the fewest that give each of them work"
    return f"{words}, for at most {MOST_TOKENS:,} tokens a step"
