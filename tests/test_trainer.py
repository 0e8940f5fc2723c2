"""What `Trainer` does with data before anything starts, and what a finished run remembers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from PIL import Image

from detkit import Dataset, Model, Predictor, Run, Sample, Trainer, evaluate, read_dataset, write_dataset
from detkit.errors import (
    ClassMismatch,
    InvalidData,
    InvalidValue,
    MissingSettings,
    RunFailed,
    UnknownName,
    Unsupported,
    UsageError,
)
from detkit.testing import tiny_dataset
from detkit.testing.jobs import CATEGORY_IDS, write_coco

pytestmark = pytest.mark.usefixtures("clean")

QUICK = Trainer(model="echo/memory", epochs=1)


def losses(run: Run) -> list[tuple[float, float]]:
    return [(row["step"], row["train/loss"]) for row in run.history if "train/loss" in row]


def channel(run: Run, name: str) -> Dataset:
    data = run.workspace.dataset(name)
    assert data is not None
    return data


def messages(run: Run) -> str:
    return "\n".join(str(event.values["message"]) for event in run.events(follow=False) if event.kind == "log")


def test_unknown_parameter(tiny: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match=r"'learning_rte' *;? *did you mean 'learning_rate'"):
        QUICK.fit(tiny, tiny, learning_rte=1)
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_train_on() -> None:
    with pytest.raises(MissingSettings, match=r"(?s)1 setting\(s\) missing:\n  train: for example .*DETKIT_<NAME>"):
        QUICK.fit()


def test_data_from_the_constructor_and_from_paths(tmp_path: Path) -> None:
    folder = write_dataset(tiny_dataset(tmp_path / "images"), tmp_path / "data")
    run = Trainer(model="echo/memory", epochs=1, train=folder, val=str(folder)).fit(quiet=True)
    assert len(channel(run, "train")) == len(channel(run, "validation")) == 8


def test_holds_out_a_fifth_and_validates_on_a_sixth(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "images", num_images=50)
    runs = [QUICK.fit(data, seed=seed, quiet=True) for seed in (0, 0, 1)]
    parts = [{name: channel(run, name) for name in ("train", "validation", "test")} for run in runs]
    assert {name: len(part) for name, part in parts[0].items()} == {"train": 32, "validation": 8, "test": 10}
    assert "32 train, 8 validation, 10 test images, stratified by class, seed 0" in messages(runs[0])
    ids = [image_id for part in parts[0].values() for image_id in part.image_ids]
    assert sorted(ids) == sorted(data.image_ids)
    whole = np.array(list(data.boxes_per_class().values())) / len(data)
    for part in parts[0].values():
        share = np.array(list(part.boxes_per_class().values())) / len(part)
        assert np.abs(share - whole).max() < 0.15
    assert all(parts[0][name].image_ids == parts[1][name].image_ids for name in parts[0])
    assert parts[0]["test"].image_ids != parts[2]["test"].image_ids
    assert {"test/AP", "val/AP"} <= set(runs[0].metrics)


def test_too_few_to_hold_out(tiny: Dataset) -> None:
    with pytest.raises(UsageError, match=r"4 image\(s\) are too few to hold any out; give validation images"):
        QUICK.fit(tiny[:4])


def test_own_splits_are_kept(tiny: Dataset) -> None:
    splits = {"train": np.arange(5), "val": np.arange(5, 7), "test": np.array([7])}
    run = QUICK.fit(replace(tiny, split_indices=splits), quiet=True)
    assert channel(run, "train").image_ids == tiny.image_ids[:5]
    assert channel(run, "validation").image_ids == tiny.image_ids[5:7]
    assert channel(run, "test").image_ids == tiny.image_ids[7:]
    assert "the data's own splits: train (5), val (2), test (1)" in messages(run)


def test_own_splits_without_validation(tiny: Dataset) -> None:
    run = QUICK.fit(replace(tiny, split_indices={"trainval": np.arange(7), "test": np.array([7])}), quiet=True)
    assert len(channel(run, "train")) + len(channel(run, "validation")) == 7
    assert "held out for validation, seed 0" in messages(run)


def test_own_splits_without_train(tiny: Dataset) -> None:
    with pytest.raises(UsageError, match=r"has the splits night and none is called train.*data.splits\['"):
        QUICK.fit(replace(tiny, split_indices={"night": np.arange(4)}))


def test_data_without_validation(tiny: Dataset) -> None:
    run = QUICK.fit(tiny, test=tiny, quiet=True)
    assert run.workspace.dataset("validation") is None
    assert run.model.manifest.score_threshold is None
    assert "val/AP" not in run.metrics


def test_images_in_two_channels_are_told(tiny: Dataset) -> None:
    run = QUICK.fit(tiny[:6], tiny[4:], quiet=True)
    assert "warning: 2 images of validation are also in train" in messages(run)


def test_unknown_class_in_validation(tiny: Dataset, tmp_path: Path) -> None:
    other = replace(tiny, classes=("disc", "sqare"))
    with pytest.raises(ClassMismatch, match=r"validation data: .*unknown here: 'sqare'.* did you mean 'square'"):
        QUICK.fit(tiny, other, name="r")
    assert not (tmp_path / "runs").exists()


def test_validation_classes_in_another_order(tiny: Dataset) -> None:
    turned = tiny.with_classes(["square", "disc"])
    run = Trainer(model="echo/memory", epochs=6).fit(tiny, turned, quiet=True)
    assert channel(run, "validation").classes == tiny.classes
    assert run.metrics["val/AP50"] > 0.5


def test_empty_data(tiny: Dataset) -> None:
    with pytest.raises(InvalidData, match="no images"):
        QUICK.fit(tiny[:0], tiny)
    with pytest.raises(UsageError, match="the training images have no boxes"):
        QUICK.fit(tiny[7:], tiny)


def test_faulty_boxes(tiny: Dataset) -> None:
    boxes = tiny.boxes.copy()
    boxes[0, 2] = boxes[0, 0]
    faulty = replace(tiny, boxes=boxes)
    with pytest.raises(InvalidData, match=r"(?s)zero-area 1.*--on-invalid drop") as caught:
        QUICK.fit(faulty, tiny)
    assert [finding.code for finding in caught.value.findings] == ["zero-area"]
    run = QUICK.fit(faulty, tiny, on_invalid="drop", quiet=True)
    assert len(channel(run, "train").boxes) == len(tiny.boxes) - 1
    assert run.model.manifest.dropped == {"zero-area": 1}
    assert "train: left out 1 boxes: zero-area" in messages(run)
    with pytest.raises(InvalidValue, match=r"on_invalid='ignore'.*one of raise, drop"):
        QUICK.fit(faulty, tiny, on_invalid="ignore")


def test_faulty_images(tiny: Dataset, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "images")
    Path(data.paths[2]).unlink()
    with pytest.raises(InvalidData, match="missing-image 1") as caught:
        QUICK.fit(data, tiny, on_invalid="drop")
    assert data.paths[2] in str(caught.value)
    with pytest.raises(InvalidData, match="missing-image 2"):  # one error tells of every channel
        QUICK.fit(data, data)


def test_truncated_image(tmp_path: Path) -> None:
    """Its header is sound, so the worker finds out; the run fails and names it."""
    data = tiny_dataset(tmp_path / "images")
    file = Path(data.paths[0])
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(RunFailed, match=r"cannot read image .*000\.jpg: .*truncated"):
        QUICK.fit(data, data, quiet=True)


def test_size_that_disagrees(tiny: Dataset) -> None:
    sizes = tiny.sizes.copy()
    sizes[0] = (500, 300)
    with pytest.raises(InvalidData, match="the annotation says 500x300, the image is 96x96"):
        QUICK.fit(replace(tiny, sizes=sizes), tiny)


def test_device_that_is_not_there(tiny: Dataset) -> None:
    with pytest.raises(RunFailed, match=r"device='cuda': .* choose device=cpu"):
        QUICK.fit(tiny, tiny, device="cuda", quiet=True)


def test_max_detections_follow_the_data(tmp_path: Path) -> None:
    image = np.zeros((200, 200, 3), dtype=np.uint8)
    path = tmp_path / "crowded.png"
    Image.fromarray(image).save(path)
    corners = np.array([(2 * i, 2 * j) for i in range(10) for j in range(7)], dtype=np.float64)
    crowded = Sample(
        path=str(path), width=200, height=200, boxes=np.hstack([corners, corners + 50]), names=("pill",) * 70
    )
    data = Dataset.from_samples(["pill"], [crowded])
    assert QUICK.fit(data, data, quiet=True).model.manifest.max_detections == 140
    assert QUICK.fit(data, data, max_detections=30, quiet=True).model.manifest.max_detections == 30


def test_the_manifest_reproduces_the_run(tiny: Dataset) -> None:
    first = Trainer(model="echo/memory", epochs=3, learning_rate=0.2, seed=7).fit(tiny, tiny, quiet=True)
    manifest = Model(first.path / "model").manifest
    again = Trainer(model=f"{manifest.backend}/{manifest.model}", **manifest.params).fit(
        channel(first, "train"), channel(first, "validation"), quiet=True
    )
    assert losses(again) == losses(first)
    assert again.metrics == first.metrics
    assert again.model.manifest.data == manifest.data
    assert {n: a.sha256 for n, a in again.model.manifest.artifacts.items()} == {
        n: a.sha256 for n, a in manifest.artifacts.items()
    }
    other = Trainer(model="echo/memory", epochs=3, learning_rate=0.2, seed=8).fit(tiny, tiny, quiet=True)
    assert losses(other) != losses(first)


def test_incremental(tiny: Dataset) -> None:
    parent = Trainer(model="echo/memory", epochs=4).fit(tiny[:4], tiny, quiet=True)
    for weights in (parent, parent.model, str(parent.path), parent.path, parent.path / "model", parent.name):
        child = QUICK.fit(tiny[4:], tiny, weights=weights, quiet=True)
        assert child.model.manifest.weights.source.endswith("input/data/model")
        assert child.model.manifest.parent
    assert set(child.model.seen()["train"]) == set(parent.model.seen()["train"]) | set(
        child.workspace.image_digests("train")
    )
    assert child.model.manifest.params["weights"] == str((parent.path / "model").absolute())


@pytest.mark.parametrize("ids", CATEGORY_IDS)
def test_names_out_as_in(ids: str, tiny: Dataset, tmp_path: Path) -> None:
    """Whatever ids a COCO file gives its categories: through reading, training and predicting."""
    data = read_dataset(write_coco(tiny, tmp_path / "coco", ids))
    run = Trainer(model="echo/memory", epochs=8).fit(data, data, quiet=True)
    with Predictor(run) as predictor:
        assert [found.names for found in predictor.predict(tiny)][:7] == [sample.names for sample in tiny][:7]


def test_weights_that_are_nowhere(tiny: Dataset) -> None:
    with pytest.raises(UnknownName, match=r"no weights for echo/memory 'coko'.*the path of a file"):
        QUICK.fit(tiny, tiny, weights="coko")


def test_weights_of_another_model(tiny: Dataset, tmp_path: Path) -> None:
    run = QUICK.fit(tiny, tiny, quiet=True)
    file = run.path / "model/detkit.json"
    stranger = msgspec.json.decode(file.read_bytes())
    file.write_bytes(msgspec.json.encode({**stranger, "model": "elephant"}))
    with pytest.raises(UsageError, match="is a echo/elephant; training a echo/memory"):
        QUICK.fit(tiny, tiny, weights=run)


def test_newer_schema_is_refused(tiny: Dataset) -> None:
    run = QUICK.fit(tiny, tiny, quiet=True)
    file = run.path / "model/detkit.json"
    file.write_bytes(msgspec.json.encode({**msgspec.json.decode(file.read_bytes()), "schema": 99}))
    with pytest.raises(UsageError, match="has schema 99, this detkit knows up to 1; upgrade it"):
        _ = run.model


def test_export_is_declared(tiny: Dataset, tmp_path: Path) -> None:
    from detkit.backends import load_engine

    run = QUICK.fit(tiny, tiny, quiet=True)
    with pytest.raises(Unsupported, match="echo/memory cannot be exported to 'onnx'"):
        load_engine(run.model.manifest.engine).export(run.model, "onnx", tmp_path)


def test_first_lines_say_what_happens(tiny: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    QUICK.fit(tiny, tiny, name="r")
    out, err = capfd.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "model echo/memory"
    assert lines[1] == "run runs/r; the worker ends with this process"
    assert lines[-1].startswith("epoch 1  loss 0.")
    assert "val/AP50" in lines[-1]
    QUICK.fit(tiny, tiny, quiet=True)
    assert capfd.readouterr() == ("", "")


def test_brackets_are_shown_as_they_are(tiny: Dataset, capfd: pytest.CaptureFixture[str]) -> None:
    """Codes of findings stand in brackets, which the console would otherwise take for colours, or stumble over."""
    boxes = tiny.boxes.copy()
    boxes[0] = [-0.5, 0, 20, 20]
    data = replace(tiny, boxes=boxes, sources=("[/etc]",) * len(tiny))
    QUICK.fit(data, data)
    err = capfd.readouterr().err
    assert "[overhang]" in err
    assert "[/etc]" in err


def test_scores_of_the_end_are_those_of_evaluate(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=5).fit(tiny[:6], tiny[6:], quiet=True)
    scores = evaluate(run, tiny[6:], allow_seen=True)
    assert scores["AP"] == pytest.approx(run.metrics["val/AP"])
    assert scores["AP50"] == pytest.approx(run.metrics["val/AP50"])


def test_data_given_beside_splits(tiny: Dataset, tmp_path: Path) -> None:
    """Another test set takes the place of the data's own; the other splits stay what they are."""
    more = tiny_dataset(tmp_path / "more", num_images=3, seed=5)
    split = replace(
        tiny, split_indices={"train": np.array([0, 1, 2, 3]), "val": np.array([4, 5]), "test": np.array([6])}
    )
    run = QUICK.fit(split, test=more, quiet=True)
    assert [len(channel(run, name)) for name in ("train", "validation", "test")] == [4, 2, 3]


def test_copies_are_not_held_out(tiny: Dataset, tmp_path: Path) -> None:
    """An image that is there under several names is trained on or held out, not both."""
    twice = [replace(sample, image_id=f"{n}-{sample.image_id}") for n in range(6) for sample in tiny]
    run = QUICK.fit(Dataset.from_samples(tiny.classes, twice), quiet=True)
    seen = {name: set(run.workspace.image_digests(name)) for name in ("train", "validation", "test")}
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert "copies of others" in messages(run)


def test_what_the_parent_has_seen_is_told(tiny: Dataset, tmp_path: Path) -> None:
    """Also where the weights are named by the file of a finished model."""
    parent = QUICK.fit(tiny[:4], tiny[4:6], name="parent", quiet=True)
    fresh = tiny_dataset(tmp_path / "more", num_images=5, seed=5)
    for weights in (parent, parent.path / "model/memory.npz"):
        child = QUICK.fit(fresh, tiny[2:6], weights=weights, quiet=True)
        assert "4 images of validation are also in what" in messages(child)
        assert set(parent.workspace.image_digests("train")) <= set(child.model.seen()["train"])
