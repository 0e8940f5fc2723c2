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

    from detkit.studies import Trial

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


def share_of_money(search: Search, others: Sequence[Trial] = ()) -> float | None:
    """Return what a trial may cost beside the ``others``, in US dollars; None where a search may cost anything.

    What is neither spent nor promised to others is divided among the trials that are still to come. So all together
    never cost more, whatever is queued or added later; what trials cost less than they might falls to the next ones.
    """
    if search.max_cost is None:
        return None
    rest, to_come = search.max_cost, max(search.trials, len(others) + 1)
    for trial in others:
        promised = trial.facts.max_cost
        if promised is not None:
            rest -= promised if trial.facts.cost is None else trial.facts.cost
        if promised is not None or trial.state not in {"waiting", "running"}:
            to_come -= 1
    return rest / max(1, to_come) if rest >= _CENT else 0.0
