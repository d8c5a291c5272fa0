"""Layers with shared experts on the ranks of one job, without and with overlap in turn; and their parts alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from piper_hpc.comm.factory import DispatcherFactory
from piper_hpc.comm.hierarchy import Places
from piper_hpc.model.layer import LayerSettings, MoELayer
from piper_hpc.profiling.clock import CpuClock
from piper_hpc.profiling.untimed import UntimedRecorder
from piper_hpc.runs import RunFolder
from piper_hpc.spec import ExpertPlacement, Layout, ModelSpec, Recompute
from piper_hpc.studies.jobs import asked_of
from piper_hpc.submit.payload import run_as_rank
from piper_hpc.tasks.context import Context
from piper_hpc.worker import run_task

OPERATOR = "shared_overlap"
SEQUENCE = 64
Call = Callable[[], None]


@dataclass(frozen=True)
class Point:
    """One layer on every rank. width: of the shared expert; tokens: of a rank."""

    algorithm: str
    width: int
    hidden: int = 256
    experts: int = 32
    top_k: int = 4
    tokens: int = 1024

    @property
    def model(self) -> ModelSpec:
        """A model of such layers."""
        return ModelSpec(
            "shared", layers=1, hidden=self.hidden, heads=4, kv_heads=4, head_dim=32, experts=self.experts,
            top_k=self.top_k, expert_ffn=64, vocab=64, shared_experts=1, shared_expert_ffn=self.width,
        )  # fmt: skip


ALGORITHMS = "flat", "halo", "halo_dedup"
POINTS = [Point(algorithm, width) for algorithm in ALGORITHMS for width in (256, 1024, 4096)]


@dataclass(frozen=True)
class Asked:
    """Which points are measured, by their all-to-all, and how often each."""

    repeats: int
    algorithms: tuple[str, ...] = ALGORITHMS


@dataclass(frozen=True)
class Row:
    """One repeat of a point, means over ranks, of a forward and a backward.

    off_s, on_s: of the layer; shared_s: of the shared expert alone; wait_s: what rows and their gradients are waited
    for where nothing else runs, less what the process computes meanwhile, as long as its quota lets that take.
    """

    off_s: float
    on_s: float
    shared_s: float
    wait_s: float


def work(run_path: str) -> None:
    """Measure on the ranks of the run at `run_path`."""
    run_as_rank(RunFolder(run_path), lambda run, rank_env: run_task(run, rank_env, measure))


def measure(context: Context) -> None:
    """Every point in each repeat."""
    asked, ranks = Asked(**asked_of(context.run.path)), context.rank_env.ranks
    places = Places.of(context.rank_map(Layout(ep=ranks)), range(ranks))
    timeout = timedelta(seconds=context.experiment.cluster.comm_timeout_s)
    factory = DispatcherFactory(places, range(ranks), timeout)
    chosen = [point for point in POINTS if point.algorithm in asked.algorithms]
    layers = {point: layer_of(context, point, factory) for point in chosen}
    for repeat in range(-1, asked.repeats):
        for point, layer in layers.items():
            row = measured(point, layer)
            if context.is_first and repeat >= 0:
                about = {"operator": OPERATOR, "repeat": repeat, "point": asdict(point)}
                context.run.append_measurement(about | asdict(row), context.rank_env.attempt)
    factory.close()


def layer_of(context: Context, point: Point, factory: DispatcherFactory) -> MoELayer:
    """The layer of a point on this rank, with weights alike on all."""
    settings = LayerSettings(
        sequence=SEQUENCE,
        aux_scale=0.0,
        dispatcher=factory.dispatcher(point.algorithm),
        recorder=UntimedRecorder(CpuClock()),
        recompute=Recompute(),
        device=context.device,
        dtype=torch.float32,
    )
    layer = MoELayer(point.model, 0, settings, ExpertPlacement.linear(point.experts, context.rank_env.ranks))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return layer


def measured(point: Point, layer: MoELayer) -> Row:
    """One repeat. Collective; the same on every rank."""
    hidden = torch.randn(point.tokens // SEQUENCE, SEQUENCE, point.hidden, requires_grad=True)
    tokens = hidden.detach().flatten(0, 1).requires_grad_()
    shared = layer.shared
    assert shared is not None

    def whole(overlap: bool) -> None:
        layer.overlap_shared = overlap
        layer.reset()
        layer(hidden).sum().backward()

    off_s, _ = _seconds(lambda: whole(False))
    on_s, _ = _seconds(lambda: whole(True))
    shared_s, shared_cpu_s = _seconds(lambda: shared(tokens).sum().backward())
    # It does nothing but compute: so much longer than on a core of its own does this rank take for what it computes.
    stretch = max(1.0, shared_s / shared_cpu_s)
    return Row(*map(_mean, (off_s, on_s, shared_s, _waited(layer, tokens, stretch))))


def _waited(layer: MoELayer, tokens: torch.Tensor, stretch: float) -> float:
    """Seconds of waiting for rows and for their gradients, less `stretch` times those of the process's CPU."""
    routed = layer.router(tokens.view(-1, SEQUENCE, tokens.shape[-1]))
    begun, handle = layer.dispatcher.dispatch(tokens, routed.expert_ids, routed.weights.detach(), layer.placement)

    def without_cpu(call: Callable[[], object]) -> float:
        lasted_s, used_s = _seconds(call, together=False)
        return max(0.0, lasted_s - stretch * used_s)

    arrived: list[torch.Tensor] = []
    forward_s = without_cpu(lambda: arrived.append(handle.rows(begun)))
    dist.barrier()
    return forward_s + without_cpu(lambda: arrived[0].backward(torch.ones_like(arrived[0])))


def _seconds(call: Callable[[], object], *, together: bool = True) -> tuple[float, float]:
    """(seconds of a call, CPU seconds of all threads of the process meanwhile). together: all ranks begin at once."""
    if together:
        dist.barrier()
    begun_s, used_s = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - begun_s, time.process_time() - used_s


def _mean(value: float) -> float:
    """Over all ranks. Collective."""
    summed = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(summed)
    return float(summed) / dist.get_world_size()
