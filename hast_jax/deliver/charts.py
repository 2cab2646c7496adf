"""Small charts as inline SVG. The page around a chart sets its colours and size, by the charts' CSS classes."""

import html
import math
from collections.abc import Mapping, Sequence

import numpy as np

from hast_jax.deliver.measure import Histogram

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, RIGHT, BOTTOM, TOP = 640, 250, 72, 12, 48, 12  # room for large letters on a phone
SMALL_WIDTH, SMALL_HEIGHT, SMALL_TOP, SMALL_BOTTOM = 240, 102, 12, 16  # SMALL_TOP: room for the arrow
MOST_LINES, MOST_POINTS = 20, 400  # grid lines of a histogram; points of a curve


def curves(series: Mapping[str, Points], x: str, y: str) -> str:
    """Curves over one pair of axes; "" if they have fewer than two finite points. series: name -> (x, y).

    The y axis is logarithmic if all values are positive and the largest is more than 30 times the smallest.
    """
    points = [point for each in series.values() for point in each if math.isfinite(point[1])]
    if len(points) < 2:
        return ""
    xs, ys = zip(*points)
    low, high = min(ys), max(ys)
    logarithmic = low > 0 and high / low > 30
    scale = (lambda v: math.log10(v)) if logarithmic else float
    ticks = _ticks(low, high, logarithmic)
    bottom, top = scale(min(low, ticks[0])), scale(max(high, ticks[-1]))
    right = max(xs)

    def place_x(v):
        return LEFT + (WIDTH - LEFT - RIGHT) * (v / right if right else 0)

    def place_y(v):
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * ((scale(v) - bottom) / ((top - bottom) or 1))

    parts = []
    for tick in ticks:
        at = place_y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in _ticks(0, right, False):
        if tick <= right:
            at, anchor = (WIDTH, "end") if tick > 0.96 * right else (place_x(tick), "middle")
            parts.append(f'<text x="{at:.1f}" y="{HEIGHT - 28}" text-anchor="{anchor}">{_number(tick)}</text>')
    for i, (name, each) in enumerate(series.items()):
        thin = [each[j] for j in np.unique(np.linspace(0, len(each) - 1, min(len(each), MOST_POINTS)).astype(int))]
        path = " ".join(f"{place_x(a):.1f},{place_y(b):.1f}" for a, b in thin if math.isfinite(b))
        parts.append(f'<polyline class="line line{i}" points="{path}"><title>{html.escape(name)}</title></polyline>')
    parts.append(f'<text x="{(LEFT + WIDTH) / 2:.0f}" y="{HEIGHT - 4}" text-anchor="middle">{html.escape(x)}</text>')
    label = f"{y} over {x}: {', '.join(series)}"
    head = f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(label)}">'
    return head + "".join(parts) + "</svg>"


def histogram(values: Histogram, label: str) -> str:
    """Bars that count the values, and a line at each integer of their grid if these are at most 20.

    The highest bar may be cut, so that the others can be seen. An arrow above it then marks it. label: for screen readers.
    """
    counts, edges = values.counts, values.edges
    ordered = np.sort(counts)
    top = max(1, min(ordered[-1], 2 * ordered[-2] if len(ordered) > 1 else ordered[-1]))
    floor, height = SMALL_HEIGHT - SMALL_BOTTOM, SMALL_HEIGHT - SMALL_BOTTOM - SMALL_TOP

    def place(step):
        return SMALL_WIDTH * (step - edges[0]) / (edges[-1] - edges[0])

    parts = []
    if values.highest - values.lowest < MOST_LINES:
        for step in np.arange(values.lowest, values.highest + 1):
            at = f'x1="{place(step):.1f}" x2="{place(step):.1f}" y1="{SMALL_TOP}" y2="{floor}"'
            parts.append(f'<line class="integer" {at}/>')
    bars = []
    for i, count in enumerate(counts):
        tall = height * min(count / top, 1)
        if tall >= 0.05:
            width = place(edges[i + 1]) - place(edges[i]) - 0.3
            bars.append(f"M{place(edges[i]):.1f} {floor}v{-tall:.1f}h{width:.1f}v{tall:.1f}z")
    parts.append(f'<path class="bar" d="{"".join(bars)}"/>')
    if ordered[-1] > top:
        at = place((edges[counts.argmax()] + edges[counts.argmax() + 1]) / 2)
        parts.append(f'<text class="cut" x="{min(max(at, 5), SMALL_WIDTH - 5):.1f}" y="9" text-anchor="middle">&#8593;</text>')
    ends = ((values.lowest, "start"), (values.highest, "end"))
    for step, anchor in ends:
        parts.append(f'<text x="{place(step):.1f}" y="{SMALL_HEIGHT - 3}" text-anchor="{anchor}">{step:.0f}</text>')
    head = f'<svg class="small" viewBox="0 0 {SMALL_WIDTH} {SMALL_HEIGHT}" role="img" aria-label="{html.escape(label)}">'
    return head + "".join(parts) + "</svg>"


def _ticks(low: float, high: float, logarithmic: bool) -> list[float]:
    if logarithmic:
        return [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    rough = (high - low or abs(high) or 1) / 4
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(each * unit for each in (1, 2, 2.5, 5, 10) if each * unit >= rough * 0.999)
    return [step * i for i in range(math.floor(low / step), math.ceil(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
