"""Rows of the record as the flat names that dashboards plot."""

from __future__ import annotations

from typing import Any


def flatten(row: dict[str, Any], prefix: str = "") -> dict[str, float | int | str]:
    """Lists by index and mappings by key as `name/0` and `name/key`, so that every number becomes a curve."""
    flat: dict[str, float | int | str] = {}
    for key, value in row.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}/")
        elif isinstance(value, (list, tuple)):
            flat |= flatten({str(index): item for index, item in enumerate(value)}, f"{name}/")
        elif value is not None:
            flat[name] = int(value) if isinstance(value, bool) else value
    return flat
