"""What machines cost, by a dated table: always an estimate, and never the bill.

The table is bundled (``prices.json``) or the user's own, the file that ``DETKIT_SAGEMAKER_PRICES`` names; nothing is
fetched. Machine hours are counted and nothing else: storage, transfer and requests are left out, and said to be.
"""

from __future__ import annotations

import functools
import importlib.resources
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from detkit.errors import InvalidValue, UsageError
from detkit.plans import to_cents

VARIABLE = "DETKIT_SAGEMAKER_PRICES"
Use = Literal["training", "transform", "hosting"]

SHORTEST = 300
"""Seconds that a cost limit has to be enough for; before that a job has hardly started its container."""


class Prices(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A table of prices, as it stands in the file."""

    as_of: str
    """The day or month of the prices."""
    source: str
    """Where they are from."""
    usd_per_hour: dict[str, float]
    """One machine in the base region, by type, whatever it is used for."""
    training: dict[str, float] = {}
    """Prices that differ for training; likewise below."""
    transform: dict[str, float] = {}
    hosting: dict[str, float] = {}
    regions: dict[str, float] = {}
    """Factors of regions; where there are none, the prices are those of every region."""
    serverless_usd_per_gb_second: float | None = None

    def of(self, instance_type: str, use: Use) -> float | None:
        """Return the price of a machine in the base region."""
        own: dict[str, float] = getattr(self, use)
        return own.get(instance_type, self.usd_per_hour.get(instance_type))


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What machines cost an hour, and at most in all."""

    price_per_hour: float | None
    """US dollars for all machines together; None where no price is known."""
    seconds: float | None
    """How long they may run; None where nothing ends them."""
    source: str
    """Where the price is from, of when, and what is left out."""

    @property
    def worst_case(self) -> float | None:
        """US dollars if all the time is used; None where that is not known."""
        if self.price_per_hour is None or self.seconds is None:
            return None
        return self.price_per_hour * self.seconds / 3600

    def __str__(self) -> str:
        if self.price_per_hour is None:
            return f"unknown price: {self.source}"
        most = "" if self.worst_case is None else f", at most {self.worst_case:.2f} USD"
        return f"about {self.price_per_hour:.3g} USD/h{most}, an estimate: {self.source}"


def estimate(
    *,
    instance_type: str,
    instance_count: int = 1,
    seconds: float | None,
    region: str,
    use: Use,
    spot: bool = False,
) -> Estimate:
    """Return what machines cost at most. Raises `InvalidValue` for a broken file of the user's."""
    for prices, origin in _tables():
        price = prices.of(instance_type, use)
        if price is None:
            continue
        factor, where = _factor(prices, region)
        parts = [f"{prices.source}, {prices.as_of}{where}", "machine hours only, no storage, transfer or requests"]
        if spot:
            parts.append("the price without spot, which is cheaper")
        return Estimate(
            price_per_hour=price * factor * instance_count, seconds=seconds, source="; ".join([*origin, *parts])
        )
    why = f"{instance_type} is in no table; add it to a file of your own and name that in {VARIABLE}"
    return Estimate(price_per_hour=None, seconds=seconds, source=why)


def serverless(*, memory_size: int, concurrency: int, region: str) -> Estimate:
    """Return what an hour of answering costs at most on a serverless endpoint; waiting costs nothing.

    ``memory_size`` is the megabytes of each of ``concurrency`` requests that are answered at once, and paid each.
    """
    for prices, origin in _tables():
        if prices.serverless_usd_per_gb_second is not None:
            factor, where = _factor(prices, region)
            price = prices.serverless_usd_per_gb_second * memory_size / 1024 * 3600 * factor * concurrency
            parts = [
                *origin,
                f"{prices.source}, {prices.as_of}{where}",
                f"while it answers {concurrency} requests at once without a pause; data is paid beside it",
            ]
            return Estimate(price_per_hour=price, seconds=None, source="; ".join(parts))
    return Estimate(price_per_hour=None, seconds=None, source="no table has serverless_usd_per_gb_second")


def runtime_within(max_cost: float, *, instance_type: str, instance_count: int = 1, region: str, use: Use) -> int:
    """Return the seconds that an amount of US dollars is enough for, so that it can end a job.

    Raises `UsageError` where no price is known, and `InvalidValue` where the amount is too little to begin with.
    """
    known = estimate(instance_type=instance_type, instance_count=instance_count, seconds=None, region=region, use=use)
    if known.price_per_hour is None:
        raise UsageError(
            f"max_cost={max_cost:g} cannot be kept: the price of {known.source}; or give yes=True (--yes) and rely on "
            "max_runtime"
        )
    seconds = int(max_cost / known.price_per_hour * 3600 + 1e-6)
    if seconds < SHORTEST:
        least = to_cents(known.price_per_hour * SHORTEST / 3600)
        raise InvalidValue(
            "max_cost",
            max_cost,
            f"at least {least:.2f}: {instance_count} x {instance_type} cost about {known.price_per_hour:.3g} USD/h, "
            f"so this is enough for {seconds} s, and starting alone takes minutes",
        )
    return seconds


def _factor(prices: Prices, region: str) -> tuple[float, str]:
    if not prices.regions:
        return 1.0, ""
    if region in prices.regions:
        factor = prices.regions[region]
        return factor, "" if factor == 1 else f", {factor:g} times as much in {region}, roughly"
    factor = max(prices.regions.values())
    return factor, f", {factor:g} times as much, the most of all regions, as {region} is not in the table"


def _tables() -> list[tuple[Prices, list[str]]]:
    """The user's table comes first; what is not in it is looked up in the bundled one."""
    own = os.environ.get(VARIABLE)
    return [*([(_read(Path(own)), [f"your {VARIABLE}"])] if own else []), (_bundled(), [])]


def _read(path: Path) -> Prices:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Prices)
    except OSError as error:
        raise InvalidValue(VARIABLE, str(path), f"a file that can be read: {error.strerror}") from None
    except msgspec.DecodeError as error:
        raise InvalidValue(VARIABLE, str(path), f"a table of prices in JSON: {error}") from None


@functools.cache
def _bundled() -> Prices:
    return msgspec.json.decode(
        importlib.resources.files("detkit_sagemaker").joinpath("prices.json").read_bytes(), type=Prices
    )
