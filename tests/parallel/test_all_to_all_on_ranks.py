"""The family on real processes: equal to flat over gloo, the same training step, and an error that names the absent."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from piper_hpc.comm import FlatDispatcher, channel
from piper_hpc.comm.channel import MissingPeerError
from piper_hpc.comm.factory import DispatcherFactory
from piper_hpc.comm.hierarchy import Places
from piper_hpc.model.dispatcher import Dispatcher
from piper_hpc.parallel.dispatcher import AllToAllConfig, make_dispatcher
from piper_hpc.parallel.groups import make_groups
from piper_hpc.runtime.failures import classify
from piper_hpc.spec import ALGORITHMS, OVERLAPS, ExpertPlacement, Layout, ModelSpec, Overlap, RankMap, Workload
from piper_hpc.train import metrics
from piper_hpc.train.settings import TrainSettings
from piper_hpc.train.trainer import Trainer
from tests.processes import run_ranks

TOKENS, TOP_K, HIDDEN = 10, 3, 8
FAMILY = tuple(name for name in ALGORITHMS if name != "flat")
TIMEOUT = timedelta(seconds=30)

Found = dict[str, torch.Tensor]


def routing(load: str, rank: int, experts: int) -> torch.Tensor:
    """expert_ids [tokens, top_k]: even, or hot (experts 0 to 2 alone, rank 1 has no tokens)."""
    generator = torch.Generator().manual_seed(rank)
    if load == "hot":
        return torch.tensor([[0, 1, 2]]).repeat(0 if rank == 1 else TOKENS, 1)
    return torch.stack([torch.randperm(experts, generator=generator)[:TOP_K] for _ in range(TOKENS)])


def dispatched(dispatcher: Dispatcher, load: str, placement: ExpertPlacement, dtype: torch.dtype) -> Found:
    """Rows, sums and gradients of one dispatch and combine on this rank."""
    rank = dist.get_rank()
    ids = routing(load, rank, len(placement.rank_of_expert))
    generator = torch.Generator().manual_seed(50 + rank)
    tokens = torch.randn(len(ids), HIDDEN, generator=generator).to(dtype).requires_grad_()
    weights = torch.rand(len(ids), TOP_K, generator=generator).to(dtype).requires_grad_()
    begun, handle = dispatcher.dispatch(tokens, ids, weights, placement)
    rows = handle.rows(begun)
    sizes = torch.diff(handle.offsets, prepend=torch.zeros(1, dtype=torch.int32)).long()
    scale = torch.tensor([1.0 + expert for expert in placement.experts_of(rank)], dtype=dtype)
    combined = dispatcher.combine(rows * scale.repeat_interleave(sizes)[:, None], handle)
    (combined * torch.arange(1, HIDDEN + 1, dtype=dtype)).sum().backward()
    assert tokens.grad is not None and weights.grad is not None
    return {"rows": rows, "combined": combined, "tokens": tokens.grad, "weights": weights.grad}


def compare_with_flat(per_node: int, racks: tuple[int, ...], algorithms: Sequence[str], overlap: Overlap) -> None:
    """On one rank: `algorithms` against `FlatDispatcher`, with experts moved about."""
    ranks = dist.get_world_size()
    placement = ExpertPlacement(0, (*reversed(range(ranks)), *range(ranks)), (*[0] * ranks, *[1] * ranks))
    loads = (("even", torch.float32), ("hot", torch.float64), ("even", torch.bfloat16))
    flat = FlatDispatcher(dist.group.WORLD)
    expected = [dispatched(flat, load, placement, dtype) for load, dtype in loads]
    factory = DispatcherFactory(
        Places.of(RankMap.block(Layout(ep=ranks), per_node, racks), tuple(range(ranks))), range(ranks), TIMEOUT
    )
    for algorithm in algorithms:
        dispatcher = factory.dispatcher(algorithm, overlap=overlap)
        for (load, dtype), of_flat in zip(loads, expected, strict=True):
            found = dispatched(dispatcher, load, placement, dtype)
            assert torch.equal(found.pop("rows"), of_flat["rows"])
            for name, value in found.items():
                if not ALGORITHMS[algorithm].dedup:
                    assert torch.equal(value, of_flat[name]), (algorithm, load, name)
                elif dtype != torch.bfloat16:
                    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
                    error, norm = (float(each.detach().norm()) for each in (value - of_flat[name], of_flat[name]))
                    assert error <= tolerance * norm, (algorithm, load, name)


@pytest.mark.processes
@pytest.mark.parametrize("overlap", OVERLAPS, ids=OVERLAPS.values())
@pytest.mark.parametrize(
    ("per_node", "racks"), [(2, (0, 0)), (4, (0, 0)), (2, (0, 0, 1, 1))], ids=["2x2", "2x4", "2x2x2"]
)
def test_real_ranks_agree_with_flat(per_node: int, racks: tuple[int, ...], overlap: Overlap) -> None:
    """Every algorithm, with phases in each order of the paper."""
    run_ranks(per_node * len(racks), compare_with_flat, per_node, racks, FAMILY, overlap)


@pytest.mark.processes
def test_sixteen_real_ranks_agree_with_flat() -> None:
    """4 x 4, as in two racks of two nodes, so that the third level is one."""
    run_ranks(16, compare_with_flat, 4, (0, 0, 1, 1), FAMILY, "far_first")


MODEL = ModelSpec(
    "tiny", layers=2, hidden=16, heads=2, kv_heads=2, head_dim=8, experts=8, top_k=3, expert_ffn=16, vocab=32,
    router_aux_coef=0.1,
)  # fmt: skip
WORKLOAD = Workload(global_batch=8, sequence=8)


class Tokens:
    """The tokens of this rank's place, the same at every step; all stages of a pipeline have the same."""

    def __init__(self, layout: Layout) -> None:
        generator = torch.Generator().manual_seed(dist.get_rank() % layout.dense_dp)
        shape = (WORKLOAD.global_batch // layout.dense_dp, WORKLOAD.sequence + 1)
        self.tokens = torch.randint(0, MODEL.vocab, shape, generator=generator)

    def batch(self, first_sample: int) -> torch.Tensor:
        return self.tokens


def step(layout: Layout, per_node: int, racks: tuple[int, ...]) -> tuple[float, torch.Tensor]:
    """Loss of the second step and all gradients of the first, of this rank."""
    settings = TrainSettings(steps=2, dtype="float64", grad_clip=0.3, learning_rate=0.01, collective_timeout_s=30.0)
    rank_map = RankMap.block(layout, per_node, racks)
    trainer = Trainer(MODEL, layout, WORKLOAD, settings, rank_map=rank_map, device=torch.device("cpu"))
    trainer.step(Tokens(layout), 0, 0.01, sample_memory=False)
    gradients = torch.cat([each.grad.flatten() for each in trainer.chunks[0].parameters() if each.grad is not None])
    trainer.step(Tokens(layout), 0, 0.01, sample_memory=False)
    return float(trainer.pipeline.loss.total), gradients.clone()


def step_with_each(degrees: dict[str, int], per_node: int, racks: tuple[int, ...]) -> dict[str, tuple[float, float]]:
    """By algorithm: how far the loss and the gradients of a rank are from those of flat."""
    flat_loss, flat = step(Layout(**degrees), per_node, racks)
    errors = {}
    for algorithm in FAMILY:
        loss, gradients = step(Layout(**degrees, all_to_all=algorithm), per_node, racks)
        errors[algorithm] = abs(loss - flat_loss), float((gradients - flat).norm() / flat.norm())
    return errors


@pytest.mark.processes
@pytest.mark.parametrize(
    ("degrees", "per_node", "racks"),
    [
        ({"ep": 4}, 2, (0, 0)),
        ({"ep": 4}, 1, (0, 0, 1, 1)),
        ({"pp": 2, "ep": 2}, 1, (0, 0, 0, 0)),
        ({"dp": 2, "ep": 2}, 1, (0, 1, 0, 1)),
    ],
    ids=["ep4-2x2", "ep4-2x2x1", "pp2-ep2", "dp2-ep2"],
)
def test_training_step_is_that_of_flat(degrees: dict[str, int], per_node: int, racks: tuple[int, ...]) -> None:
    """In float64: bit for bit without pre-reduction, to rounding with it."""
    for errors in run_ranks(4, step_with_each, degrees | {"micro_batch": 2}, per_node, racks):
        for algorithm, (loss, gradients) in errors.items():
            tolerance = 1e-12 if ALGORITHMS[algorithm].dedup else 0.0
            assert loss <= tolerance and gradients <= tolerance, algorithm


def auto_with_configs() -> tuple[dict[str, object] | None, list[int], float, float, str]:
    """Training on two expert groups of two nodes each, one of which goes flat: on rank 0 the exchange, and the rows
    that left each rank by the routers' counts, losses of flat and of auto, and what auto says without a choice."""
    layout = Layout(ep=4, dp=2, micro_batch=1, all_to_all="auto")
    rank_map = RankMap.block(layout, 2, (0, 0, 1, 1))
    settings = TrainSettings(steps=1, dtype="float64", collective_timeout_s=30.0)
    configs = {(0, 1, 2, 3): AllToAllConfig("halo_dedup", 2), (4, 5, 6, 7): AllToAllConfig("flat")}
    trainer = Trainer(MODEL, layout, WORKLOAD, settings, rank_map=rank_map, device=torch.device("cpu"), configs=configs)
    trainer.step(Tokens(layout), 0, 0.01, sample_memory=False)
    loss, records = float(trainer.pipeline.loss.total), trainer.record()
    flat_map = RankMap.block(Layout(ep=4, dp=2, micro_batch=1), 2, (0, 0, 1, 1))
    flat = Trainer(MODEL, flat_map.layout, WORKLOAD, settings, rank_map=flat_map, device=torch.device("cpu"))
    flat.step(Tokens(layout), 0, 0.01, sample_memory=False)
    flat_records = flat.record()
    try:
        make_dispatcher(rank_map, make_groups(rank_map, TIMEOUT), TIMEOUT)
        said = "nothing"
    except ValueError as error:
        said = str(error)
    if records is None or flat_records is None:
        return None, [], float(flat.pipeline.loss.total), loss, said
    sent, metadata = (records.ranks[name].sum(axis=1) for name in ("payload_bytes", "metadata_bytes"))
    away = [
        int(tokens.sum() - tokens[:, 2 * (rank % 4) : 2 * (rank % 4) + 2].sum())
        for rank, tokens in enumerate(flat_records.ranks["expert_tokens"])
    ]
    assert sent[4:].tolist() == [4 * 8 * MODEL.hidden * rows for rows in away[4:]], "every choice sent away, four times"
    row = metrics.summarise(records, layout, tokens=1)
    assert sent[:4].sum() > 0
    assert not metadata[4:].any(), "flat takes nothing along"
    return row["exchange"], away, float(flat.pipeline.loss.total), loss, said


@pytest.mark.processes
def test_auto_trains_each_group_its_own_way_and_counts_what_it_sends() -> None:
    found = run_ranks(8, auto_with_configs)
    for _, _, flat, auto, said in found:
        assert auto == pytest.approx(flat, rel=1e-12)
        assert said.startswith("all_to_all=auto: nothing was chosen for the ranks 0, 1, 2, 3; name an algorithm")
    exchange, away, *_ = found[0]
    assert exchange is not None and exchange["exposed_s"] > 0
    payload = exchange["payload_bytes"]
    # Nodes 0 and 1 make a rack, 2 and 3 another: nothing crosses racks.
    assert payload["node"] > 0 and payload["rack"] > 0 and payload["system"] == 0
    # Two hops send more rows inside nodes than flat, shared rows fewer between them.
    assert payload["rack"] < 4 * 8 * MODEL.hidden * sum(away)
    # Choices take along an index and a weight in float64, whose gradient comes back, and only between nodes.
    metadata = exchange["metadata_bytes"]
    assert metadata["rack"] > 0 and metadata["rack"] % (4 + 2 * 8) == 0
    assert metadata["node"] == metadata["system"] == 0


def without_rank_3(algorithm: str) -> tuple[str, str] | None:
    """Rank 3 never dispatches; the others' error and its failure class."""
    rank_map = RankMap.block(Layout(ep=4, all_to_all=algorithm), 2, (0, 0))
    timeout = timedelta(seconds=5)  # on a busy machine, too, those who are there have entered by then
    with patch.object(channel, "GRACE_S", 1.0):
        dispatcher = make_dispatcher(rank_map, make_groups(rank_map, timeout), timeout)
        dispatched(dispatcher, "even", ExpertPlacement.linear(8, 4), torch.float32)
        if dist.get_rank() == 3:
            return None
        try:
            dispatched(dispatcher, "even", ExpertPlacement.linear(8, 4), torch.float32)
        except MissingPeerError as error:
            return str(error), classify(error)
    return "no error", ""


@pytest.mark.processes
def test_a_missing_rank_is_named_with_the_phase_that_it_did_not_enter() -> None:
    flat = run_ranks(4, without_rank_3, "flat")
    for message, kind in flat[:3]:
        # A step of flat enters five exchanges, so the next is number 6.
        assert message.startswith("all-to-all flat, exchange 6 of ranks 0, 1, 2, 3: rank 3 is the first that did not")
        assert kind == "hang"
    halo = run_ranks(4, without_rank_3, "halo")
    assert "all-to-all between nodes, exchange" in halo[1][0] and "ranks 1, 3: rank 3 is the first" in halo[1][0]
    assert "all-to-all inside nodes, exchange" in halo[2][0] and "ranks 2, 3: rank 3 is the first" in halo[2][0]
