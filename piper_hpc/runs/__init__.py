"""The only reader and writer of a run's folder. JSONL is the truth; every table and dashboard is a view of it."""

from piper_hpc.runs.folder import RecordError, RunFolder, find, new_run_id, understood
from piper_hpc.runs.status import FAILURE_CLASSES, Failure, Status

__all__ = ["FAILURE_CLASSES", "Failure", "RecordError", "RunFolder", "Status", "find", "new_run_id", "understood"]
