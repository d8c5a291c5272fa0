"""The vendors' programs run by rank 0 while the others wait, and held against what the links sent meanwhile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist

from piper_hpc.microbench import vendor
from piper_hpc.microbench.links import LinkCounter, missing_bytes
from piper_hpc.microbench.rows import OnRow
from piper_hpc.microbench.vendor import Program, Row
from piper_hpc.runtime.group import broadcast_from_rank0


@dataclass
class VendorSuite:
    """What rank 0 has on its PATH for the suites that were asked for; every rank runs it, rank 0 is given the rows.

    node_of_rank: names, in rank order; timeout_s: of one program; done: cell -> row of what need not be measured again;
    counter: of this node's link, on every rank or on none. `left_out`: program -> why, afterwards, on rank 0.
    """

    device: torch.device
    node_of_rank: Sequence[str]
    timeout_s: float
    on_row: OnRow
    done: Mapping[str, Row] = field(default_factory=dict)
    counter: LinkCounter | None = None
    left_out: dict[str, str] = field(default_factory=dict)

    def run(self, suites: Sequence[str], least: int, most: int) -> None:
        """Run the programs of these suites, each for messages of `least` to `most` bytes."""
        nodes = list(dict.fromkeys(self.node_of_rank))
        for program in broadcast_from_rank0(lambda: vendor.find_programs(suites, len(self.node_of_rank), nodes)):
            if any(row.get("library") == program.name for row in self.done.values()):
                continue
            if program.is_nccl_tests and self.device.type != "cuda":
                self.left_out[program.name] = "it needs CUDA or ROCm devices, and these ranks have none"
                continue
            self._measure(program, least, most)

    def _measure(self, program: Program, least: int, most: int) -> None:
        """Run one program.

        Its rows cannot be told apart by the counters, which are read before it begins and after it has ended: all of
        them are refused where fewer bytes were sent than its rows together must move. Ranks wait at the store, since
        in a barrier they would keep their devices busy.
        """
        rank, world = dist.get_rank(), dist.get_world_size()
        assert dist.group.WORLD is not None
        store = dist.PrefixStore(f"vendor/{program.operation}/{program.name}", dist.group.WORLD.get_group_store())
        patience = timedelta(seconds=2 * self.timeout_s)
        before = self._sent_bytes()
        store.set(f"ready{rank}", "")
        rows: list[Row] = []
        if rank == 0:
            store.wait([f"ready{other}" for other in range(world)], patience)
            try:
                rows = vendor.run(program, least, most, self.timeout_s)
            except (RuntimeError, ValueError) as error:  # ValueError: a line that is like one of a table
                self.left_out[program.name] = str(error)
            finally:
                store.set("ended", "")
        store.wait(["ended"], patience)
        store.set(f"sent{rank}", str(self._sent_bytes() - before))
        if rank == 0:
            keys = [f"sent{other}" for other in range(world)]
            store.wait(keys, patience)
            told = zip(self.node_of_rank, store.multi_get(keys), strict=True)
            by_node = {node: float(sent) for node, sent in told}  # one rank of each node speaks for its link
            for row in rows:
                self.on_row(row | self._verdict(program.minimum_bytes(rows), sum(by_node.values())))

    def _sent_bytes(self) -> int:
        return self.counter.sent_bytes() if self.counter is not None else 0

    def _verdict(self, least: float, sent: float) -> Row:
        """What the counters say; `link_counter` is null where nothing was watched, or nothing leaves a node."""
        if self.counter is None or not least:
            return {"link_counter": None}
        refused = missing_bytes(self.counter.interface, sent, least)
        watched: Row = {"link_counter": self.counter.interface}
        return watched | ({"correct": False, "refused": refused} if refused else {})
