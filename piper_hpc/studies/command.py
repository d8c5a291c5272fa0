"""What the commands of studies have in common: their exit codes and how they read their words."""

from __future__ import annotations

import argparse

MET, MISSED, NO_ANSWER = 0, 1, 2
"""All bars met; one missed; a mistake in what was asked, or not all could be measured."""


def parser_of(study: str, description: str | None) -> argparse.ArgumentParser:
    """For `python -m piper_hpc.studies.STUDY`, whose module's docstring is its help."""
    return argparse.ArgumentParser(
        prog=f"python -m piper_hpc.studies.{study}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
