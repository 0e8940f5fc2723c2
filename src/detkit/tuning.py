"""What a search is, and what a place does that searches by itself, as SageMaker's automatic model tuning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import msgspec

from detkit.events import validation_loss
from detkit.spaces import Range

if TYPE_CHECKING:
    from detkit.runs import Run

Mode: TypeAlias = Literal["max", "min"]

TrialState: TypeAlias = Literal["waiting", "running", "finished", "pruned", "failed"]
"""``pruned`` trials were ended early, as they were behind the others."""


class Search(msgspec.Struct, frozen=True, kw_only=True):
    """What is searched, and how."""

    space: dict[str, Range]
    metric: str
    """As runs log it, e.g. ``val/AP``."""
    mode: Mode
    trials: int
    """How many, at most; those that fail count."""
    parallel: int = 1
    """How many at once."""
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0
    parent: str = ""
    """An earlier study whose trials are learned from, by its name at a place that searches by itself."""
    max_cost: float | None = None
    """US dollars that all trials together may cost, by their estimates."""
    budget_s: float | None = None
    """Seconds that a search may take that a place does by itself; of others each process counts its own."""


class PlaceTrial(msgspec.Struct, frozen=True, kw_only=True):
    """A trial that a place has started by itself."""

    name: str
    """The place's own name of its job."""
    values: dict[str, Any]
    """The parameters that the place chose."""
    state: TrialState
    value: float | None = None
    """Of the metric, once there is one."""
    reason: str = ""
    """Why it failed."""
    seconds: float | None = None
    """How long it has had its machines."""


class TuningJob(ABC):
    """A search that goes on at a place, or has ended there."""

    name: str
    """The place's own name of it."""

    @property
    @abstractmethod
    def status(self) -> Literal["running", "finished", "failed", "stopped"]:
        """Where it stands."""

    @property
    def reason(self) -> str:
        """Why it failed; empty where it did not."""
        return ""

    @abstractmethod
    def trials(self) -> list[PlaceTrial]:
        """Return every trial that was started so far, the oldest first."""

    @abstractmethod
    def bring(self, trial: PlaceTrial, path: Path) -> Run:
        """Make the run directory of a trial that has ended, and return its run, whose model can be opened.

        ``path`` may hold what was brought there in vain before, also of another trial. Raises `RunFailed` for what
        will be the same whenever it is tried, and another `DetkitError` where it may work later.
        """

    @abstractmethod
    def stop(self) -> None:
        """Ask the search, and the trials that run, to end."""

    @property
    def cost(self) -> float | None:
        """US dollars that it has cost so far, by an estimated price; None where that is not known."""
        return None


def metrics_of_loops(losses: Mapping[str, Any] | tuple[str, ...] = ()) -> dict[str, Mode]:
    """Return what engines that run on this machine log of validation images, the one to judge by first."""
    scores: dict[str, Mode] = {f"val/{name}": "max" for name in ("AP", "AP50", "AP75", "mask_AP", "mask_AP50")}
    return {**scores, "val/loss": "min", **dict.fromkeys(map(validation_loss, losses), "min")}
