"""The open end of the command line: ``[DATA ...] [--option value ...] [param=value ...]`` of `train` and `explain`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from detkit.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

_PARAMETER = re.compile(r"([A-Za-z_][\w.]*)=(.*)", re.DOTALL)
_FLAG = re.compile(r"--([A-Za-z][\w.-]*)(?:=(.*))?", re.DOTALL)

_BY_POSITION = {"train", "val"}
_OF_PYTHON = {"self", "leash"}
"""Arguments of `Trainer.start` that are none of the user's settings."""


class Words(NamedTuple):
    """What the words after the verb mean."""

    positions: list[str]
    """What is neither: data sets."""
    settings: dict[str, str]
    """Parameters and options of the backend, still text, by name with underscores."""


def sort_words(words: Iterable[str], own_flags: Iterable[str], usage: str = "") -> Words:
    """Tell data, flags and parameters apart. Raises `UsageError` for a name given twice or in the wrong way.

    ``own_flags`` are the verb's own options, which cannot be given as ``name=value``; ``usage`` is how a verb is typed
    that does not train.
    """
    positions: list[str] = []
    settings: dict[str, str] = {}
    reserved = {name.replace("-", "_") for name in own_flags}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, parameter = _FLAG.fullmatch(word), None if Path(word).exists() else _PARAMETER.fullmatch(word)
        if flag:
            name, value = flag[1].replace("-", "_"), flag[2]
            if value is None:
                if not rest or _FLAG.fullmatch(rest[0]):
                    raise UsageError(f"option {word} needs a value; write `{word} VALUE`, for a switch `{word}=true`")
                value = rest.pop(0)
        elif parameter:
            name, value = parameter[1], parameter[2]
            if name in reserved:
                raise UsageError(f"{name} is an option, not a parameter; write `--{name.replace('_', '-')} {value}`")
        elif word.startswith("-"):
            raise UsageError(f"no option {word!r}; options are written `--option value`, see --help")
        else:
            positions.append(word)
            continue
        if name in _BY_POSITION:
            raise UsageError(f"data is given by position: `detkit {usage or 'train DATA [VAL]'}`, not as {word!r}")
        if name in _OF_PYTHON and not usage:
            raise UsageError(f"no parameter or option {name!r}; `detkit explain` lists them")
        if name in settings:
            raise UsageError(f"{name} is given twice: {settings[name]!r} and {value!r}")
        settings[name] = value
    return Words(positions, settings)
