"""What the user decides about training, apart from model, layout and batch. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

WARMUP_STEPS = 2
"""Steps of an attempt that are not representative: connections open in the first, memory is sampled in the second."""


@dataclass(frozen=True)
class TrainSettings:
    """Optimizer, length and records of a training run.

    learning_rate is reached after `warmup_steps` and then held (`constant`) or brought down to
    `minimum_learning_rate` at the last step along half a cosine (`cosine`).
    grad_clip: the largest global gradient norm; infinity for no clipping.
    dtype: of parameters, activations, gradients and optimizer state alike: float32, bfloat16, or float64 for tests.
    checkpoint_every, checkpoint_every_s: steps and seconds between checkpoints; 0: none so. One is written at the end.
    checkpoint_keep: how many whole ones stay, the newest; 0: all. checkpoint_keep_every: those of every so many steps
    stay too; 0: none. checkpoint_inodes: the most files and folders of all of them.
    on_non_finite: what a gradient that is not finite does: `stop` ends training on all ranks, `skip` goes on with the
    next step, weights and moments as they were.
    peak_flops: FLOP/s of one rank, the denominator of MFU; flops_per_token: model FLOPs, forward and backward.
    collective_timeout_s: how long a rank waits for its peers before it gives up.
    routing: a workload of piper_hpc.spec.routing_workloads that says which experts tokens go to; None: the router does.
    timing: whether every step is timed by term; else rows have its whole length alone.
    """

    steps: int
    seed: int = 0
    learning_rate: float = 3e-3
    minimum_learning_rate: float = 3e-4
    schedule: str = "cosine"
    warmup_steps: int = 10
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    grad_clip: float = 1.0
    dtype: str = "float32"
    checkpoint_every: int = 0
    checkpoint_every_s: float = 0.0
    checkpoint_keep: int = 2
    checkpoint_keep_every: int = 0
    checkpoint_inodes: int = 100_000
    on_non_finite: str = "stop"
    peak_flops: float = 0.0
    flops_per_token: float = 0.0
    collective_timeout_s: float = 600.0
    routing: str | None = None
    timing: bool = True
