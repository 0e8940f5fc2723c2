"""Every error detkit raises on purpose, and the wording of each.

::

    DetkitError                     code of `detkit` on the command line
    ├── UsageError                  2   asked for something that cannot be done
    │   ├── UnknownName             2   no such backend, model, parameter, class, split ...
    │   ├── InvalidValue            2   a parameter or option out of its range or type
    │   ├── MissingSettings         2   everything that is still needed, in one list
    │   ├── RunExists               2   the directory already holds a run
    │   ├── SeenImages              1   a model would be scored on images it has seen
    │   ├── ClassMismatch           2   class names of model and data differ
    │   ├── ProtocolMismatch        2   two sets of scores that do not compare
    │   ├── WeightsMissing          2   weights asked for are not here and cannot be fetched
    │   └── Unsupported             2   this backend or format declares that it cannot
    ├── InvalidData                 1   annotations that cannot be used; carries findings
    │   ├── ImageError              1   an image that cannot be read
    │   └── BrokenRecord            1   a record of a RecordIO file that cannot be read
    ├── StorageError                3   the disk is full, a file cannot be written
    ├── PluginError                 3   a plugin is broken, missing or there twice
    ├── UserCodeFailed              3   a module of the user's own raised an error
    ├── RunFailed                   3   training ended in an error; carries the log's tail
    │   └── WorkerDied              3   the worker process vanished without a word
    ├── NonFiniteLoss               3   raised by engines, reaches users as RunFailed
    └── ExportDiffers               1   an exported model does not find what the original finds

A message says what happened, what was expected or is known, and what to type next.
Anything that is not a `DetkitError` is a bug in detkit or a plugin and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from detkit.data import Dataset
    from detkit.formats.findings import Finding


class DetkitWarning(UserWarning):
    """detkit had to decide something that nobody has said, or cannot keep everything it was given."""


class DetkitError(Exception):
    """A mistake or a failure that detkit can explain; printed without a traceback."""

    exit_code = 2


class UsageError(DetkitError):
    """What was asked for cannot be done."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` did you mean 'x'?`` for the closest of the known names, or nothing."""
    close = difflib.get_close_matches(name.lower(), {k.lower(): k for k in known}, n=1, cutoff=0.6)
    if not close:
        return ""
    original = {k.lower(): k for k in known}[close[0]]
    return f" did you mean {original!r}?"


class UnknownName(UsageError):
    """A name that nobody provides, with the closest known one."""

    def __init__(self, kind: str, name: str, known: Iterable[str], hint: str = "") -> None:
        self.kind, self.name, self.known = kind, name, sorted(known)
        listed = ", ".join(self.known) if self.known else "none"
        super().__init__(
            f"no {kind} {name!r};{did_you_mean(name, self.known)} known: {listed}" + (f". {hint}" if hint else "")
        )


class InvalidValue(UsageError):
    """A value of the wrong type or out of range."""

    def __init__(self, name: str, value: object, expected: str, origin: str = "") -> None:
        self.name = name
        """Of the setting."""
        where = f" (from {origin})" if origin else ""
        super().__init__(f"{name}={value!r}{where} is not valid: {expected}")


class MissingSettings(UsageError):
    """All settings that are still missing, each with an example."""

    def __init__(self, missing: Sequence[tuple[str, str]]) -> None:
        lines = "\n".join(f"  {name}: for example {example}" for name, example in missing)
        super().__init__(
            f"{len(missing)} setting(s) missing:\n{lines}\n"
            "give them in the call, as DETKIT_<NAME> in the environment, or in detkit.yaml"
        )


class RunExists(UsageError):
    """A run directory is never overwritten."""

    def __init__(self, path: object, holds: str) -> None:
        ways = ["choose another name"]
        if holds == "an unfinished run":
            ways.append(f"continue it with `detkit train --resume {path}`")
        if holds != "other files":
            ways.append(f"remove it with `detkit runs rm {path}`")
        super().__init__(f"{path} already holds {holds}; {', or '.join(ways)}")


class SeenImages(UsageError):
    """The data to score overlaps what the model was trained, validated or tuned on."""

    exit_code = 1

    def __init__(self, role: str, count: int, total: int, files: Sequence[str]) -> None:
        self.count = count
        super().__init__(
            f"{count} of {total} images were used in {role} of this model, "
            f"for example {', '.join(files[:3])}; their scores would say nothing about new images. "
            "score other images, or pass allow_seen=True (--allow-seen) and have them marked"
        )


class ClassMismatch(UsageError):
    """Two lists of class names that should agree, and their difference."""

    def __init__(self, what: str, expected: Sequence[str], found: Sequence[str]) -> None:
        unknown = [name for name in found if name not in expected]
        missing = [name for name in expected if name not in found]
        parts = [f"unknown here: {', '.join(map(repr, unknown))}"] if unknown else []
        if missing:
            parts.append(f"missing: {', '.join(map(repr, missing))}")
        hints = [did_you_mean(name, expected).strip() for name in unknown]
        hint = " ".join(h for h in hints if h)
        super().__init__(
            f"{what}: the class names differ ({'; '.join(parts)}). "
            f"expected: {', '.join(map(repr, expected))}" + (f". {hint}" if hint else "")
        )


class ProtocolMismatch(UsageError):
    """Two sets of scores that do not compare; `differing` has what differs, by name."""

    def __init__(self, first: str, second: str, differing: Mapping[str, tuple[str, str]]) -> None:
        self.differing = dict(differing)
        told = "; ".join(f"{name}: {a} and {b}" for name, (a, b) in differing.items())
        super().__init__(
            f"the scores of {first} and {second} do not compare ({told}). score both on the same images with the same "
            "limits: detkit.compare([A, B], DATA, max_detections=N). evaluation leaves out what scores below 0.001; "
            "detkit.score(data, detections, score_floor=0.001) does, too"
        )


class WeightsMissing(UsageError):
    """Weights that are not in the cache and were not, or could not be, fetched."""

    def __init__(self, weights: str, model: str, path: object, why: str) -> None:
        super().__init__(
            f"weights {weights!r} for {model}: {why}. put the file at {path}, "
            "or choose weights=none to start from scratch"
        )


class Unsupported(UsageError):
    """Something a backend or format declares that it cannot do."""


class InvalidData(DetkitError):
    """Annotations or images that cannot be used as they are; `findings` has every place, `hint` what to do.

    ``partial`` is what could be read all the same, so that a check goes on with it; nothing else may use it.
    """

    exit_code = 1

    def __init__(
        self, message: str, findings: Sequence[Finding] = (), hint: str = "", partial: Dataset | None = None
    ) -> None:
        self.findings, self.hint, self.partial = tuple(findings), hint, partial
        super().__init__(f"{message}\n{hint}" if hint else message)


class ImageError(InvalidData):
    """An image that cannot be read: missing, truncated, no image, too large."""

    def __init__(self, path: object, why: str) -> None:
        self.path = str(path)
        super().__init__(f"cannot read image {path}: {why}")


class BrokenRecord(InvalidData):
    """A record of a RecordIO file that is cut off or damaged, with its number, where that is known, from 0."""

    def __init__(self, path: object, why: str, offset: int, record: int | None = None) -> None:
        self.why, self.offset, self.record = why, offset, record
        super().__init__(f"{path}: record {'' if record is None else f'{record} '}at byte {offset}: {why}")


class StorageError(DetkitError):
    """A file could not be written; what was there before is untouched."""

    exit_code = 3

    def __init__(self, path: object, cause: OSError | str) -> None:
        self.why = cause if isinstance(cause, str) else (cause.strerror or str(cause))
        super().__init__(
            f"cannot write {path}: {self.why}. nothing was replaced; free some space or choose another folder"
        )


class PluginError(DetkitError):
    """A plugin that is broken, or two that offer the same name."""

    exit_code = 3


class UserCodeFailed(DetkitError):
    """A module of the user's own raised an error; the message names its file and line."""

    exit_code = 3


class RunFailed(DetkitError):
    """Training ended in an error. `log_tail` holds the last lines that the worker wrote."""

    exit_code = 3

    def __init__(self, message: str, log_tail: str = "") -> None:
        self.log_tail = log_tail
        super().__init__(message)


class WorkerDied(RunFailed):
    """The worker's process ended without saying why."""

    def __init__(self, reason: str, log: object, log_tail: str) -> None:
        quoted = f"\nlast lines of {log}:\n{log_tail}" if log_tail else f"\n{log} is empty"
        super().__init__(f"the worker {reason}{quoted}", log_tail)


class NonFiniteLoss(DetkitError):
    """The loss became NaN or infinite; training stopped within the same step."""

    exit_code = 3

    def __init__(self, iteration: int, learning_rate: float, losses: dict[str, float], files: Sequence[str]) -> None:
        """``files`` names each image of the batch, with its boxes where they are known."""
        parts = ", ".join(f"{name} {value:g}" for name, value in losses.items())
        listed = "".join(f"\n  {file}" for file in files)
        super().__init__(
            f"the loss is not finite at iteration {iteration} with learning rate {learning_rate:g} ({parts}). "
            f"lower learning_rate, or look at the images of the batch and their boxes:{listed}"
        )


class OutOfMemory(DetkitError):
    """A training step needs more memory than there is."""

    exit_code = 3

    def __init__(self, batch_size: int, image_size: int, device: str, fits: str) -> None:
        """``batch_size`` counts the images of one pass; ``fits`` says what would fit, as far as that is known."""
        super().__init__(
            f"out of memory: {batch_size} images at once at image_size={image_size} do not fit on {device}. {fits}"
        )


class ExportDiffers(DetkitError):
    """An exported model does not find what the original finds, or loses too much by being quantized."""

    exit_code = 1

    def __init__(self, name: str, faults: Sequence[str], numbers: str, worst: str, *, quantized: bool) -> None:
        """``numbers`` are all that was measured; ``worst`` is the image with most disagreement."""
        self.faults = list(faults)
        advice = (
            "calibrate on more images, allow more with max_ap_drop, or export it without quantizing"
            if quantized
            else "predict on that image with the original, and with an export without verify, to see where"
        )
        super().__init__(
            f"{name} was not kept: {'; '.join(faults)}. most differs in {worst}; {advice}. measured:\n{numbers}"
        )


class Stopped(BaseException):
    """Raised inside an engine to leave training where somebody asked it to stop; not an error."""
