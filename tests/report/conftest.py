"""The finished run that reports are of."""

from tests.finished_run import run

__all__ = ["run"]
