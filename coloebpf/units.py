"""Figures as people read them."""

from __future__ import annotations

SECOND = 1e9  # ns
LONG_UNITS = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))  # s
SHORT_S = 120  # a time below that is told in one unit


def duration(nanoseconds: float | None) -> str:
    """A time in the unit that fits it; '-' for none measured."""
    if nanoseconds is None:
        return "-"
    for unit, size in (("s", SECOND), ("ms", 1e6), ("us", 1e3)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds:.0f} ns"


def amount(size: int) -> str:
    """Bytes, in the unit that fits."""
    for unit, of in (("MiB", 1 << 20), ("KiB", 1 << 10)):
        if size >= of:
            return f"{size / of:,.1f} {unit}"
    return f"{size} bytes"


def age(milliseconds: float | None) -> str:
    """A time that may have lasted for days, in two units at most; 'never' for none."""
    if milliseconds is None:
        return "never"
    seconds = int(milliseconds / 1000)
    if seconds < SHORT_S:
        return duration(milliseconds * 1e6)
    parts: list[str] = []
    for unit, size in LONG_UNITS:
        number, seconds = divmod(seconds, size)
        if number or parts:
            parts.append(f"{number} {unit}")
    return " ".join(parts[:2])
