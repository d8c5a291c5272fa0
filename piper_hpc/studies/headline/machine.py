"""The testbed that strategies are compared on: links of a site, scaled and slowed, or those of a testbed that is up."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from piper_hpc.runs import RunFolder
from piper_hpc.studies.headline.links import Links, layer_of, scaled
from piper_hpc.studies.headline.strategies import MACHINE, MODEL, NAMED, SITE
from piper_hpc.studies.jobs import prepared
from piper_hpc.studies.testbed import TestbedError, brought_up
from piper_hpc.testbed import presets, rate, state

RUN = (
    *("cluster=testbed", "cluster.time_min=60", "parallelism=pp2_ep4", "task.budget_s=90"),
    *("task.suites=[calibration,dispatch]", "task.cell_s=0.25"),
)
"""Of the configuration of a run: what is compared has model, layouts and batch of its own."""


def flops_per_s() -> float:
    """What a rank reaches in the experts of MODEL under its quota. Needs root; see piper_hpc.testbed.rate."""
    return rate.measure(layer_of(MODEL), MACHINE)


@contextmanager
def slowed(slowdown: float, rank_flops_per_s: float) -> Iterator[Links]:
    """A testbed with SITE's links, scaled to ranks of this rate, those between nodes slower by `slowdown`."""
    links = scaled(presets.machine(SITE), presets.layer(NAMED), layer_of(MODEL), rank_flops_per_s, slowdown)
    with brought_up(links.flags(MACHINE)):
        yield links


@contextmanager
def as_it_is() -> Iterator[Links]:
    """The testbed that is up, its links as they are. Raises TestbedError where none is, or it has another shape."""
    found = state.load()
    if found is None or any(
        found.options[key] != getattr(MACHINE, key) for key in ("nodes", "ranks_per_node", "racks")
    ):
        raise TestbedError("no testbed of four nodes of two ranks in two racks is up: python -m piper_hpc.testbed up")
    rates = {kind: link.configured_bytes_per_s / MACHINE.ranks_per_node for kind, link in found.links.items()}
    yield Links(rates["node"], rates["nic"])


def new_run(overrides: Sequence[str]) -> RunFolder:
    """A run on the testbed that is up, nothing of it submitted; overrides: after those of RUN."""
    return prepared([*RUN, *overrides])
