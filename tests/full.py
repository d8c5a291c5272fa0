"""How much of a large matrix is run: a part that covers it, or with `--full` (`make test-all`) the whole."""

from __future__ import annotations

import pytest

ALL = False
"""Set by tests/conftest.py before any test is collected."""
full = pytest.mark.full
"""On what `make test` may leave out, since other tests of the same matrix cover each of its values."""


def examples(part: int, whole: int) -> int:
    """How many examples hypothesis makes up."""
    return whole if ALL else part
