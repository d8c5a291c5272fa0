"""The testbed for the length of a study."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

COMMAND = (sys.executable, "-m", "piper_hpc.testbed")


class TestbedError(RuntimeError):
    """The testbed could not be had; the message is for its user."""


@contextmanager
def brought_up(flags: Sequence[str] = ()) -> Iterator[None]:
    """A testbed with these flags of `python -m piper_hpc.testbed up`, taken down at the end. Without flags one that is
    up is used as it is, and left up. Raises TestbedError where it cannot be had."""
    up = not subprocess.run([*COMMAND, "status"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
    if up and flags:
        raise TestbedError("a testbed is up already: python -m piper_hpc.testbed down")
    try:
        if not up:
            answer = subprocess.run([*COMMAND, "up", *flags, "--json"], stdout=subprocess.DEVNULL, check=False)
            if answer.returncode:
                raise TestbedError("the testbed did not come up (see above)")
        yield
    finally:  # also where it was interrupted half way up
        if not up:
            subprocess.run([*COMMAND, "down"], stdout=subprocess.DEVNULL, check=False)
