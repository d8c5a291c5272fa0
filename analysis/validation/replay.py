"""`python -m analysis.validate replay RUN...`: a profiled run's passes and messages, put through the schedule model.

The trace of `task=profile` has every pass of a pipeline rank (F, B, I, W of one micro-batch through one stage) and
every post of a message and wait for one. They go step by step through `resource_model.schedule.simulate`, with the
order of the run's schedule: what comes out should be the step that was measured, and what is missing is the
schedule model's error, apart from that of the prices of passes and messages. Of several runs a table has the medians by
schedule.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from piper_hpc.report.load import UsageError, metrics, open_run, steady
from piper_hpc.report.units import percent, seconds
from piper_hpc.resource_model.schedule import simulate
from piper_hpc.runs import RunFolder, understood

SCHEMA_VERSION = 1
MICROSECONDS = 1e6


@dataclass(frozen=True)
class Event:
    """One pass (kind F, B, I, W), wait, post, or whole step of a rank, in seconds on the run's clock."""

    kind: str
    rank: int
    start_s: float
    end_s: float
    message: str = ""
    stage: int = 0
    micro_batch: int = 0


@dataclass(frozen=True)
class Replay:
    """A run's measured step against the schedule model with the run's own times.

    step_time_s, replayed_s: medians over the steps; bubble_s: of the critical rank, measured; predicted_s and
    predicted_bubble_s: of the step and the bubble, predicted before the run from the calibration alone (None without a
    prediction).
    """

    run: RunFolder
    schedule: str
    steps: int
    step_time_s: float
    replayed_s: float
    bubble_s: float
    predicted_s: float | None
    predicted_bubble_s: float | None

    @property
    def error_pct(self) -> float:
        """Of the replayed step."""
        return 100 * (self.replayed_s / self.step_time_s - 1)

    @property
    def bubble_error_pct(self) -> float | None:
        """Predicted less measured bubble, of the measured step."""
        if self.predicted_bubble_s is None:
            return None
        return 100 * (self.predicted_bubble_s - self.bubble_s) / self.step_time_s

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "run_id": self.run.run_id,
            "schedule": self.schedule,
            "steps": self.steps,
            "step_time_s": self.step_time_s,
            "replayed_s": self.replayed_s,
            "error_pct": self.error_pct,
            "bubble_s": self.bubble_s,
            "predicted_s": self.predicted_s,
            "predicted_bubble_s": self.predicted_bubble_s,
            "bubble_error_pct": self.bubble_error_pct,
        }


def replay(run: RunFolder) -> Replay:
    """Read a run of `task=profile`. UsageError where it has no trace of several pipeline ranks."""
    path = run.path / "trace.json"
    layout = run.config()["parallelism"]
    if not path.is_file() or layout["pp"] < 2:
        raise UsageError(
            f"RUN={run.path}: must be a run of task=profile with parallelism.pp of 2 or more; "
            "python -m piper_hpc.launch task=profile parallelism=pp2_ep2"
        )
    rank_map = run.manifest()["job"]["rank_map"]
    stages = {place["rank"]: tuple(place["stages"]) for place in rank_map}
    steps = steps_of(events_of(json.loads(path.read_text())["traceEvents"]))
    micro_batches = 1 + max(event.micro_batch for step in steps for event in step if event.kind == "F")
    measured = [max(e.end_s for e in step) - min(e.start_s for e in step) for step in steps]
    rows = steady(metrics(run))
    prediction = run.prediction()
    return Replay(
        run,
        layout["schedule"],
        len(steps),
        median(measured),
        replayed_s(layout["schedule"], steps, stages, micro_batches),
        median(float(row["bubble_s"]) for row in rows),
        None if prediction is None else prediction["step_time_s"],
        None if prediction is None else prediction["terms"]["bubble_s"],
    )


def events_of(trace: Iterable[Mapping[str, Any]]) -> list[Event]:
    """What of a trace the schedule model has: passes, waits and posts of messages, and each rank's whole steps."""
    found = []
    for event in trace:
        if event["ph"] != "X":
            continue
        about, start_s = event.get("args", {}), event["ts"] / MICROSECONDS
        times = (event["tid"], start_s, start_s + event["dur"] / MICROSECONDS)
        if "action" in about:
            found.append(Event(about["action"], *times, "", about["stage"], about["micro_batch"]))
        elif event["name"] in ("wait", "post") and about:
            found.append(Event(event["name"], *times, about["for"], about["stage"], about["micro_batch"]))
        elif event["name"] == "wait":
            found.append(Event("wait", *times))
        elif event["name"] == "other" and event["cat"] == "forward":
            found.append(Event("step", *times))
    return found


def steps_of(events: Sequence[Event]) -> list[list[Event]]:
    """Events of every step: a rank's step is the span that no other encloses; ranks' n-th steps belong together."""
    by_rank: dict[int, list[Event]] = defaultdict(list)
    for event in sorted(events, key=lambda event: (event.start_s, -event.end_s)):
        by_rank[event.rank].append(event)
    steps: dict[int, list[Event]] = defaultdict(list)
    for of_rank in by_rank.values():
        number, end_s = -1, float("-inf")
        for event in of_rank:
            if event.kind == "step" and event.start_s >= end_s:
                number, end_s = number + 1, event.end_s
                steps[number].append(event)
            elif event.kind != "step":
                steps[number].append(event)
    return [steps[number] for number in sorted(steps)]


def replayed_s(
    schedule: str, steps: Sequence[Sequence[Event]], stages: Mapping[int, tuple[int, ...]], micro_batches: int
) -> float:
    """Seconds that the schedule model makes of a step, median over the steps.

    stages: the global stages of each rank, by chunk.
    """
    return median(_replayed_s(schedule, step, stages, micro_batches) for step in steps)


def _replayed_s(
    schedule: str, step: Sequence[Event], stages: Mapping[int, tuple[int, ...]], micro_batches: int
) -> float:
    """One step: its passes and messages by micro-batch, the median of ranks that hold the same stage."""
    passes: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    transfers: dict[tuple[str, int, int], list[float]] = defaultdict(list)
    arrive: dict[tuple[int, ...], list[float]] = defaultdict(list)
    began_s, began_passes_s = min(event.start_s for event in step), float("inf")
    posted = {
        (event.message, event.stage, event.micro_batch, event.rank): event.start_s
        for event in step
        if event.kind == "post"
    }
    after_s = max(event.end_s for event in step) - max(at for (to, *_), at in posted.items() if to == "everyone")
    for rank, held in stages.items():
        own = sorted(
            (event for event in step if event.rank == rank and event.kind in (*"FBIW", "wait")),
            key=lambda event: event.start_s,
        )
        work = [event for event in own if event.kind != "wait"]
        began_passes_s = min(began_passes_s, work[0].start_s)
        arrive[held].append(posted["everyone", 0, 0, rank] - work[-1].end_s)
        # Python between two passes belongs to the first: it lasts until the next pass or wait begins.
        for event, following in pairwise(own):
            if event.kind != "wait":
                end_s = event.end_s if event is work[-1] else following.start_s
                passes[event.kind, event.stage, event.micro_batch].append(end_s - event.start_s)
        for event in own:
            if event.message in ("activations", "gradients"):
                # Of a message that was there before it was waited for, this is the most that it can have taken.
                sent_s = _sent_s(posted, event, stages)
                transfers[event.message, event.stage, event.micro_batch].append(event.end_s - sent_s)
    ranks = sorted(set(stages.values()))
    times = _times(passes, transfers, 1 + max(map(max, ranks)), micro_batches)
    timeline = simulate(schedule, len(ranks), micro_batches, **times, blocking=False, paired=False)
    arrival_s = max(end + median(arrive[held]) for end, held in zip(timeline.end_s, ranks, strict=True))
    return began_passes_s - began_s + arrival_s + after_s


def _times(
    passes: Mapping[tuple[str, int, int], list[float]],
    transfers: Mapping[tuple[str, int, int], list[float]],
    count: int,
    micro_batches: int,
) -> dict[str, Any]:
    """What `simulate` asks for, by stage (or boundary) and micro-batch, `count` stages in all."""
    taken = {key: median(found) for key, found in passes.items()}
    crossing = {key: median(found) for key, found in transfers.items()}

    def table(stages: Iterable[int], seconds: Callable[[int, int], float]) -> list[list[float]]:
        return [[seconds(stage, index) for index in range(micro_batches)] for stage in stages]

    def weight_s(stage: int, index: int) -> float:
        return taken.get(("W", stage, index), 0.0)

    return {
        "forward_s": table(range(count), lambda stage, index: taken["F", stage, index]),
        # Whole where it ran as one, else its halves; torch's first stage has no pass for its input.
        "backward_s": table(
            range(count),
            lambda stage, index: taken.get(
                ("B", stage, index), taken.get(("I", stage, index), 0.0) + weight_s(stage, index)
            ),
        ),
        "weight_s": table(range(count), weight_s),
        "send_forward_s": table(
            range(count - 1), lambda stage, index: crossing.get(("activations", stage + 1, index), 0.0)
        ),
        "send_backward_s": table(range(count - 1), lambda stage, index: crossing.get(("gradients", stage, index), 0.0)),
    }


def _sent_s(
    posted: Mapping[tuple[str, int, int, int], float], event: Event, stages: Mapping[int, tuple[int, ...]]
) -> float:
    """When the message that a rank waits for was posted, by the rank at its place of the stage before or after."""
    source = event.stage - 1 if event.message == "activations" else event.stage + 1
    of_stage = sorted(rank for rank, held in stages.items() if source in held)
    place = sorted(rank for rank, held in stages.items() if event.stage in held).index(event.rank)
    return posted[event.message, event.stage, event.micro_batch, of_stage[place]]


def run(names: Sequence[str], *, as_json: bool) -> None:
    """Print the replay of every run."""
    found = []
    for opened in map(open_run, names):
        with understood(opened):
            found.append(replay(opened))
    if as_json:
        print(json.dumps({"schema_version": SCHEMA_VERSION, "replays": [each.document() for each in found]}, indent=2))
        return
    console = Console()
    for each in found:
        bubble = each.bubble_error_pct
        foreseen = seconds(each.predicted_bubble_s or 0.0)
        predicted = "" if bubble is None else f", predicted {foreseen} ({percent(bubble)} of the step)"
        console.print(
            f"{each.schedule:12} {each.run.run_id}: step {seconds(each.step_time_s)}, replayed "
            f"{seconds(each.replayed_s)} ({percent(each.error_pct)}); bubble {seconds(each.bubble_s)}{predicted}",
            highlight=False,
            soft_wrap=True,
        )
    if len(found) > 1:
        console.print(by_schedule(found))


def by_schedule(replays: Sequence[Replay]) -> Table:
    """Medians over the runs of each schedule; what was predicted, over those that have a prediction."""
    table = Table(title="medians by schedule", title_justify="left", box=None)
    table.add_column("")
    for column in ("runs", "step", "predicted step", "replayed", "bubble", "predicted bubble", "error, of step"):
        table.add_column(column, justify="right")
    for schedule in dict.fromkeys(each.schedule for each in replays):
        runs = [each for each in replays if each.schedule == schedule]
        foreseen = [each for each in runs if each.predicted_s is not None]
        errors = [each.bubble_error_pct for each in foreseen if each.bubble_error_pct is not None]
        table.add_row(
            schedule,
            str(len(runs)),
            seconds(median(each.step_time_s for each in runs)),
            seconds(median(each.predicted_s or 0.0 for each in foreseen)) if foreseen else "",
            percent(median(each.error_pct for each in runs)),
            seconds(median(each.bubble_s for each in runs)),
            seconds(median(each.predicted_bubble_s or 0.0 for each in foreseen)) if foreseen else "",
            percent(median(errors)) if errors else "",
        )
    return table
