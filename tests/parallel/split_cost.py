"""What a backward in two halves costs beyond one in whole: `python -m tests.parallel.split_cost`, on a quiet machine.

Chunks from the middle of model=tiny, in one process: torch's halves (I, W) and its whole backward in turn, beside the
eager operation of the micro-benchmarks. That it comes from Python and from calls of autograd, the same for every size,
shows in the second length of the sequence.
"""

from __future__ import annotations

import time
from statistics import median

import torch
from torch.distributed.pipelining._backward import stage_backward, stage_backward_input, stage_backward_weight

from piper_hpc.comm import FlatDispatcher
from piper_hpc.microbench.operators import build
from piper_hpc.model import Stage
from piper_hpc.model.names import initialise
from piper_hpc.profiling.clock import clock_for
from piper_hpc.profiling.spans import Recorder
from piper_hpc.spec import Recompute
from piper_hpc.spec.expert_placement import ExpertPlacement
from tests.presets import preset

ROUNDS = 20
OPERATIONS = 256
SEQUENCE = 64
MODEL = preset("tiny", "model.layers=8")


def middle(layers: int) -> Stage:
    """A stage of `layers` layers that is neither first nor last."""
    device = torch.device("cpu")
    stage = Stage(
        MODEL,
        range(1, 1 + layers),
        sequence=SEQUENCE,
        aux_scale=0.01,
        dispatcher=FlatDispatcher(None),
        placements=[ExpertPlacement.linear(MODEL.experts, 1)] * MODEL.layers,
        recorder=Recorder(clock_for(device)),
        recompute=Recompute(),
        device=device,
        dtype=torch.float32,
    )
    initialise(stage, [range(MODEL.experts)] * MODEL.layers, layers=MODEL.layers, seed=0)
    return stage


def backward_s(stage: Stage, batch: int, *, halves: bool) -> float:
    """Seconds of one backward after a forward of [batch, SEQUENCE, hidden]."""
    entered = torch.randn(batch, SEQUENCE, MODEL.hidden, requires_grad=True)
    returned = stage(entered)
    gradient = torch.ones_like(returned)
    stage.zero_grad()
    begun_s = time.perf_counter()
    if halves:
        _, groups = stage_backward_input([returned], [gradient], [entered], iter(stage.parameters()))
        stage_backward_weight(iter(stage.parameters()), groups)
    else:
        stage_backward((returned,), (gradient,), (entered,))
    return time.perf_counter() - begun_s


def main() -> None:
    """Print seconds and eager operations per layer, medians."""
    torch.set_num_threads(1)
    chain = build("host_op", {"operations": OPERATIONS}, torch.device("cpu"), torch.float32)
    for batch in (1, 4):
        for layers in (1, 2, 3):
            stage, found = middle(layers), []
            for _ in range(ROUNDS):
                whole_s, halves_s = (backward_s(stage, batch, halves=halves) for halves in (False, True))
                begun_s = time.perf_counter()
                chain.call()
                operation_s = (time.perf_counter() - begun_s) / OPERATIONS
                found.append((whole_s, halves_s, operation_s))
            whole_s, halves_s, operation_s = (median(column[ROUNDS // 4 :]) for column in zip(*found, strict=True))
            extra = (halves_s - whole_s) / operation_s / layers
            print(
                f"{batch * SEQUENCE} tokens, {layers} layers: whole {1e3 * whole_s:.1f} ms, in halves "
                f"{1e3 * halves_s:.1f} ms: {extra:.0f} operations a layer of {1e6 * operation_s:.1f} us"
            )


if __name__ == "__main__":
    main()
