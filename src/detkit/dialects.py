"""Another tool's hyperparameters, by the names, ranges and defaults that they have there.

``Trainer(like="sagemaker-object-detection", mini_batch_size=16)`` trains here what was written for there. A plugin
declares the `Dialect`; what it does with each hyperparameter is said in a `Note`, and nothing is changed without one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from detkit.errors import UsageError
from detkit.params import Params

if TYPE_CHECKING:
    from detkit.data import Dataset

Fidelity = Literal["exact", "approximate", "unused", "refused"]
"""How well a value is kept: as it is; nearly; it has no effect, there as here; not at all, so training is refused."""


class Note(msgspec.Struct, frozen=True):
    """What one hyperparameter of another tool becomes here."""

    name: str
    """Empty for what that tool does without being asked."""
    value: Any
    """Its value there; None where it has none."""
    becomes: dict[str, Any] = {}
    """The backend's own parameters that it sets, and ``model``."""
    fidelity: Fidelity = "exact"
    why: str = ""
    origin: str = "default"
    """Where the value was found; filled in by the trainer."""

    def __str__(self) -> str:
        how = f" becomes {typed(self.becomes)}" if self.becomes else ""
        fidelity = f" ({self.fidelity})" if self.fidelity != "exact" else ""
        return f"{self.hyperparameter}{how}{fidelity}" + (f": {self.why}" if self.why else "")

    @property
    def hyperparameter(self) -> str:
        """What was, or would be, written there."""
        return typed({self.name: self.value}) if self.value is not None else self.name or "always"


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a tool refuses of data that is sound. `detkit check` reads it and tells, and nothing else of the tool."""

    who: str
    """The tool, as a sentence calls it."""
    label_width: int | None = None
    """Numbers in an image's label that its defaults take: 2, and 5 for each box."""
    three_channels: bool = False
    """Whether images have to be RGB."""
    ids_from_zero: bool = False
    """Whether the class ids of a file have to be 0, 1, 2 ... without a gap."""
    needs_objects: bool = False
    """Whether it fails on an image without a box."""


SAGEMAKER_OBJECT_DETECTION = Limits(
    who="SageMaker's built-in object detection",
    label_width=350,
    three_channels=True,
    ids_from_zero=True,
    needs_objects=True,
)
"""From the pages "Object Detection Hyperparameters" and "Object Detection - MXNet" of the Amazon SageMaker Developer
Guide; images without a box from amazon-sagemaker-examples, issue 643."""


@dataclass(frozen=True, kw_only=True)
class Dialect:
    """The hyperparameters of another tool, for ``like=``. A record of data and two functions, as light as its backend.

    ``translate`` gets the hyperparameters and the canonical parameters that the user gave beside them, by their own
    names (``weights``, ``seed``). It returns one `Note` for each hyperparameter and never raises for a value: what
    cannot be had here is a refused note. Together the notes name the model. A parameter that a note sets cannot be
    given another value under its own name.

    ``check`` gets the hyperparameters and the data of each channel (``train``, ``validation``, ``test``) once that is
    read, before anything is started. It returns notes on what the data has to say; a refused one ends it.
    """

    name: str
    summary: str
    params: Params
    """That tool's names, ranges and defaults, as a struct."""
    translate: Callable[[Any, Mapping[str, Any]], Sequence[Note]]
    check: Callable[[Any, Mapping[str, Dataset]], Sequence[Note]] | None = None
    limits: Limits | None = None
    hints: Mapping[str, str] = field(default_factory=dict)
    """What to say of names that are found beside that tool's hyperparameters and are none."""


def becomes(notes: Sequence[Note]) -> dict[str, Any]:
    """Return everything that the notes set."""
    return {name: value for note in notes for name, value in note.becomes.items()}


def refuse(dialect: Dialect, notes: Sequence[Note]) -> None:
    """Raise one `UsageError` with everything that is refused, if anything is."""
    refused = [f"  {note.hyperparameter}: {note.why}" for note in notes if note.fidelity == "refused"]
    if refused:
        raise UsageError("\n".join([f"{len(refused)} hyperparameter(s) of {dialect.name} are refused here:", *refused]))


def typed(settings: Mapping[str, Any]) -> str:
    """Return settings as one would type them on the command line."""
    return " ".join(f"{name}={text(value)}" for name, value in settings.items())


def text(value: Any) -> str:
    """Return a value as one would type it."""
    if isinstance(value, (tuple, list)):
        return ",".join(map(text, value))
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)
