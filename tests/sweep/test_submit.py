"""A pool's batch script: the site's own, with an array and a way to start steps."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from piper_hpc.config import ConfigError
from piper_hpc.config.schema import ClusterConfig
from piper_hpc.paths import data_folder
from piper_hpc.runs.sweeps import SweepFolder
from piper_hpc.sweep.submit import array_script

TEMPLATES = sorted(path.name for path in data_folder("sbatch_templates").glob("*.sbatch"))


@pytest.mark.parametrize("template", TEMPLATES)
def test_every_sites_script_starts_a_pool_and_tells_it_how_to_start_steps(template: str, tmp_path: Path) -> None:
    cluster = ClusterConfig(name="site", template=template, nodes=2, container="apptainer exec image.sif")
    text = array_script(SweepFolder(tmp_path / "runs" / "sweeps" / "a b"), 3, cluster, {"switches": "1@60"}, 5)
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "#SBATCH --array=0-4\n" in text and "#SBATCH --switches=1@60\n" in text
    assert "/logs/pool-%A_%a.out" in text and "#SBATCH --job-name=" in text
    given = next(
        line for line in (data_folder("sbatch_templates") / template).read_text().splitlines() if "srun --" in line
    )
    words = given.removeprefix('eval "').removesuffix(' $PIPER_COMMAND"')
    last = text.rstrip().splitlines()[-2:]
    assert last == [f'export PIPER_STEP="{words}"', 'eval "$PIPER_COMMAND"']
    # The pool itself runs outside of srun and of the container, which hold for its steps.
    command = next(line for line in text.splitlines() if line.startswith("PIPER_COMMAND="))
    assert "piper_hpc.sweep.pool" in command and "apptainer" not in command and "a b" in command


def test_a_script_without_the_line_that_starts_ranks_is_refused(tmp_path: Path) -> None:
    own = tmp_path / "own.sbatch"
    own.write_text("#!/bin/bash\n#SBATCH --nodes=1\nmpirun $PIPER_COMMAND\n")
    cluster = ClusterConfig(name="site", template=str(own))
    with pytest.raises(ConfigError, match=r"eval .srun .*generic\.sbatch"):
        array_script(SweepFolder(tmp_path / "runs" / "sweeps" / "x"), 0, cluster, {}, 1)
