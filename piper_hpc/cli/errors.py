"""Turn bad input into a message on stderr and exit code 2; with HYDRA_FULL_ERROR=1 the traceback is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import OmegaConfBaseException

from piper_hpc.spec import SpecError

USAGE_ERROR = 2
INTERRUPTED = 130


def run_command(command: Callable[[], int]) -> int:
    """Run a command and turn bad input, Hydra's complaints included, into a message and exit code 2."""
    asked_for_traceback = os.environ.get("HYDRA_FULL_ERROR") == "1"
    # With this set Hydra hands its exceptions on, instead of printing them its own way and leaving with code 1.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        return command()
    except (SpecError, HydraException, OmegaConfBaseException) as error:
        if asked_for_traceback:
            raise
        print(message_of(error), file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        if not asked_for_traceback:
            os.environ.pop("HYDRA_FULL_ERROR", None)


def message_of(error: Exception) -> str:
    """What is wrong, line by line, without a traceback."""
    if isinstance(error, SpecError):
        return "\n".join(f"error: {problem}" for problem in error.problems)
    # Hydra wraps what OmegaConf found; the cause says which key, which value and which type.
    root: BaseException = error
    while isinstance(root.__cause__, (HydraException, OmegaConfBaseException)):
        root = root.__cause__
    about = f"{error.override}: " if isinstance(error, OverrideParseException) else ""
    lines = [f"error: {about}{str(error).splitlines()[0]}"]
    for detail in [*str(error).splitlines()[1:], *(str(root).splitlines() if root is not error else [])]:
        line = detail.strip()
        if line and not line.startswith(("reference_type", "object_type")) and f"  {line}" not in lines:
            lines.append(f"  {line}")
    key = getattr(root, "full_key", None)
    hint = f"see the keys of {key.split('.')[0]} with" if key else "see every key with"
    lines.append(f"  {hint}: python -m piper_hpc.launch --cfg job")
    return "\n".join(lines)
