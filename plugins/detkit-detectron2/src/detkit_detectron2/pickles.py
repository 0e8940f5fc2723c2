"""Pickles of weights, read without running what is in them: nothing but plain containers and arrays is built.

numpy's own way to restore an array trusts what the pickle says of its type, down to its flags, so here a pickle fills
two small records, and the arrays are made of those.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from detkit.errors import UsageError

_KINDS = "biufc"
"""Kinds of arrays: numbers."""


def read_pickle(path: Path) -> Any:
    """Return the dicts, lists, texts, numbers and arrays of numbers in a pickle. Raises `UsageError` for any other."""
    try:
        with path.open("rb") as file:
            return _plain(_Unpickler(file, encoding="latin1").load(), {})
    except UsageError as error:
        raise UsageError(f"{path} is not read: {error}") from None
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    except Exception as error:  # what is cut off or made up fails in many ways
        raise UsageError(f"{path} is no pickle of weights: {type(error).__name__}: {error}") from None


class _Type:
    """What a pickle says of the type of an array."""

    def __init__(self, name: Any, *_flags: Any) -> None:
        if not isinstance(name, str | bytes):  # else its own `__str__` would run
            raise UsageError(f"it holds an array of {type(name).__name__}, which are no numbers")
        found = np.dtype(name.decode("ascii") if isinstance(name, bytes) else name)
        if found.kind not in _KINDS:
            raise UsageError(f"it holds an array of {name!r}, which are no numbers")
        self.found = found

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, order, *parts = state
        if order not in {"<", ">", "|", "="} or any(part is not None for part in parts[:3]):
            raise UsageError("it holds an array of parts, which are no numbers")
        self.found = self.found.newbyteorder(order)


class _Marker:
    """Stands for the class of arrays where a pickle names it; numpy's own would make one of any size and content."""

    def __new__(cls, *_arguments: Any, **_named: Any) -> NoReturn:
        raise UsageError("it makes an array with numpy.ndarray, which a pickle of weights only names")


class _Array:
    """What a pickle says of an array."""

    content: NDArray[Any] | None = None

    def __init__(self, *_begun: Any) -> None:
        """Take no notice of how an array is begun; its state says it all."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _version, shape, kind, is_fortran, data = state
        self.fill(data, kind, shape, "F" if is_fortran else "C")

    def fill(self, data: Any, kind: Any, shape: Any, order: Any, axes: Sequence[int] | None = None) -> None:
        if not isinstance(kind, _Type) or not isinstance(data, str | bytes | bytearray):
            raise UsageError("it holds an array of something else than numbers")
        # Python 2 wrote bytes as texts.
        flat = np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype=kind.found)
        laid = flat.reshape(shape, order="F" if order == "F" else "C")
        self.content = (laid if axes is None else laid.transpose(axes)).copy()


def _from_buffer(data: Any, kind: Any, shape: Any, order: Any, axes: Sequence[int] | None = None) -> _Array:
    array = _Array()
    array.fill(data, kind, shape, order, axes)
    return array


def _scalar(kind: Any, data: Any) -> _Array:
    return _from_buffer(data, kind, (), "C")


def _encode(text: Any, encoding: str) -> bytes:
    """Return the bytes that Python 3 wrote as a text, for Python 2."""
    if not isinstance(text, str) or encoding != "latin1":
        raise UsageError("it encodes something that is no text")
    return text.encode("latin1")


_KNOWN: dict[tuple[str, str], Any] = {
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _Type,
    ("numpy", "ndarray"): _Marker,  # an argument of the next ones, which take no notice of it
    **{
        (f"numpy.{core}.{module}", name): made
        for core in ("core", "_core")  # before numpy 2, and since
        for module, name, made in (
            ("multiarray", "_reconstruct", _Array),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _from_buffer),
        )
    },
}


class _Unpickler(pickle.Unpickler):
    """Finds what arrays are made of, and refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise UsageError(
                f"it would build {module}.{name}, and a pickle of weights needs only arrays and plain containers. "
                "if you trust it, load it where it was made and save a .pth of the state dict"
            )
        return _KNOWN[module, name]

    def persistent_load(self, pid: Any) -> NoReturn:
        raise UsageError("it refers to something outside of it")


def _plain(value: Any, done: dict[int, Any]) -> Any:
    """Return what was read, with arrays in place of what was said of them; ``done`` is by id, as it may be circular."""
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, dict):
        made: dict[Any, Any] = {}
        done[id(value)] = made
        made.update((_plain(key, done), _plain(one, done)) for key, one in value.items())
        return made
    if isinstance(value, list):
        items: list[Any] = []
        done[id(value)] = items
        items.extend(_plain(one, done) for one in value)
        return items
    if isinstance(value, tuple):
        return tuple(_plain(one, done) for one in value)
    if isinstance(value, _Array):
        if value.content is None:
            raise UsageError("it begins an array and does not fill it")
        return value.content if value.content.ndim else value.content.item()
    if value is None or isinstance(value, str | bytes | bytearray | int | float | complex | set | frozenset):
        return value
    raise UsageError(f"it holds a {type(value).__name__.lstrip('_')}, which is neither an array nor a plain container")
