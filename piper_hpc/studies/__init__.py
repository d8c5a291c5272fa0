"""Experiments that answer one question each: they start jobs, judge what came back, and print the verdict.

all_to_all: which algorithm is fastest on the testbed's shaped links, and whether the model chooses it (`make
bench-a2a`). frontier_all_to_all: the same algorithms on a simulated Frontier, beside the figures of arXiv 2605.05049.
A study that measures starts its jobs through piper_hpc.submit, as the launcher does, and keeps its rows in a run's
folder; what it concludes is computed from these rows alone, so that it can be shown again.
"""
