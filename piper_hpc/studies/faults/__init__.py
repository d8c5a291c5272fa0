"""Faults on purpose: real trainings on the testbed, each hurt at a random moment, and what became of them."""
