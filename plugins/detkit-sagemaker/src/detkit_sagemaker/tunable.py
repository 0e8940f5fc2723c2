"""What is worth searching of a model that trains in SageMaker, and what its trials can be judged by."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from detkit.errors import Unsupported, UsageError
from detkit.spaces import Choice, Float, Int, Range
from detkit.tuning import Mode
from detkit_sagemaker import builtin
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.builtin import FOREIGN
from detkit_sagemaker.jumpstart import HubModel
from detkit_sagemaker.models import jumpstart_id, local_backend
from detkit_sagemaker.submission import kind_of

_ANYWHERE = "us-east-1"
"""Where JumpStart's hub is asked what a model is, if no region is named; it is the same one in all of them."""
_SMALLEST = 1e-6
"""Where AWS recommends a range from 0, which training itself does not take."""
_FALLS, _RISES = (
    re.compile(r"loss|entropy|error", re.I),
    re.compile(r"map|\bap\d*\b|iou|accuracy|precision|recall", re.I),
)
"""By the names of a hub's metrics: its documents do not say which way is better."""


def space(model: str) -> Mapping[str, Range]:
    """Return what is worth searching of a model. Asks JumpStart's hub for one of its own."""
    kind = kind_of(model)
    if kind == "ours":
        found = local_backend(model)
        assert found is not None  # the model's parameters came from it
        return found[0].space(found[1])
    if kind == "builtin":
        return {name: _recommended(name, one) for name, one in builtin.TUNABLE.items()}
    hub, suggested = _hub(model), dict[str, Range]()
    for name, most in (("learning_rate", 10.0), ("batch_size", 2.0)):
        listed = hub.listed(name)
        if listed is None or listed.default is None:
            continue
        usual = float(listed.default)
        low, high = max(listed.min or 0.0, usual / most), min(listed.max or math.inf, usual * most)
        if name == "learning_rate":
            suggested[name] = Float(low, high, log=True)
        elif low < high:
            suggested[name] = Int(max(1, math.ceil(low)), math.floor(high))
    return suggested


def _recommended(name: str, one: builtin.Tunable) -> Range:
    if one.kind == "Categorical":
        return Choice(one.values)
    if one.kind == "Integer":
        return Int(int(one.low), int(one.high))
    return Float(max(one.low, _SMALLEST), one.high, log=name in ("learning_rate", "weight_decay"))


def metrics(model: str) -> Mapping[str, Mode]:
    """Return what AMT can judge a model's trials by, as runs log it, the usual one first."""
    kind = kind_of(model)
    if kind == "ours":
        found = local_backend(model)
        assert found is not None
        return found[0].tuning_metrics(found[1])
    if kind == "builtin":
        return {FOREIGN + builtin.OBJECTIVE: "max"}
    names = list(_hub(model).metrics)
    if not names:
        raise Unsupported(f"JumpStart's hub names no metric of {model}, so nothing tells which trial is better")
    return HubMetrics(model, names)


class HubMetrics(Mapping[str, Mode]):
    """The metrics of a hub's model with the better way, by their names: those of validation images, and clear, first.

    Asked for a metric whose name does not tell, it raises `UsageError`; such a one is judged by if ``mode`` is given.
    """

    def __init__(self, model: str, names: Sequence[str]) -> None:
        """``names`` are the hub's."""
        clear = {FOREIGN + name: mode for name in names if (mode := _better(name)) is not None}
        every = [FOREIGN + name for name in names]
        self._model, self._clear = model, clear
        self._names = sorted(every, key=lambda name: (name not in clear, "val" not in name.lower()))

    def __getitem__(self, name: str) -> Mode:
        if name not in self._names:
            raise KeyError(name)
        if name not in self._clear:
            raise UsageError(
                f"JumpStart's hub does not say which way {name} of {self._model} is better; it reports "
                f"{', '.join(self._names)}. give both, e.g. metric={name} mode=min, or mode=max (--metric, --mode)"
            )
        return self._clear[name]

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _better(name: str) -> Mode | None:
    return "min" if _FALLS.search(name) else "max" if _RISES.search(name) else None


def _hub(model: str) -> HubModel:
    try:
        aws = Aws()
    except UsageError:  # no region is named
        aws = Aws(_ANYWHERE)
    return HubModel.read(aws, str(jumpstart_id(model)))
