"""A rank's temporary folder: private, short enough, and gone in the end, however that came."""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Listener
from pathlib import Path

import pytest

from piper_hpc.runtime import scratch
from piper_hpc.runtime.scratch import LOCK, LONGEST_PATH, private_tmp, remove_left

RUN = "20261129-165040-aabbccdd"


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The temporary folder of this process, short as a site's is."""
    folder = Path(tempfile.mkdtemp(prefix="b", dir="/tmp"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(scratch, "SHORT", folder)
    yield folder
    shutil.rmtree(folder)


def test_it_is_the_users_alone_used_by_all_and_removed(base):
    with private_tmp(RUN, 3) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700 and folder.parent == base
        assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(folder)
        child = subprocess.check_output([sys.executable, "-c", "import tempfile; print(tempfile.mkstemp()[1])"])
        assert Path(child.decode().strip()).parent == folder
    assert not folder.exists()
    assert tempfile.gettempdir() == os.environ["TMPDIR"] == str(base)


def test_it_is_removed_where_the_rank_fails(base):
    with pytest.raises(RuntimeError), private_tmp(RUN, 0) as folder:
        (folder / "deep").mkdir()
        raise RuntimeError
    assert list(base.iterdir()) == []


def test_two_ranks_and_two_users_of_one_name_never_share_it(base):
    with private_tmp(RUN, 0) as one, private_tmp(RUN, 0) as other:
        assert one != other and one.exists() and other.exists()


def test_a_socket_has_room_in_it_also_where_the_site_goes_deep(base, monkeypatch):
    deep = base / ("d" * 90)
    deep.mkdir()
    for place in (base, deep):
        monkeypatch.setenv("TMPDIR", str(place))
        monkeypatch.setattr(tempfile, "tempdir", None)
        with private_tmp(RUN, 4095) as folder:
            assert len(str(folder)) <= LONGEST_PATH
            inner = Path(tempfile.mkdtemp(prefix="pymp-"))
            with Listener(str(inner / "listener-12345678"), family="AF_UNIX"):
                pass
        assert not folder.exists()


def start(base: Path) -> tuple[subprocess.Popen[str], Path]:
    code = (
        "import sys; from piper_hpc.runtime.scratch import private_tmp\n"
        f"with private_tmp({RUN!r}, 1) as folder: print(folder, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_what_a_killed_rank_left_is_removed_by_the_next_and_what_lives_stays(base):
    killed, left = start(base)
    living, held = start(base)
    try:
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        (base / "piper-being-made").mkdir()
        (base / "another").mkdir()
        assert left.exists() and left.parent == base
        assert remove_left(run_id="another-run") == []
        with private_tmp(RUN, 2):
            assert not left.exists() and held.exists()
        assert remove_left(run_id=RUN) == []
    finally:
        living.communicate("")
    assert {path.name for path in base.iterdir()} == {"piper-being-made", "another"}


def test_a_link_of_somebody_else_leads_nowhere(base, tmp_path):
    (tmp_path / LOCK).touch()
    (base / "piper-link").symlink_to(tmp_path)
    assert remove_left() == [] and (tmp_path / LOCK).exists()


def test_a_rank_that_starts_beside_does_not_take_it_for_left(base, monkeypatch):
    """The other one looks between the making of the lock and its taking."""
    real, looked = fcntl.flock, []

    def flock(descriptor: int, how: int) -> None:
        if not looked:
            looked.append(True)
            assert len(remove_left()) == 1
        real(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with private_tmp(RUN, 0) as folder:
        assert (folder / LOCK).exists() and remove_left() == []
    assert looked and list(base.iterdir()) == []
