"""Numbers as people write them."""

from __future__ import annotations

from typing import Any


def finite(value: Any) -> float | None:
    """The value as a float, or None where it is missing, no number, NaN or infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if abs(number) < 1e100 else None


def number(value: float | None) -> str:
    """A number to about three digits, as people write it."""
    if value is None:
        return "–"
    size = abs(value)
    if size >= 1e6 or 0 < size < 5e-4:
        return f"{value:.1e}"
    return f"{value:,.{0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3}f}"


def fixed(value: float | None) -> str:
    """Three decimals, for numbers that are near zero most of the time."""
    return "–" if value is None else f"{value:.3f}"


def count(value: float | None) -> str:
    """A whole number, its thousands apart."""
    return "–" if value is None else f"{value:,.0f}"


def share(value: float | None) -> str:
    """A share as a percentage."""
    if value is None:
        return "–"
    return f"{100 * value:.0f}%" if value >= 0.0995 or value == 0 else f"{100 * value:.1f}%"


def duration(seconds: float | None) -> str:
    """A time as people say it: 48 s, 4m 12s, 2h 05m, 3d 4h."""
    if seconds is None:
        return "–"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if not minutes:
        return f"{whole} s"
    if not hours:
        return f"{minutes}m {whole % 60:02d}s"
    return f"{hours}h {minutes % 60:02d}m" if not days else f"{days}d {hours % 24}h"
