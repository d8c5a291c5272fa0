"""Numbers as people read them, always with their unit."""

from __future__ import annotations

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_COUNTS = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def _three_digits(value: float) -> str:
    """Three significant digits, zeros too: 22 is `22.0`; more before the point: 1234.5 is `1,234`."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def seconds(value: float) -> str:
    """Three significant digits in s, ms or µs: `0.0123` is `12.3 ms`."""
    for scale, unit in _SECONDS:
        if abs(value) >= scale:
            return f"{_three_digits(value / scale)} {unit}"
    return "0 s" if value == 0 else f"{value / 1e-6:.2g} µs"


def size(value: float) -> str:
    """Bytes with a binary prefix: `5.4e6` is `5.15 MiB`."""
    for scale, unit in _BYTES:
        if abs(value) >= scale:
            return f"{_three_digits(value / scale)} {unit}"
    return f"{value:.0f} B"


def count(value: float, unit: str = "") -> str:
    """A count with a decimal prefix: `1.24e9` is `1.24 G`."""
    for scale, prefix in _COUNTS:
        if abs(value) >= scale:
            return f"{_three_digits(value / scale)} {prefix}{unit}"
    return f"{value:.3g} {unit}".rstrip()


def percent(value: float) -> str:
    """A percentage with its sign: `-12.3 %`."""
    return f"{value:+,.1f} %" if abs(value) < 1000 else f"{value:+,.0f} %"


def quantity(value: float, unit: str) -> str:
    """A value in `s` or `bytes`."""
    return seconds(value) if unit == "s" else size(value)
