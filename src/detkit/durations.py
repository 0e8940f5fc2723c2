"""Durations as people write them: ``4h``, ``90m``, ``1h30m``, ``2d``, ``45s``."""

from __future__ import annotations

import re

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def seconds(text: str) -> int:
    """Read a duration: ``4h``, ``90m``, ``1h30m``, ``2d``, ``45s``, or a plain number of seconds.

    Raises `ValueError` with what was expected.
    """
    compact = text.replace(" ", "").lower()
    if re.fullmatch(r"\d+", compact):
        return int(compact)
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd])", compact)
    if not parts or "".join(number + unit for number, unit in parts) != compact:
        raise ValueError("a duration such as 4h, 90m, 1h30m or 3600 (seconds)")
    return round(sum(float(number) * _UNITS[unit] for number, unit in parts))


def duration(seconds: float) -> str:
    """Return a duration as `seconds` reads it, in the two largest units: ``4h``, ``1h30m``, ``45s``."""
    left = round(seconds)
    parts = []
    for unit in ("d", "h", "m", "s"):
        number, left = divmod(left, _UNITS[unit])
        parts += [f"{number}{unit}"] if number else []
    return "".join(parts[:2]) or "0s"
