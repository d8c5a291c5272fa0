"""The best layout of a plan as the arguments of another project, for those who train elsewhere."""

from piper_hpc.planner.export.file import TARGETS, Reading, check_file, compose, write

__all__ = ["TARGETS", "Reading", "check_file", "compose", "write"]
