"""The only reader and writer of a run's folder. JSONL is the truth; every table and dashboard is a view of it."""

from piper_hpc.runs.files import RecordError, understood
from piper_hpc.runs.folder import RunFolder, find, new_run_id
from piper_hpc.runs.status import ADVICE, ECHOES, FAILURE_CLASSES, Failure, Status

__all__ = [
    "ADVICE",
    "ECHOES",
    "FAILURE_CLASSES",
    "Failure",
    "RecordError",
    "RunFolder",
    "Status",
    "find",
    "new_run_id",
    "understood",
]
