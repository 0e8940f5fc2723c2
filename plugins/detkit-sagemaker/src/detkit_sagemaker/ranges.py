"""Search spaces as AMT, AWS's automatic model tuning, takes them, and the values that it chose, read back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from detkit.errors import InvalidValue, Unsupported
from detkit.spaces import Choice, Float, Int, Range, Scalar, Space, steps_of

STRATEGIES: Mapping[str, str] = {
    "amt": "Bayesian",
    "amt-random": "Random",
    "amt-hyperband": "Hyperband",
    "amt-grid": "Grid",
}
"""What AWS calls each of detkit's samplers; the first is what is done unless told."""

MOST_RANGES, MOST_VALUES = 30, 30
"""As many as a tuning job has of each kind, and as many as a category has (API reference, ParameterRanges)."""

Wire = Callable[[str, Scalar], tuple[str, str]]
"""From a parameter and a value to the hyperparameter and the text that a job is sent. Raises `InvalidValue`."""


class Searched(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter that AMT chooses."""

    name: str
    """What the training job calls it."""
    range: Range
    values: tuple[Scalar, ...] = ()
    """Where AMT is given categories: what each of them is."""
    words: tuple[str, ...] = ()
    """And how each is sent."""

    def read(self, text: str) -> Scalar:
        """Return the value that AMT chose, as the range has it. Raises `InvalidValue` for what it may not choose."""
        if self.words:
            if text not in self.words:
                raise InvalidValue(self.name, text, f"one of {', '.join(self.words)}, as AMT was told")
            return self.values[self.words.index(text)]
        return int(float(text)) if isinstance(self.range, Int) else float(text)


def searched(space: Space, sampler: str, wire: Wire) -> dict[str, Searched]:
    """Return each parameter as AMT is to search it. Raises `Unsupported` and `InvalidValue` for what it cannot."""
    if len(space) > MOST_RANGES:
        raise Unsupported(
            f"SageMaker searches at most {MOST_RANGES} parameters at once, and the space has {len(space)}"
        )
    dependent = [f"{name} ({range_})" for name, range_ in space.items() if range_.when]
    if dependent:
        raise Unsupported(
            f"SageMaker's tuning knows no conditions, and these depend on others: {', '.join(dependent)}; leave the "
            "conditions out, or search each case by itself"
        )
    return {name: _searched(name, range_, sampler, wire) for name, range_ in space.items()}


def _searched(name: str, range_: Range, sampler: str, wire: Wire) -> Searched:
    values = _categories(name, range_, sampler)
    if values:
        sent = [wire(name, value) for value in values]
        return Searched(name=sent[0][0], range=range_, values=tuple(values), words=tuple(text for _, text in sent))
    assert isinstance(range_, Float | Int)
    (native, _), _ = wire(name, range_.low), wire(name, range_.high)
    return Searched(name=native, range=range_)


def _categories(name: str, range_: Range, sampler: str) -> Sequence[Scalar]:
    """Return the values of a range that AMT is given one by one; none for what it draws from an interval."""
    if isinstance(range_, Choice):
        values: Sequence[Scalar] = range_.values
    elif isinstance(range_, Int) and (range_.step > 1 or sampler == "amt-grid"):
        values = range(range_.low, range_.high + 1, range_.step)
    elif isinstance(range_, Float) and range_.step is not None:
        values = steps_of(range_)
    elif sampler == "amt-grid":
        raise Unsupported(f"{name}={range_}: a grid has no end there; give a step, or values: {name}=A|B|C")
    else:
        return ()
    if len(values) > MOST_VALUES:
        raise Unsupported(
            f"{name}={range_} has {len(values)} values, and SageMaker takes at most {MOST_VALUES} one by one; give a "
            "larger step, or an interval without a step"
        )
    return values


def combinations(found: Mapping[str, Searched]) -> int:
    """Return how many trials a grid has."""
    number = 1
    for one in found.values():
        number *= len(one.words)
    return number


def request_of(found: Mapping[str, Searched]) -> dict[str, Any]:
    """Return ``ParameterRanges`` of a tuning job's request."""
    ranges: dict[str, list[dict[str, Any]]] = {}
    for one in found.values():
        if one.words:
            entry: dict[str, Any] = {"Name": one.name, "Values": list(one.words)}
            ranges.setdefault("CategoricalParameterRanges", []).append(entry)
            continue
        assert isinstance(one.range, Float | Int)
        kind = "Integer" if isinstance(one.range, Int) else "Continuous"
        scale = "Logarithmic" if one.range.log else "Linear"
        entry = {"Name": one.name, "MinValue": repr(one.range.low), "MaxValue": repr(one.range.high)}
        ranges.setdefault(f"{kind}ParameterRanges", []).append({**entry, "ScalingType": scale})
    return ranges


def notes(found: Mapping[str, Searched]) -> list[str]:
    """Return what AMT is told otherwise than the space has it."""
    return [
        f"{name}={one.range} is sent as {len(one.words)} values without an order, as SageMaker's tuning has no steps"
        for name, one in found.items()
        if one.words and not isinstance(one.range, Choice)
    ]


def read(found: Mapping[str, Searched], tuned: Mapping[str, str]) -> dict[str, Scalar]:
    """Return the values of a trial by detkit's names, from ``TunedHyperParameters``."""
    return {name: one.read(tuned[one.name]) for name, one in found.items() if one.name in tuned}
