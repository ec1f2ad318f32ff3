"""Numbers with units, as people read them. A leaf: it imports nothing of ours."""

from __future__ import annotations

__all__ = ["data", "energy", "number", "percent", "plain", "quantity", "ratio", "time"]


def plain(value: object) -> str:
    """A number with all its digits; anything else as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) else str(value)


def number(value: float | None) -> str:
    """A count, or a number to four digits."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value == int(value) or value >= 1e4 else f"{value:,.4g}"


def percent(part: float | None, whole: float | None = 1.0) -> str:
    """A share of a whole, in percent."""
    return "-" if part is None or not whole else f"{100 * part / whole:.1f} %"


def ratio(value: float | None) -> str:
    """A ratio, to three digits."""
    return "-" if value is None else f"{value:.3g}x"


def data(bits: float | None) -> str:
    """An amount of data, as bytes."""
    if bits is None:
        return "-"
    for factor, unit in ((2**33, "GiB"), (2**23, "MiB"), (2**13, "KiB")):
        if bits >= factor:
            return f"{bits / factor:.4g} {unit}"
    return f"{bits / 8:g} B"


def energy(pj: float | None) -> str:
    """An energy, given in picojoules."""
    if pj is None:
        return "-"
    for factor, unit in ((1e12, "J"), (1e9, "mJ"), (1e6, "uJ"), (1e3, "nJ")):
        if pj >= factor:
            return f"{pj / factor:.4g} {unit}"
    return f"{pj:.4g} pJ"


def time(seconds: float | None) -> str:
    """A time, given in seconds."""
    if seconds is None:
        return "-"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if seconds >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds / 1e-9:.4g} ns"


def quantity(value: float | None, unit: str) -> str:
    """A value of an objective, in the unit that objectives have."""
    if value is None or value != value:
        return "-"
    if unit == "bytes":
        return data(8 * value)
    if unit == "uJ":
        return energy(1e6 * value)
    if unit == "ms":
        return time(1e-3 * value)
    if unit == "x":
        return f"{value:.4g}x"
    if unit == "%":
        return f"{value:.2f} %"
    if unit == "cycles":
        return number(value)
    return f"{value:.4g} {unit}".rstrip()
