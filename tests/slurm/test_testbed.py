"""The testbed itself: what a job sees on it, that links and devices hold, and that it leaves no trace."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from piper_hpc.testbed import hosts, lifecycle, network, options, process, state
from piper_hpc.testbed.faults import Fault
from piper_hpc.testbed.state import Testbed
from tests.slurm.machine import CHECKOUT, run_testbed, traces

pytestmark = [pytest.mark.slurm, pytest.mark.processes]

Command = Callable[..., "subprocess.CompletedProcess[str]"]
PAYLOAD = str(Path(__file__).with_name("payload.py"))


def accounted(slurm: Command, job: str) -> str:
    """The state that the accounting database gives for a job, which hears of its end some seconds later."""
    found = ""
    for _ in range(60):
        found = slurm("sacct", "-j", job, "-X", "-n", "-P", "-o", "state").stdout.strip()
        if found not in ("", "PENDING", "RUNNING"):
            break
        time.sleep(0.5)
    return found


def test_record_tells_shape_devices_and_measured_links(testbed: Testbed) -> None:
    assert [(node.name, node.address, node.rack) for node in testbed.nodes] == [
        ("n1", "10.77.0.1", "rack1"),
        ("n2", "10.77.0.2", "rack1"),
        ("n3", "10.77.0.3", "rack2"),
        ("n4", "10.77.0.4", "rack2"),
    ]
    assert set(testbed.links) == {"node", "nic", "rack"}
    for link in testbed.links.values():
        assert link.measured_bytes_per_s == pytest.approx(link.configured_bytes_per_s, rel=0.1)
    assert testbed.links["nic"].configured_bytes_per_s == 50e6
    ranks = len(testbed.nodes) * testbed.ranks_per_node
    assert ranks == 8 and ranks * testbed.cpu_share < len(os.sched_getaffinity(0))


@pytest.mark.alone
def test_a_job_crosses_nodes_as_independent_devices_and_is_accounted(testbed: Testbed, slurm: Command) -> None:
    command = ("--ntasks-per-node=2", sys.executable, "-S", PAYLOAD, "describe")
    answer = slurm("srun", "--nodes=4", *command)
    assert answer.returncode == 0, answer.stderr
    ranks = sorted((json.loads(line) for line in answer.stdout.splitlines()), key=lambda facts: facts["rank"])
    assert [facts["node"] for facts in ranks] == ["n1", "n1", "n2", "n2", "n3", "n3", "n4", "n4"]
    address_of = {node.name: node.address for node in testbed.nodes}
    rack_of = {node.name: node.rack for node in testbed.nodes}
    for facts in ranks:
        node = facts["node"]
        assert facts["address"] == address_of[node]
        assert facts["topology"] == f"spine.{rack_of[node]}.{node}"
        assert facts["interface"] == "eth0"
        assert facts["limits"] == {
            "quota_us": round(testbed.cpu_share * testbed.period_us),
            "period_us": testbed.period_us,
            "memory_bytes": testbed.memory_bytes,
        }
    # All eight at once, each with two busy threads, get what one alone gets.
    alone = json.loads(slurm("srun", "--nodes=1", "--ntasks=1", *command[1:]).stdout)["cpu_share"]
    assert alone == pytest.approx(testbed.cpu_share, rel=0.25)
    median = sorted(facts["cpu_share"] for facts in ranks)[4]
    assert median == pytest.approx(alone, rel=0.2)


def test_batch_job_completes_in_the_accounting_and_its_groups_are_removed(
    testbed: Testbed, slurm: Command, tmp_path: Path
) -> None:
    # Each task leaves a process behind that has left its session: the epilog has to end it.
    script = tmp_path / "job.sh"
    script.write_text("#!/bin/sh\nsrun sh -c 'setsid sleep 600 >/dev/null 2>&1 & cat /proc/self/cgroup'\n")
    output = tmp_path / "out"
    answer = slurm(
        "sbatch", "--parsable", "--wait", "--nodes=2", "--ntasks-per-node=2", f"--output={output}", str(script)
    )
    assert answer.returncode == 0, answer.stderr
    job = answer.stdout.strip()
    assert len(set(re.findall(rf"piper_hpc/testbed/n\d/job{job}/step0_task\d", output.read_text()))) == 4
    assert accounted(slurm, job) == "COMPLETED"
    deadline = time.monotonic() + 10
    while any(job_groups(job)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert job_groups(job) == []


def job_groups(job: str) -> list[str]:
    return [str(path) for path in Path("/sys/fs/cgroup").glob(f"**/piper_hpc/testbed/*/job{job}")]


def test_traffic_between_racks_is_bounded_by_the_link_and_counted_on_both_ends(
    testbed: Testbed, slurm: Command
) -> None:
    sender, receiver = testbed.nodes[0], testbed.nodes[2]
    assert sender.rack != receiver.rack
    size = 50_000_000
    before = {node.name: state.counters(node.name) for node in testbed.nodes}
    answer = slurm(
        "srun", "--nodes=2", f"--nodelist={sender.name},{receiver.name}", "--ntasks-per-node=1",
        f"--export=ALL,PAYLOAD_RECEIVER={receiver.address}", sys.executable, "-S", PAYLOAD, "exchange", str(size),
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    after = {node.name: state.counters(node.name) for node in testbed.nodes}
    arrived = json.loads(answer.stdout)
    assert arrived["bytes"] == size
    rate = testbed.links["nic"].configured_bytes_per_s
    assert 0.5 * rate < arrived["bytes_per_s"] < 1.05 * rate
    sent = after[sender.name]["tx_bytes"] - before[sender.name]["tx_bytes"]
    received = after[receiver.name]["rx_bytes"] - before[receiver.name]["rx_bytes"]
    assert size < sent < 1.1 * size and size < received < 1.1 * size
    no_exchange = testbed.nodes[1].name
    assert after[no_exchange]["tx_bytes"] - before[no_exchange]["tx_bytes"] < 0.01 * size


def test_acknowledgements_go_first_and_short_messages_do_not(testbed: Testbed, slurm: Command) -> None:
    """A message that overtakes the data before it has that taken for lost."""
    sender, receiver = testbed.nodes[:2]

    def went_first() -> int:
        command = ["tc", "-n", network.namespace(2), "-s", "-j", "qdisc", "show", "dev", "eth0"]
        queues = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        return next(queue["packets"] for queue in queues if queue.get("parent") == "1:2")

    def of(*command: str) -> int:
        before = went_first()
        answer = slurm(
            "srun", "--nodes=2", f"--nodelist={sender.name},{receiver.name}", "--ntasks-per-node=1",
            f"--export=ALL,PAYLOAD_RECEIVER={receiver.address}", sys.executable, "-S", PAYLOAD, *command,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stderr
        return went_first() - before

    assert of("talk", "500") < 250
    assert of("exchange", "40000000") > 100


def test_status_answers_with_one_document(testbed: Testbed) -> None:
    answer = run_testbed("status", "--json")
    assert answer.returncode == 0
    document = json.loads(answer.stdout)
    assert document["up"] and document["problems"] == []
    assert document["slurm_conf"] == testbed.slurm_conf
    assert set(document["node_states"]) == {"n1", "n2", "n3", "n4"}
    assert all(document["daemons"].values()) and len(document["daemons"]) == 8
    people = run_testbed("status").stdout
    assert "n3" in people and "rack2" in people and "400.0 Mbit/s configured" in people


def test_up_again_changes_nothing_and_other_options_are_refused(testbed: Testbed) -> None:
    again = run_testbed("up", "--json")
    assert again.returncode == 0 and json.loads(again.stdout)["was_up"]
    assert state.load() == testbed
    other = run_testbed("up", "--nodes", "2", "--json")
    assert other.returncode == 2
    error = json.loads(other.stdout)["error"]
    assert "--nodes" in error["rule"] and error["works"].endswith("testbed down")
    assert state.load() == testbed


def test_what_others_have_is_refused(testbed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(Fault, match=f"port {port} is taken by somebody else"):
            lifecycle.check_no_conflicts(options.parse({"port": str(port)}))
    with pytest.raises(Fault, match="has a route into it already"):
        lifecycle.check_no_conflicts(options.parse({"subnet": "127.0.0.0/24"}))
    text = tmp_path / "hosts"
    text.write_text("192.0.2.7 build n3  # somebody's\n")
    monkeypatch.setattr(hosts, "HOSTS", text)
    with pytest.raises(Fault, match=r"node name=n3: .* gives this name to another host"):
        lifecycle.check_no_conflicts(options.parse({}))


def test_a_second_testbed_is_refused_and_somebodys_folder_stays(testbed: Testbed, tmp_path: Path) -> None:
    elsewhere = {"PIPER_TESTBED_DIR": str(tmp_path / "other")}
    for command in ("up", "down"):
        answer = run_testbed(command, environment=elsewhere)
        assert answer.returncode == 2
        assert f"PIPER_TESTBED_DIR={state.folder()} python -m piper_hpc.testbed down" in answer.stderr
    assert state.load() == testbed


@pytest.mark.alone
@pytest.mark.timeout(400)
def test_up_and_down_survive_crashes_and_leave_no_trace(
    testbed: Testbed, testbed_is_ours: bool, machine_before: dict[str, Any], slurm: Command
) -> None:
    if not testbed_is_ours:
        pytest.skip("a testbed was up, and stays as it is; to run this: python -m piper_hpc.testbed down")
    try:
        # The controller dies while a job runs, with processes that left their session.
        job = "srun sh -c 'setsid sleep 600 >/dev/null 2>&1 & sleep 600'"
        assert slurm("sbatch", "--nodes=2", "--output=/dev/null", f"--wrap={job}").returncode == 0
        controller = process.pid_of(state.folder(), "slurmctld")
        assert controller is not None
        os.kill(controller, signal.SIGKILL)
        assert process.wait_until(lambda: state.load() is None, 5)
        broken = run_testbed("status", "--json")
        assert broken.returncode == 1 and json.loads(broken.stdout)["problems"] == ["slurmctld has ended"]
        rebuilt = run_testbed("up", "--json")
        assert rebuilt.returncode == 0, rebuilt.stderr
        assert not json.loads(rebuilt.stdout)["was_up"]

        assert json.loads(run_testbed("down", "--json").stdout)["removed"] is True
        assert traces() == machine_before
        again = run_testbed("down", "--json")
        assert again.returncode == 0 and json.loads(again.stdout)["removed"] is False
        assert run_testbed("status").returncode == 1

        # A link that cannot carry its rate: said with its key, and everything taken back.
        slow = run_testbed("up", "--json", "--nodes", "1", "--node-mbit-per-s", "90000")
        assert slow.returncode == 1
        error = json.loads(slow.stdout)["error"]
        assert error["key"] == "--node-mbit-per-s" and "link n1 lo carried" in error["rule"]
        assert error["works"].startswith("--node-mbit-per-s ")
        assert traces() == machine_before

        # `up` is killed half-way, at three depths; then interrupted, which has to clean up by itself.
        for seconds in (0.4, 1.2, 2.5):
            half(signal.SIGKILL, seconds)
        assert traces() != machine_before
        assert run_testbed("down").returncode == 0
        assert traces() == machine_before
        assert half(signal.SIGTERM, 2.0) == 130
        assert traces() == machine_before
        half(signal.SIGKILL, 2.0)
    finally:
        up = run_testbed("up")  # over the remains of the last crash; for the tests that follow
    assert up.returncode == 0, up.stderr
    assert state.load() is not None


def half(number: signal.Signals, seconds: float) -> int:
    """Start `up`, and end it after a while."""
    started = subprocess.Popen(
        [sys.executable, "-m", "piper_hpc.testbed", "up"],
        cwd=CHECKOUT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    time.sleep(seconds)
    started.send_signal(number)
    return started.wait(timeout=60)
