"""Keys of a framework itself, such as ``SOLVER.WARMUP_ITERS``, beside the parameters that all backends share.

A backend takes them where its parameters have a field ``overrides: Overrides``. In a call and on the command line they
may also stand by themselves, as ``SOLVER.WARMUP_ITERS=100``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple, TypeAlias

from msgspec import Meta

FIELD = "overrides"

KEY = re.compile(r"[A-Z][A-Z0-9_]+(\.\w+)*")
"""Capitals, and what follows after dots: ``SEED``, ``SOLVER.STEPS``. No parameter is written so."""


def read(text: str) -> dict[str, str]:
    """Read native keys from JSON. Raises `ValueError` with what is expected."""
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError('native keys by name, such as {"SOLVER.WARMUP_ITERS": 100}')
    return {str(key): written(value) for key, value in found.items()}


Overrides: TypeAlias = Annotated[
    dict[str, str],
    Meta(description="native keys of the framework and their values, such as SOLVER.NESTEROV", extra={"read": read}),
]


class Meaning(NamedTuple):
    """A native key that is a parameter here."""

    key: str
    name: str
    """Of the parameter."""
    value: Any
    origin: str = ""
    """The file that says it, over which a parameter that is given wins; empty where the key itself was given."""


class Adopted(NamedTuple):
    """What a backend makes of native keys."""

    overrides: Mapping[str, str]
    """Those that stay as they are."""
    meanings: Sequence[Meaning] = ()


def written(value: Any) -> str:
    """Return a value as one would write it on the command line."""
    return value if isinstance(value, str) else repr(value)
