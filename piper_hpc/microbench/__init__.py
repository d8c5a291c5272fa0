"""Micro-benchmarks of operators and links: what a calibration rests on. Knows nothing of the training code."""

from piper_hpc.microbench.suite import BENCHMARK_VERSION, run

__all__ = ["BENCHMARK_VERSION", "run"]
