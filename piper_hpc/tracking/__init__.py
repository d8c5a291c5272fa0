"""Views of the record beside it. The run's folder is the truth; a tracker only shows it elsewhere."""

from piper_hpc.tracking.base import TRACKERS, NoTracker, Tracker, make
from piper_hpc.tracking.rows import flatten

__all__ = ["TRACKERS", "NoTracker", "Tracker", "flatten", "make"]
