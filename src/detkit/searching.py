"""How a trial's values are chosen and which trials end early, by Optuna's samplers and pruners."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from detkit.errors import PluginError, UsageError
from detkit.spaces import Choice, Int, Range, Scalar, steps_of
from detkit.study_storage import import_optuna
from detkit.tuning import Search

if TYPE_CHECKING:
    import optuna

    from detkit.studies import Facts

SAMPLERS = ("tpe", "random", "grid", "cmaes")
PRUNERS = ("median", "hyperband", "asha", "none")

_CENT = 0.01
_LEAST_SHARE = 10
"""Percent of the training before which no trial is ended."""


def grid(space: Mapping[str, Range]) -> Iterator[dict[str, Scalar]]:
    """Yield all combinations of a space. Raises `UsageError` for a range without steps, or with a condition."""
    columns: list[list[Scalar]] = []
    for name, range_ in space.items():
        if range_.when:
            raise UsageError(f"a grid has all combinations, and {name} has a condition; leave it out")
        if isinstance(range_, Choice):
            columns.append(list(range_.values))
        elif isinstance(range_, Int):
            columns.append([round(value) for value in steps_of(range_)])
        else:
            columns.append([*steps_of(range_)])
    for values in itertools.product(*columns):
        yield dict(zip(space, values, strict=True))


def make_sampler(search: Search, number: int | None) -> Any:
    """Return a sampler for one trial.

    Its seed is that of the search and the trial's number, so that a search which goes on chooses as if it had not been
    interrupted; None where others may choose at the same moment, who would choose the same.
    """
    samplers, name = import_optuna().samplers, search.sampler
    seed = None if number is None else search.seed * 100_003 + number
    if name == "tpe":
        return samplers.TPESampler(
            seed=seed,
            multivariate=True,
            group=True,
            constant_liar=search.parallel > 1 or number is None,
            n_startup_trials=max(4, min(10, search.trials // 4)),
        )
    if name == "cmaes":
        try:
            importlib.import_module("cmaes")
        except ImportError:
            raise PluginError("sampler cmaes needs the package cmaes; `pip install cmaes`") from None
        return samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False, n_startup_trials=1)
    return samplers.RandomSampler(seed=seed)


def make_pruner(name: str) -> Any:
    """Return what decides which trials end early. Places are percents of the training."""
    pruners = import_optuna().pruners
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=4, n_warmup_steps=_LEAST_SHARE)
    if name == "hyperband":
        return pruners.HyperbandPruner(min_resource=_LEAST_SHARE, max_resource=100, reduction_factor=3)
    if name == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=_LEAST_SHARE, reduction_factor=3)
    return pruners.NopPruner()


def suggest(trial: optuna.Trial, name: str, range_: Range) -> Scalar:
    if isinstance(range_, Choice):
        return trial.suggest_categorical(name, range_.values)
    if isinstance(range_, Int):
        return trial.suggest_int(name, range_.low, range_.high, step=range_.step, log=range_.log)
    return trial.suggest_float(name, range_.low, range_.high, step=range_.step, log=range_.log)


def share_of_money(most: float | None, begun: Sequence[Facts], to_come: int) -> float | None:
    """Return what the next trial may cost, in US dollars; None where a search may cost anything, 0 if all is promised.

    ``begun`` are the facts of all other trials that have begun, also of those that were lost. What they have neither
    cost nor been promised is divided among the trials ``to_come``, the next one among them. So all together never cost
    more than ``most``, whatever is queued or added later; what one cost less than it might falls to the next ones.
    """
    if most is None:
        return None
    taken = (facts.given_up + ((facts.max_cost if facts.cost is None else facts.cost) or 0.0) for facts in begun)
    rest = most - sum(taken)
    return rest / max(1, to_come) if rest >= _CENT else 0.0
