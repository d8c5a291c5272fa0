"""The typed schema of every config group, its checks, and what a checked configuration means."""

from piper_hpc.config.errors import ConfigError, Problem
from piper_hpc.config.experiment import Experiment, check_experiment
from piper_hpc.config.schema import register

__all__ = ["ConfigError", "Experiment", "Problem", "check_experiment", "register"]
