"""Scoring a model: seen images are refused, classes meet by name, the held-out test is at hand."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from detkit import Dataset, Run, Trainer, evaluate, plugins, write_dataset
from detkit.errors import ClassMismatch, DetkitWarning, InvalidData, SeenImages, UsageError
from detkit.hookspecs import hookimpl
from detkit.metrics import Metric
from detkit.testing import tiny_dataset

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(scope="module")
def run(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Trained on images 0 to 3, validated on 4 and 5."""
    folder = tmp_path_factory.mktemp("evaluation")
    return Trainer(model="echo/memory", epochs=8).fit(tiny[:4], tiny[4:6], name=str(folder / "run"), quiet=True)


def test_seen_images_are_refused(run: Run, tiny: Dataset) -> None:
    with pytest.raises(SeenImages, match=r"4 of 8 images were used in training of this model, for example 000\.jpg, "
                                         r"001\.png, 002\.jpg; .*allow_seen=True") as caught:  # fmt: skip
        evaluate(run, tiny)
    assert caught.value.exit_code == 1
    assert caught.value.count == 4
    with pytest.raises(SeenImages, match="2 of 4 images were used in validation"):
        evaluate(run, tiny[4:])


def test_seen_images_are_known_by_their_bytes(run: Run, tiny: Dataset, tmp_path: Path) -> None:
    copy = shutil.copy(tiny.paths[0], tmp_path / "renamed.jpg")
    data = replace(tiny[:1], paths=(str(copy),), image_ids=("renamed.jpg",))
    with pytest.raises(SeenImages, match=r"renamed\.jpg"):
        evaluate(run, data)


def test_seen_images_are_marked(run: Run, tiny: Dataset) -> None:
    scores = evaluate(run, tiny[:4], allow_seen=True)
    assert scores.seen_in == "training"
    assert repr(scores).startswith("SEEN IN TRAINING")
    assert scores.to_dict()["seen_in"] == "training"
    assert scores["AP50"] > 0.9
    assert evaluate(run, tiny[4:6], allow_seen=True).seen_in == "validation"


def test_unseen_images(run: Run, tiny: Dataset) -> None:
    scores = evaluate(run, tiny[6:])
    assert scores.seen_in == ""
    assert not repr(scores).startswith("SEEN")
    assert set(scores.per_class) == {"disc", "square"}
    assert scores.protocol.max_detections == 100
    assert evaluate(run, tiny[6:], max_detections=5).protocol.max_detections == 5


def test_parents_images_count_as_seen(run: Run, tiny: Dataset) -> None:
    child = Trainer(model="echo/memory", epochs=1).fit(tiny[6:7], tiny[7:], weights=run, quiet=True)
    with pytest.raises(SeenImages, match="6 of 6 images were used in training"):
        evaluate(child, tiny[:6])


def test_without_data_the_test_images_are_scored(tmp_path: Path) -> None:
    run = Trainer(model="echo/memory", epochs=2).fit(tiny_dataset(tmp_path / "images", num_images=20), quiet=True)
    scores = evaluate(run)
    assert scores.protocol.num_images == 4
    assert scores["AP"] == pytest.approx(run.metrics["test/AP"])
    for name in (run.path, run.name, "last"):
        assert evaluate(name)["AP"] == scores["AP"]


def test_without_data_and_without_test_images(run: Run) -> None:
    with pytest.raises(UsageError, match="has no test images of its own; name a data set"):
        evaluate(run)


def test_path_and_split(run: Run, tiny: Dataset, tmp_path: Path) -> None:
    split = replace(tiny, split_indices={"train": np.arange(6), "test": np.arange(6, 8)})
    folder = write_dataset(split, tmp_path / "data")
    assert dict(evaluate(run, f"{folder}:test")) == pytest.approx(dict(evaluate(run, tiny[6:])), nan_ok=True)
    with pytest.raises(SeenImages):
        evaluate(run, folder)


def test_classes_meet_by_name(run: Run, tiny: Dataset) -> None:
    straight = evaluate(run, tiny[:4], allow_seen=True)
    turned = evaluate(run, tiny[:4].with_classes(["square", "never", "disc"]), allow_seen=True)
    assert turned["AP"] == straight["AP"]
    assert turned.per_class["disc"] == straight.per_class["disc"]


def test_class_that_the_model_does_not_know(run: Run, tiny: Dataset) -> None:
    data = replace(tiny[:4], classes=("disc", "pentagon"))
    with pytest.raises(ClassMismatch, match="unknown here: 'pentagon'"):
        evaluate(run, data, allow_seen=True)


def test_broken_data(run: Run, tiny: Dataset) -> None:
    boxes = tiny.boxes.copy()
    boxes[0] = [5, 5, 5, 9]
    broken = replace(tiny, boxes=boxes)
    with pytest.raises(InvalidData, match="zero-area"):
        evaluate(run, broken, allow_seen=True)
    scores = evaluate(run, broken, allow_seen=True, on_invalid="drop")
    assert sum(row["boxes"] for row in scores.per_class.values()) == len(boxes) - 1


def test_images_without_boxes(run: Run, tiny: Dataset) -> None:
    assert np.isnan(evaluate(run, tiny[7:])["AP"])


def test_progress_is_shown_on_stderr(run: Run, tiny: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    evaluate(run, tiny[6:], progress=True)
    assert capfd.readouterr().out == ""


def test_kept_images_that_have_changed_are_refused(tiny: Dataset, tmp_path: Path) -> None:
    """They are links to the user's files, so that an edit in place changes them."""
    own = [tmp_path / Path(path).name for path in tiny.paths]
    for path, copy in zip(tiny.paths, own, strict=True):
        shutil.copy(path, copy)
    data = replace(tiny, paths=tuple(map(str, own)))
    run = Trainer(model="echo/memory", epochs=2).fit(
        data[:4], data[4:6], data[6:], name=str(tmp_path / "r"), quiet=True
    )
    evaluate(run)
    with own[6].open("ab") as file:
        file.write(b"more")
    with pytest.raises(InvalidData, match=r"1 of the 2 test images .* have changed since, for example 006"):
        evaluate(run)


def test_a_model_that_forgot_what_it_has_seen(run: Run, tiny: Dataset, tmp_path: Path) -> None:
    copy = shutil.copytree(run.model.path, tmp_path / "model")
    (copy / "seen.json").unlink()
    with pytest.warns(DetkitWarning, match="which images echo/memory has seen is not known"):
        evaluate(copy, tiny[6:])


class _Metrics:
    """A metric plugin whose numbers are given."""

    def __init__(self, numbers: object) -> None:
        self.numbers = numbers

    @hookimpl
    def detkit_metrics(self) -> list[Metric]:
        compute = cast(Any, lambda data, detections: self.numbers)
        return [Metric(name="odd", summary="odd numbers", higher_is_better=False, compute=compute)]


@pytest.fixture
def offer() -> Iterator[Callable[[object], None]]:
    """Register a plugin as long as the test runs."""
    plugins.registry.cache_clear()
    yield lambda plugin: plugins.registry().manager.register(plugin, name="guest") and None
    plugins.registry.cache_clear()


@pytest.mark.parametrize(
    ("numbers", "message"), [({"odd": None}, "TypeError"), ({"AP": 0.5}, "AP is taken already"), (7, "AttributeError")]
)
def test_a_broken_metric_costs_only_its_own_numbers(
    numbers: object, message: str, run: Run, tiny: Dataset, offer: Callable[[object], None]
) -> None:
    usual = list(evaluate(run, tiny[6:]))
    offer(_Metrics(numbers))
    with pytest.warns(UserWarning, match=f"metric odd is left out.*{message}"):
        assert list(evaluate(run, tiny[6:])) == usual


def test_a_metric_of_which_less_is_better(run: Run, tiny: Dataset, offer: Callable[[object], None]) -> None:
    offer(_Metrics({"odd": np.float64(0.5)}))
    found = evaluate(run, tiny[6:])
    assert found["odd"] == 0.5 and type(found["odd"]) is float
    assert found.lower_is_better == ("odd",)
