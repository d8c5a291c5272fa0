"""`up --profile MACHINE --model MODEL`: measure a rank, shape links by it, write the model, and check the ratio."""

from __future__ import annotations

import os
import statistics
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml
from rich.console import Console
from rich.table import Table

from piper_hpc.testbed import presets, rate, scaling
from piper_hpc.testbed.options import Options
from piper_hpc.testbed.scaling import FullMachine, Layer, Scaling
from piper_hpc.testbed.state import Testbed

CHECK_S = 90.0
LINK_OF = {"node": "node", "nic": "nic", "system": "rack"}


@dataclass(frozen=True)
class Profile:
    """What to be a scaled version of."""

    machine: FullMachine
    layer: Layer


def of(options: Options) -> Profile | None:
    """The named machine and layer; None where none was asked for. Raises Fault for names that are none."""
    if not options.profile:
        return None
    return Profile(presets.machine(options.profile, options.achieved_tflop_per_s or None), presets.layer(options.model))


def fitted(options: Options, profile: Profile) -> tuple[Options, Scaling]:
    """The options with rates and memory that scale the profile, by what a rank was measured to compute just now."""
    layer = scaling.shrink(profile.layer, options.ranks)
    found = scaling.scale(profile.machine, profile.layer, options, rate.measure(layer, options))
    rates = found.rates_mbit(options)
    memory_mib = min(options.memory_mib, found.memory_mib())
    return (
        replace(
            options, node_mbit_per_s=rates["node"], nic_mbit_per_s=rates["nic"], rack_mbit_per_s=rates["rack"],
            memory_mib=memory_mib,
        ),
        found,
    )  # fmt: skip


def write(folder: Path, found: Scaling) -> Path:
    """The scaled model as an option of the launcher's group `model`."""
    path = folder / "conf" / "model" / f"{found.layer.name}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(found.model(), sort_keys=False))
    return path


def command(folder: Path, found: Scaling, options: Options) -> str:
    """How to train the scaled model."""
    words = [f"--config-dir {folder / 'conf'}", f"model={found.layer.name}", *found.overrides(options)]
    return " ".join(["python -m piper_hpc.launch", *words])


def document(folder: Path, found: Scaling, options: Options) -> dict[str, object]:
    """For the testbed's record: what is scaled from what, and how to train it."""
    return {
        "machine": asdict(found.machine),
        "named_layer": asdict(found.full),
        "layer": asdict(found.layer),
        "flops_per_s": found.flops_per_s,
        "communication_over_compute": found.wanted,
        "table": [asdict(row) for row in scaling.table(found, options)],
        "command": command(folder, found, options),
    }


def check(testbed: Testbed, found: Scaling, options: Options) -> dict[str, object]:
    """Communication over compute as the testbed has it: what ranks of a job compute, and what its links carried.

    A job of all ranks runs the scaled layer's experts under the quota that Slurm's prolog gives it. `failed` says why
    where it does not run.
    """
    run = [
        "srun",
        "--quiet",
        f"--nodes={options.nodes}",
        f"--ntasks={options.ranks}",
        "--ntasks-per-node",
        str(options.ranks_per_node),
    ]
    environment = rate.variables() | testbed.environment
    try:
        answer = subprocess.run(
            [*run, *rate.command(found.layer, options.ranks)],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=CHECK_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return {"failed": f"the job took longer than {CHECK_S:.0f} s"}
    rates = [float(word) for word in answer.stdout.split() if word[0].isdigit()]
    if answer.returncode or len(rates) != options.ranks:
        return {"failed": " ".join(answer.stderr.split()[-40:]) or f"{len(rates)} of {options.ranks} ranks answered"}
    flops_per_s = statistics.median(rates)
    sharers = {"node": options.ranks_per_node, "nic": options.ranks_per_node}
    sharers["system"] = options.ranks_per_node * -(-options.nodes // options.racks)
    achieved = {
        kind: scaling.balance(
            flops_per_s, testbed.links[link].measured_bytes_per_s / sharers[kind], found.layer.flops_per_byte
        )
        for kind, link in LINK_OF.items()
        if link in testbed.links
    }
    return {
        "flops_per_s": flops_per_s,
        "flops_per_s_range": [min(rates), max(rates)],
        "communication_over_compute": achieved,
    }


def show(testbed: Testbed) -> str:
    """The scaling for people: every quantity there and here, the check, and the command that trains."""
    found = testbed.scaling
    if found is None:
        return ""
    console = Console(width=int(os.environ.get("COLUMNS") or 150), no_color=True, highlight=False)
    machine, layer = found["machine"], found["named_layer"]
    names = Table("quantity", machine["name"] + ", " + layer["name"], "testbed", "", "why", box=None)
    for row in found["table"]:
        names.add_row(row["quantity"], row["named"], row["scaled"], row["outcome"], row["note"])
    with console.capture() as captured:
        console.print(names)
    lines = [captured.get().rstrip(), f"achieved there: {machine['sources']['flops_per_s']}"]
    checked = found["checked"]
    if "failed" not in checked:
        low, high = checked["flops_per_s_range"]
        computes = f"{checked['flops_per_s']:.3g} FLOP/s ({low:.3g} to {high:.3g} over ranks)"
        lines.append(f"check     a rank of a job computes {computes}")
        for kind, has in checked["communication_over_compute"].items():
            asked = found["communication_over_compute"][kind]
            what = f"communication : compute {scaling.KINDS[kind]}"
            lines.append(f"check     {what:<48}{has:7.3f}, asked {asked:.3f} ({has / asked - 1:+.1%})")
    else:
        lines.append(f"check     not done: {checked['failed']}")
    return "\n".join([*lines, f"train     {found['command']}"])
