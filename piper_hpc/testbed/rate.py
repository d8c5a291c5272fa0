"""FLOP/s that the experts of one rank reach under its CPU quota, in the shapes of a scaled layer.

As a program, `python -m piper_hpc.testbed.rate HIDDEN FFN MATRICES EXPERTS ROWS`: prints `ready`, waits for a line, and
prints FLOP/s. So that all ranks measure at once, and imports run outside of the quota.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from piper_hpc.runtime import quota
from piper_hpc.testbed.faults import FAILED, Fault
from piper_hpc.testbed.options import MIB, Options
from piper_hpc.testbed.scaling import SEQUENCE, SEQUENCES_PER_RANK, Layer, expert_ranks

GROUP = "testbed_rate"
WARM_UP_S, SECONDS = 1.0, 6.0
ROOT = str(Path(__file__).resolve().parents[2])


def command(layer: Layer, ranks: int) -> list[str]:
    """The program for one rank's share of the layer's experts, and of the rows of a balanced micro-batch."""
    ep = expert_ranks(layer.experts, ranks)
    shape = (layer.hidden, layer.expert_ffn, layer.matrices, layer.experts // ep)
    rows = SEQUENCES_PER_RANK * SEQUENCE * layer.top_k
    return [sys.executable, "-m", "piper_hpc.testbed.rate", *map(str, (*shape, rows))]


def variables() -> dict[str, str]:
    """Of the program's environment: the package, and one thread."""
    return {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def measure(layer: Layer, options: Options) -> float:
    """Median FLOP/s over ranks that all compute at once, each under the quota that it will have. Needs root.

    Raises Fault (exit code 1) where a rank does not answer, or ends before it has.
    """
    ranks = [
        subprocess.Popen(
            command(layer, options.ranks), env=variables(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(options.ranks)
    ]
    try:
        for rank in ranks:
            assert rank.stdout is not None
            if rank.stdout.readline().strip() != "ready":
                rule = "a rank ended before it could measure what it computes"
                raise Fault("torch", sys.executable, rule, "an environment with torch, as `make run` sets up", FAILED)
        for number, rank in enumerate(ranks):
            name, memory_bytes = f"{GROUP}/rank{number}", options.memory_mib * MIB
            group = quota.create(name, options.cpu_share, memory_bytes, period_us=options.period_us)
            group.enter(rank.pid)
            if quota.fits_one_core_each(options.ranks, options.cpu_share):
                quota.pin_to_core(number, rank.pid)
        for rank in ranks:
            assert rank.stdin is not None
            rank.stdin.write("go\n")
            rank.stdin.flush()
        return statistics.median(float(rank.communicate(timeout=60)[0]) for rank in ranks)
    except (OSError, ValueError, subprocess.TimeoutExpired) as error:
        rule = f"a rank ended, or did not end, while it measured what it computes ({type(error).__name__})"
        value = f"{options.memory_mib} MiB a rank"
        raise Fault("memory-mib", value, rule, f"--memory-mib {2 * options.memory_mib}", FAILED) from None
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
        quota.remove_tree(GROUP)


def _main(hidden: int, expert_ffn: int, matrices: int, experts: int, rows: int) -> None:
    import torch
    import torch.nn.functional as F

    torch.set_num_threads(1)
    inputs = torch.randn(rows, hidden)
    into = [torch.randn(experts, hidden, expert_ffn) * hidden**-0.5 for _ in range(matrices - 1)]
    out_of = torch.randn(experts, expert_ffn, hidden) * expert_ffn**-0.5
    offsets = torch.tensor([rows * (expert + 1) // experts for expert in range(experts)], dtype=torch.int32)
    print("ready", flush=True)
    sys.stdin.readline()
    begin, done, started = time.perf_counter(), 0, 0.0
    while (now := time.perf_counter()) < begin + WARM_UP_S + SECONDS or not done:
        if now >= begin + WARM_UP_S and not started:
            started, done = now, 0
        products = [F.grouped_mm(inputs, weights, offs=offsets) for weights in into]
        inner = F.silu(products[0]) * products[1] if len(products) == 2 else F.gelu(products[0])
        F.grouped_mm(inner, out_of, offs=offsets)
        done += 1
    taken = time.perf_counter() - (started or begin)
    print(2.0 * matrices * hidden * expert_ffn * rows * done / taken, flush=True)


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
