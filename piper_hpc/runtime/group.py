"""The device of a rank, and the job's default process group: rendezvous through the run's folder, and shutdown."""

from __future__ import annotations

import ipaddress
import json
import os
import pickle
import random
import socket
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
GLOO_RECEIVER_THREAD = "gloo_tcp_loop"
"""The name that gloo gives to the thread which receives, one in each process group."""
LOWEST_NICE = 19
"""The nice value of the lowest scheduling priority."""
LOOKS_PER_S, LEAST_LOOK_S = 1000.0, 0.02
"""How often all ranks that wait look for the address of rank 0, and how soon one of them looks again at most."""


Order = Callable[[Sequence[RankEnvironment]], Sequence[int]]
"""From the environments of all tasks, in the scheduler's order, the tasks in the order of their ranks."""


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
    rank_env: RankEnvironment, store_folder: Path, device: torch.device, timeout_s: float, order: Order | None = None
) -> Iterator[RankEnvironment]:
    """The default group of the job, for the length of a `with`; yields this rank's environment.

    order: numbers the ranks anew, by where all of them are; without it they keep the scheduler's numbers.

    Rank 0 starts the TCPStore on any free port and writes its address into `store_folder`, which all nodes share: two
    jobs can never share one store, as they do on a fixed port. It listens on the node's own address. Keys carry
    the run and the attempt, so that nobody reads the addresses of dead or foreign peers. Raises RendezvousError after
    `timeout_s`, and where MASTER_ADDR is another node's.
    """
    timeout = timedelta(seconds=timeout_s)
    store = dist.PrefixStore(f"{store_folder}/{rank_env.rendezvous_id}", _store(rank_env, store_folder, timeout))
    try:
        if order is not None:
            rank_env = _renumbered(rank_env, store, order)
        dist.init_process_group(
            BACKENDS[device.type],
            store=store,
            rank=rank_env.rank,
            world_size=rank_env.ranks,
            timeout=timeout,
            device_id=device if device.type != "cpu" else None,
        )
    except dist.DistStoreError as error:
        raise RendezvousError(f"{rank_env.ranks} ranks did not meet within {timeout_s:.0f} s: {error}") from error
    lower_gloo_receiver_priority()
    yield rank_env
    # Without the barrier a rank that leaves early can abort the others' clean exit.
    dist.barrier()
    dist.destroy_process_group()


def broadcast_from_rank0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 alone and return its result on every rank of the default group. Collective.

    Where `make` fails, every rank raises what rank 0 raised: were rank 0 to fail alone, the others would wait until
    their time-out and report that in place of the reason. A result or an exception that cannot be pickled becomes a
    RuntimeError with its message.
    """
    told: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            told = [pickle.dumps((make(), None))]
        except Exception as error:
            told = [pickle.dumps((None, _picklable(error)))]
            dist.broadcast_object_list(told, src=0)
            raise
    dist.broadcast_object_list(told, src=0)
    answer, failure = pickle.loads(told[0])
    if failure is not None:
        raise failure
    found: T = answer
    return found


def _picklable(error: Exception) -> Exception:
    """The exception itself where it survives pickling, else a RuntimeError with its class and message."""
    try:
        again = pickle.loads(pickle.dumps(error))
        if type(again) is type(error) and str(again) == str(error):
            return error
    except Exception:  # whatever its class makes of it
        pass
    return RuntimeError(f"{type(error).__name__} on rank 0: {error}")


def _renumbered(rank_env: RankEnvironment, store: dist.Store, order: Order) -> RankEnvironment:
    """Exchange the environments of all tasks through the store; this one's, with the rank that `order` gives it."""
    keys = [f"place{task}" for task in range(rank_env.ranks)]
    store.set(keys[rank_env.task], json.dumps(asdict(rank_env)))
    store.wait(keys)
    told = [json.loads(text) for text in store.multi_get(keys)]
    tasks = order([RankEnvironment(**facts | {"switches": tuple(facts["switches"])}) for facts in told])
    return replace(rank_env, rank=list(tasks).index(rank_env.task))


def lower_gloo_receiver_priority() -> None:
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
            if (thread / "comm").read_text().strip() == GLOO_RECEIVER_THREAD:
                os.setpriority(os.PRIO_PROCESS, int(thread.name), LOWEST_NICE)


def _store(rank_env: RankEnvironment, store_folder: Path, timeout: timedelta) -> dist.TCPStore:
    store_folder.mkdir(parents=True, exist_ok=True)
    note = store_folder / f"{rank_env.rendezvous_id}.json"
    if rank_env.task == 0:
        listener = _listener(rank_env.master_address)
        port: int = listener.getsockname()[1]
        store = dist.TCPStore(
            rank_env.master_address,
            port,
            rank_env.ranks,
            is_master=True,
            wait_for_workers=False,
            timeout=timeout,
            master_listen_fd=listener.detach(),
        )
        draft = note.with_suffix(".draft")
        draft.write_text(json.dumps({"host": rank_env.master_address, "port": port}))
        os.replace(draft, note)
        return store
    deadline = time.monotonic() + timeout.total_seconds()
    while not note.exists():
        if time.monotonic() > deadline:
            raise RendezvousError(f"rank 0 left no address in {note} within {timeout.total_seconds():.0f} s")
        time.sleep(_look_again_s(rank_env.ranks))
    address = json.loads(note.read_text())
    try:
        return dist.TCPStore(address["host"], address["port"], rank_env.ranks, is_master=False, timeout=timeout)
    except dist.DistError as error:
        raise RendezvousError(
            f"rank {rank_env.rank} could not reach {address['host']}:{address['port']}: {error}"
        ) from error


def _listener(host: str) -> socket.socket:
    """A socket on any free port of this node's address `host`, and of no other: whoever shares the node through another
    network finds nothing. Raises RendezvousError where the address is not this node's.

    A node's own name may mean its loopback to itself (127.0.1.1 in Debian's /etc/hosts) and its network's address to
    the others: only a socket on all addresses hears them then.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        bare = str(address[0])
        hides = ipaddress.ip_address(bare).is_loopback and host not in (bare, "localhost")
        listener = socket.socket(family, kind, protocol)
        listener.bind(("", 0) if hides else address)
        listener.listen(socket.SOMAXCONN)
    except OSError as error:
        raise RendezvousError(
            f"rank 0 cannot listen on {host} ({error}): the batch script's MASTER_ADDR must be the node of task 0"
        ) from error
    return listener


def _look_again_s(ranks: int) -> float:
    """How long a rank waits until it looks again for the address of rank 0, in s.

    All together look LOOKS_PER_S times, each at moments of its own: the servers of a file system that serves thousands
    of ranks answer to every look.
    """
    return max(LEAST_LOOK_S, 2 * random.random() * ranks / LOOKS_PER_S)
