"""What a model found on one image, whoever's arrays it came in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from detkit.boxes import Boxes
from detkit.data import Indices
from detkit.errors import ClassMismatch, InvalidData, UsageError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

Mask: TypeAlias = "dict[str, Any] | list[Any]"
"""COCO's run-length encoding, ``{"size": [height, width], "counts": text}``, or its list of polygons."""

COLUMNS = ("path", "width", "height", "name", "score", "xmin", "ymin", "xmax", "ymax")
"""Of tables that have one row for each detection."""

_CLASSES = "detkit.classes"
"""In supervision's metadata."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """What a model found on one image, best score first."""

    path: str
    """The image; empty where it never was a file."""
    width: int
    """Pixels, as displayed; 0 where nobody has said."""
    height: int
    classes: tuple[str, ...]
    """The model's class names; a label is an index into them."""
    boxes: Boxes
    """``(n, 4)``, xyxy, absolute pixels of the original image, 0-based, half-open."""
    labels: Indices
    """``(n,)`` indices into `classes`."""
    scores: NDArray[np.float64]
    """``(n,)`` in 0..1, not rising."""
    masks: tuple[Mask | None, ...] | None = None
    """COCO's run-length encoding or polygons of each detection, as `detkit.data.Dataset` has them; None without any."""

    def __post_init__(self) -> None:
        n = len(self.scores)
        if self.boxes.shape != (n, 4) or self.labels.shape != (n,):
            raise ValueError(f"boxes {self.boxes.shape}, labels {self.labels.shape}, scores {self.scores.shape}")
        if self.masks is not None and len(self.masks) != n:
            raise ValueError(f"{len(self.masks)} masks, scores {self.scores.shape}")
        if np.count_nonzero(self.labels.astype(np.uint64) < len(self.classes)) != n:  # negative ones become huge
            raise ValueError(f"labels from {self.labels.min()} to {self.labels.max()}, {len(self.classes)} classes")
        if np.count_nonzero(np.isfinite(self.scores)) != n:
            raise ValueError("scores that are not finite")

    @classmethod
    def from_arrays(
        cls,
        boxes: ArrayLike,
        scores: ArrayLike,
        labels: ArrayLike | None = None,
        *,
        names: Sequence[str] | None = None,
        classes: Sequence[str] | None = None,
        path: str = "",
        width: int = 0,
        height: int = 0,
        masks: Sequence[Any] | NDArray[Any] | None = None,
    ) -> Detections:
        """Put anybody's arrays, in any order, into one object, the best score first; equal scores keep their order.

        ``boxes`` are ``(n, 4)``, xyxy in pixels, and ``scores`` ``(n,)`` in 0..1. The class of each is told by
        ``names``, or by ``labels``, indices from 0 into ``classes``; neither is needed where there is only one class.
        ``masks`` are a ``(n, height, width)`` array of truth values, or COCO's encodings. Raises `UsageError` for a
        call that lacks something and `ClassMismatch` for a name that ``classes`` lacks, `InvalidData` for values that
        detections cannot have.
        """
        corners, sure = _numbers("boxes", boxes, path), _numbers("scores", scores, path)
        if not corners.size:
            corners = corners.reshape(0, 4)
        n = sure.size
        if sure.ndim != 1 or corners.shape != (n, 4):
            raise InvalidData(
                _at(path, f"boxes of shape {corners.shape} and scores of shape {sure.shape}; expected (n, 4) and (n,)")
            )
        inverted = np.flatnonzero((corners[:, 2:] < corners[:, :2]).any(axis=1))
        if len(inverted):
            raise InvalidData(
                _at(
                    path,
                    f"{len(inverted)} of {n} boxes are inverted, for example {corners[inverted[0]].tolist()}; expected "
                    "xmin, ymin, xmax, ymax. x, y, width, height become that with detkit.boxes.xywh_to_xyxy",
                )
            )
        beyond = np.flatnonzero((sure < 0) | (sure > 1))
        if len(beyond):
            raise InvalidData(_at(path, f"score {sure[beyond[0]]:g}; expected a number from 0 to 1"))
        if names is not None and labels is not None:
            raise UsageError("from_arrays was given names and labels; give one of them")
        if names is not None:
            known = tuple(classes) if classes is not None else tuple(dict.fromkeys(map(str, names)))
            kinds = _labels_of(names, known, path)
        else:
            if classes is None:
                raise UsageError(
                    "from_arrays needs names=, one for each box, or labels= and classes=, what they stand for"
                )
            known = tuple(classes)
            kinds = _checked_labels(labels, known, n, path)
        encoded = None if masks is None else _encoded(masks, path)
        for what, column in (("class names or labels", kinds), ("masks", encoded)):
            if column is not None and len(column) != n:
                raise InvalidData(_at(path, f"{len(column)} {what} for {n} boxes"))
        order = np.argsort(-sure, kind="stable")
        return cls(
            path=path,
            width=int(width),
            height=int(height),
            classes=known,
            boxes=corners[order],
            labels=kinds[order],
            scores=sure[order],
            masks=None if encoded is None else tuple(encoded[i] for i in order.tolist()),
        )

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each detection."""
        return tuple(self.classes[label] for label in self.labels)

    def above(self, score_threshold: float) -> Detections:
        """Return only the detections with at least this score."""
        keep = self.scores >= score_threshold
        masks = self.masks
        if masks is not None:
            masks = tuple(mask for mask, kept in zip(masks, keep.tolist(), strict=True) if kept)
        return replace(self, boxes=self.boxes[keep], labels=self.labels[keep], scores=self.scores[keep], masks=masks)

    def best(self, count: int) -> Detections:
        """Return the ones with the highest scores, so many at most."""
        if len(self) <= count:
            return self
        masks = None if self.masks is None else self.masks[:count]
        return replace(
            self, boxes=self.boxes[:count], labels=self.labels[:count], scores=self.scores[:count], masks=masks
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: path, width, height, and one record of name, score, box for each detection.

        A record has ``mask``, too, where there is one.
        """
        records: list[dict[str, Any]] = [
            {"name": name, "score": score, "box": box}
            for name, score, box in zip(self.names, self.scores.tolist(), self.boxes.tolist(), strict=True)
        ]
        for record, mask in zip(records, self.masks or (), strict=False):
            if mask is not None:
                record["mask"] = mask
        return {"path": self.path, "width": self.width, "height": self.height, "detections": records}

    def to_rows(self) -> list[tuple[Any, ...]]:
        """Return one row for each detection, its values those of `COLUMNS`."""
        about = (self.path, self.width, self.height)
        return [
            (*about, name, score, *box)
            for name, score, box in zip(self.names, self.scores.tolist(), self.boxes.tolist(), strict=True)
        ]

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` with one row for each detection and the columns of `COLUMNS`.

        `detkit.detections.to_pandas` makes one of many images. Raises `UsageError` where pandas is not installed.
        """
        return to_pandas([self])

    def to_supervision(self) -> Any:
        """Return a ``supervision.Detections``, which `as_detections` reads back.

        Class names are in its ``data["class_name"]``, and all that the model knows in its ``metadata``.
        Where some detections have masks, those of others are empty. Raises `UsageError` where supervision is not
        installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise _missing("to_supervision", "supervision", error) from error
        masks = None
        if self.masks is not None:
            from detkit.masks import decode

            size = (self.width, self.height)
            if not all(size):
                size = next((mask["size"][::-1] for mask in self.masks if isinstance(mask, dict)), size)
            if self.masks and not all(size):
                raise UsageError(_at(self.path, "masks are polygons, and width and height of the image are not known"))
            masks = np.zeros((len(self), round(size[1]), round(size[0])), dtype=bool)
            for pixels, mask in zip(masks, self.masks, strict=True):
                if mask is not None:
                    pixels[:] = decode(mask, size)
        return supervision.Detections(
            xyxy=self.boxes.copy(),
            confidence=self.scores.copy(),
            class_id=self.labels.copy(),
            mask=masks,
            data={"class_name": np.array(self.names, dtype=np.str_)},
            metadata={_CLASSES: list(self.classes)},
        )

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], classes: Sequence[str]) -> Detections:
        """Read what `to_dict` wrote."""
        index = {name: i for i, name in enumerate(classes)}
        found = record["detections"]
        return cls(
            path=record["path"],
            width=record["width"],
            height=record["height"],
            classes=tuple(classes),
            boxes=np.array([d["box"] for d in found], dtype=np.float64).reshape(-1, 4),
            labels=np.array([index[d["name"]] for d in found], dtype=np.int64),
            scores=np.array([d["score"] for d in found], dtype=np.float64),
            masks=tuple(d.get("mask") for d in found) if any("mask" in d for d in found) else None,
        )


def as_detections(
    found: Any,
    *,
    classes: Sequence[str] | None = None,
    width: int = 0,
    height: int = 0,
    path: str = "",
    first_label: int = 0,
) -> Detections:
    """Return what another library found on one image as `Detections`; nothing of that library is imported.

    It takes a ``supervision.Detections``, a mapping with ``boxes`` (xyxy in pixels), ``labels``, ``scores`` and maybe
    ``masks``, as torchvision's models and ``transformers``' ``post_process_object_detection`` return, and our own.
    Tensors may lie on any device. ``first_label`` is the label of ``classes[0]``: 1 for torchvision's models, whose 0
    is the background. Where supervision has class names, these count and labels do not; without ``classes`` they are
    those of `Detections.to_supervision` where it comes from that. Raises as `Detections.from_arrays` does.
    """
    if isinstance(found, Detections):
        if classes is not None and tuple(classes) != found.classes:
            raise ClassMismatch(_at(path or found.path, "detections"), list(classes), list(found.classes))
        return replace(found, path=found.path or path, width=found.width or width, height=found.height or height)
    names: list[str] | None = None
    if all(hasattr(found, name) for name in ("xyxy", "confidence", "class_id", "data")):
        boxes, scores, labels, masks = found.xyxy, found.confidence, found.class_id, getattr(found, "mask", None)
        if scores is None:
            raise UsageError(_at(path, "these supervision.Detections have no confidence, so they cannot be ranked"))
        if "class_name" in found.data:
            names = [str(name) for name in found.data["class_name"]]
            if classes is None:
                classes = getattr(found, "metadata", {}).get(_CLASSES)
    elif isinstance(found, Mapping) and {"boxes", "scores", "labels"} <= set(found):
        boxes, labels, scores, masks = (_array(found.get(key)) for key in ("boxes", "labels", "scores", "masks"))
    else:
        given = (
            f"a mapping with {', '.join(map(repr, found)) or 'nothing'}" if isinstance(found, Mapping) else type(found)
        )
        raise UsageError(
            _at(
                path,
                f"detections are {given}; expected detkit.Detections, supervision.Detections, or a mapping with "
                "'boxes', 'labels' and 'scores' of one image. Detections.from_arrays takes bare arrays",
            )
        )
    if names is None and labels is not None and first_label:
        labels = np.asarray(labels) - first_label
    return Detections.from_arrays(
        boxes,
        scores,
        labels if names is None else None,
        names=names,
        classes=classes,
        path=path,
        width=width,
        height=height,
        masks=None if masks is None else _truth(masks),
    )


def to_pandas(detections: Iterable[Detections]) -> Any:
    """Return a ``pandas.DataFrame`` of many images: one row for each detection, the columns of `COLUMNS`.

    An image on which nothing was found has no row. Raises `UsageError` where pandas is not installed.
    """
    try:
        import pandas
    except ImportError as error:
        raise _missing("to_pandas", "pandas", error) from error
    rows = [row for found in detections for row in found.to_rows()]
    numbers = {"width": np.int64, "height": np.int64} | dict.fromkeys(COLUMNS[4:], np.float64)
    return pandas.DataFrame(rows, columns=list(COLUMNS)).astype(numbers)


def _missing(function: str, package: str, error: ImportError) -> UsageError:
    return UsageError(f"{function} needs {package}, which is not here ({error}); install it: pip install {package}")


def _at(path: str, message: str) -> str:
    return f"{path}: {message}" if path else message


def _array(value: Any) -> Any:
    """Return a tensor of any framework as an array."""
    for step in ("detach", "cpu", "numpy"):
        value = getattr(value, step)() if hasattr(value, step) else value
    return value


def _numbers(what: str, values: ArrayLike, path: str) -> NDArray[np.float64]:
    try:
        array = np.array(_array(values), dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InvalidData(_at(path, f"{what} are not an array of numbers")) from None
    if not np.isfinite(array).all():
        raise InvalidData(_at(path, f"{what} hold {np.count_nonzero(~np.isfinite(array))} values that are not finite"))
    return array


def _labels_of(names: Sequence[str], classes: tuple[str, ...], path: str) -> Indices:
    index = {name: i for i, name in enumerate(classes)}
    unknown = list(dict.fromkeys(name for name in map(str, names) if name not in index))
    if unknown:
        raise ClassMismatch(_at(path, "detections"), list(classes), [*classes, *unknown])
    return np.array([index[str(name)] for name in names], dtype=np.int64)


def _checked_labels(labels: ArrayLike | None, classes: tuple[str, ...], n: int, path: str) -> Indices:
    if labels is None:
        if n and len(classes) != 1:
            raise UsageError(
                _at(path, f"{n} boxes without labels or names, and {len(classes)} classes; give labels= or names=")
            )
        return np.zeros(n, dtype=np.int64)
    values = _numbers("labels", labels, path)
    if values.ndim != 1:
        raise InvalidData(_at(path, f"labels of shape {values.shape}; expected ({n},)"))
    beyond = np.flatnonzero((values < 0) | (values >= len(classes)) | (values != np.rint(values)))
    if len(beyond):
        raise InvalidData(
            _at(
                path,
                f"label {values[beyond[0]]:g} stands for none of {len(classes)} classes; expected whole numbers from 0 "
                f"to {len(classes) - 1}. where labels begin with 1, as torchvision's do, "
                "as_detections(..., first_label=1) takes them",
            )
        )
    return values.astype(np.int64)


def _truth(masks: Any) -> Any:
    """Return truth values for the shares of torchvision's masks, which are ``(n, 1, height, width)``."""
    array = np.asarray(masks)
    if array.ndim == 4 and array.shape[1] == 1:
        array = array[:, 0]
    return array if array.dtype == bool else array > 0.5


def _encoded(masks: Sequence[Any] | NDArray[Any], path: str) -> list[Any]:
    """Return COCO's encoding of each mask; those that are encoded stay."""
    if not isinstance(masks, np.ndarray):
        wrong = next((mask for mask in masks if mask is not None and not isinstance(mask, (dict, list))), None)
        if wrong is not None:
            raise InvalidData(_at(path, f"a mask is {type(wrong)}; expected COCO's encoding, or one array for all"))
        return list(masks)
    if masks.ndim != 3:
        raise InvalidData(_at(path, f"masks of shape {masks.shape}; expected (n, height, width)"))
    if not masks.size:
        return [None] * len(masks)
    from hotcoco import mask as rle

    return [{**one, "counts": one["counts"].decode()} for one in rle.encode(masks.astype(bool).transpose(1, 2, 0))]
