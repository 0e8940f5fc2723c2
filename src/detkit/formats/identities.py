"""What image or class of a data set is meant by a name or an id in another tool's file.

Inside detkit nothing has an id. Those of the COCO files that a data set comes from are kept with it where they are not
1, 2, 3 ..., else looked up in the annotation file.
"""

from __future__ import annotations

import os
import posixpath
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import msgspec

from detkit import remote
from detkit.errors import DetkitError
from detkit.formats.imagefiles import stem

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from detkit.data import Dataset

Id: TypeAlias = int | str
ImageKey: TypeAlias = tuple[str, Id | None]
"""A file name, else empty, and an id, else None."""
ClassKey: TypeAlias = tuple[str, Id | None]
"""A class name, else empty, and an id, else None."""

UNKNOWN, AMBIGUOUS = -1, -2
"""In place of an image's index."""

_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class _Image(msgspec.Struct, gc=False):
    id: Id
    file_name: str


class _Category(msgspec.Struct, gc=False):
    id: Id
    name: str


class Listed(msgspec.Struct):
    """What a COCO file says of ids; its annotations are passed over."""

    images: list[_Image] = []
    categories: list[_Category] = []

    @property
    def file_names(self) -> dict[Id, str]:
        """The file name of each image id."""
        return {image.id: image.file_name for image in self.images}

    @property
    def names(self) -> dict[Id, str]:
        """The name of each category id."""
        return {category.id: category.name for category in self.categories}


class CocoIds:
    """Ids of one data set. An id that stands for two images, or two classes, is left out, as if it were not known."""

    def __init__(self, data: Dataset) -> None:
        self._data = data

    @cached_property
    def images(self) -> Mapping[Id, int]:
        """The index of each image in the data, by its id."""
        return _unique(self._image_ids())

    @cached_property
    def categories(self) -> Mapping[Id, str]:
        """The name of each class, by the id of its category."""
        of_classes = zip(self._data.classes, self._data.class_extra or (), strict=False)
        kept = [(extra["id"], name) for name, extra in of_classes if isinstance(extra.get("id"), (int, str))]
        if kept:
            return _unique(kept)
        listed = [pair for file in self._files.values() for pair in file.names.items()]
        return _unique((number, name) for number, name in listed if name in self._data.classes)

    @cached_property
    def _files(self) -> dict[str, Listed]:
        return {source: read_listed(source) for source in dict.fromkeys(self._data.sources) if _may_be_coco(source)}

    def _image_ids(self) -> Iterator[tuple[Id, int]]:
        data = self._data
        tables: dict[str, Mapping[str, Id]] = {}
        for i, (source, image_id) in enumerate(zip(data.sources, data.image_ids, strict=True)):
            kept = data.extra[i].get("id") if data.extra is not None else None
            if isinstance(kept, (int, str)):
                yield kept, i
                continue
            if source not in tables:
                file = self._files.get(source, Listed())
                tables[source] = _unique((_plain(name), number) for number, name in file.file_names.items())
            # An id may have got a folder before the name in the file, and the name may have one before the id.
            for text in (image_id, data.paths[i].replace("\\", "/")):
                found = next((tables[source][end] for end in _endings(text) if end in tables[source]), None)
                if found is not None:
                    yield found, i
                    break


class ImageNames:
    """Which image of the data a name or an id stands for."""

    def __init__(self, data: Dataset, ids: CocoIds) -> None:
        self._data, self._ids = data, ids

    @cached_property
    def _by_name(self) -> list[dict[str, int]]:
        """Names of ever looser kinds; an image's number, or that several have this name."""
        data = self._data
        tables: list[dict[str, int]] = []
        kinds: tuple[Iterable[str], ...] = (
            data.image_ids,
            map(os.path.abspath, data.paths),
            map(last_part, data.image_ids),
            map(last_part, data.paths),
            map(stem, data.image_ids),
            (stem(last_part(image_id)) for image_id in data.image_ids),
        )
        for names in kinds:
            table: dict[str, int] = {}
            for i, name in enumerate(names):
                table[name] = i if table.get(name, i) == i else AMBIGUOUS
            tables.append(table)
        return tables

    def find(self, key: ImageKey) -> int:
        """Return the image's number; below 0 where it is not known, or not which of several it is."""
        name, number = key
        if name:
            at = self._named(name)
            known = self._ids.images.get(number, UNKNOWN) if at == AMBIGUOUS and number is not None else UNKNOWN
            return known if known >= 0 and self._data.image_ids[known].endswith(last_part(name)) else at
        at = self._ids.images.get(number, UNKNOWN) if number is not None else UNKNOWN
        return self._named(number) if at < 0 and isinstance(number, str) else at

    def _named(self, name: str) -> int:
        last = last_part(name)
        exact, absolute, of_id, of_path, stems, last_stems = self._by_name
        found = UNKNOWN
        for table, text in (
            *((exact, name), (absolute, os.path.abspath(name)), (of_id, last), (of_path, last)),
            *((stems, name), (last_stems, last), (last_stems, stem(last))),
        ):
            at = table.get(text, UNKNOWN)
            if at >= 0:
                return at
            found = min(found, at)
        return found


def read_listed(place: str) -> Listed:
    """Return what a COCO file, here or at a URL, says of ids; nothing where it is gone or is another kind of file."""
    try:
        content = (remote.local(place) if remote.is_remote(place) else Path(place)).read_bytes()
        return msgspec.json.decode(content.removeprefix(b"\xef\xbb\xbf"), type=Listed)
    except (OSError, ValueError, RecursionError, DetkitError):
        return Listed()


def last_part(name: str) -> str:
    """Return a path's file name, whichever slashes it has."""
    return name.replace("\\", "/").rpartition("/")[2]


def _may_be_coco(source: str) -> bool:
    return source.lower().endswith(".json")


def _plain(name: str) -> str:
    return posixpath.normpath(name.replace("\\", "/"))


def _endings(text: str) -> Iterator[str]:
    """Yield a path, and what is left of it without its first folder, its first two ..."""
    while text:
        yield text
        text = text.partition("/")[2]


def _unique(pairs: Iterable[tuple[_Key, _Value]]) -> dict[_Key, _Value]:
    found: dict[_Key, _Value] = {}
    twice: set[_Key] = set()
    for key, value in pairs:
        if found.setdefault(key, value) != value:
            twice.add(key)
    return {key: value for key, value in found.items() if key not in twice}
