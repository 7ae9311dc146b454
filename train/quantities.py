"""Numbers for people: rates, durations and memory in a few characters."""

from __future__ import annotations


def number(value: float | None) -> str:
    """Three digits of a rate, or a dash."""
    return "-" if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def duration(seconds: float | None) -> str:
    """Hours, minutes and seconds, as far as they are there: 1:02:03, 2:03, 14 s, 0.3 s; a dash for None."""
    if seconds is None:
        return "-"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    if hours:
        return f"{hours}:{minutes:02}:{whole % 60:02}"
    return f"{minutes}:{whole % 60:02}" if minutes else f"{whole} s"


def gibibytes(count: float) -> str:
    """Memory, with two digits after the point."""
    return f"{count / 2**30:.2f} GiB"
