"""What `up` accepts, how defaults fit the machine, and what it says to everything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from piper_hpc.testbed import links, options, slurm
from piper_hpc.testbed.faults import Fault
from piper_hpc.testbed.network import Addresses

CHECKOUT = Path(__file__).parents[2]


def parse(given: dict[str, str] | None = None, cores: int = 2, memory_mib: int = 24_000) -> options.Options:
    return options.parse(given or {}, cores=cores, memory_mib=memory_mib)


def test_defaults_are_four_nodes_of_two_devices_in_two_racks() -> None:
    found = parse()
    assert (found.nodes, found.ranks_per_node, found.racks) == (4, 2, 2)
    assert (found.cpu_share, found.period_us, found.memory_mib) == (0.2, 10_000, 1536)
    assert [found.rack_of(node) for node in range(4)] == [0, 0, 1, 1]


def test_defaults_shrink_to_the_machine() -> None:
    assert parse({"nodes": "1"}).racks == 1
    assert parse(memory_mib=8_000).memory_mib == 750  # three quarters of it over eight ranks
    crowded = parse({"nodes": "8"})
    assert crowded.cpu_share == 0.112  # nine tenths of the cores over sixteen ranks
    assert crowded.ranks * crowded.cpu_share < 2


@pytest.mark.parametrize(
    ("key", "value", "rule", "works"),
    [
        ("nodes", "0", "whole number from 1 to 64", "--nodes 4"),
        ("nodes", "two", "whole number from 1 to 64", "--nodes 4"),
        ("ranks_per_node", "-1", "whole number from 1 to 64", "--ranks-per-node 2"),
        ("racks", "5", "whole number from 1 to 4 (nodes=4)", "--racks 2"),
        ("nic_mbit_per_s", "0", "number of Mbit/s from 1 to 100000", "--nic-mbit-per-s 400"),
        ("node_mbit_per_s", "fast", "number of Mbit/s from 1 to 100000", "--node-mbit-per-s 2000"),
        ("rack_mbit_per_s", "nan", "number of Mbit/s from 1 to 100000", "--rack-mbit-per-s 400"),
        ("cpu_share", "0.25", "8 ranks x 0.25 cores must stay under this machine's 2 cores", "--cpu-share 0.225"),
        ("cpu_share", "1.5", "number of cores above 0 and at most 1", "--cpu-share 0.2"),
        ("cpu_share", "0.05", "at least 1000 us", "--period-us 20000"),
        ("period_us", "10", "whole number from 1000 to 1000000", "--period-us 10000"),
        ("memory_mib", "4000", "8 ranks x 4000 MiB must fit into this machine's 24000 MiB", "--memory-mib 2250"),
        ("subnet", "10.0.0.1/24", "must be an IPv4 network", "--subnet 10.77.0.0/24"),
        ("subnet", "10.0.0.0/30", "private network with more than 10 addresses", "--subnet 10.77.0.0/24"),
        ("subnet", "8.8.8.0/24", "private network", "--subnet 10.77.0.0/24"),
        ("port", "80", "whole number from 1024 to 65533", "--port 26817"),
        ("kill_wait_s", "0", "whole number from 1 to 600", "--kill-wait-s 10"),
        ("accounting", "none", "must be slurmdbd or off", "--accounting off"),
    ],
)
def test_bad_values_name_the_rule_and_a_value_that_works(key: str, value: str, rule: str, works: str) -> None:
    with pytest.raises(Fault) as caught:
        parse({key: value})
    fault = caught.value
    assert fault.exit_code == 2
    assert fault.key == options.flag(key) and str(fault.value) == value
    assert rule in fault.rule and works in fault.works
    # What is said to work does.
    flag, advised = works.split()
    parse({key: value, flag.removeprefix("--").replace("-", "_"): advised})


@pytest.mark.parametrize("nodes", [1, 3, 4, 16])
def test_nodes_fill_racks_evenly_and_addresses_are_distinct(nodes: int) -> None:
    chosen = parse({"nodes": str(nodes), "ranks_per_node": "1"}, cores=64)
    plan = Addresses(chosen)
    sizes = [sum(plan.rack_of(node) == rack for node in plan.nodes) for rack in plan.racks]
    assert sum(sizes) == nodes and max(sizes) - min(sizes) <= 1
    addresses = [plan.node_address(node) for node in plan.nodes] + [plan.probe_address(rack) for rack in plan.racks]
    assert len({*addresses, plan.machine_address}) == nodes + chosen.racks + 1


def test_slurm_is_told_racks_devices_and_own_files(tmp_path: Path) -> None:
    texts = slurm.configuration(parse({"nodes": "3", "port": "30000"}), tmp_path)
    assert texts["topology.conf"].splitlines() == [
        "SwitchName=rack1 Nodes=n1,n2",
        "SwitchName=rack2 Nodes=n3",
        "SwitchName=spine Switches=rack1,rack2",
    ]
    conf = dict(line.split("=", 1) for line in texts["slurm.conf"].splitlines() if line[:1].isalpha())
    assert (conf["SlurmctldPort"], conf["AccountingStoragePort"], conf["SlurmdPort"]) == ("30000", "30001", "30002")
    assert texts["slurm.conf"].count("CPUs=2 ") == 3
    for key in ("AuthInfo", "AccountingStoragePass", "StateSaveLocation", "SlurmdSpoolDir", "TaskProlog", "Epilog"):
        assert conf[key].removeprefix("socket=").startswith(f"{tmp_path}/")
    assert "SwitchName=spine" not in slurm.configuration(parse({"racks": "1"}), tmp_path)["topology.conf"]


@pytest.mark.parametrize("name", slurm.HELPERS)
def test_what_slurm_runs_around_a_task_needs_the_interpreter_alone(name: str, tmp_path: Path) -> None:
    text = slurm.configuration(parse(), tmp_path)[name]
    (tmp_path / "logs").mkdir()
    (tmp_path / name).write_text(text)
    variables = {"SLURMD_NODENAME": "n1", "SLURM_JOB_ID": "0"}  # as around a batch script: no step, nothing to end
    answer = subprocess.run(["sh", str(tmp_path / name)], env=variables, cwd="/", check=False)
    assert answer.returncode == 0, (tmp_path / "logs/task.log").read_text()


def test_a_testbed_of_later_uses_no_number_of_a_job_again() -> None:
    now_s = 1_796_000_000.0
    assert 1 < slurm.first_job(now_s) < slurm.first_job(now_s + 60) < 0x03FF0000
    text = slurm.configuration(parse(), Path("/run"))["slurm.conf"]
    (first,) = [line.split("=")[1] for line in text.splitlines() if line.startswith("FirstJobId=")]
    assert int(first) > 1


def test_a_site_without_accounting_and_with_the_usual_patience(tmp_path: Path) -> None:
    text = slurm.configuration(parse({"accounting": "off", "kill_wait_s": "30"}), tmp_path)["slurm.conf"]
    assert "AccountingStorage" not in text and "KillWait=30" in text.splitlines()


def test_every_link_is_measured_in_both_directions_and_no_batch_exceeds_the_machine() -> None:
    wanted = links.streams(parse())
    labels = {stream.label for stream in wanted}
    assert {"n1 out", "n1 in", "n1 lo", "n4 out", "n4 in", "n4 lo", "rack1 to rack2", "rack2 to rack1"} <= labels
    groups = links.batches(wanted)
    assert sorted(stream.label for group in groups for stream in group) == sorted(labels)
    assert all(sum(stream.mbit_per_s for stream in group) <= links.BATCH_MBIT_PER_S for group in groups)
    fast = links.batches(links.streams(parse({"node_mbit_per_s": "9000"})))
    assert [len(group) for group in fast if group[0].kind == "node"] == [1, 1, 1, 1]


def command(*arguments: str, user: int = 0) -> subprocess.CompletedProcess[str]:
    """The command as another user would run it."""
    code = f"import os, runpy, sys; os.geteuid = lambda: {user}; sys.argv = ['testbed', *{list(arguments)!r}]; "
    code += "runpy.run_module('piper_hpc.testbed', run_name='__main__')"
    return subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("up", "--nodes", "none"), "--nodes=none: must be a whole number from 1 to 64; works: --nodes 4"),
        (("up", "--node", "4"), "unrecognized arguments: --node 4"),
        (("restart",), "invalid choice: 'restart'"),
        ((), "the following arguments are required"),
        (("up", "--nodes"), "expected one argument"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_message(arguments: tuple[str, ...], said: str) -> None:
    answer = command(*arguments)
    assert answer.returncode == 2
    assert said in answer.stderr and "Traceback" not in answer.stderr
    assert answer.stderr.count("\n") == 1
    assert answer.stdout == ""


@pytest.mark.parametrize("name", ["up", "down"])
def test_without_root_it_says_so(name: str) -> None:
    answer = command(name, "--json", user=1000)
    assert answer.returncode == 2
    assert "needs root" in answer.stderr and "sudo" in answer.stderr and "Traceback" not in answer.stderr
    document = json.loads(answer.stdout)
    assert document["error"]["key"] == "user" and not document["up"]


def test_missing_packages_are_named_with_the_command_that_installs_them(tmp_path: Path) -> None:
    code = (
        "import sys; from piper_hpc.testbed import lifecycle; lifecycle.shutil.which = lambda tool, path: "
        "None if tool in ('slurmd', 'munged') else tool; import runpy; sys.argv = ['testbed', 'up']; "
        "import os; os.geteuid = lambda: 0; runpy.run_module('piper_hpc.testbed', run_name='__main__')"
    )
    answer = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, check=False)
    assert answer.returncode == 2
    assert "missing Debian packages: slurm-wlm munge" in answer.stderr
    assert "make testbed-packages" in answer.stderr and "Traceback" not in answer.stderr


def test_status_without_a_testbed(tmp_path: Path) -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "piper_hpc.testbed", "status", "--json"],
        cwd=CHECKOUT,
        env={**os.environ, "PIPER_TESTBED_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert json.loads(answer.stdout) == {"schema_version": 1, "up": False}
