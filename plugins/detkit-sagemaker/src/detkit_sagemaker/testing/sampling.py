"""How a tuning job chooses values: at random over the ranges, on their scale, or every combination of a grid."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

from detkit_sagemaker.testing.refusals import Refused

Json = dict[str, Any]


def candidates(strategy: str, ranges: Json, seed: int | None) -> Iterator[dict[str, str]]:
    """Yield hyperparameters, without end unless the strategy is ``Grid``.

    ``Bayesian`` and ``Hyperband`` choose at random here.
    """
    categories = {one["Name"]: one["Values"] for one in ranges.get("CategoricalParameterRanges", [])}
    if strategy == "Grid":
        yield from (dict(zip(categories, values, strict=True)) for values in itertools.product(*categories.values()))
        return
    chance = random.Random(seed)  # noqa: S311
    while True:
        chosen = {name: chance.choice(values) for name, values in categories.items()}
        for one in ranges.get("IntegerParameterRanges", []):
            value = round(_drawn(one, chance))
            chosen[one["Name"]] = str(min(max(value, int(one["MinValue"])), int(one["MaxValue"])))
        for one in ranges.get("ContinuousParameterRanges", []):
            chosen[one["Name"]] = repr(_drawn(one, chance))
        yield chosen


def check(strategy: str, ranges: Json, fixed: dict[str, str]) -> None:
    """Raise `Refused` for ranges that AWS refuses."""
    scaled = [*ranges.get("IntegerParameterRanges", []), *ranges.get("ContinuousParameterRanges", [])]
    if ranges.get("AutoParameters"):
        raise Refused("AutoParameters are not simulated")
    if strategy == "Grid" and scaled:
        raise Refused("Grid search supports categorical parameters only")
    names = [one["Name"] for one in [*scaled, *ranges.get("CategoricalParameterRanges", [])]]
    if not names:
        raise Refused("at least one hyperparameter range is needed")
    for name in names:
        if name in fixed or names.count(name) > 1:
            raise Refused(f"the hyperparameter {name} is given twice")
    for one in scaled:
        try:
            low, high = float(one["MinValue"]), float(one["MaxValue"])
        except ValueError as error:
            raise Refused(f"the range of {one['Name']} is no range of numbers") from error
        scale = one.get("ScalingType", "Auto")
        if low > high:
            raise Refused(f"the range of {one['Name']}: MinValue {low} is above MaxValue {high}")
        if scale == "Logarithmic" and low <= 0:
            raise Refused(f"the range of {one['Name']}: Logarithmic scaling needs MinValue above 0")
        if scale == "ReverseLogarithmic" and not (low >= 0 and high < 1):
            raise Refused(f"the range of {one['Name']}: ReverseLogarithmic scaling needs values in [0, 1)")


def _drawn(one: dict[str, str], chance: random.Random) -> float:
    low, high, scale = float(one["MinValue"]), float(one["MaxValue"]), one.get("ScalingType", "Auto")
    if scale == "Logarithmic":
        return math.exp(chance.uniform(math.log(low), math.log(high)))
    if scale == "ReverseLogarithmic":
        return 1 - math.exp(chance.uniform(math.log(1 - high), math.log(1 - low)))
    return chance.uniform(low, high)
