"""Pipeline schedules: the order of every rank, the timeline of a step, and closed forms of both.

spec/orders.py says what every rank does, simulation.py and timeline.py play it with times, closed_forms.py gives
seconds and in-flight counts as formulas, trace.py writes a timeline for Perfetto.
"""

from __future__ import annotations

from piper_hpc.resource_model.schedule.closed_forms import (
    Work,
    bubble_fraction,
    bubble_s,
    exposed_messages,
    in_flight,
    in_flight_by_chunk,
    step_s,
)
from piper_hpc.resource_model.schedule.simulation import TimedAction
from piper_hpc.resource_model.schedule.timeline import Timeline, Times, peak_held, simulate
from piper_hpc.resource_model.schedule.trace import chrome_trace, write_chrome_trace
from piper_hpc.spec.orders import Action, rank_order

__all__ = [
    "Action",
    "TimedAction",
    "Timeline",
    "Times",
    "Work",
    "bubble_fraction",
    "bubble_s",
    "chrome_trace",
    "exposed_messages",
    "in_flight",
    "in_flight_by_chunk",
    "peak_held",
    "rank_order",
    "simulate",
    "step_s",
    "write_chrome_trace",
]
