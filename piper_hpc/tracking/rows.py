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


def with_prediction(row: dict[str, Any], prediction: dict[str, Any] | None) -> dict[str, Any]:
    """The row, and under `predicted` what `prediction.json` expects of each quantity in it that one rank or stage does
    not have alone: step time, rates and terms."""
    if prediction is None:
        return row
    expected = {key: prediction.get(key) for key in ("step_time_s", "tokens_per_s", "mfu")} | prediction["terms"]
    if prediction.get("bubble_fraction") is None:
        expected.pop("bubble_s", None)  # ranks that share cores: not applicable
    return row | {"predicted": {key: value for key, value in expected.items() if key in row and value is not None}}
