"""Pipeline schedules by name: how many chunks a rank has, where they stand in the model, and what each asks for.

Sources: GPipe arXiv 1811.06965; 1F1B and interleaved 1F1B arXiv 2104.04473; ZB-H1 and ZBV arXiv 2401.10241; DualPipeV
is DualPipe (arXiv 2412.19437) cut in half.
"""

from __future__ import annotations

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zbv", "dualpipev")

V_SHAPED = ("zbv", "dualpipev")
"""Chunk 0 runs down the ranks, chunk 1 back up: rank r holds stages r and 2 PP - 1 - r, the last rank the turn."""

SPLIT_BACKWARD = ("zb_h1", "zbv", "dualpipev")
"""Schedules that compute the gradient of the input (I) and of the weights (W) apart, at least now and then."""


def stage_of(schedule: str, rank: int, chunk: int, pp: int) -> int:
    """Global stage of chunk `chunk` on `rank`: V-shaped for zbv and dualpipev, looped (r, r + PP, ...) otherwise."""
    if schedule in V_SHAPED and chunk == 1:
        return 2 * pp - 1 - rank
    return chunk * pp + rank


def holders(schedule: str, pp: int, vpp: int) -> list[int]:
    """The pipeline rank that holds each global stage, [pp * vpp]."""
    rank_of = {stage_of(schedule, rank, chunk, pp): rank for rank in range(pp) for chunk in range(vpp)}
    return [rank_of[stage] for stage in range(pp * vpp)]


def schedule_problem(schedule: str, pp: int, vpp: int, micro_batches: int) -> str | None:
    """The rule that the schedule breaks with these degrees, and a value that works; None where it runs.

    These are the rules of the orders themselves. Executors may ask for more: torch's 1F1B wants micro_batches >= pp.
    """
    if schedule not in SCHEDULES:
        return f"schedule={schedule!r} is unknown; use one of {', '.join(SCHEDULES)}"
    if pp < 1 or micro_batches < 1:
        return f"schedule {schedule}: pp={pp} and micro_batches={micro_batches} must be at least 1; use 1"
    if schedule == "interleaved":
        if pp < 2:
            return f"schedule interleaved needs at least two ranks, pp={pp}; use pp=2 or schedule=1f1b with vpp=1"
        if vpp < 2:
            return f"schedule interleaved needs several chunks a rank, vpp={vpp}; use vpp=2 or schedule=1f1b"
        if micro_batches % pp:
            near = -(-micro_batches // pp) * pp
            return (
                f"schedule interleaved needs a multiple of pp={pp} micro-batches a step, "
                f"micro_batches={micro_batches}; use {near}"
            )
        return None
    chunks = 2 if schedule in V_SHAPED else 1
    if vpp != chunks:
        return f"schedule {schedule} has vpp={chunks} chunks a rank, vpp={vpp}; use vpp={chunks}"
    if schedule == "dualpipev" and micro_batches < 2 * pp:
        return (
            f"schedule dualpipev needs at least 2 pp = {2 * pp} micro-batches a step, "
            f"micro_batches={micro_batches}; use {2 * pp}"
        )
    return None
