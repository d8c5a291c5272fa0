"""A comparison as bars: how much faster than flat each strategy is, the prediction beside it, and the ceiling. SVG."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from xml.sax.saxutils import escape

from piper_hpc.studies.headline.judge import Point
from piper_hpc.studies.headline.strategies import FLAT, STRATEGIES

HEIGHT = 460
LEFT, TOP, BOTTOM = 56, 24, 136
BAR, GAP, BETWEEN = 30, 12, 44
LEAST_WIDTH = 760
"""What the legend needs."""
COLOURS = dict(zip(STRATEGIES, ("#b8c0c8", "#dde2e7", "#e08a1e", "#4a8fd6", "#2f8f6b"), strict=True))
INK, GRID = "#1c2733", "#e6eaee"


def picture(points: Sequence[Point]) -> str:
    """Filled bars are measured, hollow ones predicted; the dashed line over a group is the ceiling C of its share."""
    ratios = [ratio for point in points for key in point.entries for ratio in _ratios(point, key)]
    top = 1.08 * max([1.0, *ratios, *(point.ceiling or 0.0 for point in points)])
    left = float(LEFT + GAP)
    body: list[str] = []
    for point in points:
        drawn = list(_group(point, left, top))
        width = len(point.entries) * (2 * BAR / 1.5 + GAP)
        body += [*drawn, *_under(point, left + width / 2)]
        if point.ceiling is not None:
            y = _y(point.ceiling, top)
            body.append(_line(left - 4, left + width - GAP + 4, y, f'stroke="{INK}" stroke-dasharray="5 4"'))
            body.append(_text(left + width - GAP, y - 5, f"C = {point.ceiling:.2f}", "end"))
        left += width + BETWEEN
    width = max(LEAST_WIDTH, round(left))
    body = [*_axis(top, width), *body, *_legend([key for key in STRATEGIES if any(key in p.entries for p in points)])]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" width="{width}" height="{HEIGHT}" '
        f'font-family="system-ui, sans-serif" font-size="12" fill="{INK}">\n'
        f'<rect width="{width}" height="{HEIGHT}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def _ratios(point: Point, key: str) -> list[float]:
    pair = (key, FLAT)
    return [ratio for ratio in (point.faster(pair), point.predicted_faster(pair)) if ratio is not None]


def _group(point: Point, left: float, top: float) -> Iterator[str]:
    width = BAR / 1.5
    for key in point.entries:
        for number, ratio in enumerate(_ratios(point, key)):
            y, x = _y(ratio, top), left + number * width
            look = f'fill="{COLOURS[key]}"' if not number else f'fill="white" stroke="{COLOURS[key]}" stroke-width="2"'
            yield f'<rect x="{x:.1f}" y="{y:.1f}" width="{width - 2:.1f}" height="{_y(0, top) - y:.1f}" {look}/>'
            if not number:
                yield _text(x + width, y - 5, f"{ratio:.2f}", "middle")
        left += 2 * width + GAP


def _axis(top: float, width: int) -> Iterator[str]:
    step = 0.5 if top < 4 else 1.0
    for number in range(int(top / step) + 1):
        y = _y(number * step, top)
        yield _line(LEFT, width - LEFT / 2, y, f'stroke="{INK if number * step == 1 else GRID}"')
        yield _text(LEFT - 8, y + 4, f"{number * step:g}", "end")
    yield _text(8, 14, "times as fast as expert parallelism over all ranks, flat", "start")


def _under(point: Point, middle: float) -> Iterator[str]:
    slowed = "links as scaled" if point.slowdown == 1 else f"links between nodes / {point.slowdown:g}"
    yield _text(middle, HEIGHT - BOTTOM + 18, slowed, "middle")
    if point.share is not None:
        yield _text(middle, HEIGHT - BOTTOM + 34, f"flat exchanges {100 * point.share:.0f} % of its step", "middle")


def _legend(keys: Sequence[str]) -> Iterator[str]:
    for number, key in enumerate(keys):
        x, y = LEFT + number % 2 * 360, HEIGHT - 62 + number // 2 * 20
        yield f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{COLOURS[key]}"/>'
        yield _text(x + 16, y, STRATEGIES[key].name, "start")
    yield _text(LEFT + 360, HEIGHT - 22, "filled: measured, hollow: predicted", "start")


def _y(ratio: float, top: float) -> float:
    return TOP + (HEIGHT - TOP - BOTTOM) * (1 - ratio / top)


def _line(x0: float, x1: float, y: float, look: str) -> str:
    return f'<line x1="{x0:.1f}" x2="{x1:.1f}" y1="{y:.1f}" y2="{y:.1f}" {look}/>'


def _text(x: float, y: float, words: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(words)}</text>'
