"""A picture of latencies: one row for a model, one group for each setting."""

from __future__ import annotations

import math
from collections.abc import Sequence
from xml.sax.saxutils import escape

from slimfuse_export.latency import BenchResult, Latency, conditions

WIDTH, LEFT, RIGHT, ROW, TOP = 760, 230, 80, 22, 46
_STYLE = (
    "text{font:12px sans-serif;fill:#1a1a1a}.g{font-weight:bold}.l{stroke:#0b6e8a;"
    "stroke-width:3}.p{fill:#0b6e8a}.q{fill:none;stroke:#0b6e8a;stroke-width:2}"
    ".a{stroke:#c8c8c8}@media(prefers-color-scheme:dark){text{fill:#eee}.a{stroke:#555}"
    ".l,.q{stroke:#5fc3df}.p{fill:#5fc3df}}"
)


def plot_bench(result: BenchResult) -> str:
    """Return an SVG of p50 (dot), p90 (ring) and p99 (end of line) on a logarithmic axis."""
    groups: dict[str, list[Latency]] = {}
    for row in result.latencies:
        groups.setdefault(conditions(row.threads, row.batch, row.dims), []).append(row)
    rows = result.latencies
    low, high = min(r.p50_ms for r in rows), max(r.p99_ms for r in rows)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    span = math.log(high / low)

    def x(ms: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(ms / low) / span

    parts, y = [], TOP
    for label, members in groups.items():
        parts.append(f'<text class="g" x="8" y="{y}">{escape(label)}</text>')
        for row in members:
            y += ROW
            parts += _row(row, y, x(row.p50_ms), x(row.p90_ms), x(row.p99_ms))
        y += ROW + 6
    axis = [
        f'<line class="a" x1="{x(t):.1f}" x2="{x(t):.1f}" y1="{TOP - 12}" y2="{y - ROW}"/>'
        f'<text text-anchor="middle" x="{x(t):.1f}" y="{y}">{t:g}</text>'
        for t in ticks
    ]
    height = y + ROW + 8
    told = "; ".join(f"{r.name} {conditions(r.threads, r.batch, r.dims)}: {r.p50_ms:.3g} ms"
                     for r in rows)  # fmt: skip
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img">',
            f"<title>Latency of one call</title><desc>Medians: {escape(told)}</desc>",
            f"<style>{_STYLE}</style>",
            '<text x="8" y="20">Latency of one call, ms: dot p50, ring p90, end of line p99</text>',
            *axis,
            *parts,
            "</svg>\n",
        ]
    )


def _row(row: Latency, y: int, p50: float, p90: float, p99: float) -> Sequence[str]:
    middle = y - 4
    name = row.name if len(row.name) <= 32 else f"…{row.name[-31:]}"
    return (
        f'<text x="20" y="{y}">{escape(name)}</text>',
        f'<line class="l" x1="{p50:.1f}" x2="{p99:.1f}" y1="{middle}" y2="{middle}"/>',
        f'<circle class="q" cx="{p90:.1f}" cy="{middle}" r="5"/>',
        f'<circle class="p" cx="{p50:.1f}" cy="{middle}" r="5"/>',
        f'<text x="{p99 + 8:.1f}" y="{y}">{row.p50_ms:.3g}</text>',
    )


def _ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten from just below `low` to just above `high`."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    steps = [m * 10.0**e for e in range(first - 1, last + 1) for m in (1, 2, 5)]
    start = max(i for i, step in enumerate(steps) if step <= low)
    end = min(i for i, step in enumerate(steps) if step >= high)
    kept = steps[start : max(end, start + 1) + 1]
    return kept if len(kept) <= 12 else [t for t in kept if math.log10(t).is_integer()] or kept
