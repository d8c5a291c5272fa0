"""Jobs of studies that train: a run's folder as the launcher prepares it, with work of the study's own on its ranks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from piper_hpc.config import check_experiment
from piper_hpc.report.load import UsageError
from piper_hpc.runs import RunFolder, Status
from piper_hpc.submit.executors import submit
from piper_hpc.submit.outcome import cancel, observe

ASKED = "asked.json"
POLL_S = 2.0
"""How often the scheduler is asked for the job: seldom, as each time costs the machine that is measured."""


def prepared(words: Sequence[str]) -> RunFolder:
    """A checked and predicted run that nothing was submitted of; words: of its configuration, as the launcher takes
    them. Raises UsageError where the launcher refuses it, which has said why on stderr."""
    command = [sys.executable, "-m", "piper_hpc.launch", "submit=false", *words]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        raise UsageError(f"the launcher refuses {' '.join(words)} (see above)")
    return RunFolder(Path(answer.stdout.split()[-1]))


def finished(run: RunFolder, work: Callable[[str], None]) -> Status:
    """How the run ended whose ranks call `work` with its path; an interrupt cancels it.

    The ranks of a run that was at work before add to it; how it ended then is forgotten.
    """
    for failure in run.logs.glob("attempt-*/*.failure.json"):
        failure.unlink()
    run.write_status(Status("pending"))
    environment = run.manifest()["machine"]["environment"]
    submit(run, check_experiment(run.config()).cluster, environment=environment, wait=True, placement={}, work=work)
    return ended(run)


def completed(run: RunFolder, work: Callable[[str], None]) -> RunFolder:
    """The run once its ranks have done `work`. Raises UsageError where they did not come to the end."""
    status = finished(run, work)
    if status.state != "completed":
        raise UsageError(f"{run.path} {status.state}: {status.reason}")
    return run


def ask(run: RunFolder, asked: Any) -> None:
    """Leave what is asked of a run, a dataclass, in its folder for its ranks."""
    (run.path / ASKED).write_text(json.dumps(asdict(asked)))


def asked_of(folder: Path) -> dict[str, Any]:
    """What `ask` left: the fields, with tuples for lists."""
    document = json.loads((folder / ASKED).read_text())
    return {key: tuple(value) if isinstance(value, list) else value for key, value in document.items()}


def ended(run: RunFolder) -> Status:
    """How a job of the run ended, once it has; an interrupt cancels it."""
    try:
        while not (status := observe(run)).ended:
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        cancel(run)
        raise
    return status
