"""Measure, model, plan, train and validate Mixture-of-Experts training on Slurm (arXiv 2605.05049)."""

__version__ = "0.1.0"
