"""Quotas: what is written for each version of the interface, and that the kernel then holds ranks to it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from piper_hpc.runtime import quota

needs_cgroups = pytest.mark.skipif(not quota.writable(), reason="the cpu control group is not writable: run as root")

BURN = """
import sys, time
sys.stdin.readline()
begin, cpu = time.monotonic(), time.process_time()
while time.monotonic() - begin < 1.5:
    pass
print((time.process_time() - cpu) / (time.monotonic() - begin))
"""


STAND_STILL = """
import sys, time
from piper_hpc.runtime.quota import StandStill
sys.stdin.readline()
still = StandStill.of_this_process()
for busy in (False, True):
    begin, cpu, stood = time.monotonic(), time.process_time(), still.seconds()
    while time.monotonic() - begin < 0.5:
        if not busy:
            time.sleep(0.01)
    computed = time.process_time() - cpu
    print(time.monotonic() - begin - computed, still.seconds() - stood)
"""


@pytest.fixture
def prefix() -> Iterator[str]:
    name = f"test-{os.getpid()}"
    yield name
    for pid in quota.processes(name):
        os.kill(pid, signal.SIGKILL)
    quota.remove_tree(name)


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(lines)
    monkeypatch.setattr(quota, "MOUNTS", mounts)


def test_version_1_writes_period_and_quota_where_each_controller_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cpu", "memory"):
        (tmp_path / name).mkdir()
    lines = f"cgroup {tmp_path}/cpu cgroup rw,cpu,cpuacct 0 0\ncgroup {tmp_path}/memory cgroup rw,memory 0 0\n"
    mount(tmp_path, monkeypatch, lines)
    group = quota.create("run/rank0", cpu_share=0.2, memory_bytes=2**20, period_us=10_000)
    group.enter(42)
    cpu, memory = tmp_path / "cpu/piper_hpc/run/rank0", tmp_path / "memory/piper_hpc/run/rank0"
    assert group.folders == (cpu, memory)
    assert (cpu / "cpu.cfs_period_us").read_text() == "10000"
    assert (cpu / "cpu.cfs_quota_us").read_text() == "2000"
    assert (memory / "memory.limit_in_bytes").read_text() == str(2**20)
    assert (cpu / "cgroup.procs").read_text() == (memory / "cgroup.procs").read_text() == "42"
    assert quota.processes("run") == [42]


def test_version_2_hands_controllers_down_and_writes_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path, tmp_path / "piper_hpc", tmp_path / "piper_hpc/run"):
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.subtree_control").write_text("cpuset")
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu memory")
    mount(tmp_path, monkeypatch, f"cgroup2 {tmp_path} cgroup2 rw 0 0\n")
    group = quota.create("run/rank0", cpu_share=0.25, memory_bytes=2**20, period_us=20_000)
    leaf = tmp_path / "piper_hpc/run/rank0"
    assert group.folders == (leaf,)
    assert (leaf / "cpu.max").read_text() == "5000 20000"
    assert (leaf / "memory.max").read_text() == str(2**20)
    for folder in (tmp_path / "piper_hpc", leaf.parent, leaf):
        assert (folder / "cpu.weight").read_text() == "10000"  # or ranks starve beside ordinary processes
    for folder in (tmp_path, tmp_path / "piper_hpc", tmp_path / "piper_hpc/run"):
        assert (folder / "cgroup.subtree_control").read_text() == "+memory"  # the last one asked for
    assert not (leaf / "cgroup.subtree_control").exists()  # a group with processes may not hand anything down


def test_a_version_1_mount_wins_over_the_unified_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.controllers").write_text("memory")
    mount(tmp_path, monkeypatch, f"cgroup2 {tmp_path} cgroup2 rw 0 0\ncgroup /c cgroup rw,cpu 0 0\n")
    assert quota.controllers() == {"memory": quota.Controller(tmp_path, 2), "cpu": quota.Controller(Path("/c"), 1)}


def test_without_control_groups_nothing_is_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mount(tmp_path, monkeypatch, "proc /proc proc rw 0 0\n")
    assert not quota.writable()
    with pytest.raises(OSError, match="cpu control group is not mounted"):
        quota.create("run/rank0", 0.5, period_us=10_000)


@pytest.mark.parametrize(
    ("name", "share", "period_us", "rule"),
    [
        ("../escape", 0.2, 10_000, "relative path"),
        ("/absolute", 0.2, 10_000, "relative path"),
        ("", 0.2, 10_000, "relative path"),
        ("run", 0.2, 2_000_000, "period_us=2000000"),
        ("run", 0.05, 10_000, "cpu_share=0.05"),
    ],
)
def test_limits_that_the_kernel_would_not_take(name: str, share: float, period_us: int, rule: str) -> None:
    with pytest.raises(ValueError, match=rule):
        quota.create(name, share, period_us=period_us)


@needs_cgroups
@pytest.mark.processes
@pytest.mark.alone
def test_every_rank_gets_its_share_whether_alone_or_with_all_others(prefix: str) -> None:
    def shares(ranks: int) -> list[float]:
        processes = [start(BURN) for _ in range(ranks)]
        for rank, process in enumerate(processes):
            quota.create(f"{prefix}/rank{rank}", cpu_share=0.2, period_us=10_000).enter(process.pid)
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        return [float(process.communicate()[0]) for process in processes]

    ranks = max(2, int(0.8 * len(os.sched_getaffinity(0)) / 0.2))
    alone, together = shares(1)[0], shares(ranks)
    assert 0.14 < alone < 0.24
    assert sorted(together)[ranks // 2] == pytest.approx(alone, rel=0.2)
    assert max(together) < 0.24


@needs_cgroups
@pytest.mark.processes
@pytest.mark.alone
def test_a_rank_stands_still_when_its_quota_is_used_up_and_not_when_it_waits(prefix: str) -> None:
    process = start(STAND_STILL)
    quota.create(f"{prefix}/rank", cpu_share=0.2, period_us=10_000).enter(process.pid)
    waiting, computing = (map(float, line.split()) for line in process.communicate("go\n")[0].splitlines())
    apart_s, stood_still_s = waiting
    assert apart_s == pytest.approx(0.5, rel=0.1) and stood_still_s < 0.02
    apart_s, stood_still_s = computing
    assert apart_s == pytest.approx(0.4, rel=0.1) and stood_still_s == pytest.approx(apart_s, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "own", "statistics", "expected_s"),
    [
        ("cgroup {}/cpu cgroup rw,cpu 0 0", "4:cpuset:/\n1:cpu,cpuacct:/run/rank0", "throttled_time 2500000000", 2.5),
        ("cgroup2 {}/cpu cgroup2 rw 0 0", "0::/run/rank0", "throttled_usec 2500000", 2.5),
        ("cgroup2 {}/cpu cgroup2 rw 0 0", "0::/run/rank0", "usage_usec 1", 0.0),
        ("tmpfs /tmp tmpfs rw 0 0", "0::/", "", 0.0),
    ],
)
def test_both_versions_tell_for_how_long_a_group_stood_still(
    kind: str, own: str, statistics: str, expected_s: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = tmp_path / "cpu/run/rank0"
    group.mkdir(parents=True)
    (tmp_path / "cpu/cgroup.controllers").write_text("cpu memory")
    (group / "cpu.stat").write_text(f"nr_periods 7\n{statistics}\n")
    mount(tmp_path, monkeypatch, f"{kind.format(tmp_path)}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    monkeypatch.setattr(quota, "OWN_GROUPS", tmp_path / "own")
    assert quota.StandStill.of_this_process().seconds() == pytest.approx(expected_s)


@needs_cgroups
@pytest.mark.processes
@pytest.mark.alone
def test_children_and_threads_share_the_quota_of_their_process(prefix: str) -> None:
    # Four busy loops in two processes; those that a quota missed would take a core each.
    code = """
import subprocess, sys, threading, time
sys.stdin.readline()
busy = "import time; e = time.monotonic() + 1.5\\nwhile time.monotonic() < e: pass"
children = [subprocess.Popen([sys.executable, "-S", "-c", busy]) for _ in range(2)]
threads = [threading.Thread(target=exec, args=(busy, {})) for _ in range(2)]
begin = time.monotonic()
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
for child in children:
    child.wait()
import resource
used = sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(used / (time.monotonic() - begin))
"""
    process = start(code)
    quota.create(f"{prefix}/rank0", cpu_share=0.3, period_us=10_000).enter(process.pid)
    assert float(process.communicate("go\n")[0]) < 0.4


@needs_cgroups
@pytest.mark.processes
@pytest.mark.skipif("memory" not in quota.controllers(), reason="the memory control group is not mounted")
def test_a_rank_that_passes_its_memory_limit_is_killed(prefix: str) -> None:
    process = start("import sys; sys.stdin.readline(); block = bytearray(256 * 2**20); print(len(block))")
    quota.create(f"{prefix}/rank0", 0.5, memory_bytes=64 * 2**20, period_us=10_000).enter(process.pid)
    answer, _ = process.communicate("go\n")
    assert answer == "" and process.returncode == -signal.SIGKILL


@needs_cgroups
@pytest.mark.processes
def test_removal_waits_for_processes_and_leaves_nothing(prefix: str) -> None:
    group = quota.create(f"{prefix}/rank0", 0.2, period_us=10_000)
    other = quota.create(f"{prefix}/rank1", 0.2, period_us=10_000)
    process = start("import sys; sys.stdin.readline()")
    group.enter(process.pid)
    assert quota.processes(prefix) == [process.pid]
    with pytest.raises(OSError) as caught:
        group.remove(timeout_s=0.1)
    assert caught.value.errno == errno.EBUSY
    process.communicate("go\n")
    group.remove()
    group.remove()  # again is no error
    assert other.folders[0].exists()
    quota.remove_tree(prefix)
    assert not other.folders[0].parent.exists()
    assert quota.processes(prefix) == []


def test_ranks_are_pinned_only_where_their_shares_fit_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert quota.fits_one_core_each(4, 0.45) and quota.fits_one_core_each(1, 1.0) and quota.fits_one_core_each(8, 0.2)
    assert not quota.fits_one_core_each(3, 0.6), "two of them would share a core"


def test_a_pinned_process_keeps_its_threads_on_one_core_and_neighbours_differ() -> None:
    cores = sorted(os.sched_getaffinity(0))
    code = "import threading, time; threading.Thread(target=time.sleep, args=(30,)).start(); print(flush=True)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None and process.stdout.readline()
        for turn in (1, 0):
            os.sched_setaffinity(process.pid, cores)
            assert quota.pin_to_core(turn, process.pid) == cores[turn % len(cores)]
        threads = os.listdir(f"/proc/{process.pid}/task")
        assert len(threads) == 2
        assert [os.sched_getaffinity(int(thread)) for thread in threads] == [{cores[0]}] * 2
    finally:
        process.kill()
        process.wait()
