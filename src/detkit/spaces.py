"""Search spaces: which values of a model's parameters a tuner may try.

A space is a mapping from a parameter's name to a range: `Float`, `Int` or `Choice`. On the command line each is text:

    learning_rate=1e-5..1e-2:log          a number, drawn evenly over its logarithm
    batch_size=4..32:step=4               whole numbers, where both ends are written as such
    optimizer=sgd|adamw                   one of several values
    momentum=0.8..0.99:if:optimizer=sgd   searched only where another parameter has that value, or one of a|b
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import msgspec

from detkit.errors import InvalidValue, UnknownName, UsageError
from detkit.params import INSTEAD, Params, coerce

Scalar: TypeAlias = bool | int | float | str | None
"""A parameter's value in a trial; a list is text with commas, as on the command line."""

When: TypeAlias = dict[str, tuple[Scalar, ...]]
"""Other parameters, and the values of theirs with which a range is searched at all."""


class Float(msgspec.Struct, frozen=True, tag="float"):
    """A number from ``low`` to ``high``, both included; with ``log`` drawn evenly over its logarithm."""

    low: float
    high: float
    log: bool = False
    step: float | None = None
    when: When = {}

    def __post_init__(self) -> None:
        _require_bounds(self)
        _spread(self)

    def __str__(self) -> str:
        return _text_of(self)


class Int(msgspec.Struct, frozen=True, tag="int"):
    """A whole number from ``low`` to ``high``, both included, every ``step``-th; with ``log`` over its logarithm."""

    low: int
    high: int
    log: bool = False
    step: int = 1
    when: When = {}

    def __post_init__(self) -> None:
        _require_bounds(self)
        _spread(self)

    def __str__(self) -> str:
        return _text_of(self)


class Choice(msgspec.Struct, frozen=True, tag="choice"):
    """One of several ``values``, which have no order."""

    values: tuple[Scalar, ...]
    when: When = {}

    def __post_init__(self) -> None:
        listed = (self.values,) if isinstance(self.values, str) else tuple(map(_scalar, self.values))
        if len(set(map(repr, listed))) < max(2, len(listed)):
            raise InvalidValue("Choice", self.values, "two values or more, each once")
        msgspec.structs.force_setattr(self, "values", listed)
        _spread(self)

    def __str__(self) -> str:
        return "|".join(map(_word, self.values)) + _condition(self.when)


Range: TypeAlias = Float | Int | Choice

Space: TypeAlias = Mapping[str, Range]


def read_range(name: str, text: str) -> Range | None:
    """Read a range as it is typed, see the head of this module; None for text that is a plain value.

    Raises `InvalidValue` for what begins like a range and is none.
    """
    body, condition, rest = text.partition(":if:")
    when = _read_condition(name, text, rest) if condition else {}
    if "|" in body:
        return Choice(tuple(word.strip() for word in body.split("|")), when)
    found = _BETWEEN.fullmatch(body)
    if found is None:
        if condition:
            raise InvalidValue(name, text, _EXPECTED)
        return None  # such as a path with two dots
    low, high, flags = found[1], found[2], [flag for flag in found[3].split(":") if flag]
    step = next((flag.removeprefix("step=") for flag in flags if flag.startswith("step=")), None)
    if any(flag != "log" and not flag.startswith("step=") for flag in flags):
        raise InvalidValue(name, text, _EXPECTED)
    try:
        if all(re.fullmatch(r"[+-]?\d+", end) for end in (low, high, *([step] if step else []))):
            return Int(int(low), int(high), "log" in flags, step=int(step or 1), when=when)
        return Float(float(low), float(high), "log" in flags, step=None if step is None else float(step), when=when)
    except ValueError:
        raise InvalidValue(name, text, _EXPECTED) from None


def check_space(space: Space, params: Params, model: str) -> None:
    """Raise where a space names what the parameters are not, or values that they do not take, or waits for nothing."""
    hints = typing_hints(type(params))
    if not space:
        raise UsageError("the space is empty; name a parameter and its range, e.g. learning_rate=1e-5..1e-2:log")
    for name, range_ in space.items():
        if name not in hints:
            raise UnknownName(f"parameter of {model} to search", name, hints, "options are not searched")
        for value in _ends(range_):
            coerce(name, value, hints[name], origin="the space")
        if INSTEAD.get(name) in space:
            raise UsageError(f"the space has both {name} and {INSTEAD[name]}; they mean the same, search one of them")
        for other, values in range_.when.items():
            _check_condition(name, other, values, space, params)
    _order(space)


def suggested(params: Params) -> dict[str, Range]:
    """Return what is usually worth searching around a model's own defaults: learning rate, weight decay and batch."""
    found: dict[str, Range] = {}
    rate, decay, batch = (getattr(params, name, None) for name in ("learning_rate", "weight_decay", "batch_size"))
    if isinstance(rate, float):
        found["learning_rate"] = Float(rate / 10, rate * 10, log=True)
    if isinstance(decay, float) and decay:
        found["weight_decay"] = Float(decay / 10, min(decay * 10, 0.9), log=True)
    if isinstance(batch, int) and batch > 1:
        found["batch_size"] = Choice((max(1, batch // 2), batch, batch * 2))
    return found


def chosen(range_: Range, values: Mapping[str, Any], params: Params) -> bool:
    """Return whether a range is searched where others have ``values``, and all else is as in ``params``."""
    return all(_is_in(values.get(other, getattr(params, other, None)), wanted) for other, wanted in range_.when.items())


def steps_of(range_: Int | Float) -> list[float]:
    """Return the values of a range with a step, as numbers of 12 digits. Raises `UsageError` where it has none."""
    if range_.step is None or range_.log:
        raise UsageError(
            f"{range_} has no steps; write its values one by one, {range_.low:g}|{range_.high:g}, or a step"
        )
    count = math.floor((range_.high - range_.low) / range_.step + 1e-9) + 1
    return [min(range_.high, float(f"{range_.low + i * range_.step:.12g}")) for i in range(count)]


def fitted(name: str, range_: Range, value: Any, hint: Any) -> Scalar:
    """Return a value as a trial has it. Raises `InvalidValue` where it is not in the range.

    ``hint`` is the type of the parameter.
    """
    scalar = _scalar(value)
    if isinstance(range_, Choice):
        same = [one for one in range_.values if coerce(name, one, hint) == coerce(name, scalar, hint)]
        if same:
            return same[0]
    elif isinstance(scalar, int | float):
        slack = 1e-9 * max(abs(range_.low), abs(range_.high))
        steps = (scalar - range_.low) / (range_.step or 1)
        on_step = range_.log or range_.step is None or math.isclose(steps, round(steps), abs_tol=1e-6)
        if range_.low - slack <= scalar <= range_.high + slack and on_step:
            inside = min(max(scalar, range_.low), range_.high)
            return float(inside) if isinstance(range_, Float) else round(inside)
    raise InvalidValue(name, scalar, f"one of the space: {range_}")


def defaults_in(space: Space, params: Params) -> dict[str, Scalar]:
    """Return the values of ``params`` for what is searched; none where one of them is not in the space."""
    hints = typing_hints(type(params))
    found: dict[str, Scalar] = {}
    try:
        for name in in_order(space):
            if chosen(space[name], found, params):
                found[name] = fitted(name, space[name], getattr(params, name), hints[name])
    except UsageError:
        return {}
    return found


def in_order(space: Space) -> list[str]:
    """Return the names so that each comes behind those that its condition looks at."""
    return _order(space)


def typing_hints(struct: type[Params]) -> dict[str, Any]:
    """Return the type of each parameter."""
    import typing

    return typing.get_type_hints(struct, include_extras=True)


_NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+|\d+\.(?=\.\.\d))(?:[eE][+-]?\d+)?"
_BETWEEN = re.compile(rf"\s*({_NUMBER})\.\.({_NUMBER})((?::[^:]+)*)\s*")

_EXPECTED = "a range: 1e-5..1e-2:log, 4..32 or 4..32:step=4, sgd|adamw, or one of these with :if:other=value behind it"


def _require_bounds(range_: Float | Int) -> None:
    low, high = range_.low, range_.high
    if not low < high:
        raise InvalidValue("range", f"{low:g}..{high:g}", "a first number below the second")
    if range_.log and low <= 0:
        raise InvalidValue("range", f"{low:g}..{high:g}:log", "numbers above 0, as they are drawn over the logarithm")
    if range_.log and range_.step not in (None, 1):
        raise InvalidValue("range", str(range_), "either log or step, not both")
    if range_.step is not None and range_.step <= 0:
        raise InvalidValue("range", str(range_), "a step above 0")


def _spread(range_: Range) -> None:
    """Let ``when`` name one value without a tuple around it."""
    when = {
        name: tuple(map(_scalar, value)) if isinstance(value, list | tuple) else (value,)
        for name, value in range_.when.items()
    }
    msgspec.structs.force_setattr(range_, "when", when)


def _scalar(value: Any) -> Scalar:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else value


def _ends(range_: Range) -> tuple[Scalar, ...]:
    return range_.values if isinstance(range_, Choice) else (range_.low, range_.high)


def _word(value: Scalar) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}"


def _text_of(range_: Float | Int) -> str:
    step = "" if range_.step in (None, 1) else f":step={range_.step:g}"
    ends = f"{range_.low:g}..{range_.high:g}"
    return ends + (":log" if range_.log else "") + step + _condition(range_.when)


def _condition(when: When) -> str:
    return "".join(f":if:{name}={'|'.join(map(_word, values))}" for name, values in when.items())


def _read_condition(name: str, text: str, rest: str) -> When:
    found: When = {}
    for part in rest.split(":if:"):
        other, equals, values = part.partition("=")
        if not equals or not values:
            raise InvalidValue(name, text, _EXPECTED)
        found[other.strip()] = tuple(word.strip() for word in values.split("|"))
    return found


def _check_condition(name: str, other: str, values: tuple[Scalar, ...], space: Space, params: Params) -> None:
    hints = typing_hints(type(params))
    if other not in hints or other == name:
        raise UnknownName(f"parameter that {name} depends on", other, [known for known in hints if known != name])
    for value in values:
        coerce(other, value, hints[other], origin=f"the condition of {name}")
    possible = space.get(other)
    if possible is None and not _is_in(getattr(params, other), values):
        raise UsageError(
            f"{name} is searched only if {other} is {' or '.join(map(_word, values))}, and {other} is "
            f"{getattr(params, other)} in every trial; search {other}, too, or set it"
        )
    if possible is not None and not isinstance(possible, Choice):
        raise UsageError(f"{name} depends on {other}, which is not a choice of values but {possible}")


def _is_in(value: Any, wanted: tuple[Scalar, ...]) -> bool:
    return _word(_scalar(value)) in {_word(one) for one in wanted}


def _order(space: Space) -> list[str]:
    done: list[str] = []
    left = list(space)
    while left:
        ready = [name for name in left if all(other in done or other not in space for other in space[name].when)]
        if not ready:
            raise UsageError(f"{', '.join(left)} depend on each other; no trial could begin with one of them")
        done += ready
        left = [name for name in left if name not in ready]
    return done
