"""Slurm's configuration and daemons: munge, slurmdbd, slurmctld, and one slurmd per node, all with files of our own."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from piper_hpc.testbed import database, process
from piper_hpc.testbed.faults import FAILED, Fault
from piper_hpc.testbed.network import Addresses, namespace
from piper_hpc.testbed.options import MIB, Options

PARTITION, URGENT = "batch", "urgent"
"""Jobs of the second take nodes from those of the first, which are warned and requeued."""
GRACE_S = 30
"""How long a job that is preempted may take to end by itself."""
START_S = 30.0
HELPERS = ("task_prolog", "task_epilog", "epilog")

SLURM_CONF = """\
ClusterName=piper_testbed
SlurmctldHost={host}({address})
SlurmctldPort={port}
SlurmdPort={slurmd_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge/munge.socket
StateSaveLocation={folder}/slurmctld
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldSyslogDebug=quiet
SlurmdSpoolDir={folder}/slurmd/%n
SlurmdPidFile={folder}/slurmd/%n.pid
SlurmdLogFile={folder}/logs/%n.log
SlurmdSyslogDebug=quiet
{accounting}
JobAcctGatherType=jobacct_gather/linux
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
TaskProlog={folder}/task_prolog
TaskEpilog={folder}/task_epilog
Epilog={folder}/epilog
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
TopologyPlugin=topology/tree
MpiDefault=none
MailProg=/bin/true
ReturnToService=2
PropagateResourceLimits=NONE
SlurmdTimeout=60
KillWait={kill_wait_s}
UnkillableStepTimeout=180
MinJobAge=300
FirstJobId={first_job}
SchedulerParameters=batch_sched_delay=0,bf_interval=5
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName={partition} Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime={grace_s}
PartitionName={urgent} Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""

ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost={address}
AccountingStoragePort={slurmdbd_port}
# Not a password: the munge socket to speak to slurmdbd with.
AccountingStoragePass={folder}/munge/munge.socket"""

SLURMDBD_CONF = """\
DbdHost={host}
DbdAddr={address}
DbdPort={slurmdbd_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/munge.socket
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_accounting
PidFile={folder}/slurmdbd.pid
DebugLevelSyslog=quiet
"""

# Slurm's own cgroup plugins are not used: the ranks' groups are ours (runtime/quota.py).
CGROUP_CONF = "CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n"


def configuration(options: Options, folder: Path) -> dict[str, str]:
    """File names and texts of Slurm's configuration."""
    addresses = Addresses(options)
    values = {
        "host": socket.gethostname(),
        "address": addresses.machine_address,
        "port": options.port,
        "slurmdbd_port": options.port + 1,
        "slurmd_port": options.port + 2,
        "folder": folder,
        "partition": PARTITION,
        "urgent": URGENT,
        "grace_s": GRACE_S,
        "first_job": first_job(time.time()),
        "kill_wait_s": options.kill_wait_s,
        "nodes": "\n".join(_node_line(addresses, node) for node in addresses.nodes),
    }
    accounting = ACCOUNTING.format(**values) if options.accounting == "slurmdbd" else "# no accounting"
    members: dict[int, list[str]] = {}
    for node in addresses.nodes:
        members.setdefault(addresses.rack_of(node), []).append(f"n{node}")
    switches = [f"SwitchName=rack{rack} Nodes={','.join(names)}" for rack, names in members.items()]
    if options.racks > 1:
        switches.append(f"SwitchName=spine Switches={','.join(f'rack{rack}' for rack in members)}")
    return {
        "slurm.conf": SLURM_CONF.format(**values, accounting=accounting),
        "slurmdbd.conf": SLURMDBD_CONF.format(**values),
        "topology.conf": "\n".join(switches) + "\n",
        "cgroup.conf": CGROUP_CONF,
    } | {name: _helper(name, options, folder) for name in HELPERS}


def first_job(now_s: float) -> int:
    """Number of the first job: one more every ten seconds, below Slurm's largest. A testbed brought up anew uses
    no number again, as no cluster does: attempts in a run's folder are told apart by them."""
    return 1 + int(now_s / 10) % 60_000_000


def _node_line(addresses: Addresses, node: int) -> str:
    options = addresses.options
    # Memory is no consumable resource here: it only has to exceed what a job may ask for.
    memory_mib = options.ranks_per_node * options.memory_mib + 1024
    return (
        f"NodeName=n{node} NodeAddr={addresses.node_address(node)} CPUs={options.ranks_per_node} "
        f"RealMemory={memory_mib} State=UNKNOWN"
    )


def _helper(name: str, options: Options, folder: Path) -> str:
    """A prolog or epilog: hands over to our own code, with the interpreter and the package that `up` ran with."""
    package = shlex.quote(str(Path(__file__).resolve().parents[2]))
    limits = f"{options.cpu_share} {options.memory_mib * MIB} {options.period_us} {options.ranks}"
    call = f"{shlex.quote(sys.executable)} -S -m piper_hpc.testbed.task {name} {limits}"
    log = shlex.quote(str(folder / "logs" / "task.log"))
    return f"#!/bin/sh\nunset PYTHONHOME\nPYTHONPATH={package} exec {call} 2>>{log}\n"


def write(options: Options, folder: Path) -> None:
    """Write the configuration. slurmdbd refuses a file that others may read."""
    for name, text in configuration(options, folder).items():
        path = folder / name
        path.touch(mode=0o600)
        path.chmod(0o755 if name in HELPERS else 0o600 if name == "slurmdbd.conf" else 0o644)
        path.write_text(text)
    for part in ("slurmctld", "slurmd"):
        (folder / part).mkdir(mode=0o755)


def start_munge(folder: Path) -> None:
    """One key for all nodes, in the machine's own namespace: its socket is a file, which every namespace sees."""
    home = folder / "munge"
    home.mkdir(mode=0o755)
    key = home / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(1024))
    files = {"key": key, "pid": home / "munged.pid", "seed": home / "munged.seed", "log": home / "munged.log"}
    command = ["munged", "--foreground", f"--socket={home / 'munge.socket'}"]
    process.spawn(folder, "munged", command + [f"--{name}-file={path}" for name, path in files.items()])
    _expect(folder, "munged", lambda: (home / "munge.socket").is_socket())


def start_controller(options: Options, folder: Path) -> None:
    """slurmdbd where there is accounting, then slurmctld, which takes its list of resources from it at first."""
    address = Addresses(options).machine_address
    conf = str(folder / "slurm.conf")
    if options.accounting == "slurmdbd":
        of_database = str(database.socket(folder))
        process.spawn(folder, "slurmdbd", ["slurmdbd", "-D"], SLURM_CONF=conf, MYSQL_UNIX_PORT=of_database)
        _expect(folder, "slurmdbd", lambda: _listens(address, options.port + 1))
    process.spawn(folder, "slurmctld", ["slurmctld", "-D", "-c"], SLURM_CONF=conf)
    _expect(folder, "slurmctld", lambda: _listens(address, options.port))


def start_nodes(options: Options, folder: Path) -> None:
    """One slurmd in each namespace; returns when all nodes are ready for work."""
    nodes = Addresses(options).nodes
    conf = str(folder / "slurm.conf")
    for node in nodes:
        (folder / "slurmd" / f"n{node}").mkdir(mode=0o755)
        command = ["slurmd", "-D", "-N", f"n{node}"]
        process.spawn(folder, f"slurmd-n{node}", command, namespace(node), SLURM_CONF=conf)
    wanted = {f"n{node}": "idle" for node in nodes}
    for node in nodes:
        _expect(folder, f"slurmd-n{node}", lambda: node_states(folder / "slurm.conf") == wanted)


def node_states(slurm_conf: Path) -> dict[str, str]:
    """What slurmctld says of each node, for example idle or down*; empty when it does not answer."""
    try:
        answer = subprocess.run(
            ["sinfo", "--noheader", "--Node", "--format=%N %t"],
            env={**os.environ, "SLURM_CONF": str(slurm_conf)},
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return dict(pair for line in answer.stdout.splitlines() if len(pair := line.split()) == 2)


def _listens(address: str, port: int) -> bool:
    try:
        socket.create_connection((address, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _expect(folder: Path, daemon: str, ready: Callable[[], bool]) -> None:
    """Wait until a daemon is ready. Raises Fault (exit code 1) if it ends before, or takes too long."""
    process.wait_until(lambda: ready() or process.pid_of(folder, daemon) is None, START_S)
    ended = process.pid_of(folder, daemon) is None
    if ended or not ready():
        what = "ended at its start" if ended else f"did not get ready within {START_S:.0f} s"
        rule = f"{what}: {process.log_tail(folder, daemon)}"
        raise Fault("daemon", daemon, rule, "the packages that `make testbed-packages` installs", FAILED)
