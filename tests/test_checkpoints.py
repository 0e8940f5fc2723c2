"""States of a run: the two newest are kept, a damaged one is set aside, and a full disk costs none."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pytest

from detkit.checkpoints import KEPT, Checkpoints
from detkit.errors import StorageError, UsageError


@pytest.fixture
def states(tmp_path: Path) -> Checkpoints:
    """Return the states of four steps, of which two are left."""
    (tmp_path / "checkpoints").mkdir()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (9, 10, 100, 110):
        save(checkpoints, step)
    return checkpoints


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(step, lambda file: file.write(b"state %d" % step))


def files(checkpoints: Checkpoints) -> list[str]:
    return sorted(path.name.rpartition("-")[0] for path in checkpoints.folder.iterdir())


def newest(checkpoints: Checkpoints) -> tuple[int, bytes, list[str]]:
    told: list[str] = []
    found = checkpoints.newest(told.append)
    assert found is not None
    return found.step, found.path.read_bytes(), told


def test_the_newest_two_are_kept(states: Checkpoints) -> None:
    assert KEPT == 2
    assert files(states) == ["step-000000100", "step-000000110"]
    assert newest(states) == (110, b"state 110", [])


def test_none_was_saved(tmp_path: Path) -> None:
    assert Checkpoints(tmp_path).newest(pytest.fail) is None


@pytest.mark.parametrize("content", [b"", b"state 11", b"state 111", b"state 110 and more"])
def test_a_damaged_one_is_set_aside_and_told(states: Checkpoints, content: bytes) -> None:
    next(states.folder.glob("step-000000110-*")).write_bytes(content)
    step, state, [message] = newest(states)
    assert (step, state) == (100, b"state 100")
    assert message.startswith("the checkpoint of step 110 is damaged")
    assert files(states) == ["damaged-step-000000110", "step-000000100"]
    save(states, 105)
    assert newest(states) == (105, b"state 105", [])
    save(states, 110)
    save(states, 115)
    assert files(states) == ["damaged-step-000000110", "step-000000110", "step-000000115"]


def test_all_are_damaged(states: Checkpoints) -> None:
    for path in states.folder.iterdir():
        path.write_bytes(b"?")
    for _ in range(2):  # the second finds nothing but what the first has set aside
        with pytest.raises(UsageError, match=r"no checkpoint in .* is whole, so this run cannot go on; train anew"):
            states.newest(lambda message: None)


def test_what_a_kill_left_half_written_goes(states: Checkpoints) -> None:
    """`kill -9` in the middle of writing, and between writing and the last renaming."""
    left = [states.folder / name for name in (".new.x1y2z3", ".new.abcdef", "new")]
    for file in left:
        file.write_bytes(b"half of it")
    (states.folder / "batch_size.json").write_text("4")
    assert newest(states)[0] == 110
    assert not any(file.exists() for file in left)
    left[0].write_bytes(b"half of it")
    save(states, 120)
    assert {path.name.rpartition("-")[0] for path in states.folder.iterdir()} == {
        "", "step-000000110", "step-000000120"
    }  # fmt: skip
    assert (states.folder / "batch_size.json").read_text() == "4"


def test_what_cannot_be_written_leaves_the_others(states: Checkpoints) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"No space left on device; the checkpoint of step 110 is still there"):
        states.save(120, write)
    assert files(states) == ["step-000000100", "step-000000110"]


def test_an_error_of_the_writer_leaves_nothing_half_written(states: Checkpoints) -> None:
    def write(file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise ValueError("something else")

    with pytest.raises(ValueError, match="something else"):
        states.save(120, write)
    assert files(states) == ["step-000000100", "step-000000110"]


def test_a_state_that_is_saved_again_replaces_itself(states: Checkpoints) -> None:
    save(states, 110)
    assert files(states) == ["step-000000100", "step-000000110"]
