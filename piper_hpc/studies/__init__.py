"""Experiments that answer one question each: they start jobs, judge what came back, and print the verdict."""
