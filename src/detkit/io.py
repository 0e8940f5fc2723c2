"""Reading and writing data sets in any format that a plugin offers."""

from __future__ import annotations

import os
import secrets
import shutil
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from detkit import plugins
from detkit.errors import DetkitWarning, StorageError, UnknownName, Unsupported, UsageError
from detkit.params import set_fields

if TYPE_CHECKING:
    from detkit.data import Dataset
    from detkit.formats import Format


def read_dataset(path: str | Path, format: str | None = None, *, split: str | None = None, **options: Any) -> Dataset:
    """Read a data set, in the format that its files show or that is given.

    ``"PATH:SPLIT"`` is short for ``split="SPLIT"``. ``options`` are the format's own, e.g. ``origin=0`` for "voc".
    Raises `InvalidData` with everything that is wrong, `UsageError` where the format cannot be told.
    """
    where, named = _separate(path)
    if named and split and named != split:
        raise UsageError(f"{path} names the split {named!r}, the call {split!r}; give one of them")
    chosen = recognise(where, format)
    data = chosen.read(where, set_fields(chosen.options(), options, kind=f"option of format {chosen.name}"))
    wanted = split or named
    return data.splits[wanted] if wanted else data


def recognise(path: str | Path, format: str | None = None) -> Format:
    """Return the format of a data set: the one of that name, or the one that its files show. Raises `UsageError`."""
    where, _ = _separate(path)
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
) -> Path:
    """Write a data set into a new folder and return it; the folder appears only once it is complete.

    Images become hard links where possible, which cost no space and change with the file they are links to, or copies
    of their own with ``images="copy"``. ``options`` are the format's own for writing. Warns once of everything that
    the format cannot carry. Raises `UsageError` for a target that holds anything, `Unsupported` where the format cannot
    be written, `StorageError`.
    """
    chosen, target = _format(format), Path(path).absolute()
    if chosen.write is None:
        raise Unsupported(f"format {format!r} can be read but not written; these can: {', '.join(_writable())}")
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise UsageError(f"{target} is not empty; nothing is overwritten, so choose another folder or remove it")
    settings = set_fields(chosen.write_options(), options, kind=f"option for writing format {chosen.name}")
    lost = chosen.not_carried(data, settings)
    beside = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        beside.mkdir(parents=True)
        chosen.write(data, beside, settings)
        if images == "copy":
            _copy_links(beside)
        os.replace(beside, target)
    except OSError as error:
        raise StorageError(target, error) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    if lost:
        warnings.warn(f"{target}: {_told(chosen, lost)}", DetkitWarning, stacklevel=2)
    return target


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


def _separate(path: str | Path) -> tuple[Path, str]:
    """Split ``PATH:SPLIT``; a colon in the name of something that exists is only a colon."""
    head, colon, tail = str(path).rpartition(":")
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
        raise UsageError(f"{path} looks like several formats: {names}; say which with format= (--format)")
    listed = "\n".join(f"  {name}: {candidate.summary}" for name, candidate in known.items())
    raise UsageError(f"{path} looks like none of the known formats. looked for:\n{listed}\nor name it with format=")
