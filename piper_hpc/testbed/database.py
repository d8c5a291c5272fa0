"""A small MariaDB for slurmdbd: own folder, own socket, no network; quick rather than durable."""

from __future__ import annotations

import subprocess
from pathlib import Path

from piper_hpc.testbed import process
from piper_hpc.testbed.faults import FAILED, Fault

NAME = "mariadbd"

CONFIGURATION = """\
[mariadbd]
user = root
datadir = {folder}/data
socket = {socket}
pid-file = {folder}/mariadbd.pid
tmpdir = {folder}
skip-networking
skip-name-resolve
skip-log-bin
performance-schema = OFF
max-connections = 32
key-buffer-size = 1M
aria-pagecache-buffer-size = 8M
aria-log-file-size = 8M
innodb-buffer-pool-size = 32M
innodb-log-file-size = 8M
innodb-data-file-path = ibdata1:4M:autoextend
innodb-undo-tablespaces = 0
innodb-lock-wait-timeout = 900
# The database lives and dies with the testbed: nothing of it has to survive a crash.
innodb-flush-log-at-trx-commit = 0
innodb-flush-method = nosync
innodb-doublewrite = OFF
"""


def socket(folder: Path) -> Path:
    return folder / "database" / "mariadbd.sock"


def start(folder: Path) -> None:
    """Create the database and start its server; returns when it answers. Root alone may enter its folder."""
    home = folder / "database"
    home.mkdir(mode=0o700)
    configuration = home / "my.cnf"
    configuration.write_text(CONFIGURATION.format(folder=home, socket=socket(folder)))
    install = subprocess.run(
        [
            "mariadb-install-db",
            f"--defaults-file={configuration}",
            "--auth-root-authentication-method=normal",
            "--skip-test-db",
        ],
        env=process.environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    if install.returncode:
        rule = f"mariadb-install-db failed: {(install.stderr + install.stdout).strip()[-500:]}"
        raise Fault("database", home, rule, "free space in that file system, and a whole mariadb-server", FAILED)
    process.spawn(folder, NAME, ["mariadbd", f"--defaults-file={configuration}"])
    if not process.wait_until(lambda: socket(folder).exists() or process.pid_of(folder, NAME) is None, 20):
        _complain(folder)
    if process.pid_of(folder, NAME) is None:
        _complain(folder)


def _complain(folder: Path) -> None:
    rule = f"did not start: {process.log_tail(folder, NAME)}"
    raise Fault("database", folder / "database", rule, "a whole mariadb-server package", FAILED)
