"""The numbers, what else can be asked of them, and `score`, which makes them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np

from detkit.data import Dataset
from detkit.detections import Detections
from detkit.errors import InvalidValue, UsageError
from detkit.scores import engine
from detkit.scores.certainty import (
    FEWEST_IMAGES,
    LEVEL,
    NUMBERS,
    REPLICATES,
    Interval,
    Resampling,
    interval,
    summarize,
)
from detkit.scores.confusion import Confusion, Pairing, count_confusions, operating_point, pair_up
from detkit.scores.curves import Curves, draw_curves, find_best_threshold
from detkit.scores.matching import Found, Matching, gather
from detkit.scores.mistakes import find_mistakes
from detkit.scores.protocol import IOU_THRESHOLDS, Protocol, mean, plain
from detkit.scores.voc import VOCScores, score_voc
from detkit.tables import html_table

if TYPE_CHECKING:
    from detkit.scores.protocol import Floats

_BACKGROUND_IOU = 0.1
"""Overlap below which a detection is on no object (Bolya et al., "TIDE", ECCV 2020)."""

_ERROR_NAMES = {
    "classification": "Cls",
    "localisation": "Loc",
    "both": "Both",
    "duplicate": "Dupe",
    "background": "Bkg",
    "missed": "Miss",
}


@dataclass(frozen=True, kw_only=True)
class ErrorType:
    """One kind of error at IoU 0.5."""

    count: int
    ap_cost: float
    """By how much AP50 would rise, were these errors mended."""


@dataclass(frozen=True, eq=False, kw_only=True)
class _Basis:
    """What the numbers were computed from, kept for questions that are asked later."""

    data: Dataset
    detections: Sequence[Detections]
    matching: Matching
    precision_at_50: Floats
    """``(recall, class)``."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Scores(Mapping[str, float]):
    """The numbers by name, as a mapping: AP AP50 AP75 APs APm APl AR1 AR10 AR100 AR<limit> ARs ARm ARl.

    All are in 0..1. With a limit below 10 detections, AR10 is AR at that limit. NaN stands where there is no ground
    truth to find, for example no small object for APs. Where both sides have masks, ``mask_AP`` and the like compare
    these. Whatever costs more is computed when it is asked for: `curves`, `voc`, `confusion`, `error_types`,
    `warnings` and `interval`.
    """

    numbers: Mapping[str, float]
    """What the mapping holds; metrics of plugins come after the COCO numbers."""
    per_class: Mapping[str, Mapping[str, float]]
    """For each class of the data: AP, AP50, AP75, AR at the limit, and ``boxes``, the objects that count (neither crowd
    nor difficult)."""
    protocol: Protocol
    score_threshold: float | None
    """Score at which the mean over classes of F1 at IoU 0.5 is highest; None where no detection is right.

    It lies halfway between the last detection to keep and the first to drop, so that rounding changes nothing.
    """
    best_f1: float | None
    """That highest mean F1; None without ground truth or detections."""
    seen_in: str = ""
    """``training`` or ``validation`` where the model has seen some of the images and the user allowed it."""
    lower_is_better: tuple[str, ...] = ()
    """The numbers, all of plugins, of which less is better."""
    basis: _Basis = field(repr=False)
    """Data and detections, for what is computed later."""

    def __getitem__(self, name: str) -> float:
        return self.numbers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def data(self) -> Dataset:
        """The ground truth."""
        return self.basis.data

    @property
    def detections(self) -> Sequence[Detections]:
        """What was scored: one `Detections` for each image, in order."""
        return self.basis.detections

    @cached_property
    def curves(self) -> Curves:
        """Precision against recall, and precision, recall and F1 against the score threshold."""
        return draw_curves(self.basis.matching, self.basis.precision_at_50)

    @cached_property
    def voc(self) -> VOCScores:
        """Pascal VOC's mAP, 11-point and area."""
        return score_voc(self.basis.matching)

    @cached_property
    def confusion(self) -> Confusion:
        """Which class was found as which, at `score_threshold` (where None: with as many detections as objects)."""
        return count_confusions(self.data, self.basis.matching, self._pairing, self._operating_point)

    @cached_property
    def error_types(self) -> dict[str, ErrorType]:
        """Errors by kind, and the AP50 that each costs (TIDE; Bolya et al., ECCV 2020), over all detections that count.

        Keys: classification, localisation, both, duplicate, background, missed.
        """
        if not len(self.data) or not self.data.classes:
            return {name: ErrorType(count=0, ap_cost=0.0) for name in _ERROR_NAMES}
        found = engine.error_types(self.basis.matching, IOU_THRESHOLDS[0], _BACKGROUND_IOU)
        return {
            name: ErrorType(count=int(found["counts"][key]), ap_cost=float(found["delta_ap"][key]))
            for name, key in _ERROR_NAMES.items()
        }

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """Signs of mistakes: mixed-up class names, boxes in another convention, detections cut short."""
        return tuple(
            find_mistakes(
                self.detections, self.basis.matching, self.confusion, self._pairing, self.protocol.max_detections
            )
        )

    def interval(
        self, name: str = "AP", *, level: float = LEVEL, replicates: int = REPLICATES, seed: int = 0
    ) -> Interval:
        """Return the bias-corrected bootstrap interval of AP, AP50 or AP75 over images drawn again.

        Its ends are NaN where there are fewer images than `detkit.scores.certainty.FEWEST_IMAGES`. Raises
        `InvalidValue` for another name.
        """
        return interval(self[name], self.replicates(name, number=replicates, seed=seed), level)

    def replicates(self, name: str = "AP", *, number: int = REPLICATES, seed: int = 0) -> Floats:
        """Return ``(number,)`` values of AP, AP50 or AP75, each of as many images drawn with replacement.

        With the same seed, any two `Scores` of the same images are of the same draws.
        """
        if name not in NUMBERS:
            raise InvalidValue("name", name, " or ".join(NUMBERS))
        return summarize(self._drawn(number, seed), name)

    def _drawn(self, number: int, seed: int) -> Floats:
        if (number, seed) not in self._draws:
            if len(self.data) < FEWEST_IMAGES or not self.data.classes:
                return np.full((number, len(IOU_THRESHOLDS), len(self.data.classes)), np.nan)
            self._draws[number, seed] = Resampling(self.basis.matching).replicates(number, seed)
        return self._draws[number, seed]

    @cached_property
    def _draws(self) -> dict[tuple[int, int], Floats]:
        return {}

    @cached_property
    def _operating_point(self) -> float:
        return operating_point(self.basis.matching, self.score_threshold)

    @cached_property
    def _pairing(self) -> Pairing:
        return pair_up(self.data, self.basis.matching, self._operating_point)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; None stands for NaN. Curves are in `Curves.to_dict`."""
        return {
            "scores": _without_nan(self.numbers),
            "per_class": {name: _without_nan(row) for name, row in self.per_class.items()},
            "score_threshold": self.score_threshold,
            "best_f1": self.best_f1,
            "voc": self.voc.to_dict(),
            "error_types": {name: asdict(kind) for name, kind in self.error_types.items()},
            "confusion": self.confusion.to_dict(),
            "warnings": list(self.warnings),
            "seen_in": self.seen_in,
            "lower_is_better": list(self.lower_is_better),
            "protocol": asdict(self.protocol),
        }

    def __repr__(self) -> str:
        names = list(self)
        lines = [f"SEEN IN {self.seen_in.upper()}: these images say nothing about new ones"] if self.seen_in else []
        for block in (names[at : at + 6] for at in range(0, len(names), 6)):
            lines.append("  ".join(f"{name:>6}" for name in block))
            lines.append("  ".join(_cell(self[name], len(name)) for name in block))
        width = max([len(name) for name in self.per_class] + [len("class")])
        lines += ["", f"{'class':<{width}}  {'boxes':>6}  {'AP':>6}  {'AP50':>6}"]
        for name, row in self.per_class.items():
            lines.append(f"{name:<{width}}  {row['boxes']:>6.0f}  {_cell(row['AP'])}  {_cell(row['AP50'])}")
        lines.append("")
        if self.score_threshold is not None:
            lines.append(f"best mean F1 at IoU 0.5: {self.best_f1:.3f}, at score {self.score_threshold:.3f}")
        lines.append(str(self.protocol))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        classes = [
            (name, f"{row['boxes']:.0f}", _cell(row["AP"]), _cell(row["AP50"])) for name, row in self.per_class.items()
        ]
        seen = f"<p><b>SEEN IN {escape(self.seen_in.upper())}</b></p>" if self.seen_in else ""
        return (
            seen
            + html_table(list(self), [[_cell(value) for value in self.values()]])
            + html_table(["class", "boxes", "AP", "AP50"], classes)
            + f"<p><small>{escape(str(self.protocol))}</small></p>"
        )


def score(
    data: Dataset, detections: Sequence[Detections], *, max_detections: int = 100, score_floor: float = 0.0
) -> Scores:
    """Score one `Detections` for each image of ``data``, in order; those below ``score_floor`` do not count.

    Classes are matched by name. Those that only the model knows have no ground truth here, so their detections count
    nowhere; those that only the data knows score 0. Raises `UsageError` where the counts differ.
    """
    if len(detections) != len(data):
        raise UsageError(f"{len(detections)} detections for {len(data)} images; expected one for each, in order")
    if max_detections < 1:
        raise InvalidValue("max_detections", max_detections, "a whole number from 1")
    found = gather(data, detections, score_floor)
    limits = sorted({1, min(10, max_detections), min(100, max_detections), max_detections})
    precision, recall = engine.accumulate(data, found, limits)
    numbers = _headline(precision, recall, limits)
    if _comparable_masks(data, found):
        by_mask = engine.accumulate(data, found, limits, "segm")
        numbers |= {f"mask_{name}": value for name, value in _headline(*by_mask, limits).items()}
    matching = Matching(data, found, max_detections)
    best = find_best_threshold(matching)
    at_75 = IOU_THRESHOLDS.index(0.75)
    return Scores(
        numbers=numbers,
        per_class={
            name: {
                "AP": mean(precision[:, :, k, 0, -1]),
                "AP50": mean(precision[0, :, k, 0, -1]),
                "AP75": mean(precision[at_75, :, k, 0, -1]),
                "AR": mean(recall[:, k, 0, -1]),
                "boxes": int(matching.positives[k]),
            }
            for k, name in enumerate(data.classes)
        },
        protocol=Protocol(
            max_detections=max_detections,
            score_floor=score_floor,
            classes=data.classes,
            num_images=len(data),
            images=hashlib.sha256(json.dumps(data.image_ids).encode()).hexdigest(),
            data=data.digest(),
            engine=engine.engine_name(),
        ),
        score_threshold=best.score,
        best_f1=best.f1,
        basis=_Basis(
            data=data,
            detections=detections,
            matching=matching,
            precision_at_50=precision[0, :, :, 0, -1],
        ),
    )


def _comparable_masks(data: Dataset, found: Found) -> bool:
    """Say whether every object and every detection has a mask."""
    if data.masks is None or found.masks is None or not len(data.labels):
        return False
    return all(mask is not None for mask in data.masks) and all(mask is not None for mask in found.masks)


def _headline(precision: Floats, recall: Floats, limits: list[int]) -> dict[str, float]:
    at_75 = IOU_THRESHOLDS.index(0.75)
    ten = limits.index(min(10, limits[-1]))
    numbers = {
        "AP": mean(precision[..., 0, -1]),
        "AP50": mean(precision[0, ..., 0, -1]),
        "AP75": mean(precision[at_75, ..., 0, -1]),
        "APs": mean(precision[..., 1, -1]),
        "APm": mean(precision[..., 2, -1]),
        "APl": mean(precision[..., 3, -1]),
        "AR1": mean(recall[..., 0, 0]),
        "AR10": mean(recall[..., 0, ten]),
    }
    numbers |= {f"AR{limit}": mean(recall[..., 0, at]) for at, limit in enumerate(limits) if limit > 10}
    numbers |= {f"AR{limits[-1]}": mean(recall[..., 0, -1])}
    for at, size in enumerate("sml", start=1):
        numbers[f"AR{size}"] = mean(recall[..., at, -1])
    return numbers


def _without_nan(row: Mapping[str, float]) -> dict[str, float | None]:
    return {name: plain(value) for name, value in row.items()}


def _cell(value: float, width: int = 0) -> str:
    text = "-" if math.isnan(value) else f"{value:.3f}"
    return f"{text:>{max(width, 6)}}"
