"""The vendors' own benchmarks, where they are on the PATH: nccl-tests and rccl-tests, OSU Micro-Benchmarks.

A table counts if it is of all ranks that were started. Programs without MPI, and ranks that MPI's launcher did not
bring together, print one table for each rank, of that rank alone (github.com/NVIDIA/nccl-tests/issues/213).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piper_hpc.microbench.exchanges import BUS_FACTOR
from piper_hpc.microbench.groups import GroupFamily
from piper_hpc.microbench.links import minimum_bytes
from piper_hpc.spec import BENCHMARK_VERSION, Layout, RankMap

ITERATIONS, WARMUP = 20, 5

OSU_BY_PEER = ("all_to_all", "all_gather")
"""Where OSU counts bytes for one peer, or of one rank; elsewhere those of a rank's whole buffer."""

BINARIES: dict[str, tuple[str, ...]] = {
    "all_reduce": ("all_reduce_perf", "osu_allreduce"),
    "reduce_scatter": ("reduce_scatter_perf", "osu_reduce_scatter"),
    "all_gather": ("all_gather_perf", "osu_allgather"),
    "all_to_all": ("alltoall_perf", "osu_alltoall", "osu_alltoallv"),
    "p2p": ("sendrecv_perf", "osu_latency"),
}
"""Suite -> names of programs; rccl-tests has those of nccl-tests."""

Row = dict[str, Any]


class TableError(RuntimeError):
    """What a program printed is no table of the ranks that were started."""


@dataclass(frozen=True)
class Program:
    """A benchmark that was found: what it measures, where it is, and how many ranks on which nodes the job has."""

    operation: str
    path: str
    ranks: int
    nodes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the program."""
        return os.path.basename(self.path)

    @property
    def is_nccl_tests(self) -> bool:
        """Whether it is one of nccl-tests or rccl-tests."""
        return self.name.endswith("_perf")

    @property
    def ranks_started(self) -> int:
        """Ranks that it is run on: all of the job's, or the two of a message."""
        return 2 if self.name == "osu_latency" else self.ranks

    @property
    def nodes_used(self) -> tuple[str, ...]:
        """The nodes that it is run on, each with as many of its ranks."""
        return self.nodes[: self.ranks_started]

    def command(self, least: int, most: int, environ: Mapping[str, str] = os.environ) -> list[str]:
        """The command line for messages of `least` to `most` bytes.

        In a Slurm job each rank is a task of a step of its own, beside the ranks that wait, brought together by the
        job's type of MPI (SLURM_MPI_TYPE) or, without one, the site's; elsewhere one process of nccl-tests drives all
        devices, and mpiexec starts OSU's ranks.
        """
        ranks = self.ranks_started
        if self.is_nccl_tests:
            sizes = ["-b", str(least), "-e", str(most), "-f", "4", "-n", str(ITERATIONS), "-w", str(WARMUP)]
            arguments = [*sizes, "-g", "1"]
        else:
            scale = self.ranks if self.operation in OSU_BY_PEER else 1
            arguments = ["-m", f"{max(1, least // scale)}:{most // scale}", "-i", str(ITERATIONS), "-x", str(WARMUP)]
            arguments += [] if self.operation == "p2p" else ["-f"]
        if "SLURM_JOB_ID" in environ:
            mpi = [f"--mpi={environ['SLURM_MPI_TYPE']}"] if environ.get("SLURM_MPI_TYPE") else []
            places = [f"--nodes={len(self.nodes_used)}", f"--nodelist={','.join(self.nodes_used)}"]
            tasks = [f"--ntasks={ranks}", f"--ntasks-per-node={ranks // len(self.nodes_used)}"]
            return ["srun", "--overlap", *mpi, *places, *tasks, self.path, *arguments]
        if self.is_nccl_tests:
            return [self.path, *arguments[:-1], str(ranks)]
        return ["mpiexec", "-n", str(ranks), self.path, *arguments]

    def rows(self, text: str) -> Iterator[Row]:
        """Rows of what it printed. Raises TableError for a table that is not of all ranks that were started."""
        return parse_nccl(text, self) if self.is_nccl_tests else parse_osu(text, self)

    def minimum_bytes(self, rows: Sequence[Row]) -> float:
        """What its timed iterations must send between nodes, over all nodes and rows, at the least; see links.py."""
        places = RankMap.block(
            Layout(dp=self.ranks_started), self.ranks_started // len(self.nodes_used), (0,) * len(self.nodes_used)
        )
        everyone = GroupFamily(self.ranks_started, "system", (tuple(range(self.ranks_started)),))

        def of_call(size: float) -> float:
            if self.name == "sendrecv_perf":  # a ring: each rank sends to the next
                return size * len(self.nodes_used) if len(self.nodes_used) > 1 else 0.0
            return minimum_bytes(self.operation, everyone, size, places)

        return sum(row["iterations_per_sample"] * of_call(row["work"]) for row in rows)


def find_programs(suites: Sequence[str], ranks: int, nodes: Sequence[str]) -> list[Program]:
    """The programs of these suites that are on the PATH."""
    named = [(suite, name) for suite in suites for name in BINARIES.get(suite, ())]
    paths = [(suite, shutil.which(name)) for suite, name in named]
    return [Program(suite, path, ranks, tuple(nodes)) for suite, path in paths if path is not None]


def run(program: Program, least: int, most: int, timeout_s: float) -> list[Row]:
    """Run one program; RuntimeError with the end of what it said where it fails, gives nothing, or takes too long."""
    command = program.command(least, most)
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{' '.join(command)}: {error}") from error
    said = " ".join((ended.stderr or ended.stdout).split())[-300:]
    if ended.returncode:
        raise RuntimeError(f"{' '.join(command)}: exit code {ended.returncode}: {said}")
    try:
        rows = list(program.rows(ended.stdout))
    except TableError as error:
        raise RuntimeError(f"{' '.join(command)}: {error}") from error
    if not rows:
        raise RuntimeError(f"{' '.join(command)}: it printed no rows: {said}")
    return rows


_NCCL = re.compile(
    r"^\s*(?P<size>\d+)\s+(?P<count>\d+)\s+(?P<type>\w+)\s+(?P<redop>\w+)\s+(?:(?P<root>-?\d+)\s+)?"
    r"(?P<time>[\d.]+)\s+(?P<algbw>[\d.]+)\s+(?P<busbw>[\d.]+)\s+(?P<wrong>\d+|N/A)"
)
_NCCL_TYPES = {"float": "float32", "half": "float16", "double": "float64"}
_NCCL_RANK = re.compile(r"^#\s+Rank\s+(\d+)\s", re.MULTILINE)
_PRINTED_GB_PER_S = 0.005
"""Half of the last digit of a printed bandwidth."""


def parse_nccl(text: str, program: Program) -> Iterator[Row]:
    """The out-of-place block of nccl-tests' table; its first columns are size, count, type, redop and root.

    The ranks are those that its head lists under `Using devices`, and its bus bandwidth is theirs, else TableError.
    """
    listed = Counter(int(rank) for rank in _NCCL_RANK.findall(text))
    if listed != Counter(range(program.ranks_started)):
        tables = max(listed.values(), default=1)
        raise _partial_table_error(
            program, f"{tables} tables of {len(listed)} ranks" if tables > 1 else f"{len(listed)} ranks"
        )
    for line in text.splitlines():
        if (match := _NCCL.match(line)) and float(match["size"]) > 0:
            wrong = 0 if match["wrong"] == "N/A" else int(match["wrong"])
            dtype = _NCCL_TYPES.get(match["type"], match["type"])
            seconds = float(match["time"]) * 1e-6
            factor = BUS_FACTOR[program.operation](program.ranks_started)
            expected, printed = float(match["algbw"]) * factor, float(match["busbw"])
            if abs(printed - expected) > 2 * _PRINTED_GB_PER_S * (1 + factor):
                raise TableError(
                    f"it prints a bus bandwidth of {printed:g} GB/s at {match['size']} bytes, where "
                    f"{program.ranks_started} ranks make {expected:.4g}: its ranks are others"
                )
            yield _row(program, "nccl-tests", float(match["size"]), seconds, dtype=dtype, wrong=wrong)


def parse_osu(text: str, program: Program) -> Iterator[Row]:
    """OSU's `# Size  Avg Latency(us) [Min Max Iterations]`; sizes become those of a rank's larger buffer.

    Its head names no ranks. One rank alone runs no such program, so that one table is of all; more than one, in which
    sizes come again, are of a part of them each: TableError.
    """
    whole = program.operation in OSU_BY_PEER
    lines = [line.split() for line in text.splitlines()]
    lines = [fields for fields in lines if len(fields) > 1 and fields[0].isdigit() and int(fields[0])]
    tables = max(Counter(fields[0] for fields in lines).values(), default=1)
    if tables > 1:
        raise _partial_table_error(program, f"{tables} tables")
    for fields in lines:
        size = float(fields[0]) * (program.ranks if whole else 1)
        times = [float(field) * 1e-6 for field in fields[1:4]]
        least_s, most_s = (times[1], times[2]) if len(times) == 3 else (times[0], times[0])
        iterations = int(fields[4]) if len(fields) > 4 and fields[4].isdigit() else ITERATIONS
        yield _row(
            program, "osu", size, times[0],
            least_s=least_s, most_s=most_s, iterations=iterations, dtype="char", wrong=0,
        )  # fmt: skip


def _partial_table_error(program: Program, found: str) -> TableError:
    return TableError(
        f"it tells of {found}, not of {program.ranks_started} ranks together: build it with MPI "
        "(nccl-tests: make MPI=1), and let a launcher that speaks to this MPI start it, for example "
        "+cluster.environment.SLURM_MPI_TYPE=pmi2 "
        "(what `srun --mpi=list` shows and the library has)"
    )


def _row(
    program: Program,
    backend: str,
    size: float,
    seconds: float,
    *,
    dtype: str,
    wrong: int,
    least_s: float | None = None,
    most_s: float | None = None,
    iterations: int = ITERATIONS,
) -> Row:
    """As the exchange suites write it; a mean over iterations is all that is known, or with its ends over ranks."""
    least_s, most_s = least_s or seconds, most_s or seconds
    ranks = program.ranks_started
    return {
        "benchmark_version": BENCHMARK_VERSION,
        "operator": f"{program.operation}/{program.name}/{ranks}",
        "work": size,
        "unit": "bytes",
        "shape": {},
        "dtype": dtype,
        "n": 1,
        "warmup": WARMUP,
        "iterations_per_sample": iterations,
        **{f"{name}_s": seconds for name in ("median", "mean")},
        **{f"{name}_s": least_s for name in ("p5", "min")},
        **{f"{name}_s": most_s for name in ("p95", "max")},
        "statistic": "mean",
        "ranks": list(range(ranks)),
        "nodes": list(program.nodes_used),
        "correct": wrong == 0,
        "wrong": wrong,
        "cell": f"{backend}/{program.name}/{ranks}/{size:.0f}",
        "backend": backend,
        "library": program.name,
        "group_size": ranks,
        "concurrent_groups": 1,
        "algbw_bytes_per_s": size / seconds,
        "busbw_bytes_per_s": size / seconds * BUS_FACTOR[program.operation](ranks),
    }
