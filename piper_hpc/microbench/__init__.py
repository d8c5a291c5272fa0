"""Micro-benchmarks of operators and links: what a calibration rests on. Knows nothing of the training code."""

from piper_hpc.microbench.suite import run

__all__ = ["run"]
