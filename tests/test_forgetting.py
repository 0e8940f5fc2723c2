"""Old data again, and what a model forgets without it. The echo backend forgets by remembering something nearer."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit import Dataset, Predictor, Run, Trainer, evaluate, write_dataset
from detkit.errors import InvalidValue, UsageError
from detkit.files import file_sha256
from detkit.forgetting_table import APChange
from detkit.job import Replayed
from detkit.scores import SCORE_FLOOR, score
from detkit.testing import tiny_dataset

pytestmark = pytest.mark.usefixtures("clean")

ECHO = Trainer(model="echo/memory", epochs=8)


def messages(run: Run) -> str:
    return "\n".join(str(event.values["message"]) for event in run.events(follow=False) if event.kind == "log")


def channel(run: Run, name: str) -> Dataset:
    data = run.workspace.dataset(name)
    assert data is not None
    return data


def digests(data: Dataset) -> set[str]:
    return {file_sha256(Path(path)) for path in data.paths}


def darkened(data: Dataset, folder: Path, by: int) -> Dataset:
    """Save the same pictures a little darker: files that nobody has seen, which look the same."""
    folder.mkdir()
    paths = []
    for name, path in zip(data.image_ids, data.paths, strict=True):
        pixels = np.asarray(Image.open(path), dtype=np.int64)
        Image.fromarray((pixels - by).clip(0, 255).astype(np.uint8)).save(folder / f"{name}.png")
        paths.append(str(folder / f"{name}.png"))
    return replace(data, paths=tuple(paths), image_ids=tuple(f"{name}.png" for name in data.image_ids))


def shifted(data: Dataset) -> Dataset:
    """Return the data with every box elsewhere."""
    boxes = np.where(
        data.boxes[:, :1] > 48, data.boxes - np.array([40, 0, 40, 0]), data.boxes + np.array([40, 0, 40, 0])
    )
    return replace(data, boxes=boxes.clip(0, 96))


@pytest.fixture
def held_out(tiny: Dataset, tmp_path: Path) -> Dataset:
    return darkened(tiny, tmp_path / "held-out", 8)


@pytest.fixture
def parent(tiny: Dataset, held_out: Dataset, tmp_path: Path) -> Run:
    """A run that finds the objects of its test images."""
    val = darkened(tiny, tmp_path / "val", 4)
    return ECHO.fit(tiny, val, held_out, name="parent", quiet=True)


@pytest.fixture
def new(tiny: Dataset, tmp_path: Path) -> Dataset:
    """Pictures like the test images with boxes elsewhere, and a class more."""
    misleading = shifted(darkened(tiny, tmp_path / "new", 9)).with_classes(["disc", "square", "star"])
    star = tiny_dataset(tmp_path / "stars", num_images=4, classes=("star",), seed=3).with_classes(misleading.classes)
    star = replace(star, image_ids=tuple(f"star-{name}" for name in star.image_ids))
    return Dataset.from_samples(misleading.classes, [*misleading, *star])


def test_what_is_forgotten_is_told(parent: Run, new: Dataset, held_out: Dataset) -> None:
    run = ECHO.fit(new, weights=parent, name="child", quiet=True)
    found = run.forgetting
    assert found is not None
    assert found.data == "test images of parent"
    assert found.images == len(held_out)
    assert list(found.classes) == ["disc", "square"]
    assert found.overall.objects == sum(change.objects for change in found.classes.values()) == len(held_out.boxes)
    assert found.overall.before == pytest.approx(parent.metrics["test/AP"])
    for which, model in (("before", parent), ("after", run)):
        with Predictor(model, score_threshold=SCORE_FLOOR) as predictor:
            scores = score(held_out, list(predictor.predict(held_out)), score_floor=SCORE_FLOOR)
        for name, change in found.classes.items():
            assert getattr(change, which) == pytest.approx(scores.per_class[name]["AP"])
    assert found.overall.before is not None and found.overall.after is not None
    assert found.overall.before > 0.9
    assert found.overall.after < 0.5
    assert found.overall.difference == found.overall.after - found.overall.before
    assert run.metrics["forgetting/AP_before"] == found.overall.before
    assert run.metrics["forgetting/AP_after"] == found.overall.after
    assert run.history[-1]["step"] == max(row["step"] for row in run.history)
    assert str(found).splitlines()[0] == f"forgetting on 8 test images of parent: AP {found.overall}"
    assert "forgetting of disc, square will be told on 8 test images of parent" in messages(run)
    trained, kept = channel(run, "train"), channel(run, "retention")
    assert run.model.seen()["train"] == sorted(digests(trained).union(*parent.model.seen().values()))
    assert not digests(kept) & set(run.model.seen()["train"]), "they were not trained on, so they are not seen"
    assert "retention" not in run.model.manifest.data


def test_images_trained_on_now_tell_nothing(parent: Run, held_out: Dataset, tiny: Dataset) -> None:
    run = ECHO.fit(held_out.take(range(3)), tiny, weights=parent, quiet=True)
    assert run.forgetting is not None
    assert run.forgetting.images == 5
    assert not digests(channel(run, "retention")) & digests(held_out.take(range(3)))


def test_images_validated_on_now_tell_nothing(parent: Run, held_out: Dataset, tiny: Dataset, tmp_path: Path) -> None:
    """The new run's weights are chosen by them."""
    run = ECHO.fit(tiny_dataset(tmp_path / "others", seed=9), held_out.take(range(3)), weights=parent, quiet=True)
    assert run.forgetting is not None
    assert run.forgetting.data == "test images of parent"
    assert run.forgetting.images == 5
    assert not digests(channel(run, "retention")) & digests(held_out.take(range(3)))


def test_validation_images_where_nothing_was_tested(tiny: Dataset, held_out: Dataset, new: Dataset) -> None:
    parent = ECHO.fit(tiny, held_out, name="parent", quiet=True)
    run = ECHO.fit(new, weights=parent, quiet=True)
    assert run.forgetting is not None
    assert run.forgetting.data == "validation images of parent"


def test_own_images_where_the_parent_has_none(parent: Run, new: Dataset, tmp_path: Path) -> None:
    """A model that came alone: what it knew is looked at on new images that show it."""
    model = shutil.copytree(parent.model.path, tmp_path / "alone")
    shutil.rmtree(parent.path)
    val = darkened(new, tmp_path / "val-of-new", 1)
    run = ECHO.fit(new, val, weights=model, quiet=True)
    assert run.forgetting is not None
    assert run.forgetting.data.startswith("validation images of this run that have a class of ")
    kept = channel(run, "retention")
    assert kept.classes == ("disc", "square")
    assert len(kept) == 7, "the image without objects and those with a star alone say nothing"
    assert (kept.boxes_per_image() > 0).all()


@pytest.mark.parametrize("gone", ["classes", "images"])
def test_no_table_says_why(gone: str, parent: Run, new: Dataset, tmp_path: Path) -> None:
    if gone == "classes":
        data = tiny_dataset(tmp_path / "others", classes=("star", "moon"))
        expected = "no forgetting table: .*parent/model knows none of the new classes"
    else:
        for image in (parent.path / "input/data/test/images").iterdir():
            image.unlink()
        for image in (parent.path / "input/data/validation/images").iterdir():
            image.unlink()
        data, expected = new, "no forgetting table: .*parent holds no images that it kept aside, and of disc, square"
    run = ECHO.fit(data.take(range(6)), data.take([0]), weights=parent)
    assert run.forgetting is None
    assert re.search(expected, messages(run)), messages(run)
    assert "retention" not in {path.name for path in (run.path / "input/data").iterdir()}


def test_scoring_that_fails_does_not_fail_the_run(parent: Run, new: Dataset, tiny: Dataset) -> None:
    run = ECHO.start(new, tiny, weights=parent, epochs=2, seconds_per_step=0.02, leash=True)
    image = next((run.workspace.channel("retention") / "images").iterdir())
    image.unlink()  # a hard link
    image.write_bytes(b"no picture")
    run.wait()
    assert run.status == "finished"
    assert run.forgetting is None
    assert re.search(f"no forgetting table: .*{re.escape(str(image))}", messages(run))
    assert evaluate(run, tiny, allow_seen=True)["AP"] >= 0


def test_numbers_that_are_none() -> None:
    change = APChange.between(float("nan"), 0.5, 0)
    assert (change.before, change.after, change.difference) == (None, 0.5, None)
    assert str(change) == "- -> 0.500"


@pytest.mark.parametrize(("share", "expected"), [(None, 2), (0.5, 6), ("0.4", 4), (0.99, 8)])
def test_replayed_images_join_the_new_ones(
    share: Any, expected: int, parent: Run, tiny: Dataset, tmp_path: Path
) -> None:
    new = tiny_dataset(tmp_path / "new", num_images=6, classes=("star", "disc"), seed=7)
    val = tiny_dataset(tmp_path / "val2", num_images=4, classes=("star", "disc"), seed=8)
    run = ECHO.fit(new, val, weights=parent, replay="parent", replay_share=share, quiet=True)
    train = channel(run, "train")
    assert run.job.classes == ["star", "disc", "square"], "the new data's classes first"
    assert len(train) == 6 + expected
    old = [image_id for image_id in train.image_ids if image_id.startswith("replay/")]
    assert len(old) == expected
    truth = {f"replay/{sample.image_id}": sample for sample in tiny}
    for sample in train:
        if sample.image_id in truth:
            assert sample.names == truth[sample.image_id].names
            np.testing.assert_array_equal(sample.boxes, truth[sample.image_id].boxes)
    boxes = sum(len(truth[name].boxes) for name in old)
    assert run.job.replayed == Replayed(source="parent", images=expected, boxes=boxes, available=8)
    assert run.model.manifest.replayed == run.job.replayed
    assert f"replay: {expected} of 8 images of parent join the 6 new ones" in messages(run)
    assert run.workspace.image_digests("train")[6:] == [file_sha256(Path(path)) for path in train.paths[6:]]
    assert digests(channel(run, "validation")) == digests(val)
    again = ECHO.fit(new, val, weights=parent, replay="parent", replay_share=share, quiet=True)
    assert channel(again, "train").image_ids == train.image_ids


def test_what_is_kept_aside_is_not_replayed(tiny: Dataset, held_out: Dataset, tmp_path: Path) -> None:
    """Neither what is validated or tested on, nor what forgetting is measured on, nor what is trained on anyway."""
    parent = ECHO.fit(tiny, name="parent", quiet=True)
    everything = write_dataset(tiny, tmp_path / "everything")
    kept = channel(parent, "test")
    known = [i for i, path in enumerate(tiny.paths) if file_sha256(Path(path)) not in digests(kept)]
    new = Dataset.from_samples(tiny.classes, [*held_out.take(range(3)), replace(tiny[known[0]], image_id="copy.jpg")])
    run = ECHO.fit(new, tiny.take(known[1:3]), weights=parent, replay=everything, replay_share=0.9, quiet=True)
    again = [i for i, name in enumerate(channel(run, "train").image_ids) if name.startswith("replay/")]
    replayed = digests(channel(run, "train").take(again))
    assert replayed == digests(tiny.take(known[3:]))
    assert run.job.replayed is not None
    assert run.job.replayed.source == str(everything)
    assert "are in this run already, or kept aside, and stay out" in messages(run)


def test_boxes_left_out_of_what_is_replayed_are_told(tiny: Dataset, held_out: Dataset) -> None:
    boxes = tiny.boxes.copy()
    boxes[0] = [10, 10, 10, 30]
    replay = replace(tiny, boxes=boxes)
    run = ECHO.fit(held_out, held_out, replay=replay, replay_share=0.9, on_invalid="drop", quiet=True)
    assert run.job.dropped == run.model.manifest.dropped == {"zero-area": 1}
    assert "replay: left out 1 boxes: zero-area" in messages(run)
    assert run.job.replayed is not None
    assert run.job.replayed.boxes == len(tiny.boxes) - 1


def test_splits_of_what_is_replayed(tiny: Dataset, held_out: Dataset, tmp_path: Path) -> None:
    split = replace(tiny, split_indices={"train": np.arange(3), "test": np.arange(3, 8)})
    path = write_dataset(split, tmp_path / "split", format="coco")
    for replay, expected in ((str(path), 3), (f"{path}:test", 5), (split, 3)):
        run = ECHO.fit(held_out, held_out, replay=replay, replay_share=0.9, quiet=True)
        assert run.job.replayed is not None
        assert run.job.replayed.available == expected


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"replay": "parent"}, UsageError, "replay=parent takes the training images of an earlier run"),
        ({"replay_share": 0.5}, UsageError, r"replay_share=0.5 \(from the call\) without replay="),
        ({"replay": "nowhere"}, Exception, "nowhere"),
        ({"replay": "DATA", "replay_share": 1}, InvalidValue, "replay_share=1"),
        ({"replay": "DATA", "replay_share": "half"}, InvalidValue, "replay_share='half'"),
        ({"replay": "DATA"}, UsageError, "nothing of a data set can be replayed"),
    ],
)
def test_replay_that_cannot_be(
    settings: dict[str, Any], kind: type[Exception], message: str, tiny: Dataset, tmp_path: Path
) -> None:
    given = {name: tiny if value == "DATA" else value for name, value in settings.items()}
    with pytest.raises(kind, match=message):
        ECHO.fit(tiny, tiny, **given)
    assert not (tmp_path / "runs").exists()


def test_parent_without_its_data(parent: Run, tiny: Dataset, tmp_path: Path) -> None:
    model = shutil.copytree(parent.model.path, tmp_path / "alone")
    with pytest.raises(UsageError, match="does not hold the images that .*alone was trained on; name the data set"):
        ECHO.fit(tiny, tiny, weights=model, replay="parent")
