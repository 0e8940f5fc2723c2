"""Reading and writing data sets in any format that a plugin offers."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detkit import plugins
from detkit.errors import DetkitWarning, InvalidData, UnknownName, Unsupported, UsageError
from detkit.files import staged_folder
from detkit.images import EXTENSIONS
from detkit.params import set_fields
from detkit.reading_cache import SLOW_S, reading
from detkit.remote import Mirror, exists, is_remote, mirrored, uploading

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.data import Dataset
    from detkit.formats import Format
    from detkit.formats.findings import Finding


def read_dataset(path: str | Path, format: str | None = None, *, split: str | None = None, **options: Any) -> Dataset:
    """Read a data set, in the format that its files show or that is given.

    ``"PATH:SPLIT"`` is short for ``split="SPLIT"``. ``options`` are the format's own, e.g. ``origin=0`` for "voc".
    Raises `InvalidData` with everything that is wrong, `UsageError` where the format cannot be told.

    A URL such as ``s3://bucket/folder`` is read through fsspec: its annotations are fetched, its images only when they
    are needed. What took long is kept in a cache and read from there as long as no file has changed; see
    `detkit.reading_cache`.
    """
    where, named = _separate(path)
    if named and split and named != split:
        raise UsageError(f"{path} names the split {named!r}, the call {split!r}; give one of them")
    wanted = split or named
    try:
        data = _read_there(where, format, options) if isinstance(where, str) else _read(where, format, options)
    except InvalidData as error:
        if wanted and error.partial is not None:
            error.partial = error.partial.splits.get(wanted)
        raise
    return data.splits[wanted] if wanted else data


def _read(path: Path, format: str | None, options: dict[str, Any]) -> Dataset:
    try:
        return _read_or_recall(path, format, options)
    except OSError as error:
        message = f"cannot read {error.filename or path}: {error.strerror or error}"
        raise InvalidData(f"{message}. mend or remove it, or see to the permission to read it") from error


def _read_or_recall(path: Path, format: str | None, options: dict[str, Any]) -> Dataset:
    kept = reading(path, format, options, [known.read for known in plugins.formats().values()])
    found = kept.look_up() if kept is not None else None
    if found is not None:
        data, told = found
        for text in told:
            warnings.warn(text, DetkitWarning, stacklevel=3)
        return data
    chosen = recognise(path, format)
    settings = set_fields(chosen.options(), options, kind=f"option of format {chosen.name}")
    began, caught = time.time(), []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = chosen.read(path, settings)
    finally:
        for warning in caught:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if kept is not None and time.time() - began > SLOW_S:
        told = [str(warning.message) for warning in caught if issubclass(warning.category, DetkitWarning)]
        kept.keep(data, told, began)
    return data


def _read_there(url: str, format: str | None, options: dict[str, Any]) -> Dataset:
    """Read what lies at a URL; findings, warnings and paths name places there."""
    with mirrored(url, _is_image) as mirror, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            data = _read(mirror.path, format, options)
        except InvalidData as error:
            findings = [_finding_there(finding, mirror) for finding in error.findings]
            partial = None if error.partial is None else _there(error.partial, mirror)
            raise InvalidData(mirror.told(str(error)), findings, partial=partial) from None
        except UsageError as error:
            raise UsageError(mirror.told(str(error))) from None
    for warning in caught:
        warnings.warn(mirror.told(str(warning.message)), warning.category, stacklevel=3)
    return _there(data, mirror)


def _finding_there(finding: Finding, mirror: Mirror) -> Finding:
    return replace(
        finding,
        file=mirror.told(finding.file),
        message=mirror.told(finding.message),
        image_file=mirror.told(finding.image_file),
    )


def _there(data: Dataset, mirror: Mirror) -> Dataset:
    return replace(
        data,
        paths=tuple(mirror.place(path) for path in data.paths),
        sources=tuple(mirror.told(source) for source in data.sources),
        file_extra={mirror.told(source): extra for source, extra in data.file_extra.items()},
    )


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in EXTENSIONS


def recognise(path: str | Path, format: str | None = None) -> Format:
    """Return the format of a data set: the one of that name, or the one that its files show. Raises `UsageError`."""
    where, _ = _separate(path)
    if isinstance(where, str):
        with mirrored(where, _is_image) as mirror:
            return _format(format) if format else _sniff(mirror.path)
    if not where.exists():
        raise UsageError(f"there is no file or folder {where} (looked for from {Path.cwd()})")
    return _format(format) if format else _sniff(where)


def write_dataset(
    data: Dataset,
    path: str | Path,
    format: str = "coco",
    *,
    images: Literal["link", "copy"] = "link",
    **options: Any,
) -> Path | str:
    """Write a data set into a new folder, here or at a URL, and return it; it appears only once it is complete.

    Images become hard links where possible, which cost no space and change with the file they are links to, or copies
    of their own with ``images="copy"``. ``options`` are the format's own for writing. Warns once of everything that
    the format cannot carry. Raises `UsageError` for a target that holds anything, `Unsupported` where the format cannot
    be written, `StorageError`. At a URL, images that lie in the same store are copied over there.
    """
    chosen = _format(format)
    if chosen.write is None:
        raise Unsupported(f"format {format!r} can be read but not written; these can: {', '.join(_writable())}")
    settings = set_fields(chosen.write_options(), options, kind=f"option for writing format {chosen.name}")
    lost = chosen.not_carried(data, settings)
    target: Path | str
    if is_remote(path):
        target = str(path)
        with tempfile.TemporaryDirectory() as staged, uploading(Path(staged), target, _is_image):
            chosen.write(data, Path(staged), settings)
    else:
        target = Path(path).absolute()
        with _appearing(target) as beside:
            chosen.write(data, beside, settings)
            if images == "copy":
                _copy_links(beside)
    if lost:
        warnings.warn(f"{target}: {_told(chosen, lost)}", DetkitWarning, stacklevel=2)
    return target


@contextlib.contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """Yield a folder beside its final place, which it takes when the block ends well."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"{target} is not empty; nothing is overwritten, so choose another folder or remove it")
    try:
        with staged_folder(target) as beside:
            yield beside
    except UnicodeEncodeError as error:
        shown = ascii(error.object[max(0, error.start - 40) : error.end + 40])
        raise InvalidData(
            f"{shown} in a name or a kept key is no Unicode text, which annotation files are; rename it"
        ) from error


def _copy_links(folder: Path) -> None:
    """Replace files that are links to others' by files of their own."""
    for path in folder.rglob("*"):
        if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
            own = path.with_name(f".{path.name}.own")
            shutil.copy2(path, own)
            os.replace(own, path)


def _told(format: Format, lost: dict[str, int]) -> str:
    listed = ", ".join(f"{name} ({count})" for name, count in lost.items())
    return f"{format.name} does not carry everything this data has; left behind: {listed}"


def _separate(path: str | Path) -> tuple[Path | str, str]:
    """Split ``PATH:SPLIT``; a colon in the name of something that exists is only a colon. A URL stays text."""
    head, colon, tail = str(path).rpartition(":")
    if is_remote(path):
        named = is_remote(head) and "/" not in tail and not exists(str(path))
        return (head, tail) if named else (str(path), "")
    if colon and head and tail and not Path(path).exists() and Path(head).exists():
        return Path(head), tail
    return Path(path), ""


def _format(name: str) -> Format:
    known = plugins.formats()
    if name not in known:
        raise UnknownName("format", name, known, "others come as plugins")
    return known[name]


def _writable() -> list[str]:
    return sorted(name for name, known in plugins.formats().items() if known.write is not None)


def _sniff(path: Path) -> Format:
    known = plugins.formats()
    fitting = [candidate for candidate in known.values() if candidate.sniff(path)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        names = ", ".join(candidate.name for candidate in fitting)
        raise UsageError(
            f"{path} looks like several formats: {names}; say which with format= (--format, or --from of check and "
            "convert)"
        )
    listed = "\n".join(f"  {name}: {candidate.summary}" for name, candidate in known.items())
    raise UsageError(f"{path} looks like none of the known formats. looked for:\n{listed}\nor name it with format=")
