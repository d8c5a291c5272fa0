"""A trace through the schedule model: one that the model itself made comes out as it was, for every schedule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from analysis.validation.replay import Event, Replay, by_schedule, events_of, replayed_s, steps_of
from piper_hpc.resource_model.schedule import simulate
from piper_hpc.runs import RunFolder
from piper_hpc.spec.schedules import SCHEDULES, SPLIT_BACKWARD, stage_of

PP, MICRO_BATCHES, TRANSFER_S = 4, 8, 0.25
CHUNKS = {"interleaved": 2, "zbv": 2, "dualpipev": 2}


def trace_of(schedule: str) -> tuple[list[dict[str, Any]], dict[int, tuple[int, ...]], float]:
    """Events of one step of PP ranks as a profile writes them; each rank's stages; the step's seconds."""
    vpp = CHUNKS.get(schedule, 1)
    stages = PP * vpp
    forward = [1.0 + 0.1 * stage for stage in range(stages)]
    whole = [2.0 + 0.1 * stage for stage in range(stages)]
    weight = [0.9] * stages if schedule in SPLIT_BACKWARD else []
    transfers = [TRANSFER_S] * (stages - 1)
    timeline = simulate(
        schedule, PP, MICRO_BATCHES, forward, whole, weight_s=weight,
        send_forward_s=transfers, send_backward_s=transfers, blocking=False, paired=False,
    )  # fmt: skip
    held = {rank: tuple(stage_of(schedule, rank, chunk, PP) for chunk in range(vpp)) for rank in range(PP)}
    rank_of = {stage: rank for rank, of_rank in held.items() for stage in of_rank}
    reduce_s, update_s = 0.5, 0.75
    arrival_s = timeline.step_s + reduce_s
    events: list[dict[str, Any]] = []

    def add(rank: int, name: str, start_s: float, end_s: float, category: str = "forward", **args: Any) -> None:
        times = {"ts": 1e6 * start_s, "dur": 1e6 * (end_s - start_s)}
        events.append({"ph": "X", "name": name, "cat": category, "tid": rank, **times, "args": args})

    for rank, timed_actions in enumerate(timeline.timed_actions):
        add(rank, "other", 0.0, arrival_s + update_s)
        free_s = 0.0
        for timed in timed_actions:
            at_s = timed.start_s
            for part in timed.action.parts:
                stage, index = held[rank][part.chunk], part.micro_batch
                source = {"F": stage - 1, "W": -1}.get(part.kind, stage + 1)
                if 0 <= source < stages and rank_of[source] != rank and at_s == timed.start_s and at_s > free_s:
                    message = "activations" if part.kind == "F" else "gradients"
                    add(rank, "wait", free_s, at_s, **{"for": message, "stage": stage, "micro_batch": index})
                length = {"F": forward[stage], "B": whole[stage], "W": (weight or whole)[stage]}.get(
                    part.kind, whole[stage] - (weight or whole)[stage]
                )
                add(rank, "other", at_s, at_s + length, action=part.kind, stage=stage, micro_batch=index)
                at_s += length
                target = {"F": stage + 1, "W": -1}.get(part.kind, stage - 1)
                if 0 <= target < stages and rank_of[target] != rank:
                    message = "activations" if part.kind == "F" else "gradients"
                    add(
                        rank,
                        "post",
                        timed.end_s,
                        timed.end_s,
                        **{"for": message, "stage": target, "micro_batch": index},
                    )
            free_s = timed.end_s
        posted_s = timeline.end_s[rank] + reduce_s
        add(rank, "post", posted_s, posted_s, **{"for": "everyone", "stage": 0, "micro_batch": 0})
        add(rank, "wait", posted_s, arrival_s, **{"for": "everyone", "stage": 0, "micro_batch": 0})
    return events, held, arrival_s + update_s


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_simulated_step_is_replayed_as_it_was(schedule: str) -> None:
    events, held, step_s = trace_of(schedule)
    steps = steps_of(events_of(events))
    assert len(steps) == 1
    assert replayed_s(schedule, steps, held, MICRO_BATCHES) == pytest.approx(step_s, rel=1e-3)


def test_steps_of_ranks_are_numbered_each_for_itself() -> None:
    events = [Event("step", rank, start, start + 1.0) for rank, start in ((0, 0.0), (0, 2.0), (1, 0.5), (1, 2.5))] + [
        Event("F", 1, 2.6, 2.7)
    ]
    first, second = steps_of(events)
    assert [(event.kind, event.rank) for event in first] == [("step", 0), ("step", 1)]
    assert [(event.kind, event.rank) for event in second] == [("step", 0), ("step", 1), ("F", 1)]


def test_runs_of_a_schedule_are_one_row_of_medians() -> None:
    run = RunFolder(Path("run"))
    replays = [Replay(run, "1f1b", 10, step, step, 0.1 * step, 2.0, 0.4) for step in (1.0, 2.0, 4.0)]
    replays.append(Replay(run, "zbv", 10, 1.0, 0.9, 0.2, None, None))
    console = Console(width=100, record=True)
    console.print(by_schedule(replays))
    first, second = (line.split() for line in console.export_text().splitlines()[-2:])
    assert first == ["1f1b", "3", *("2.00", "s") * 2, *("+0.0", "%"), *("200", "ms"), *("400", "ms"), "+10.0", "%"]
    assert second == ["zbv", "1", "1.00", "s", "-10.0", "%", "200", "ms"]
