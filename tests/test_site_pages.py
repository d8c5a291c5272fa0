"""Pages of sites: their facts are those of conf/cluster, their commands give a script, and the index has them all."""

from __future__ import annotations

import io
import re
import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from rich.console import Console

from piper_hpc.cluster import preset
from piper_hpc.config import register
from piper_hpc.config.schema import ClusterConfig, LimitConfig
from piper_hpc.launch import launch
from piper_hpc.paths import data_folder
from tests.test_docs import LAUNCH, ROOT, SITE_PAGES, commands

INDEX = ROOT / "docs" / "sites.md"
OWN = "my_own"
PAGES = [page for page in SITE_PAGES if page.stem != OWN]
ELSEWHERE = {"python -m piper_hpc.doctor --write site/mysite.yaml": ("tests/doctor/test_doctor.py", '"--write"')}
"""Commands that need a site, and where they are run: a file, and words in it that show so."""
ACCOUNTS = {"perlmutter": "_g", "delta": "-delta-gpu", "deltaai": "-dtai-gh"}
"""How the names of accounts end, by site."""
FABRICS = {"cxi": "Slingshot (`cxi`)", "ib": "InfiniBand (`ib`)"}


def _jobs(cluster: ClusterConfig) -> str:
    return f"{cluster.jobs_queued} in the queue, {cluster.jobs_running} of them running or next"


def facts_block(name: str) -> str:
    """The table, as Markdown."""
    cluster = preset.config(name)
    queue = [f"`{key}={value}`" for key in ("partition", "qos", "constraint") if (value := getattr(cluster, key))]
    ending = f", which ends in `{ACCOUNTS[name]}`" if name in ACCOUNTS else ""
    facts = {
        "devices": f"{cluster.ranks_per_node} a node, `{cluster.accelerator}`, {cluster.cpus_per_task} cores each",
        "give": ", ".join(f"`cluster.{key}`" for key in cluster.wants) + ending,
        "queue": ", ".join(queue),
        "a job lasts at most": "; ".join(map(limit, cluster.limits)),
        **({"jobs of a user": _jobs(cluster)} if cluster.jobs_queued else {}),
        "unless you say more": f"{cluster.nodes} nodes, {hours(cluster.time_min)}",
        "network": f"{FABRICS[cluster.fabric or '']}, {_nics(cluster)}",
        "facts": f"`conf/cluster/{name}.yaml`, compared with their sources {cluster.checked}",
        "batch script": f"`sbatch_templates/{cluster.template}`",
    }  # fmt: skip
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in facts.items())])


def limit(bin_: LimitConfig) -> str:
    """`12 h to 256 nodes with qos=NAME`."""
    return f"{hours(bin_.time_min)} to {bin_.nodes:,} nodes" + (f" with `cluster.qos={bin_.qos}`" if bin_.qos else "")


def hours(minutes: int) -> str:
    """`30 min` or `12 h`."""
    return f"{minutes // 60} h" if minutes % 60 == 0 else f"{minutes} min"


def _nics(cluster: ClusterConfig) -> str:
    cards = cluster.topology.nics_per_node if cluster.topology else None
    return f"{cards} card{'s' if cards != 1 else ''} a node"


def test_every_site_with_a_batch_script_has_a_page_and_the_index_leads_to_all() -> None:
    clusters = {path.stem: preset.config(path.stem) for path in (data_folder("conf") / "cluster").glob("*.yaml")}
    submitting = {name for name, cluster in clusters.items() if cluster.template and cluster.checked}
    assert {page.stem for page in PAGES} == submitting
    linked = set(re.findall(r"\]\(sites/(\w+)\.md\)", INDEX.read_text()))
    assert linked == {page.stem for page in SITE_PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_has_the_facts_of_its_cluster(page: Path) -> None:
    assert facts_block(page.stem) in page.read_text(), f"must have this table:\n{facts_block(page.stem)}"


@pytest.mark.parametrize("page", SITE_PAGES, ids=lambda page: page.stem)
def test_its_commands_give_a_script(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    dry = [command for command in commands(page) if command not in ELSEWHERE]
    assert dry
    for command in dry:
        assert command.startswith(LAUNCH) and command.endswith("dry_run=true")
        overrides = shlex.split(command.removeprefix(LAUNCH))
        register()
        with initialize_config_dir(str(data_folder("conf")), version_base="1.3"):
            composed = compose("config", overrides=overrides)
        said = io.StringIO()
        document, code = launch(composed, Console(file=said, width=120), overrides)
        account = next(word for word in overrides if word.startswith("cluster.account="))
        assert code == 0 and f"#SBATCH --account={account.partition('=')[2]}\n" in document["script"]
        assert "nothing submitted" in said.getvalue() and "too long" not in said.getvalue()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ELSEWHERE)
def test_what_is_run_elsewhere_is_in_a_page_and_run_there(command: str) -> None:
    assert any(command in commands(page) for page in SITE_PAGES)
    place, words = ELSEWHERE[command]
    assert words in (ROOT / place).read_text()
