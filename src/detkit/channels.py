"""Which images a run trains on, validates on and tests on, and whether these are really different ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from detkit.data import Dataset
from detkit.errors import InvalidData, UsageError
from detkit.formats.checks import Prepared, prepare
from detkit.formats.findings import Finding, raise_errors
from detkit.io import read_dataset
from detkit.job import Model

TEST_SHARE, VALIDATION_SHARE = 0.20, 0.16
"""What is held out of data without splits: 20 % for one final test, 16 % to choose the weights by."""

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
    aliases = {"train": ("train", "trainval"), "validation": ("val", "valid", "validation"), "test": ("test",)}
    chosen = {c: next((n for n in names if n in data.splits), None) for c, names in aliases.items()}
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
