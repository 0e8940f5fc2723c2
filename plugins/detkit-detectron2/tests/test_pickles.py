"""Pickles of weights: Detectron2's are read, whatever runs or refers elsewhere is refused before it is built."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detkit.errors import UsageError
from detkit_detectron2.pickles import read_pickle


class Calls:
    """Calls a function when it is read."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.made_by = (function, arguments)

    def __reduce__(self) -> Any:
        return self.made_by


def write(folder: Path, content: Any, protocol: int = 2) -> Path:
    path = folder / "weights.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_and_plain_containers(protocol: int, tmp_path: Path) -> None:
    arrays = {
        "conv1.w": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
        "half": np.ones(3, dtype=np.float16),
        "turned": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "count": np.int64(7),
        "swapped": np.arange(3, dtype=">i4"),
    }
    found = read_pickle(write(tmp_path, {"model": OrderedDict(arrays), "__author__": "Detectron2"}, protocol))
    assert found["__author__"] == "Detectron2"
    assert found["model"]["count"] == 7
    for name in ("conv1.w", "half", "turned", "swapped"):
        np.testing.assert_array_equal(found["model"][name], arrays[name])
        assert found["model"][name].dtype == arrays[name].dtype


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Calls(os.system, "touch ran"), r"would build (posix|nt)\.system"),
        (Calls(eval, "1"), r"would build (builtins|__builtin__)\.eval"),
        ({"model": {"a": np.array([{}], dtype=object)}}, "are no numbers|no pickle of weights"),
        ({"model": {"a": np.array(["text"])}}, "are no numbers"),
        (np.ndarray, "holds a type"),
        (Calls(np.ndarray, (2**33,), "f8"), r"makes an array with numpy\.ndarray"),
        (Calls(np.dtype, Calls(np.ndarray, (1,), "O", b"A" * 8)), r"makes an array with numpy\.ndarray"),
        (Calls(np.dtype, ["f4"]), "an array of list, which are no numbers"),
        (Path("/etc"), "would build pathlib"),
    ],
    ids=["a command", "eval", "objects", "texts", "a type", "an array", "a type named by an array", "a list", "a path"],
)
def test_refused(content: Any, message: str, protocol: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        read_pickle(write(tmp_path, content, protocol))
    assert not (tmp_path / "ran").exists()


class Turned:
    """An array whose state is another one than its beginning."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        function, arguments, _ = np.zeros(1, dtype=np.float32).__reduce__()
        return function, arguments, self.state


@pytest.mark.parametrize(
    "state",
    [
        (1, (1,), np.dtype("O"), False, [{}]),
        (1, (1,), np.dtype("f4"), False, [{}]),
        (1, (1,), np.dtype([("a", "f4")]), False, b"1234"),
        (1, (9,), np.dtype("f4"), False, b"1234"),
        (1, (1,), "f4", False, b"1234"),
    ],
    ids=["objects", "a list", "parts", "too short", "a name"],
)
def test_an_array_that_lies_about_itself_is_refused(state: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="weights"):
        read_pickle(write(tmp_path, {"a": Turned(*state)}))


def test_a_type_cannot_be_changed_into_another(tmp_path: Path) -> None:
    """numpy takes the flags of a type from the state; with those of objects, it would free what is no object."""

    class Flagged:
        def __reduce__(self) -> Any:
            return np.dtype, ("i4", False, True), (3, "<", None, None, None, -1, -1, 63)

    array = Turned(1, (1,), Flagged(), False, b"1234")
    found = read_pickle(write(tmp_path, {"a": array}))["a"]
    assert (found.dtype, found.dtype.flags) == (np.dtype("i4"), 0)


def test_circular(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": []}
    content["a"].append(content)
    found = read_pickle(write(tmp_path, content))
    assert found["a"][0] is found


@pytest.mark.parametrize("content", [b"", b"\x80", b"no pickle", pickle.dumps({"a": 1})[:-3]], ids=range(4))
def test_damaged(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "weights.pkl").write_bytes(content)
    with pytest.raises(UsageError, match="is no pickle of weights"):
        read_pickle(tmp_path / "weights.pkl")


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="No such file"):
        read_pickle(tmp_path / "weights.pkl")
