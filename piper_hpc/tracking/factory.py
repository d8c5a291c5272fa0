"""Makes the tracker of a name."""

from __future__ import annotations

from piper_hpc.tracking.base import NoTracker, Tracker

TRACKERS = ("none", "wandb_offline", "wandb")


def make(name: str, *, project: str = "piper_hpc", entity: str | None = None) -> Tracker:
    """The tracker of a name in TRACKERS; `project` and `entity` say where wandb puts the run.

    Nothing is imported for `none`. Raises ValueError for an unknown name and ImportError, with the command that
    installs it, where wandb is missing.
    """
    if name not in TRACKERS:
        raise ValueError(f"tracking={name!r}: must be one of {', '.join(TRACKERS)}; use tracking=none")
    if name == "none":
        return NoTracker()
    from piper_hpc.tracking.wandb_run import WandbTracker

    return WandbTracker("offline" if name == "wandb_offline" else "online", project=project, entity=entity)
