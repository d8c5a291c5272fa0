"""Batch scripts: rendered as the golden files say, valid for bash, and the template serves by hand unchanged."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from piper_hpc.cluster.placement import request
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.paths import data_folder
from piper_hpc.runs import RunFolder
from piper_hpc.spec import Layout
from piper_hpc.submit.script import render, script, template_of
from tests.presets import experiment

GOLDEN = Path(__file__).parent / "golden"
TEMPLATES = sorted(data_folder("sbatch_templates").glob("*.sbatch"))
SITES = ("perlmutter", "lumi_g", "alps", "jupiter", "juwels_booster", "leonardo_booster", "delta", "deltaai")


def cluster(*overrides: str):
    return experiment("task=plan", *overrides).cluster


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("testbed", ["cluster=testbed", "cluster.nodes=2", "cluster.time_min=5"]),
        *((site, [f"cluster={site}", "cluster.account=abc123"]) for site in SITES),
        ("frontier", ["cluster=frontier", "cluster.nodes=16", "cluster.account=abc123"]),
        (
            "generic",
            ["cluster=slurm", "cluster.account=abc123", "cluster.partition=gpu", "cluster.modules=[cuda/12.6]"],
        ),
        ("frontier_pack", ["cluster=frontier", "cluster.nodes=16", "cluster.account=abc123"]),
    ],
)
def test_a_rendered_script_is_the_golden_one(name, overrides):
    chosen = cluster(*overrides)
    placement = request(chosen, Layout(placement="pack" if name.endswith("_pack") else "linear"), {})
    text = script(chosen, RunFolder("/runs/r1"), "/opt/python", "/opt/python -m work", placement)
    assert text == (GOLDEN / f"{name}.sbatch").read_text()


@pytest.mark.parametrize(
    "path", [*TEMPLATES, *sorted(GOLDEN.glob("*.sbatch"))], ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_bash_accepts_the_script(path):
    checked = subprocess.run(["bash", "-n", str(path)], capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_a_directive_without_a_value_has_none():
    text = render("#!/bin/bash\n#SBATCH --time=5\nsrun\n", {"contiguous": ""}, "py", "py")
    assert "#SBATCH --time=5\n#SBATCH --contiguous\n" in text


def test_every_slurm_cluster_that_names_a_template_has_it():
    named = {
        path.stem: facts.template
        for path in (data_folder("conf") / "cluster").glob("*.yaml")
        if "template" in (facts := OmegaConf.load(path))
    }
    assert named.keys() >= {"frontier", "slurm", "testbed"}
    assert all(template_of(ClusterConfig(template=template)).is_file() for template in named.values())


def test_directives_are_replaced_in_place_added_at_the_end_and_the_body_is_kept():
    template = "#!/bin/bash\n#SBATCH --nodes=1\n#SBATCH --time=5\nset -e\nsrun $PIPER_COMMAND\n"
    text = render(template, {"time": "9", "account": "abc"}, "py", "py -m 'my work'")
    assert text.splitlines() == [
        "#!/bin/bash",
        "#SBATCH --nodes=1",
        "#SBATCH --time=9",
        "#SBATCH --account=abc",
        "export PIPER_PYTHON=py",
        "PIPER_COMMAND='py -m '\"'\"'my work'\"'\"''",
        "set -e",
        "srun $PIPER_COMMAND",
    ]


def test_what_the_scripts_must_do_for_slurm_traps():
    for path in TEMPLATES:
        text = path.read_text()
        assert "export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK" in text  # lost since Slurm 22.05
        assert "--open-mode=append" in text  # a requeued job keeps its log
        assert "--kill-on-bad-exit=1" in text  # one dead rank ends the others
        assert "MASTER_ADDR=" in text
