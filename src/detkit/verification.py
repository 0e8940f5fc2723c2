"""Whether an exported model finds what the original finds, on the same images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from detkit.boxes import iou
from detkit.data import Dataset
from detkit.detections import Detections
from detkit.errors import ExportDiffers, InvalidValue, UsageError
from detkit.job import Model
from detkit.masks import decode
from detkit.predictor import Predictor
from detkit.progress import track
from detkit.scores import SCORE_FLOOR, score

COMPARED_FROM = 0.05
"""Score from which on a detection has to have a counterpart; that of torchvision's two-stage detectors' own floor."""
SAME_OBJECT = 0.5
"""Least intersection over union of counterparts."""
CORNERS_PX, CORNERS_SHARE = 0.5, 0.002
"""How far a corner may be off: so many pixels, or so much of the image's longer side, whichever is more."""
SCORES = 0.005
"""How far a score may be off."""
MASKS = 0.9
"""Least intersection over union of counterparts' masks: a pixel on an outline may be either one's."""
SURE_FROM = 0.5
"""Score of detections that are also counted by themselves, so that faint ones that agree do not hide them."""
LEFT_OVER = 0.01
"""Share of the detections that may disagree all the same: where two boxes tie, either may suppress the other. Two
models of NEU-DET left over .6 % of theirs, because torch's and Pillow's resizing differ by one level of 255; with the
very same pixels all of their detections agreed to a thousandth of a pixel."""
FEWEST_TO_LEAVE = 100
"""Detections from which on that share is one at least."""
AP_DELTA = 0.002
"""How far AP may be off, either way."""
AP_DROP = 0.01
"""How much AP a quantized model may lose by default."""

_BATCH = 4
_AP = ("AP", "AP50", "mask_AP")


class Agreement(msgspec.Struct, frozen=True, kw_only=True):
    """How an exported model's detections compare with the original's. Kept as ``native["verified"]``."""

    kind: Literal["exact", "quantized"]
    """Detection by detection, or by the AP alone."""
    images: int
    detections: int
    """Of either model above `COMPARED_FROM`, counterparts counted once."""
    disagreeing: int
    """Without a counterpart within the tolerances."""
    sure: int = 0
    """Of `detections`, those that either model gives `SURE_FROM` or more."""
    sure_disagreeing: int = 0
    corners_px_p99: float
    """Of detections and counterparts, the 99th percentile of how far corners are apart."""
    corners_px_max: float
    scores_p99: float
    scores_max: float
    original: dict[str, float] = {}
    """AP, AP50 and, of masks, mask_AP, where the images have boxes."""
    exported: dict[str, float] = {}
    worst: str = ""
    """The image with most disagreement."""

    def table(self) -> list[tuple[str, str, str]]:
        """Return rows of what was measured, its value, and what is allowed."""
        exact = self.kind == "exact"
        rows = [
            ("images", f"{self.images}", ""),
            (f"detections above {COMPARED_FROM:g}", f"{self.detections}", ""),
            ("disagreeing", f"{self.disagreeing}", f"{allowed(self.detections)}" if exact else ""),
            (
                f"of the {self.sure} above {SURE_FROM:g}",
                f"{self.sure_disagreeing}",
                f"{allowed(self.sure)}" if exact else "",
            ),
            (
                "corners apart, 99 % / most",
                f"{self.corners_px_p99:.3f} / {self.corners_px_max:.3f} px",
                f"{CORNERS_PX:g} px or {CORNERS_SHARE:.1%} of the longer side" if exact else "",
            ),
            (
                "scores apart, 99 % / most",
                f"{self.scores_p99:.5f} / {self.scores_max:.5f}",
                f"{SCORES:g}" if exact else "",
            ),
        ]
        for name, value in self.original.items():
            found = self.exported.get(name)
            told = "none" if found is None else f"{found:.4f} ({found - value:+.4f})"
            rows.append((name, f"{value:.4f} -> {told}", ""))
        return rows

    def __str__(self) -> str:
        width = max(len(name) for name, _, _ in self.table())
        lines = [
            f"{name:<{width}}  {value}" + (f"  (allowed: {most})" if most else "") for name, value, most in self.table()
        ]
        return "\n".join(lines)


def agreement_of(model: Model) -> Agreement | None:
    """Return what an exported model was verified to, None where it was not."""
    kept = model.manifest.native.get("verified")
    return None if kept is None else msgspec.convert(kept, Agreement)


def spread(data: Dataset, most: int) -> Dataset:
    """Return so many images at most, evenly spread over a data set."""
    if len(data) <= most:
        return data
    return data.take(np.linspace(0, len(data) - 1, most).round().astype(np.int64))


def verify(original: Model, exported: Model, data: Dataset, *, max_ap_drop: float | None = None) -> Agreement:
    """Run both models on the images and return how they compare. Both run on the CPU, in batches of the same images.

    With ``max_ap_drop`` only AP, and mask AP where there are masks, have to stay. Raises `ExportDiffers` with the
    numbers where they do not agree, and `UsageError` where these images can prove nothing.
    """
    if max_ap_drop is not None and not (math.isfinite(max_ap_drop) and 0 <= max_ap_drop <= 1):
        raise InvalidValue("max_ap_drop", max_ap_drop, "an AP from 0 to 1, such as 0.01")
    _require_same_classes(original.classes, exported.classes)
    data.with_classes(list(original.classes), "the data")
    most = (exported.manifest.native.get("graph") or {}).get("max_batch") or _BATCH
    pairs: list[tuple[Detections, Detections]] = []
    with ExitStack() as opened:
        both = [
            opened.enter_context(
                Predictor(model, score_threshold=SCORE_FLOOR, device="cpu", batch_size=min(_BATCH, most))
            )
            for model in (original, exported)
        ]
        streams = zip(both[0].predict(data), both[1].predict(data), strict=True)
        pairs.extend(track(streams, "verify", total=len(data)))
    agreement = compare(data, pairs, "exact" if max_ap_drop is None else "quantized", original.manifest.max_detections)
    if max_ap_drop is not None:
        _require_ap(agreement, max_ap_drop)
    faults = _faults(agreement, max_ap_drop)
    if faults:
        raise ExportDiffers(exported.name, faults, str(agreement), agreement.worst, quantized=max_ap_drop is not None)
    return agreement


def compare(
    data: Dataset,
    pairs: Sequence[tuple[Detections, Detections]],
    kind: Literal["exact", "quantized"],
    max_detections: int,
) -> Agreement:
    """Compare what two models found on each image. Raises `UsageError` where there is nothing to compare."""
    corners, scores, total, disagreeing, worst = [np.empty(0)], [np.empty(0)], 0, 0, (-1.0, "")
    sure = sure_disagreeing = 0
    for first, second in pairs:
        _require_same_classes(first.classes, second.classes)
        one = _Matched(first, second)
        corners.append(one.corners)
        scores.append(one.scores)
        total += one.total
        disagreeing += one.disagreeing
        sure += one.sure
        sure_disagreeing += one.sure_disagreeing
        worst = max(worst, (one.disagreeing + one.corners.max(initial=0) / 1e6, first.path))
    if not total:
        raise UsageError(
            f"neither model finds anything above {COMPARED_FROM:g} in these {len(pairs)} images, so that nothing is "
            "proven; verify with images that hold objects, or train longer"
        )
    known: list[dict[str, float]] = [{}, {}]
    if len(data.boxes):
        for which in (0, 1):
            found = score(data, [pair[which] for pair in pairs], max_detections=max_detections, score_floor=SCORE_FLOOR)
            known[which] = {name: float(found[name]) for name in _AP if name in found and math.isfinite(found[name])}
    apart_px, apart = np.concatenate(corners), np.concatenate(scores)
    return Agreement(
        kind=kind,
        images=len(pairs),
        detections=total,
        disagreeing=disagreeing,
        sure=sure,
        sure_disagreeing=sure_disagreeing,
        corners_px_p99=_percentile(apart_px, 99),
        corners_px_max=_percentile(apart_px, 100),
        scores_p99=_percentile(apart, 99),
        scores_max=_percentile(apart, 100),
        original=known[0],
        exported=known[1],
        worst=worst[1],
    )


def allowed(detections: int) -> int:
    """Return how many of so many detections may disagree."""
    return math.ceil(LEFT_OVER * detections) if detections >= FEWEST_TO_LEAVE else 0


def _require_same_classes(first: Sequence[str], second: Sequence[str]) -> None:
    if tuple(first) != tuple(second):
        raise UsageError(
            f"the export has the classes {', '.join(second)}, and the original {', '.join(first)}; both must have the "
            "same in the same order: export it again"
        )


def _require_ap(found: Agreement, max_ap_drop: float) -> None:
    """Raise `UsageError` where AP cannot show what a quantized model has lost."""
    if "AP" not in found.original or "AP" not in found.exported:
        raise UsageError(
            "these images give no AP: none of their boxes counts, as those of crowds do not; verify with some that do"
        )
    for name in ("AP", "mask_AP"):
        if found.original.get(name, 1.0) <= max_ap_drop:
            raise UsageError(
                f"{name} of the original is {found.original[name]:.4f}, and a drop of {max_ap_drop:g} is allowed, so "
                "that an export which finds nothing would pass; allow less with max_ap_drop, or train longer"
            )


def _faults(found: Agreement, max_ap_drop: float | None) -> list[str]:
    faults = []
    if max_ap_drop is None and found.disagreeing > allowed(found.detections):
        faults.append(f"{found.disagreeing} of {found.detections} detections disagree")
    elif max_ap_drop is None and found.sure_disagreeing > allowed(found.sure):
        faults.append(f"{found.sure_disagreeing} of {found.sure} detections above {SURE_FROM:g} disagree")
    for name in ("AP", "mask_AP"):
        if name not in found.original:
            continue
        if name not in found.exported:
            faults.append(f"{name} is {found.original[name]:.4f}, and the export has none")
            continue
        delta = found.exported[name] - found.original[name]
        if max_ap_drop is None and abs(delta) > AP_DELTA:
            faults.append(f"{name} differs by {delta:+.4f}, and {AP_DELTA:g} is allowed")
        elif max_ap_drop is not None and -delta > max_ap_drop:
            faults.append(f"{name} drops by {-delta:.4f}, and {max_ap_drop:g} is allowed")
    return faults


class _Matched:
    """What two models found on one image: counterparts, and what has none."""

    def __init__(self, first: Detections, second: Detections) -> None:
        counterpart = _counterparts(first, second)
        clear = (first.scores >= COMPARED_FROM, second.scores >= COMPARED_FROM)
        rows = np.flatnonzero(counterpart >= 0)
        rows = rows[clear[0][rows] | clear[1][counterpart[rows]]]
        others = counterpart[rows]
        self.corners: NDArray[np.float64] = np.abs(first.boxes[rows] - second.boxes[others]).max(axis=1, initial=0)
        self.scores: NDArray[np.float64] = np.abs(first.scores[rows] - second.scores[others])
        edge = max(CORNERS_PX, CORNERS_SHARE * max(first.width, first.height))
        beyond = (self.corners > edge) | (self.scores > SCORES) | _masks_differ(first, second, rows, others)
        missing = np.flatnonzero(clear[0] & (counterpart < 0))
        alone = np.setdiff1d(np.flatnonzero(clear[1]), counterpart)
        best = np.concatenate(
            [np.maximum(first.scores[rows], second.scores[others]), first.scores[missing], second.scores[alone]]
        )
        wrong = np.concatenate([beyond, np.ones(len(missing) + len(alone), dtype=np.bool_)])
        self.total, self.disagreeing = len(best), int(np.count_nonzero(wrong))
        self.sure = int(np.count_nonzero(best >= SURE_FROM))
        self.sure_disagreeing = int(np.count_nonzero(wrong & (best >= SURE_FROM)))


def _masks_differ(
    first: Detections, second: Detections, rows: NDArray[np.int64], others: NDArray[np.int64]
) -> NDArray[np.bool_]:
    """Return for each pair whether its masks overlap less than `MASKS`, or only one of it has a mask."""
    differ = np.zeros(len(rows), dtype=np.bool_)
    if first.masks is None and second.masks is None:
        return differ
    for i, (row, other) in enumerate(zip(rows.tolist(), others.tolist(), strict=True)):
        a = None if first.masks is None else first.masks[row]
        b = None if second.masks is None else second.masks[other]
        if a is None or b is None:
            differ[i] = a is not b
            continue
        pixels = decode(a, (first.width, first.height)), decode(b, (second.width, second.height))
        union = np.count_nonzero(pixels[0] | pixels[1])
        differ[i] = np.count_nonzero(pixels[0] & pixels[1]) < MASKS * union
    return differ


def _counterparts(first: Detections, second: Detections) -> NDArray[np.int64]:
    """Return the row of ``second`` that each of ``first`` is the same object as, the best overlap by score; else -1."""
    found = np.full(len(first), -1, dtype=np.int64)
    overlap = iou(first.boxes, second.boxes)
    # What lies in a batch's padding is cut off to boxes without area, which overlap nothing, not even themselves.
    flat = np.flatnonzero((first.boxes[:, 2:] <= first.boxes[:, :2]).any(axis=1))
    apart = np.abs(first.boxes[flat, None] - second.boxes[None]).max(axis=2, initial=0)
    overlap[flat] = np.clip(1 - apart, 0, None)
    overlap[first.labels[:, None] != second.labels[None, :]] = 0
    for row in range(len(first)):
        best = int(overlap[row].argmax()) if len(second) else 0
        if len(second) and overlap[row, best] >= SAME_OBJECT:
            found[row] = best
            overlap[:, best] = 0
    return found


def _percentile(values: NDArray[np.float64], share: float) -> float:
    return float(np.percentile(values, share)) if len(values) else 0.0
