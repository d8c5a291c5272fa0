"""Bring the testbed up and down, and check its health; each may be repeated, also after a crash half way."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from piper_hpc.runtime import quota
from piper_hpc.testbed import database, hosts, links, network, process, profile, rate, segments, slurm, state, task
from piper_hpc.testbed.faults import FAILED, Fault
from piper_hpc.testbed.network import Addresses
from piper_hpc.testbed.options import MIB, Options, flag
from piper_hpc.testbed.state import Node, Testbed

OWN = ".piper_testbed"  # marks a folder that `up` made, and `down` may therefore remove
NO_NAMESPACES = ".no_namespaces"  # iproute2's folder of namespaces was not there before
DOWN = "python -m piper_hpc.testbed down"
PACKAGE_OF = {
    "slurmctld": "slurm-wlm",
    "slurmd": "slurm-wlm",
    "sbatch": "slurm-wlm",
    "slurmdbd": "slurmdbd",
    "munged": "munge",
    "mariadbd": "mariadb-server",
    "mariadb-install-db": "mariadb-server",
    "ip": "iproute2",
    "tc": "iproute2",
    "nsenter": "util-linux",
}


@dataclass(frozen=True)
class Health:
    """How a testbed is: daemons by name, nodes by name as Slurm sees them, and what is wrong, if anything."""

    daemons: dict[str, bool]
    node_states: dict[str, str]
    problems: tuple[str, ...]


def up(options: Options) -> tuple[Testbed, bool]:
    """Bring the testbed up; (its record, whether it was up already). Raises Fault, with everything taken back."""
    wanted = profile.of(options)
    _check_privilege()
    missing = packages_missing()
    if missing:
        rule = f"missing Debian packages: {' '.join(missing)}; `make testbed-packages` installs them"
        raise Fault("packages", " ".join(missing), rule, f"apt-get install {' '.join(missing)}")
    with _lock():
        present = state.read()
        if present and not health(present).problems:
            if options.matches(present.options):
                return present, True
            differing = [key for key, value in options.document().items() if present.options.get(key) != value]
            rule = f"a testbed is up with other options ({', '.join(map(flag, differing))})"
            raise Fault("up", state.folder(), rule, DOWN)
        _check_owner()
        _remove_all()  # what a crash may have left
        check_no_conflicts(options)
        try:
            if wanted is None:
                return _build(options), False
            print("measuring what a rank computes under its quota", file=sys.stderr, flush=True)
            options, scaling = profile.fitted(options, wanted)
            testbed = _build(options)
            profile.write(state.folder(), scaling)
            print("checking the ratio with a job of all ranks", file=sys.stderr, flush=True)
            record = profile.document(state.folder(), scaling, options)
            record["checked"] = profile.check(testbed, scaling, options)
            testbed = replace(testbed, scaling=record)
            state.write(testbed)
            return testbed, False
        except BaseException:
            _remove_all()
            raise


def down() -> bool:
    """Remove every trace; whether there was any. Raises Fault (exit code 1) if something would not go."""
    _check_privilege()
    with _lock():
        _check_owner()
        return _remove_all()


def health(testbed: Testbed) -> Health:
    """Look at what runs; needs no privilege."""
    folder = state.folder()
    daemons = {name: process.pid_of(folder, name) is not None for name in process.names(folder)}
    node_states = slurm.node_states(Path(testbed.slurm_conf)) if daemons.get("slurmctld") else {}
    problems = [f"{name} has ended" for name, runs in daemons.items() if not runs]
    problems += [] if daemons else ["no daemon was started"]
    for node in testbed.nodes if daemons.get("slurmctld") else ():
        found = node_states.get(node.name, "unknown")
        if found.rstrip("*").startswith(("down", "drain", "unk", "fail", "inval")):
            problems.append(f"node {node.name} is {found}")
    return Health(daemons, node_states, tuple(problems))


def packages_missing() -> list[str]:
    """Debian packages whose commands are not here."""
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    return list(dict.fromkeys(name for tool, name in PACKAGE_OF.items() if shutil.which(tool, path=path) is None))


def _build(options: Options) -> Testbed:
    folder, addresses, begin = state.folder(), Addresses(options), time.monotonic()

    def log(text: str) -> None:
        print(f"[{time.monotonic() - begin:5.1f} s] {text}", file=sys.stderr, flush=True)

    folder.mkdir(parents=folder == Path(state.DEFAULT_FOLDER), exist_ok=True)
    (folder / OWN).touch()
    if not network.NAMESPACES.exists():
        (folder / NO_NAMESPACES).touch()
    for part in ("pids", "logs"):
        (folder / part).mkdir()
    nodes = tuple(
        Node(f"n{node}", addresses.node_address(node), f"rack{addresses.rack_of(node)}") for node in addresses.nodes
    )
    hosts.add(folder, {node.name: node.address for node in nodes})
    network.build(options)
    log(f"network: {options.nodes} nodes in {options.racks} racks, every link shaped in both directions")
    pool, cancelled = ThreadPoolExecutor(max_workers=1), threading.Event()
    try:  # links are measured while the database creates its tables
        measured = pool.submit(links.measure, options, cancelled)
        slurm.write(options, folder)
        slurm.start_munge(folder)
        if options.accounting == "slurmdbd":
            database.start(folder)
            log("munge and MariaDB run")
        slurm.start_controller(options, folder)
        slurm.start_nodes(options, folder)
        log("slurmctld runs, all nodes are idle")
        found = measured.result()
    finally:
        cancelled.set()
        pool.shutdown(wait=False)  # taking the network back ends what is still under way
    network.drop_probes(options)
    log("links carry what they were shaped to")
    testbed = Testbed(
        schema_version=state.SCHEMA_VERSION,
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        slurm_conf=str(folder / "slurm.conf"),
        environment={"SLURM_CONF": str(folder / "slurm.conf"), "GLOO_SOCKET_IFNAME": "eth0"},
        nodes=nodes,
        ranks_per_node=options.ranks_per_node,
        cpu_share=options.cpu_share,
        period_us=options.period_us,
        memory_bytes=options.memory_mib * MIB,
        links=found,
        options=options.document(),
    )
    state.write(testbed)
    return testbed


def _remove_all() -> bool:
    """Processes first, then what they held, the folder with its mark last: a crash in here can be repeated."""
    folder = state.folder()
    ours = _is_ours(folder)
    spaces, devices = network.existing()
    for pid in quota.processes(rate.GROUP):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    quota.remove_tree(rate.GROUP)
    if not (ours or spaces or devices or hosts.owner() or quota.processes(task.GROUP)):
        quota.remove_tree(task.GROUP)
        return False
    with _ignore_interrupt():
        (folder / "testbed.json").unlink(missing_ok=True)
        process.stop_all(folder)
        left = process.kill_all(
            lambda: {*network.processes_in_namespaces(), *process.marked(folder), *quota.processes(task.GROUP)}
        )
        if left:
            rule = "processes of the testbed do not end after SIGKILL"
            raise Fault("processes", " ".join(map(str, left)), rule, "a restart of the machine", FAILED)
        segments.remove()
        quota.remove_tree(task.GROUP)
        network.remove_all(also_folder=(folder / NO_NAMESPACES).exists())
        hosts.remove()
        if ours:
            _remove_folder(folder)
    return True


def _remove_folder(folder: Path) -> None:
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name != OWN:
            entry.unlink()
    (folder / OWN).unlink(missing_ok=True)
    folder.rmdir()
    if folder == Path(state.DEFAULT_FOLDER):
        with contextlib.suppress(OSError):  # in use by something else
            folder.parent.rmdir()


def _is_ours(folder: Path) -> bool:
    """Whether `up` made this folder: it holds the mark, or a crash came before the mark in the folder of the name."""
    if not folder.is_dir():
        return False
    return (folder / OWN).exists() or (folder == Path(state.DEFAULT_FOLDER) and not any(folder.iterdir()))


def _check_privilege() -> None:
    if os.geteuid() != 0:
        rule = "needs root: network namespaces, control groups and Slurm's daemons are the kernel's to give"
        raise Fault("user", os.geteuid(), rule, "the same command with sudo")
    if network.inside():
        rule = "this process runs on a node of the testbed itself"
        raise Fault("network namespace", "a node's", rule, "the same command outside of its jobs")


def _check_owner() -> None:
    """Refuse to touch what another testbed, or somebody else, made."""
    folder, owner = state.folder(), hosts.owner()
    if owner not in (None, folder):
        rule = f"a testbed of another folder is on this machine: {owner}"
        raise Fault("PIPER_TESTBED_DIR", folder, rule, f"PIPER_TESTBED_DIR={owner} {DOWN}")
    if folder.exists() and not _is_ours(folder) and (not folder.is_dir() or any(folder.iterdir())):
        rule = "the folder holds files that no testbed made"
        raise Fault("PIPER_TESTBED_DIR", folder, rule, f"PIPER_TESTBED_DIR={state.DEFAULT_FOLDER}")
    if folder != Path(state.DEFAULT_FOLDER) and not folder.parent.is_dir():
        rule = "the folder above it must exist"
        raise Fault("PIPER_TESTBED_DIR", folder, rule, f"PIPER_TESTBED_DIR={state.DEFAULT_FOLDER}")
    if not re.fullmatch(r"[\w./-]{2,80}", str(folder), re.ASCII):
        rule = "must be a path of at most 80 letters, digits and ._-/ (it stands in slurm.conf, and in a socket's name)"
        raise Fault("PIPER_TESTBED_DIR", folder, rule, f"PIPER_TESTBED_DIR={state.DEFAULT_FOLDER}")


def check_no_conflicts(options: Options) -> None:
    """Names, addresses and ports that somebody else has are refused, never taken."""
    names = {f"n{node}": "" for node in Addresses(options).nodes}
    name = hosts.first_conflict(names)
    if name:
        rule = f"{hosts.HOSTS} gives this name to another host already"
        raise Fault("node name", name, rule, f"{hosts.HOSTS} without that line")
    route = network.overlapping(options.subnet)
    if route:
        rule = f"this machine has a route into it already ({route})"
        raise Fault(flag("subnet"), options.subnet, rule, f"{flag('subnet')} 10.{options.nodes + 177}.0.0/24")
    for port in range(options.port, options.port + 3):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))
            except OSError as error:
                rule = f"port {port} is taken by somebody else ({error.strerror}); three in a row are needed"
                works = f"{flag('port')} {(options.port + 100 - 1024) % 60000 + 1024}"
                raise Fault(flag("port"), options.port, rule, works) from None
    if not quota.writable():
        rule = "the cpu control group cannot be written here, so ranks cannot be made devices"
        raise Fault("cgroups", "read-only", rule, "a machine, or a privileged container, with writable cgroups")


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    """One `up` or `down` on a machine at a time: a lock on /run itself, which leaves no file behind."""
    handle = os.open("/run", os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("waiting for another up or down to finish", file=sys.stderr, flush=True)
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def _ignore_interrupt() -> Iterator[None]:
    """Let removal finish when the user presses Ctrl-C a second time."""
    before = {
        number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
