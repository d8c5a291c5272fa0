"""A cluster file and a batch script for a Slurm that is reached from here, from what sinfo tells of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import yaml

from piper_hpc.paths import data_folder

FIELDS = "%R %D %c %m %l %G"
"""Partition, nodes, CPUs and MB of a node, time limit, generic resources."""


@dataclass(frozen=True)
class Partition:
    """Nodes of one kind, as sinfo lists them."""

    name: str
    nodes: int
    cpus: int
    memory_mb: int
    limit_min: int
    gpus: int
    gpu: str


def partitions(text: str) -> list[Partition]:
    """From the lines of `sinfo --noheader --format "%R %D %c %m %l %G"`, most GPUs in all first."""
    found = []
    for line in text.splitlines():
        words = line.split()
        if len(words) != 6:
            continue
        gpu = re.search(r"gpu:(?:([^:,()]+):)?(\d+)", words[5])
        cpus, memory = (int(re.sub(r"\D", "", word) or 0) for word in words[2:4])
        found.append(
            Partition(
                words[0], int(words[1]), cpus, memory, minutes(words[4]), int(gpu[2]) if gpu else 0,
                (gpu[1] or "") if gpu else "",
            )
        )  # fmt: skip
    return sorted(found, key=lambda one: (-one.gpus * one.nodes, -one.nodes, one.name))


def minutes(limit: str) -> int:
    """`2-00:00:00`, `12:00:00` or `30:00` in minutes; what is infinite is taken for a day."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", limit)
    if match is None:
        return 24 * 60
    days, hours, mins, _ = (int(part or 0) for part in match.groups())
    return (days * 24 + hours) * 60 + mins


def cluster_file(partition: Partition, name: str, memory_gib: float | None) -> str:
    """The YAML of conf/cluster for a partition. memory_gib: of one device, where a tool told it."""
    ranks = partition.gpus or max(1, partition.cpus)
    document = {
        "name": name,
        "checked": date.today().isoformat(),
        "scheduler": "slurm",
        "nodes": min(2, partition.nodes),
        "ranks_per_node": ranks,
        "device": "cuda" if partition.gpus else "cpu",
        "template": f"{name}.sbatch",
        "partition": partition.name,
        "time_min": min(30, partition.limit_min),
        "limits": [{"nodes": partition.nodes, "time_min": partition.limit_min}],
        "cpus_per_task": max(1, partition.cpus // ranks),
        **({"gpus_per_node": partition.gpus} if partition.gpus else {}),
        "memory_gib_per_rank": memory_gib or round(partition.memory_mb / 1024 / ranks, 1),
        "comm_timeout_s": 600,
        "sources": {
            "partition": f"sinfo, {date.today().isoformat()}",
            "memory_gib_per_rank": "the device's own tool" if memory_gib else
            "assumed: a rank's share of the node's memory; a device's may be less" if partition.gpus else "sinfo",
        },
    }  # fmt: skip
    head = f"# Written by python -m piper_hpc.doctor --write; partition {partition.name}"
    head += f" of {partition.nodes} nodes with {partition.gpus} {partition.gpu or 'GPUs'}\n" if partition.gpus else "\n"
    return head + yaml.safe_dump(document, sort_keys=False)


def ask_sinfo(environment: dict[str, str]) -> str:
    """What sinfo tells of all partitions. Raises CalledProcessError where it does not answer."""
    words = ["sinfo", "--noheader", "--format", FIELDS]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=True, timeout=60).stdout


def device_memory_gib() -> float | None:
    """Of one device of this host, in GiB, by nvidia-smi or rocm-smi; None where neither tells."""
    for words in (
        ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
        ["rocm-smi", "--showmeminfo", "vram", "--csv"],
    ):
        if shutil.which(words[0]) is None:
            continue
        answer = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60)
        sizes = Counter(int(word) for word in re.findall(r"\b\d{4,}\b", answer.stdout))
        if sizes:
            size = sizes.most_common(1)[0][0]
            return round(size / 1024 if words[0] == "nvidia-smi" else size / 2**30, 1)
    return None


def write(path: Path, partition: Partition) -> list[Path]:
    """`cluster/NAME.yaml` and `NAME.sbatch` in the folder of `path`, whose name without ending is NAME; the two files.

    Raises FileExistsError rather than replace either.
    """
    name = path.stem
    made = [path.parent / "cluster" / f"{name}.yaml", path.parent / f"{name}.sbatch"]
    for each in made:
        if each.exists():
            raise FileExistsError(f"{each} is there already")
    made[0].parent.mkdir(parents=True, exist_ok=True)
    made[0].write_text(cluster_file(partition, name, device_memory_gib()))
    text = (data_folder("sbatch_templates") / "generic.sbatch").read_text()
    made[1].write_text(text.replace("cluster=slurm", f"cluster={name}"))
    return made
