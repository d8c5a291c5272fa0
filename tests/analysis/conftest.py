"""The finished run that validation judges."""

from tests.finished_run import run

__all__ = ["run"]
