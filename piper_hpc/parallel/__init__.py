"""Parallel execution on one rank: process groups, the token dispatcher, the pipeline schedule, gradient reduction."""
