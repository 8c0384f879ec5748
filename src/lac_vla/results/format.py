"""Numbers are written for people, alike in the terminal, in reports and on the live page."""

from __future__ import annotations

from lac_vla.results.stats import Percentiles

NONE = "-"
"""Written where a number does not exist."""


def percent(value: float | None, digits: int = 1) -> str:
    """Write a share, e.g. 0.25 → ``25.0 %``."""
    return NONE if value is None else f"{100 * value:.{digits}f} %"


def points(value: float) -> str:
    """Write a difference of shares in percentage points, with its sign, e.g. -0.02 → ``−2.0``."""
    return "±0.0" if round(100 * value, 1) == 0 else f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")


def p_value(value: float) -> str:
    """Write a p-value to three digits, e.g. ``0.125``; very small ones as ``<0.001``."""
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def count(value: float | None) -> str:
    """Write a number of operations with its prefix, e.g. 2.5e9 → ``2.50 G``."""
    if value is None:
        return NONE
    for factor, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {prefix}"
    return f"{value:.0f}"


def milliseconds(value: float) -> str:
    """Write milliseconds with three digits, e.g. ``8.25``, ``82.5``, ``825``."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def latency(value: Percentiles | None) -> str:
    """Write median and 95th percentile in milliseconds, e.g. ``82.5 / 101``."""
    return NONE if value is None else f"{milliseconds(value.p50)} / {milliseconds(value.p95)}"


def memory(value: float | None) -> str:
    """Write megabytes, e.g. ``812 MB``."""
    return NONE if value is None else f"{value:.0f} MB"


def times(value: float) -> str:
    """Write a factor, e.g. ``1.25 ×``."""
    return f"{value:.2f} ×"
