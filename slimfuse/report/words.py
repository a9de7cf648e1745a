"""Figures as people read them: 1.2 M, 4.1 MB, 87.9 %, 3.14 ms, 2.1×."""

from __future__ import annotations

import re

from slimfuse.report.rows import Figure, Latency, Row, Speedup

_SHARES = (
    "accuracy", "top", "f1", "precision", "recall", "auc", "agreement", "overlap", "error", "ece",
)  # fmt: skip
_LOWER = ("perplexity", "loss", "nll", "bits", "error", "ece", "rmse", "mae", "brier")


def _is(metric: str, stems: tuple[str, ...]) -> bool:
    # 'eval_accuracy' and 'accuracy@1' are accuracies; 'stop' is no 'top'
    return any(word.startswith(stems) for word in re.split(r"[^a-z0-9]+", metric.lower()))


def lower_is_better(metric: str) -> bool:
    """Return whether a smaller value of this metric is the better one."""
    return _is(metric, _LOWER)


def metric_order(rows: tuple[Row, ...], first: str = "") -> list[str]:
    """Return every metric of the rows by name, `first` in front."""
    names = {name for row in rows for name in row.metrics}
    return sorted(names, key=lambda name: (name != first, name))


def is_share(metric: str, figure: Figure) -> bool:
    """Return whether the figure is a fraction in 0..1 that reads best in per cent."""
    return figure.unit in ("", "fraction") and _is(metric, _SHARES) and 0 <= figure.value <= 1


def scale(metric: str, figure: Figure) -> tuple[float, str]:
    """Return the factor and the unit under which the figure is shown."""
    return (100.0, "%") if is_share(metric, figure) else (1.0, figure.unit)


def number(value: float) -> str:
    """Return about three significant digits, without an exponent where that reads well."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.1e}"
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}".replace(
        ",", " "
    )


def bare(metric: str, figure: Figure, value: float) -> str:
    """Return `value`, read like `figure`, without its unit."""
    factor, unit = scale(metric, figure)
    return f"{value * factor:.1f}" if unit == "%" else number(value * factor)


def measured(metric: str, figure: Figure) -> str:
    """Return the value with its unit: 87.9 %."""
    return f"{bare(metric, figure, figure.value)} {scale(metric, figure)[1]}".strip()


def interval(metric: str, figure: Figure) -> str:
    """Return the 95 % interval without unit, "" where there is none: 87.2–88.5."""
    if figure.low is None or figure.high is None:
        return ""
    return f"{bare(metric, figure, figure.low)}–{bare(metric, figure, figure.high)}"


def plus_minus(metric: str, figure: Figure) -> str:
    """Return the value with half its interval's width, without unit: 87.9 ± 0.6."""
    value = bare(metric, figure, figure.value)
    if figure.low is None or figure.high is None:
        return value
    return f"{value} ± {bare(metric, figure, (figure.high - figure.low) / 2)}"


def p50_interval(latency: Latency) -> str:
    """Return the 95 % interval of p50 in milliseconds without unit, "" where it isn't known."""
    if latency.p50_low_ms is None or latency.p50_high_ms is None:
        return ""
    return f"{number(latency.p50_low_ms)}–{number(latency.p50_high_ms)}"


def p50(latency: Latency | None, *, bare: bool = False) -> str:
    """Return p50 in milliseconds with half its interval, as 5.61 ± 0.02; a tilde where it is noisy.

    bare: without the interval.
    """
    if latency is None:
        return "–"
    told = number(latency.p50_ms) + "~" * latency.noisy
    low, high = latency.reach
    return told if bare or not p50_interval(latency) else f"{told} ± {(high - low) / 2:.2g}"


def count(value: float) -> str:
    """Return a count with a decimal prefix: 1.2 M."""
    for step, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= step * 0.9995:  # 999 960 is 1.0 M, not 1000.0 k
            return f"{value / step:.{0 if value >= 100 * step else 1}f} {prefix}"
    return f"{value:.0f}"


def size(value: float) -> str:
    """Return bytes with a decimal prefix: 4.1 MB."""
    text = count(value).replace(" G", " GB").replace(" M", " MB").replace(" k", " kB")
    return text if text.endswith("B") else f"{text} B"


def whole(value: int) -> str:
    """Return an integer with its thousands apart: 10 000."""
    return f"{value:,}".replace(",", " ")


def seconds(value: float) -> str:
    """Return a duration: 0.4 s, 12 s, 3 min 20 s, 2 h 05 min."""
    if value < 9.95:
        return f"{value:.1f} s"
    whole = round(value)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def times(ratio: float) -> str:
    """Return a ratio: 2.1×, 1.04×, 12×."""
    digits = 0 if ratio >= 9.95 else 2 if ratio < 1.095 else 1
    return f"{ratio:.{digits}f}×"


def speed(speedup: Speedup) -> str:
    """Return what the interval allows to say: faster, slower, or no measurable difference."""
    if speedup.low > 1:
        return f"{times(speedup.ratio)} faster"
    if speedup.high < 1:
        return f"{times(1 / speedup.ratio)} slower"
    return "no measurable difference in speed"


def condition(threads: int, batch: int) -> str:
    """Return the conditions of a latency: batch 1, 2 threads."""
    return f"batch {batch}, {threads} thread{'' if threads == 1 else 's'}"


def short(text: object, limit: int = 28) -> str:
    """Return one line of at most `limit` characters; the middle goes, the ends tell names apart."""
    line = " ".join(str(text).split())
    if len(line) <= limit:
        return line
    head = limit // 2
    return f"{line[:head]}…{line[head + 1 - limit :]}"


def folded(name: str, limit: int) -> str:
    """Return a name in lines of at most `limit` characters, folded behind hyphens and the like."""
    lines = [""]
    for piece in re.split(r"(?<=[-_./,=+ ])", name):
        if lines[-1] and len(lines[-1]) + len(piece.rstrip()) > limit:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1].rstrip()) > limit:  # no place to fold
            lines[-1:] = [lines[-1][:limit], lines[-1][limit:]]
    return "\n".join(line.rstrip() for line in lines)


def natural(text: str) -> list[tuple[int, int, str]]:
    """Return a sort key under which 'layer 2' precedes 'layer 10'."""
    parts = re.split(r"(\d+)", text.lower())
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in parts if p]
