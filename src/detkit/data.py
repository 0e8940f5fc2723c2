"""A data set as columns, and one image of it as a `Sample`.

Class *names* are the identity of a class. Labels are indices into ``classes`` (``0 .. K-1``) that never leave the
object they belong to; nothing outside a format adapter or an engine ever sees a foreign id.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from detkit import images, numbering
from detkit.boxes import Boxes, area
from detkit.errors import ClassMismatch, InvalidData, InvalidValue, UnknownName, UsageError
from detkit.stratification import stratify
from detkit.tables import html_table

Indices: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = NDArray[np.bool_]
Extra: TypeAlias = Mapping[str, Any]

_NO_EXTRA: Extra = {}


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One image with its boxes: a row of a `Dataset`, or what one is built from."""

    path: str
    """Where the image file lies."""
    width: int
    """Pixels, as displayed (EXIF orientation applied)."""
    height: int
    boxes: Boxes = field(default_factory=lambda: np.zeros((0, 4)))
    """``(n, 4)``, xyxy, absolute pixels, 0-based, half-open."""
    names: tuple[str, ...] = ()
    """The class name of each box."""
    image_id: str = ""
    """Unique relative name; the file's name where nothing is given."""
    difficult: Flags | None = None
    """Objects that VOC evaluation ignores; none where nothing is given."""
    crowd: Flags | None = None
    """COCO ``iscrowd`` regions; none where nothing is given."""
    area: NDArray[np.float64] | None = None
    """Square pixels of each object, of its mask where there is one; of its box where nothing is given."""
    masks: tuple[Any, ...] | None = None
    """COCO segmentations (polygons or RLE) of each box, or None where an object has none."""
    extra: Extra = field(default_factory=dict)
    """Keys of the image's record that detkit does not interpret, kept for writing."""
    box_extra: tuple[Extra, ...] | None = None
    """The same for each box."""
    source: str = ""
    """The annotation file."""
    records: Indices | None = None
    """Number of each box's record in `source`, counted from 0."""

    def image(self) -> images.Image:
        """Decode the pixels: ``(height, width, 3)`` uint8 RGB. Raises `detkit.errors.ImageError`."""
        return images.read_image(self.path)


@dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Images and their boxes, held as columns; immutable.

    Boxes of image ``i`` are rows ``offsets[i]:offsets[i + 1]`` of ``boxes``, ``labels``, ``difficult``, ``crowd``,
    ``area`` and ``records``. ``data[i]`` is a `Sample`; ``data.splits["train"]`` is a `Dataset`.
    """

    classes: tuple[str, ...]
    """Class names; a label is an index into them."""
    image_ids: tuple[str, ...]
    """Unique relative names, with forward slashes."""
    paths: tuple[str, ...]
    sizes: Indices
    """``(n, 2)`` width and height in pixels, as displayed."""
    offsets: Indices
    """``(n + 1,)``, rising from 0."""
    boxes: Boxes
    labels: Indices
    difficult: Flags
    crowd: Flags
    area: NDArray[np.float64]
    records: Indices
    sources: tuple[str, ...]
    masks: tuple[Any, ...] | None = None
    extra: tuple[Extra, ...] | None = None
    box_extra: tuple[Extra, ...] | None = None
    class_extra: tuple[Extra, ...] | None = None
    """What the file says of each class beyond its name, kept for writing."""
    file_extra: Mapping[str, Extra] = field(default_factory=dict)
    """What annotation files, by their names in `sources`, say beside images and boxes, kept for writing."""
    box_ids: Indices | None = None
    """The numbers that the file gives its boxes, where they are not 1, 2, 3 ...; kept for writing, and only that. An
    ``id`` in `box_extra`, which may be text, counts before."""
    numbered: bool = False
    """Whether the files number 1, 2, 3 ... in order what no ids are kept of, images, boxes by `records`, or classes."""
    split_indices: Mapping[str, Indices] = field(default_factory=dict)
    """Image indices of each split the data came with."""

    def __post_init__(self) -> None:
        if len(set(self.classes)) != len(self.classes):
            raise InvalidData(f"class names are not unique: {', '.join(self.classes)}")
        if len(set(self.image_ids)) != len(self.image_ids):
            seen: set[str] = set()
            twice = next(i for i in self.image_ids if i in seen or seen.add(i))  # type: ignore[func-returns-value]
            raise InvalidData(f"image {twice!r} is there twice; image ids must be unique")
        if self.class_extra is not None and len(self.class_extra) != len(self.classes):
            raise InvalidData(f"{len(self.class_extra)} class_extra for {len(self.classes)} classes")
        for column in (self.sizes, self.offsets, self.boxes, self.labels, self.difficult, self.crowd, self.area):
            column.flags.writeable = False
        if self.box_ids is not None:
            self.box_ids.flags.writeable = False

    @classmethod
    def from_samples(
        cls, classes: Sequence[str], samples: Iterable[Sample], splits: Mapping[str, Sequence[int]] | None = None
    ) -> Dataset:
        """Build a data set from samples whose names are all in ``classes``. Raises `ClassMismatch`, `InvalidData`."""
        rows = list(samples)
        index = {name: i for i, name in enumerate(classes)}
        unknown = sorted({name for row in rows for name in row.names if name not in index})
        if unknown:
            raise ClassMismatch("samples", list(classes), [*classes, *unknown])
        counts = [len(row.names) for row in rows]
        for row in rows:
            if np.shape(row.boxes) != (len(row.names), 4):
                raise InvalidData(
                    f"{row.path}: boxes of shape {np.shape(row.boxes)} for {len(row.names)} names; "
                    f"expected ({len(row.names)}, 4)"
                )
            for name in ("difficult", "crowd", "area", "masks", "box_extra", "records"):
                column_of_row = getattr(row, name)
                if column_of_row is not None and len(column_of_row) != len(row.names):
                    raise InvalidData(f"{row.path}: {len(column_of_row)} {name} for {len(row.names)} names")

        def column(name: str, default: Any, dtype: Any) -> Any:
            parts = [getattr(row, name) for row in rows]
            parts = [default(row) if part is None else part for part, row in zip(parts, rows, strict=True)]
            return np.concatenate([np.asarray(part, dtype=dtype) for part in parts] or [np.zeros(0, dtype)])

        def absent(row: Sample) -> Flags:
            return np.zeros(len(row.names), dtype=bool)

        boxes = np.concatenate([np.asarray(row.boxes, dtype=np.float64) for row in rows] or [np.zeros((0, 4))])
        has_masks = any(row.masks is not None for row in rows)
        has_box_extra = any(row.box_extra is not None for row in rows)
        return cls(
            classes=tuple(classes),
            image_ids=tuple(row.image_id or Path(row.path).name for row in rows),
            paths=tuple(row.path for row in rows),
            sizes=np.array([(row.width, row.height) for row in rows], dtype=np.int64).reshape(-1, 2),
            offsets=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
            boxes=boxes,
            labels=np.array([index[name] for row in rows for name in row.names], dtype=np.int64),
            difficult=column("difficult", absent, bool),
            crowd=column("crowd", absent, bool),
            area=column("area", lambda row: area(np.asarray(row.boxes, dtype=np.float64)), np.float64),
            records=column("records", lambda row: np.arange(len(row.names)), np.int64),
            sources=tuple(row.source for row in rows),
            masks=tuple(m for row in rows for m in (row.masks or (None,) * len(row.names))) if has_masks else None,
            extra=tuple(row.extra for row in rows) if any(row.extra for row in rows) else None,
            box_extra=(
                tuple(e for row in rows for e in (row.box_extra or (_NO_EXTRA,) * len(row.names)))
                if has_box_extra
                else None
            ),
            split_indices={k: np.asarray(v, dtype=np.int64) for k, v in (splits or {}).items()},
        )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.image_ids)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> Dataset: ...
    def __getitem__(self, index: int | slice) -> Sample | Dataset:
        if isinstance(index, slice):
            return self.take(range(*index.indices(len(self))))
        i = range(len(self))[index]
        rows = slice(int(self.offsets[i]), int(self.offsets[i + 1]))
        return Sample(
            path=self.paths[i],
            width=int(self.sizes[i, 0]),
            height=int(self.sizes[i, 1]),
            boxes=self.boxes[rows],
            names=tuple(self.classes[label] for label in self.labels[rows]),
            image_id=self.image_ids[i],
            difficult=self.difficult[rows],
            crowd=self.crowd[rows],
            area=self.area[rows],
            masks=None if self.masks is None else self.masks[rows],
            extra=_NO_EXTRA if self.extra is None else self.extra[i],
            box_extra=None if self.box_extra is None else self.box_extra[rows],
            source=self.sources[i],
            records=self.records[rows],
        )

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count}" for name, count in self.boxes_per_class().items())
        splits = f"; splits: {', '.join(self.split_indices)}" if self.split_indices else ""
        return f"<Dataset: {len(self)} images, {len(self.boxes)} boxes ({counts}){splits}>"

    def _repr_html_(self) -> str:
        parts = {"all": self, **self.splits}
        counts = {name: part.boxes_per_class() for name, part in parts.items()}
        rows = [["images", *(f"{len(part):,}" for part in parts.values())]]
        rows += [[name, *(f"{counts[part][name]:,}" for part in parts)] for name in self.classes]
        return html_table(["boxes of", *parts], rows)

    def boxes_per_class(self) -> dict[str, int]:
        """Return how many boxes each class has, in class order, classes without boxes included."""
        counts = np.bincount(self.labels, minlength=len(self.classes))
        return {name: int(count) for name, count in zip(self.classes, counts, strict=True)}

    @cached_property
    def image_numbers(self) -> Indices:
        """The ``(n,)`` numbers of the images among those of their files, counted from 1; see `numbered`."""
        return numbering.image_numbers(self.sources)

    def boxes_per_image(self) -> Indices:
        """Return the ``(n,)`` number of boxes of each image."""
        return np.diff(self.offsets)

    @property
    def splits(self) -> Mapping[str, Dataset]:
        """The splits the data came with, by name; empty where it came in one piece. Each is built when looked up."""
        return _Splits(self)

    def take(self, indices: Iterable[int], *, keep_splits: bool = False) -> Dataset:
        """Return the images at ``indices``, in that order.

        ``keep_splits`` leaves each in the splits it was in, those gone that nothing is left of; else there are none.
        """
        chosen = np.array(indices if isinstance(indices, np.ndarray) else list(indices))
        if chosen.dtype == bool:
            raise InvalidValue("indices", "a mask", "indices of images; np.flatnonzero(mask) makes them of a mask")
        chosen = chosen.astype(np.int64)
        counts = self.boxes_per_image()[chosen]
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        rows = np.repeat(self.offsets[chosen] - offsets[:-1], counts) + np.arange(offsets[-1])
        taken = self._with_rows(chosen, offsets, rows)
        if not keep_splits or not self.split_indices:
            return taken
        position = np.full(len(self), -1, dtype=np.int64)
        position[chosen] = np.arange(len(chosen))
        splits = {name: position[at][position[at] >= 0] for name, at in self.split_indices.items()}
        return replace(taken, split_indices={name: at for name, at in splits.items() if len(at)})

    def keep_boxes(self, keep: Flags) -> Dataset:
        """Return all images with only the boxes where ``keep``, a ``(num_boxes,)`` mask, is true."""
        kept = np.concatenate([[0], np.cumsum(keep)]).astype(np.int64)
        everything = np.arange(len(self))
        data = self._with_rows(everything, kept[self.offsets], np.flatnonzero(keep))
        return replace(data, split_indices=self.split_indices, file_extra=self.file_extra)

    def _with_rows(self, chosen: Indices, offsets: Indices, rows: Indices) -> Dataset:
        def pick(column: Sequence[Any] | None, at: Indices) -> Any:
            return None if column is None else tuple(column[i] for i in at)

        sources = pick(self.sources, chosen)
        present = set(sources) if self.file_extra else ()
        return Dataset(
            classes=self.classes,
            image_ids=pick(self.image_ids, chosen),
            paths=pick(self.paths, chosen),
            sizes=self.sizes[chosen],
            offsets=offsets,
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            difficult=self.difficult[rows],
            crowd=self.crowd[rows],
            area=self.area[rows],
            records=self.records[rows],
            sources=sources,
            masks=pick(self.masks, rows),
            extra=numbering.image_extra(self, chosen),
            box_extra=pick(self.box_extra, rows),
            class_extra=self.class_extra,
            file_extra={source: extra for source, extra in self.file_extra.items() if source in present},
            box_ids=None if self.box_ids is None else self.box_ids[rows],
            numbered=self.numbered,
        )

    def with_classes(self, classes: Sequence[str], what: str = "data") -> Dataset:
        """Return the same boxes under another list of class names, matched by name.

        ``classes`` may be longer or in another order; a class that has boxes here and is not in it raises
        `ClassMismatch`.
        """
        if tuple(classes) == self.classes:
            return self
        used = [name for name, count in self.boxes_per_class().items() if count]
        if any(name not in classes for name in used):
            raise ClassMismatch(what, list(classes), used)
        index = {name: i for i, name in enumerate(classes)}
        table = np.array([index.get(name, -1) for name in self.classes], dtype=np.int64)
        known = dict(zip(self.classes, numbering.class_extra(self) or (), strict=False))
        return replace(
            self,
            classes=tuple(classes),
            labels=table[self.labels] if len(table) else self.labels.copy(),
            class_extra=tuple(known.get(name, _NO_EXTRA) for name in classes) if known else None,
        )

    def split(self, *fractions: float, seed: int = 0, group_by: str | None = None) -> tuple[Dataset, ...]:
        """Cut the data into parts by image, each class spread over the parts in proportion to its boxes.

        ``fractions`` sum to 1; every part has its exact share of images, rounded to whole ones. The same seed gives the
        same parts. ``group_by`` keeps images together that belong together, so that none of a group is in two parts:
        the name of a key of every image's record (``extra``), or a regular expression whose first group, or whole
        match, at the beginning of the image id names the group; shares are then as near as whole groups allow. Data
        that came split keeps its splits: this raises `UsageError` and names them.
        """
        if self.split_indices:
            names = ", ".join(f"{name} ({len(at)})" for name, at in self.split_indices.items())
            raise UsageError(
                f"this data came with splits: {names}; use data.splits[...], or data.take(range(len(data))) to cut anew"
            )
        return tuple(self.take(part) for part in self.split_positions(*fractions, seed=seed, group_by=group_by))

    def split_positions(self, *fractions: float, seed: int = 0, group_by: str | None = None) -> list[list[int]]:
        """Return the image indices of the parts that `split` makes, also where the data came split."""
        if not fractions or min(fractions) <= 0 or not abs(sum(fractions) - 1) <= 1e-6:
            raise InvalidValue("fractions", fractions, "positive numbers that sum to 1")
        groups = np.arange(len(self)) if group_by is None else self._groups(group_by)
        found = int(groups.max(initial=-1)) + 1
        if found < len(fractions):
            what = "image(s)" if group_by is None else f"group(s) by {group_by!r}"
            raise UsageError(f"{found} {what} cannot be cut into {len(fractions)} parts; each needs at least one")
        counts = np.zeros((len(self), len(self.classes)), dtype=np.int64)
        np.add.at(counts, (np.repeat(np.arange(len(self)), self.boxes_per_image()), self.labels), 1)
        return stratify(counts, np.array(fractions), groups, seed)

    def _groups(self, by: str) -> Indices:
        """Return the number of each image's group."""
        index: dict[str, int] = {}
        return np.array([index.setdefault(name, len(index)) for name in self._group_names(by)], dtype=np.int64)

    def _group_names(self, by: str) -> list[str]:
        if self.extra is not None and any(by in extra for extra in self.extra):
            lacking = next((i for i, extra in enumerate(self.extra) if by not in extra), None)
            if lacking is not None:
                raise InvalidValue("group_by", by, f"image {self.image_ids[lacking]!r} has no such key in its record")
            return [str(extra[by]) for extra in self.extra]
        try:
            pattern = re.compile(by)
        except re.error as error:
            raise InvalidValue("group_by", by, f"no key of the images' records, and no expression: {error}") from None
        matches = [pattern.match(image_id) for image_id in self.image_ids]
        if None in matches:
            image_id = self.image_ids[matches.index(None)]
            raise InvalidValue("group_by", by, f"no key of the images' records, and image {image_id!r} does not match")
        return [match[1 if pattern.groups else 0] or "" for match in matches if match is not None]

    def digest(self) -> str:
        """Return the sha256 of classes, image ids, sizes and boxes; pixels are not part of it."""
        h = hashlib.sha256(json.dumps([self.classes, self.image_ids]).encode())
        for column in (self.sizes, self.offsets, self.boxes, self.labels, self.difficult, self.crowd, self.area):
            h.update(np.ascontiguousarray(column).tobytes())
        return h.hexdigest()


class _Splits(Mapping[str, Dataset]):
    def __init__(self, data: Dataset) -> None:
        self._data = data

    def __getitem__(self, name: str) -> Dataset:
        if name not in self._data.split_indices:
            raise UnknownName("split", name, self._data.split_indices)
        return self._data.take(self._data.split_indices[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._data.split_indices)

    def __len__(self) -> int:
        return len(self._data.split_indices)

    def __contains__(self, name: object) -> bool:
        return name in self._data.split_indices
