"""Micro-benchmarks of operators and links: what a calibration rests on. Knows nothing of the training code."""
