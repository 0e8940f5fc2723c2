"""Which images a run trains on, validates on and tests on, and whether these are really different ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from msgspec import Meta

from detkit.curation import merge, sample
from detkit.data import Dataset
from detkit.errors import InvalidData, UsageError
from detkit.forgetting import Retention, choose_images
from detkit.formats.checks import Prepared, prepare
from detkit.formats.findings import Finding, raise_errors
from detkit.io import read_dataset
from detkit.job import Code, Model, Replayed, Workspace
from detkit.params import coerce
from detkit.settings import Settings

TEST_SHARE, VALIDATION_SHARE = 0.20, 0.16
"""What is held out of data without splits: 20 % for one final test, 16 % to choose the weights by."""

_ALIASES = {"train": ("train", "trainval"), "validation": ("val", "valid", "validation"), "test": ("test",)}
"""Names of the splits that become each channel, the first that is there."""

REPLAY_SHARE = 0.2
"""Share of the training images that are replayed, unless given."""

_MIN_IMAGES_TO_SPLIT = 5
_SHOWN = 5


def divide(given: Mapping[str, Dataset | str | Path], seed: int) -> tuple[dict[str, Dataset], list[str], bool]:
    """Return the data of each channel, what to tell about it, and whether we chose what to hold out."""
    loaded = {name: data if isinstance(data, Dataset) else read_dataset(data) for name, data in given.items()}
    train = loaded["train"]
    names = {"train": "train", "val": "validation", "test": "test"}
    given_channels = {names[name]: data for name, data in loaded.items() if name != "train"}
    if train.split_indices:
        return *_own_splits(train, seed, given_channels), False
    if given_channels:
        blind = "validation" not in given_channels
        told = ["no validation images: the last weights are kept, and no score threshold is chosen"] if blind else []
        return {"train": train, **given_channels}, told, False
    if len(train) < _MIN_IMAGES_TO_SPLIT:
        raise UsageError(
            f"{len(train)} image(s) are too few to hold any out; give validation images yourself (val=, in the "
            "command line a second data set), even the same ones"
        )
    parts = train.split(1 - TEST_SHARE - VALIDATION_SHARE, VALIDATION_SHARE, TEST_SHARE, seed=seed)
    channels = dict(zip(("train", "validation", "test"), parts, strict=True))
    counts = ", ".join(f"{len(data)} {name}" for name, data in channels.items())
    return channels, [f"no splits in the data: {counts} images, stratified by class, seed {seed}"], True


def _own_splits(data: Dataset, seed: int, given: Mapping[str, Dataset]) -> tuple[dict[str, Dataset], list[str]]:
    """Use the splits the data came with; channels that were given as data of their own take their place."""
    chosen = {c: next((n for n in names if n in data.splits), None) for c, names in _ALIASES.items()}
    if chosen["train"] is None:
        raise UsageError(
            f"the data has the splits {', '.join(data.splits)} and none is called train; name one, "
            "e.g. DATA:trainval or data.splits['trainval']"
        )
    chosen = {channel: name for channel, name in chosen.items() if channel not in given}
    channels = {channel: data.splits[name] for channel, name in chosen.items() if name is not None}
    channels |= given
    told = "the data's own splits: " + ", ".join(f"{n} ({len(channels[c])})" for c, n in chosen.items() if n)
    if "validation" not in channels and len(channels["train"]) >= _MIN_IMAGES_TO_SPLIT:
        channels["train"], channels["validation"] = channels["train"].split(0.8, 0.2, seed=seed)
        told += f"; {len(channels['validation'])} of the training images are held out for validation, seed {seed}"
    return channels, [told]


@dataclass(frozen=True, kw_only=True)
class Gathered:
    """All images of a run, looked at, and what there is to tell about them."""

    prepared: dict[str, Prepared]
    """By channel; every one has the classes of the training data, in their order."""
    told: list[str]
    dropped: dict[str, int]
    """How many boxes were left out, by code of the finding; those of the data to replay are among them."""
    replayed: Replayed | None
    retention: Retention | None
    """The images that forgetting is measured on."""


def gather(
    given: Mapping[str, Dataset | str | Path],
    replay: Replay | None,
    parent: Model | None,
    *,
    on_invalid: Literal["raise", "drop"],
    seed: int,
    code: Code | None = None,
) -> Gathered:
    """Divide the data that was given, check it, and add what is replayed of earlier data.

    ``code`` is what `choose_images` asks for.

    Raises `InvalidData` with all findings at once, and `UsageError` where there is nothing to learn.
    """
    channels, told, held_out = divide(given, seed)
    classes = channels["train"].classes
    if replay is not None:
        channels["replay"] = replay.data
        classes = tuple(dict.fromkeys([*classes, *replay.data.classes]))
    everything = prepare_all(
        {name: data.with_classes(classes, f"{name} data") for name, data in channels.items()}, on_invalid
    )
    dropped = Counter[str]()
    for ready in everything.values():
        dropped.update(ready.dropped)
    prepared = {name: ready for name, ready in everything.items() if name != "replay"}
    if held_out:
        told += without_copies(prepared)
    told += remarks({**everything, **prepared})
    if not len(prepared["train"].data.boxes):
        raise UsageError("the training images have no boxes; there is nothing to learn")
    told += leaks(prepared, parent)
    retention = choose_images(parent, classes, prepared, code) if parent is not None else None
    replayed = None
    if replay is not None:
        apart = retention.image_digests if isinstance(retention, Retention) else []
        replayed, line = replay.add(prepared, everything["replay"], apart=apart, seed=seed)
        told.append(line)
    if isinstance(retention, Retention):
        known = ", ".join(retention.data.classes)
        told.append(f"forgetting of {known} will be told on {len(retention.data)} {retention.what}")
    elif retention is not None:
        told.append(retention)
    return Gathered(
        prepared=prepared,
        told=told,
        dropped=dict(dropped),
        replayed=replayed,
        retention=retention if isinstance(retention, Retention) else None,
    )


def prepare_all(channels: Mapping[str, Dataset], on_invalid: Literal["raise", "drop"]) -> dict[str, Prepared]:
    """Check every channel before the first complaint, so that one error tells all."""
    prepared: dict[str, Prepared] = {}
    findings: list[Finding] = []
    hints: list[str] = []
    for name, data in channels.items():
        try:
            prepared[name] = prepare(data, on_invalid=on_invalid)
        except InvalidData as error:
            if not error.findings:
                raise
            findings += error.findings
            hints += [error.hint] if error.hint not in hints else []
    raise_errors(findings, "; ".join(hints))
    return prepared


def remarks(prepared: Mapping[str, Prepared]) -> list[str]:
    """Tell what was found in the data that does not stop training, and what was left out of it."""
    told: list[str] = []
    for channel, ready in prepared.items():
        told += [str(finding) for finding in ready.warnings[:_SHOWN]]
        if len(ready.warnings) > _SHOWN:
            told.append(f"... and {len(ready.warnings) - _SHOWN} more warnings about the {channel} data")
        told += [f"{channel}: left out {n} boxes: {code}" for code, n in ready.dropped.items()]
    return told


def without_copies(prepared: dict[str, Prepared]) -> list[str]:
    """Leave out of each part the images that are also in an earlier one, byte for byte; the training part is first."""
    told: list[str] = []
    known: set[str] = set()
    for name, ready in prepared.items():
        keep = [i for i, digest in enumerate(ready.image_digests) if digest not in known]
        known |= set(ready.image_digests)
        if len(keep) < len(ready.image_digests):
            told.append(f"{name}: left out {len(ready.image_digests) - len(keep)} images that are copies of others")
            digests = [ready.image_digests[i] for i in keep]
            prepared[name] = replace(ready, data=ready.data.take(keep), image_digests=digests)
    return told


def leaks(prepared: Mapping[str, Prepared], parent: Model | None) -> list[str]:
    """Tell which images of a channel are also in an earlier one, or seen by the model that training starts from."""
    digests = {name: ready.image_digests for name, ready in prepared.items()}
    pairs = [(a, b) for i, a in enumerate(digests) for b in list(digests)[i + 1 :]]
    counts = {(a, b): int(np.isin(digests[b], digests[a]).sum()) for a, b in pairs}
    if parent is not None:
        seen = [digest for channel in parent.seen().values() for digest in channel]
        held_out = [name for name in digests if name != "train"]
        counts |= {(f"what {parent.path} has seen", name): int(np.isin(digests[name], seen).sum()) for name in held_out}
    warning = "warning: {} images of {} are also in {}; its scores will be too good"
    return [warning.format(count, b, a) for (a, b), count in counts.items() if count]


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Earlier data, some of which is trained on again beside the new."""

    data: Dataset
    source: str
    """Its name."""
    share: float
    """How much of the training images is to be replayed."""

    @classmethod
    def read(cls, layers: Settings, parent: Model | None) -> Replay | None:
        """Return what the settings ``replay`` and ``replay_share`` say; None where they say nothing."""
        replay, share = layers.get("replay"), layers.get("replay_share")
        if replay is None:
            if share is not None:
                raise UsageError(
                    f"replay_share={share.value} (from {share.origin}) without replay=; say what to replay"
                )
            return None
        number = REPLAY_SHARE
        if share is not None:
            number = coerce("replay_share", share.value, Annotated[float, Meta(gt=0, lt=1)], share.origin)
        data, source = _load_replay(replay.value, parent)
        return cls(data=data, source=source, share=number)

    def add(
        self, prepared: dict[str, Prepared], earlier: Prepared, *, apart: Sequence[str], seed: int
    ) -> tuple[Replayed, str]:
        """Put some of the earlier images among the training images, so many that they are `share` of all of these.

        All are taken where there are fewer. Never taken is what is in a channel of this run already, or ``apart``, by
        its sha256. The rest is drawn by ``seed``, each class with its share. Returns the record and what to tell.
        """
        train = prepared["train"]
        known = {*apart, *(digest for ready in prepared.values() for digest in ready.image_digests)}
        first: dict[str, int] = {}
        for i, digest in enumerate(earlier.image_digests):
            if digest not in known:
                first.setdefault(digest, i)
        free = sorted(first.values())
        wanted = max(1, round(len(train.data) * self.share / (1 - self.share)))
        if not free:
            raise UsageError(f"nothing of {self.source} can be replayed: all of its images are in this run already")
        indices = dict(zip(earlier.data.image_ids, range(len(earlier.data)), strict=True))
        drawn = sample(earlier.data.take(free), min(wanted, len(free)), seed=seed)
        digests = [earlier.image_digests[indices[image_id]] for image_id in drawn.image_ids]
        # What its files say beside the boxes, such as other numbers for the same classes, is nothing to learn from.
        drawn = replace(
            drawn,
            image_ids=tuple(f"replay/{image_id}" for image_id in drawn.image_ids),
            class_extra=None,
            file_extra={},
        )
        prepared["train"] = replace(
            train, data=merge([train.data, drawn]), image_digests=[*train.image_digests, *digests]
        )
        told = f"replay: {len(drawn)} of {len(free)} images of {self.source} join the {len(train.data)} new ones"
        if len(drawn) < wanted:
            told += f"; {wanted} would be {self.share:.0%} of all"
        left_out = len(earlier.data) - len(free)
        told += f"; {left_out} are in this run already, or kept aside, and stay out" if left_out else ""
        return Replayed(source=self.source, images=len(drawn), boxes=len(drawn.boxes), available=len(free)), told


def _load_replay(replay: Dataset | str | Path, parent: Model | None) -> tuple[Dataset, str]:
    """Return earlier data to train on again beside the new, and its name.

    ``"parent"`` are the training images of the run that training starts from; of data with splits, those to train on.
    Raises `UsageError` where there are none.
    """
    if not isinstance(replay, Dataset) and str(replay) == "parent":
        if parent is None:
            raise UsageError("replay=parent takes the training images of an earlier run; name that with weights=RUN")
        run = Workspace(parent.path.absolute().parent)
        data = run.dataset("train") if run.job_file.is_file() else None
        if data is None:
            raise UsageError(
                f"replay=parent: {run.path} does not hold the images that {parent.path} was trained on; name the data "
                "set with replay=PATH"
            )
        return data, run.path.name
    data = replay if isinstance(replay, Dataset) else read_dataset(replay)
    if data.split_indices:
        chosen = next((name for name in _ALIASES["train"] if name in data.splits), None)
        if chosen is None:
            raise UsageError(f"the data to replay has the splits {', '.join(data.splits)}; name one, e.g. PATH:SPLIT")
        data = data.splits[chosen]
    return data, "a data set" if isinstance(replay, Dataset) else str(replay)
