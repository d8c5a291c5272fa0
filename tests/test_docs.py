"""The pages tell what is so: their commands run (here, or where a table says), their links lead somewhere, and what is
written from the code is up to date."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.cluster.calibration import save
from piper_hpc.cluster.machine import describe
from piper_hpc.config import reference
from tests.full import full
from tests.presets import experiment
from tests.resource_model.clusters import calibration

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SITE_PAGES = sorted((ROOT / "docs" / "sites").glob("*.md"))
"""One a site; their commands are run by tests/test_site_pages.py."""
README_WORDS = 1_100

LAUNCH, JOBS, TESTBED = (f"python -m piper_hpc.{name}" for name in ("launch", "jobs", "testbed"))

# Commands that need root or take long, and where they are run: a file, and words in it that show so. Some are run there
# with fewer steps, and `up --profile` in its parts.
ELSEWHERE = {
    "make run": (".ci/run", "make run"),
    "make install": ("Makefile", "install: $(VENV)/run.stamp"),
    "python -m piper_hpc.doctor": ("tests/doctor/test_doctor.py", "host.examine(LOCAL"),
    "make compare-strategies": ("tests/slurm/test_runs.py", "headline(["),
    "make ablation": ("tests/slurm/test_runs.py", "ablation(["),
    "python -m piper_hpc.testbed.saved_quota": ("tests/testbed/test_saved_quota.py", "saved_quota.measure"),
    "make test": (".ci/run", "make test"),
    "make quick": ("Makefile", "quick:"),
    "python -m piper_hpc.studies.shared_overlap": ("tests/slurm/test_runs.py", "shared_overlap(["),
    "make validate-testbed": ("tests/slurm/test_runs.py", "piper_hpc.studies.own_runs"),
    "python -m piper_hpc.studies.own_runs --show RUN": ("tests/studies/test_own_runs_study.py", "--show"),
    "python -m piper_hpc.studies.own_runs --show RUN --calibration FILE": (
        "tests/studies/test_own_runs_study.py",
        '"--calibration"',
    ),
    "python -m piper_hpc.studies.migration": ("tests/studies/test_migration_study.py", "main([])"),
    f"{LAUNCH} train=smoke parallelism.pp=1 parallelism.ep=4 parallelism.migration=auto "
    "parallelism.migration_every=2": ("tests/studies/test_migration_study.py", "parallelism.migration_every=2"),
    f"{LAUNCH} train=smoke train.steps=4 train.checkpoint_every=2": (
        "tests/test_resume.py",
        "train.checkpoint_every=4",
    ),
    f"{JOBS} resume latest train.steps=6": ("tests/test_resume.py", '"resume", "latest"'),
    f"{JOBS} resume latest train.steps=8 parallelism.pp=1 parallelism.ep=4": (
        "tests/test_resume.py",
        "parallelism.ep=4",
    ),
    "make faults": ("tests/slurm/test_faults.py", "def hurt"),
    "python -m piper_hpc.convert to-checkpoint MODEL CHECKPOINT": ("tests/convert/test_convert.py", "to-checkpoint"),
    "python -m piper_hpc.convert to-model CHECKPOINT NEW_MODEL --config MODEL/config.json --dtype bfloat16": (
        "tests/convert/test_convert.py",
        '"--dtype", "bfloat16"',
    ),
    f"{LAUNCH} model=hf model.path=MODEL/config.json train.resume_from=CHECKPOINT": (
        "tests/convert/test_convert.py",
        "train.resume_from=",
    ),
    "make bench-layer": ("tests/studies/test_layer_speed.py", "layer_speed"),
    "make bench-a2a": ("tests/slurm/test_all_to_all_bench.py", "piper_hpc.studies"),
    "source .venv/bin/activate": ("Makefile", "VENV ?= .venv"),
    LAUNCH: (".ci/run", "make run"),
    f"{LAUNCH} tracking=wandb_offline train=smoke": ("tests/test_local_run.py", "tracking=wandb_offline"),
    f"{JOBS} sync": ("tests/tracking/test_sync.py", "sync(monkeypatch, tmp_path) == 0"),
    f"{LAUNCH} task=microbench": ("tests/test_local_microbench.py", "task=microbench"),
    f"{LAUNCH} task=microbench 'task.suites=[calibration,gemm,p2p,all_to_all]' task.cell_s=0.05": (
        "tests/test_local_microbench.py",
        "task.suites=[calibration,gemm,p2p,all_to_all,dispatch]",
    ),
    f"{LAUNCH} task=microbench 'task.suites=[calibration,dispatch]' task.cell_s=0.05": (
        "tests/test_local_microbench.py",
        "task.suites=[calibration,gemm,p2p,all_to_all,dispatch]",
    ),
    f"{LAUNCH} train=smoke parallelism.pp=1 parallelism.ep=4 parallelism.all_to_all=auto": (
        "tests/test_local_microbench.py",
        '"parallelism.pp=1", "parallelism.ep=4", "parallelism.all_to_all=auto"',
    ),
    f"{LAUNCH} task=plan": ("tests/test_local_run.py", "task=plan"),
    f"{LAUNCH} task=plan experiment=paper_mixtral": (
        "tests/test_plan_command.py",
        '"task=plan", "experiment=paper_mixtral"',
    ),
    f"{LAUNCH} parallelism=auto train=smoke": ("tests/test_local_run.py", '"parallelism=auto", "train=smoke"'),
    f"{LAUNCH} task=profile train=smoke": ("tests/test_local_run.py", '"task=profile", "train=smoke"'),
    f"{LAUNCH} cluster=testbed": ("tests/slurm/test_runs.py", "cluster=testbed"),
    f"{LAUNCH} task=plan model=deepseek_v3 cluster=dgx_h100 cluster.nodes=256 train.sequence=4096 "
    "train.global_batch=4096": ("tests/test_docs.py", "docs/plan_output.py"),
    f"{LAUNCH} -m parallelism.pp=1,2,4 parallelism.all_to_all=flat,halo_dedup cluster=testbed train=smoke": (
        "tests/slurm/test_sweeps.py",
        '"parallelism.pp=1,2,4", "parallelism.all_to_all=flat,halo_dedup", "cluster=testbed", "train=smoke"',
    ),
    f"{LAUNCH} sweep=plan sweep.top=4 train=smoke cluster=testbed": ("tests/sweep/test_local.py", '"sweep=plan"'),
    f"{JOBS} status SWEEP": ("tests/slurm/test_sweeps.py", '"jobs", "status", sweep.name'),
    f"{JOBS} dashboard SWEEP": ("tests/slurm/test_sweeps.py", '"jobs", "dashboard", sweep.name'),
    f"{JOBS} resume SWEEP": ("tests/slurm/test_sweeps.py", '"jobs", "resume", sweep.name'),
    f"{JOBS} sync SWEEP": ("tests/slurm/test_sweeps.py", '"jobs", "sync", sweep.name'),
    "python -m piper_hpc.planner.benchmark": ("tests/planner/test_analytical_search.py", "piper_hpc.planner.benchmark"),
    "python -m analysis.validate published": ("tests/analysis/test_published_validate.py", 'main(["published"])'),
    "python -m analysis.validate replay runs/PROFILE": ("tests/test_local_run.py", '"replay"'),
    "python -m piper_hpc.studies.all_to_all --show RUN": ("tests/studies/test_all_to_all_study.py", "--show"),
    "sbatch -A PROJECT sbatch_templates/frontier.sbatch train=paper": ("tests/slurm/test_runs.py", "by_hand"),
    f"{TESTBED} up": ("tests/slurm/conftest.py", 'run_testbed("up"'),
    f"{TESTBED} status": ("tests/slurm/test_testbed.py", 'run_testbed("status"'),
    f"{TESTBED} down": ("tests/slurm/conftest.py", 'run_testbed("down")'),
    f"{TESTBED} up --profile frontier --model deepseek_v2": ("tests/testbed/test_scaling.py", 'profile="frontier"'),
}


def commands(page: Path) -> list[str]:
    """The lines of a page's bash blocks, without their comments."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(), flags=re.DOTALL)
    lines = (line.split(" #")[0].strip() for block in blocks for line in block.splitlines())
    return [line for line in lines if line]


OF_A_RUN = (
    *(f"{JOBS} {name}" for name in ("status", "logs", "cancel", "sync")),
    "python -m analysis.report",
    "python -m analysis.validate runs",
)
"""What asks for a run in `runs/`, and so comes after what makes one."""

OF_A_FOLDER = ("runs/", "logs/", "checkpoints/", "sync/", "claims/")

EVERY = list(dict.fromkeys(command for page in PAGES for command in commands(page)))
LONG = {
    "parallelism.micro_batch=1,2": "tests/sweep/test_local.py",
    "data.sources=": "tests/train/test_token_data.py",
    "model=deepseek_v3 model.layers=4": "tests/model/test_transformers_parity.py",
    "analysis.validation.fit --check": "tests/analysis/test_published_accuracy.py",
}
"""Words of commands that are for `make test-all`, and where `make test` trains or fits the same by other means."""
IN_ORDER = sorted((command for command in EVERY if command not in ELSEWHERE), key=lambda one: one.startswith(OF_A_RUN))


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_run_elsewhere_is_in_a_page_and_run_there(command):
    assert command in EVERY
    place, words = ELSEWHERE[command]
    assert words in (ROOT / place).read_text()


@pytest.mark.parametrize(("words", "place"), LONG.items(), ids=LONG)
def test_what_is_left_to_make_test_all_is_a_command_and_tested_elsewhere(words, place):
    assert sum(words in command for command in IN_ORDER) == 1
    assert (ROOT / place).exists()


@pytest.mark.parametrize("page", [README, ROOT / "docs" / "tutorial.md"], ids=lambda page: page.name)
def test_the_environment_is_entered_before_its_first_use(page):
    """After `make run` a bare `python` is still the system's, which knows nothing of this project."""
    in_order = commands(page)
    first = next(index for index, command in enumerate(in_order) if command.startswith("python "))
    assert in_order.index("make run") < in_order.index("source .venv/bin/activate") < first


@pytest.mark.parametrize("page", [*PAGES, *SITE_PAGES], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@pytest.mark.parametrize("page", [*PAGES, *SITE_PAGES], ids=lambda page: page.name)
def test_every_file_that_a_page_names_is_there(page):
    """Paths in backticks, from the checkout or from the package; those of a run's folder are not of the checkout."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for path in re.findall(r"`((?:[a-z][\w.]*/)+[\w.]*)`", text):
        in_checkout = (ROOT / path).exists() or (ROOT / "piper_hpc" / path).exists()
        assert in_checkout or path.startswith(OF_A_FOLDER), path


def test_the_readme_is_short_and_leads_to_every_page():
    text = README.read_text()
    assert len(text.split()) <= README_WORDS
    linked = set(re.findall(r"\]\((docs/\w+\.md)", text))
    assert linked == {f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")}


def test_the_configuration_reference_is_up_to_date():
    assert reference.PAGE.read_text() == reference.page(), f"run: {reference.COMMAND}"


def test_a_key_without_a_meaning_is_named(monkeypatch):
    unsaid = {line: text for line, text in reference.COMMENTS.items() if text != "optimizer steps"}
    monkeypatch.setattr(reference, "COMMENTS", unsaid)
    with pytest.raises(ValueError, match=r"TrainConfig\.steps: needs a comment"):
        reference.page()


def test_the_picture_of_the_rooms_is_the_linters():
    linter = configparser.ConfigParser()
    linter.read(ROOT / ".importlinter")
    layers = [
        sorted(room.strip().removeprefix("piper_hpc.") for room in line.split("|"))
        for line in linter["importlinter:contract:flow"]["layers"].split("\n")
        if line
    ]
    drawn = re.findall(r"^ │ (.+)│", (ROOT / "docs" / "architecture.md").read_text(), flags=re.MULTILINE)
    assert [sorted(room.strip() for room in line.split("│")) for line in drawn] == layers


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the checkout, as a reader has it: commands may write beside the package's own files.

    It has a made-up calibration of this machine, so that no command measures first: tests/test_local_run.py does.
    """
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("README.md", "analysis", "conf", "docs", "piper_hpc", "pyproject.toml", "sbatch_templates"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, folder / name)
    here = experiment(f"runs={folder / 'runs'}")
    save(calibration(), describe(here.cluster).calibration_file(here.cluster, here.train.dtype, here.runs))
    return folder


def run(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A line as bash reads it, with this interpreter as `python` and the copy's packages first."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(folder)}
    shell = ["bash", "-c", command]
    return subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.timeout(600)
@pytest.mark.processes
def test_the_readmes_plan_is_what_its_command_prints(checkout):
    ended = run("python docs/plan_output.py --check", checkout)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.processes
@pytest.mark.parametrize(
    "command",
    [pytest.param(command, marks=full if any(words in command for words in LONG) else []) for command in IN_ORDER],
)
def test_every_other_command_works_after_those_before_it(command, checkout):
    if "RUN_ID" in command:  # the one thing that a reader fills in
        (newest, *_) = sorted((checkout / "runs").glob("2*"), reverse=True)
        command = command.replace("RUN_ID", newest.name)
    ended = run(command, checkout)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
