"""Data set formats: one module each, every one offered through the same plugin hook as a stranger's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detkit.boxes import area
from detkit.data import Dataset, Extra
from detkit.params import Options

COLUMNS = (
    *("image_ids", "classes", "difficult", "crowd", "area", "masks"),
    *("extra", "box_extra", "class_extra", "file_extra", "box_ids", "split_indices"),
)
"""What a format may carry beyond boxes and the names of their classes; ``classes``: the order, and those without
boxes."""

ID_KEYS = ("id", "class_id", "category_id")
"""Keys of an image, object or class that hold its id in the file it comes from; told together, as ``ids``."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """How to recognise, read and write one format; plugins return these from ``detkit_formats``."""

    name: str
    """What users write in ``format=``."""
    summary: str
    """One sentence for listings."""
    sniff: Callable[[Path], bool]
    """Whether a path looks like this format; cheap, opens at most a few files, never raises for a readable path."""
    read: Callable[[Path, Any], Dataset]
    """``read(path, options)`` with an instance of `options`. Raises `InvalidData` with every finding, never skips."""
    write: Callable[[Dataset, Path, Any], None] | None = None
    """``write(data, folder, options)`` into an empty folder, which the caller moves to its final place, with an
    instance of `write_options`."""
    options: type[Options] = Options
    """Typed reading options; all have defaults."""
    write_options: type[Options] = Options
    """Typed writing options; all have defaults. One called like a column, and true, says that it is carried."""
    carries: frozenset[str] = frozenset({"image_ids"})
    """Columns beyond boxes and names that survive writing and reading: some of `COLUMNS`."""
    carries_image_key: Callable[[str, Any], bool] = lambda key, value: True
    """Of a format that carries ``extra``: whether a key of an image and its value survive."""
    carries_key: Callable[[str, Any], bool] = lambda key, value: True
    """Of a format that carries ``box_extra``: whether a key of an object and its value survive."""

    def not_carried(self, data: Dataset, options: Options | None = None) -> dict[str, int]:
        """Return what `write` would leave behind of this data: the name of each field, and how often it has a value."""
        carried = {*self.carries, *(name for name in COLUMNS if getattr(options, name, False))}
        lost = {
            "file names": 0 if "image_ids" in carried else len(data),
            "classes without boxes": 0 if "classes" in carried else list(data.boxes_per_class().values()).count(0),
            "class order": 0 if "classes" in carried else _moved(data),
            "difficult": 0 if "difficult" in carried else int(data.difficult.sum()),
            "crowd": 0 if "crowd" in carried else int(data.crowd.sum()),
            "area": 0 if "area" in carried else int((~np.isclose(data.area, area(data.boxes), rtol=1e-9)).sum()),
            "masks": 0 if "masks" in carried else sum(map(bool, data.masks or ())),
            "splits": 0 if "split_indices" in carried else len(data.split_indices),
        }
        keys: Counter[str] = Counter()
        for extra, count in _distinct(data.extra or ()):
            lost_keys = [k for k, v in extra.items() if "extra" not in carried or not self.carries_image_key(k, v)]
            keys.update(dict.fromkeys(lost_keys, count))
        for extra, count in _distinct(data.box_extra or ()):
            lost_keys = [k for k, v in extra.items() if "box_extra" not in carried or not self.carries_key(k, v)]
            keys.update(dict.fromkeys(lost_keys, count))
        for extra in data.class_extra or () if "class_extra" not in carried else ():
            keys.update(extra.keys())
        for extra in data.file_extra.values() if "file_extra" not in carried else ():
            keys.update("order of categories" if key == "categories" else key for key in extra)
        numbers = 0 if "box_ids" in carried or data.box_ids is None else len(data.box_ids)
        keys["ids"] = numbers + sum(keys.pop(key, 0) for key in ID_KEYS)
        return {name: count for name, count in {**lost, **keys}.items() if count}


def _moved(data: Dataset) -> int:
    """Return how many classes with boxes have another place among them once their names are sorted, as they are read
    where no file lists them."""
    names = [name for name, count in data.boxes_per_class().items() if count]
    return sum(name != other for name, other in zip(names, sorted(names), strict=True))


def _distinct(column: Sequence[Extra]) -> list[tuple[Extra, int]]:
    """Return each mapping once, and how many rows share it: readers give one to all objects that are alike."""
    rows = {id(extra): extra for extra in column}
    return [(rows[key], count) for key, count in Counter(map(id, column)).items()]
