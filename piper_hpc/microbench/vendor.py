"""The vendors' own benchmarks, where they are on the PATH: nccl-tests and rccl-tests, OSU Micro-Benchmarks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from piper_hpc.microbench.exchanges import BUS_FACTOR
from piper_hpc.spec import BENCHMARK_VERSION

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


@dataclass(frozen=True)
class Program:
    """A benchmark that was found: what it measures, where it is, and on how many ranks of which nodes it is run."""

    operation: str
    path: str
    ranks: int
    nodes: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the program."""
        return os.path.basename(self.path)

    @property
    def of_nccl(self) -> bool:
        """Whether it is one of nccl-tests or rccl-tests."""
        return self.name.endswith("_perf")

    def command(self, least: int, most: int, environ: Mapping[str, str] = os.environ) -> list[str]:
        """The command line for messages of `least` to `most` bytes.

        In a Slurm job each rank is a task of a step of its own, beside the ranks that wait; elsewhere one process of
        nccl-tests drives all devices, and mpiexec starts OSU's ranks.
        """
        ranks = 2 if self.name == "osu_latency" else self.ranks
        if self.of_nccl:
            sizes = ["-b", str(least), "-e", str(most), "-f", "4", "-n", str(ITERATIONS), "-w", str(WARMUP)]
            arguments = [*sizes, "-g", "1"]
        else:
            scale = self.ranks if self.operation in OSU_BY_PEER else 1
            arguments = ["-m", f"{max(1, least // scale)}:{most // scale}", "-i", str(ITERATIONS), "-x", str(WARMUP)]
            arguments += [] if self.operation == "p2p" else ["-f"]
        if "SLURM_JOB_ID" in environ:
            return ["srun", "--overlap", "--nodes", str(len(self.nodes)), "--ntasks", str(ranks), self.path, *arguments]
        if self.of_nccl:
            return [self.path, *arguments[:-1], str(ranks)]
        return ["mpiexec", "-n", str(ranks), self.path, *arguments]

    def rows(self, text: str) -> Iterator[Row]:
        """Rows of what it printed."""
        return parse_nccl(text, self) if self.of_nccl else parse_osu(text, self)


def found(suites: Sequence[str], ranks: int, nodes: Sequence[str]) -> list[Program]:
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
    rows = list(program.rows(ended.stdout))
    if ended.returncode or not rows:
        said = " ".join((ended.stderr or ended.stdout).split())[-300:]
        raise RuntimeError(f"{' '.join(command)}: exit code {ended.returncode}, {len(rows)} rows: {said}")
    return rows


_NCCL = re.compile(
    r"^\s*(?P<size>\d+)\s+(?P<count>\d+)\s+(?P<type>\w+)\s+(?P<redop>\w+)\s+(?:(?P<root>-?\d+)\s+)?"
    r"(?P<time>[\d.]+)\s+(?P<algbw>[\d.]+)\s+(?P<busbw>[\d.]+)\s+(?P<wrong>\d+|N/A)"
)
_NCCL_TYPES = {"float": "float32", "half": "float16", "double": "float64"}


def parse_nccl(text: str, program: Program) -> Iterator[Row]:
    """The out-of-place block of nccl-tests' table; its first columns are size, count, type, redop and root."""
    for line in text.splitlines():
        if (match := _NCCL.match(line)) and float(match["size"]) > 0:
            wrong = 0 if match["wrong"] == "N/A" else int(match["wrong"])
            dtype = _NCCL_TYPES.get(match["type"], match["type"])
            seconds = float(match["time"]) * 1e-6
            yield _row(program, "nccl-tests", float(match["size"]), seconds, dtype=dtype, wrong=wrong)


def parse_osu(text: str, program: Program) -> Iterator[Row]:
    """OSU's `# Size  Avg Latency(us) [Min Max Iterations]`; sizes become those of a rank's larger buffer."""
    whole = program.operation in OSU_BY_PEER
    for line in text.splitlines():
        fields = line.split()
        if len(fields) < 2 or not fields[0].isdigit() or int(fields[0]) == 0:
            continue
        size = float(fields[0]) * (program.ranks if whole else 1)
        times = [float(field) * 1e-6 for field in fields[1:4]]
        least_s, most_s = (times[1], times[2]) if len(times) == 3 else (times[0], times[0])
        yield _row(program, "osu", size, times[0], least_s=least_s, most_s=most_s, dtype="char", wrong=0)


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
) -> Row:
    """As the exchange suites write it; a mean over iterations is all that is known, or with its ends over ranks."""
    least_s, most_s = least_s or seconds, most_s or seconds
    ranks = 2 if program.operation == "p2p" and not program.of_nccl else program.ranks
    return {
        "benchmark_version": BENCHMARK_VERSION,
        "operator": f"{program.operation}/{program.name}/{ranks}",
        "work": size,
        "unit": "bytes",
        "shape": {},
        "dtype": dtype,
        "n": 1,
        "warmup": WARMUP,
        "iterations_per_sample": ITERATIONS,
        **{f"{name}_s": seconds for name in ("median", "mean")},
        **{f"{name}_s": least_s for name in ("p5", "min")},
        **{f"{name}_s": most_s for name in ("p95", "max")},
        "statistic": "mean",
        "ranks": list(range(ranks)),
        "nodes": list(program.nodes),
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
