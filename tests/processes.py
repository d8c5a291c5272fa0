"""Runs a function on several real ranks: a pool of processes that lives as long as the test session."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

COLLECTIVE_TIMEOUT_S = 30.0
PRELOADED = ["piper_hpc.train.trainer", "piper_hpc.train.checkpoint"]
"""What ranks import, torch above all: seconds for each of up to sixteen, if the server did not do it once for all."""


class Pool:
    """Worker processes, each forked from one that has imported torch; each run forms a group of the first n ranks."""

    def __init__(self) -> None:
        self._workers: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []

    def run(self, ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
        """Results of `function(*arguments)` on each of `ranks` ranks of one gloo group, in rank order.

        `function` is at top level of a module. An exception on a rank, its death or the time-out ends all workers and
        raises RuntimeError with what the first failing rank said.
        """
        while len(self._workers) < ranks:
            self._workers.append(_start())
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self._workers[:ranks]):
                pipe.send((rank, ranks, str(Path(folder) / "store"), function, arguments))
            return self._results(ranks, time.monotonic() + timeout_s)

    def _results(self, ranks: int, deadline: float) -> list[Any]:
        results: dict[int, Any] = {}
        while len(results) < ranks:
            for rank, (process, pipe) in enumerate(self._workers[:ranks]):
                if rank in results or not pipe.poll(0.01):
                    problem = None if process.is_alive() or rank in results else f"died with {process.exitcode}"
                else:
                    try:
                        results[rank], problem = pipe.recv()
                    except EOFError:
                        problem = "died"
                if problem is None and time.monotonic() > deadline:
                    problem = "gave no result in time"
                if problem is not None:
                    self.close()
                    raise RuntimeError(f"rank {rank} of {ranks} {problem}")
        return [results[rank] for rank in range(ranks)]

    def close(self) -> None:
        """End all workers."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers.clear()


def _start() -> tuple[multiprocessing.process.BaseProcess, Connection]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)  # no effect once the server runs
    ours, theirs = context.Pipe()
    process = context.Process(target=_work, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def _work(pipe: Connection) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    while True:
        try:
            rank, ranks, store, function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, ranks),
                rank=rank,
                world_size=ranks,
                timeout=timedelta(seconds=COLLECTIVE_TIMEOUT_S),
            )
            result = function(*arguments)
            dist.barrier()
            dist.destroy_process_group()
            pipe.send((result, None))
        except Exception:
            pipe.send((None, f"raised\n{traceback.format_exc()}"))
            return


POOL = Pool()
atexit.register(POOL.close)


def run_ranks(ranks: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 120.0) -> list[Any]:
    """`Pool.run` on the session's pool."""
    return POOL.run(ranks, function, *arguments, timeout_s=timeout_s)
