"""The device of a rank, and the process group of a job: found through the run's folder, closed in good order."""

from __future__ import annotations

import json
import os
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch

# An optimizer's first step imports it; imported after the group was made, it keeps gloo's threads past the group's end,
# and one of them may abort the process on its way out (torch 2.13).
import torch._dynamo
import torch.distributed as dist

from piper_hpc.runtime.rank import RankEnvironment

BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
"""Back end of the process group by type of device; RCCL goes by the name of nccl, as ROCm devices by that of cuda."""
VENDORS = {"cuda": "CUDA or ROCm", "xpu": "Intel XPU"}
GLOO_RECEIVER = "gloo_tcp_loop"
"""The name that gloo gives to the thread which receives, one in each process group."""
LOWEST_PRIORITY = 19


Order = Callable[[Sequence[RankEnvironment]], Sequence[int]]
"""From the places of all tasks, in the scheduler's order, the tasks in the order of their ranks."""


T = TypeVar("T")


class RendezvousError(RuntimeError):
    """The ranks did not find one another in time."""


def device_of(kind: str, local_rank: int, *, scheduled: bool) -> torch.device:
    """This rank's device; `kind` is auto, cpu, cuda or xpu, and auto takes cuda where there is one, else the CPU.

    A scheduler may show each task one device or all of them, so the index follows from what is visible. Raises
    RuntimeError where a rank has none of its own: two ranks on one device cannot exchange over NCCL or XCCL. Devices
    of Intel are asked for by name, and were not at hand when this was written.
    """
    if kind == "cpu" or (kind == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    kind = "cuda" if kind == "auto" else kind
    module = torch.get_device_module(kind)
    visible: int = module.device_count()
    if visible == 0:
        raise RuntimeError(f"cluster.device={kind}, but this rank sees no {VENDORS[kind]} device")
    index = 0 if visible == 1 and scheduled else local_rank
    if index >= visible:
        raise RuntimeError(f"rank {local_rank} of this node has no device of its own: cluster.ranks_per_node={visible}")
    device = torch.device(kind, index)
    module.set_device(device)
    return device


@contextmanager
def process_group(
    place: RankEnvironment, meeting: Path, device: torch.device, timeout_s: float, order: Order | None = None
) -> Iterator[RankEnvironment]:
    """The default group of the job, for the length of a `with`; gives this rank's place in it.

    order: numbers the ranks anew, by where all of them are; without it they keep the scheduler's numbers.

    Rank 0 takes any free port and leaves its address in the folder `meeting`, which all nodes share: two jobs can
    never meet in one store, as they do on a fixed port. Keys carry the attempt, so that a requeued job does not read
    the addresses of dead peers. Raises RendezvousError after `timeout_s`.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore(f"attempt{place.attempt}", _store(place, meeting, timeout))
    try:
        if order is not None:
            place = _ordered(place, store, order)
        dist.init_process_group(
            BACKENDS[device.type],
            store=store,
            rank=place.rank,
            world_size=place.ranks,
            timeout=timeout,
            device_id=device if device.type != "cpu" else None,
        )
    except dist.DistStoreError as error:
        raise RendezvousError(f"{place.ranks} ranks did not meet within {timeout_s:.0f} s: {error}") from error
    let_senders_go_first()
    yield place
    # Without the barrier a rank that leaves early can abort the others' clean exit.
    dist.barrier()
    dist.destroy_process_group()


def from_first(make: Callable[[], T]) -> T:
    """What `make` gives on rank 0, told to every rank of the default group. Collective; only rank 0 calls `make`.

    Where it fails, every rank raises what rank 0 raised: were it to fail alone, the others would wait for its answer
    until their time is up, and say so in place of the reason. An exception that cannot be told, or an answer, becomes
    a RuntimeError with its words.
    """
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [pickle.dumps((make(), None))]
        except Exception as error:
            told = [pickle.dumps((None, _told(error)))]
            dist.broadcast_object_list(told, src=0)
            raise
    dist.broadcast_object_list(told, src=0)
    answer, failure = pickle.loads(told[0])
    if failure is not None:
        raise failure
    found: T = answer
    return found


def _told(error: Exception) -> Exception:
    """The exception as other ranks can read it."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:  # whatever its class makes of it
        pass
    return RuntimeError(f"{type(error).__name__} on rank 0: {error}")


def _ordered(place: RankEnvironment, store: dist.Store, order: Order) -> RankEnvironment:
    """Tell all tasks where this one is, learn where they are, and take the rank that `order` gives it."""
    keys = [f"place{task}" for task in range(place.ranks)]
    store.set(keys[place.task], json.dumps(asdict(place)))
    store.wait(keys)
    told = [json.loads(text) for text in store.multi_get(keys)]
    tasks = order([RankEnvironment(**facts | {"switches": tuple(facts["switches"])}) for facts in told])
    return replace(place, rank=list(tasks).index(place.task))


def let_senders_go_first() -> None:
    """Keep gloo's receiving threads from interrupting senders, where a rank has one core; call it after making a group.

    Such a thread does not wait for the lock of a connection: it asks again and again while another thread sends. Woken
    by a message on the core of that sender, it spins there until the scheduler's next tick, up to 4 ms, and the sender
    cannot finish meanwhile. At the lowest priority it comes after this rank's other threads; among ranks it counts as
    before where each has a control group of its own.
    """
    if len(os.sched_getaffinity(0)) > 1:
        return
    for thread in Path("/proc/self/task").glob("*"):
        # A thread may end in between, and a sandbox may refuse the call: exchanges are slower then.
        with suppress(OSError):
            if (thread / "comm").read_text().strip() == GLOO_RECEIVER:
                os.setpriority(os.PRIO_PROCESS, int(thread.name), LOWEST_PRIORITY)


def _store(place: RankEnvironment, meeting: Path, timeout: timedelta) -> dist.TCPStore:
    meeting.mkdir(parents=True, exist_ok=True)
    note = meeting / f"{place.meeting}.json"
    if place.task == 0:
        store = dist.TCPStore("0.0.0.0", 0, place.ranks, is_master=True, wait_for_workers=False, timeout=timeout)
        draft = note.with_suffix(".draft")
        draft.write_text(json.dumps({"host": place.master_address, "port": store.port}))
        os.replace(draft, note)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while not note.exists():
        if time.monotonic() > deadline:
            raise RendezvousError(f"rank 0 left no address in {note} within {timeout.total_seconds():.0f} s")
        time.sleep(0.02)
    address = json.loads(note.read_text())
    try:
        return dist.TCPStore(address["host"], address["port"], place.ranks, is_master=False, timeout=timeout)
    except dist.DistError as error:
        raise RendezvousError(
            f"rank {place.rank} could not reach {address['host']}:{address['port']}: {error}"
        ) from error
