"""SageMaker's image and JSON: the conformance suite, the folders, and what real files get wrong."""

from __future__ import annotations

import contextlib
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from detkit import read_dataset, write_dataset
from detkit.data import Dataset
from detkit.errors import DetkitWarning, InvalidData
from detkit.formats.findings import count_codes
from detkit.formats.sagemaker_json import FORMAT, SageMakerJsonOptions
from detkit.testing import FormatTests, tiny_dataset

Record = dict[str, Any]
DOG_CAT = [{"class_id": 0, "name": "dog"}, {"class_id": 1, "name": "cat"}]


class TestConformance(FormatTests):
    format_name = "sagemaker-json"


def record(name: str, *boxes: Any, **more: Any) -> Record:
    """One image of 40 x 30 pixels with a box of the class 0, or with others: (class_id, left, top, width, height)."""
    keys = ("class_id", "left", "top", "width", "height")
    return {
        "file": name,
        "image_size": [{"width": 40, "height": 30, "depth": 3}],
        "annotations": [dict(zip(keys, box, strict=True)) for box in boxes or [(0, 1, 2, 10, 12)]],
        "categories": DOG_CAT,
        **more,
    }


def put(
    root: Path,
    name: str,
    content: Record | str | None = None,
    *,
    images: str = "train",
    annotations: str = "",
    colour: int = 0,
) -> Path:
    """Write one picture, and its JSON file beside it."""
    picture = root / images / f"{name}.jpg"
    file = root / (annotations or f"{images}_annotation") / f"{name}.json"
    for path in (picture, file):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (colour, 0, 0)).save(picture)
    content = record(f"{name}.jpg") if content is None else content
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def problems(path: Path, **options: Any) -> tuple[dict[str, int], str]:
    with pytest.raises(InvalidData) as caught:
        read_dataset(path, "sagemaker-json", **options)
    return count_codes(caught.value.findings), str(caught.value)


def test_plain(tmp_path: Path) -> None:
    put(tmp_path, "sub/a", record("sub/a.jpg", (1, 1, 2, 10, 12), (0, 0.5, 0, 39.5, 30)))
    put(tmp_path, "b", record("b.jpg") | {"annotations": [], "weather": "rain"})
    data = read_dataset(tmp_path)
    assert (data.classes, data.image_ids) == (("dog", "cat"), ("b.jpg", "sub/a.jpg"))
    assert data[1].names == ("cat", "dog")
    assert data.boxes.tolist() == [[1, 2, 11, 14], [0.5, 0, 40, 30]]
    assert data.sizes.tolist() == [[40, 30]] * 2
    assert data.extra == ({"weather": "rain"}, {})
    assert not data.split_indices


def test_channels_are_splits(tmp_path: Path) -> None:
    put(tmp_path, "a")
    put(tmp_path, "b", images="validation")
    data = read_dataset(tmp_path)
    assert {name: part.image_ids for name, part in data.splits.items()} == {
        "train": ("a.jpg",),
        "validation": ("b.jpg",),
    }


def test_two_pictures_of_one_name(tmp_path: Path) -> None:
    put(tmp_path, "a", record("a.jpg", (0, 1, 1, 5, 5)))
    put(tmp_path, "a", record("a.jpg", (1, 2, 2, 5, 5)), images="validation", colour=200)
    data = read_dataset(tmp_path)
    assert data.image_ids == ("train/a.jpg", "validation/a.jpg")
    assert data.splits["validation"][0].names == ("cat",)
    put(tmp_path, "a", record("a.jpg", (1, 2, 2, 5, 5)), images="validation")
    assert problems(tmp_path)[0] == {"image-twice": 1}


@pytest.mark.parametrize(
    ("images", "annotations"),
    [("images", "annotations"), ("pictures", "json"), ("", "json"), ("train", "train_annotation")],
)
def test_one_pair_of_folders(tmp_path: Path, images: str, annotations: str) -> None:
    put(tmp_path, "a", images=images, annotations=annotations)
    (tmp_path / "other").mkdir()
    data = read_dataset(tmp_path)
    assert (data.image_ids, list(data.split_indices)) == (("a.jpg",), [])
    assert Path(data.paths[0]).is_file()


def test_categories_are_united_by_name(tmp_path: Path) -> None:
    put(tmp_path, "a", record("a.jpg", (5, 1, 2, 3, 4), categories=[{"class_id": 5, "name": "bone"}]))
    put(tmp_path, "b", record("b.jpg", (1, 1, 2, 3, 4)))
    put(tmp_path, "c", record("c.jpg", (5, 1, 2, 3, 4), categories=None))
    put(tmp_path, "d", record("d.jpg", (9, 1, 2, 3, 4), categories=[{"class_id": 9, "name": "dog"}]))
    data = read_dataset(tmp_path)
    assert data.classes == ("dog", "cat", "bone")
    assert [sample.names for sample in data] == [("bone",), ("cat",), ("bone",), ("dog",)]


def test_a_contradiction_names_both_files(tmp_path: Path) -> None:
    put(tmp_path, "a")
    file = put(tmp_path, "b", record("b.jpg", categories=[{"class_id": 0, "name": "cow"}]), images="validation")
    codes, text = problems(tmp_path)
    assert codes == {"class-contradiction": 1}
    assert f"{file}: categories[0]: class 0 is 'cow' here and 'dog' in {tmp_path}/train_annotation/a.json" in text


def test_names_are_never_invented(tmp_path: Path) -> None:
    bare = record("a.jpg", (1, 1, 2, 3, 4))
    del bare["categories"]
    put(tmp_path, "a", bare)
    assert "ids 0 to 1 occur" in problems(tmp_path)[1]
    assert read_dataset(tmp_path, classes=("dog", "cat", "cow")).classes == ("dog", "cat", "cow")
    codes, text = problems(tmp_path, classes=("dog",))
    assert codes == {"unknown-class": 1}
    assert "a.json: annotations[0]: class 1 has no name; those that have: 0" in text
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    assert read_dataset(tmp_path)[0].names == ("cat",)
    put(tmp_path, "a")
    assert problems(tmp_path, classes=("cow",))[0] == {"class-contradiction": 1}


def test_images_without_json(tmp_path: Path) -> None:
    put(tmp_path, "a")
    put(tmp_path, "b").unlink()
    assert problems(tmp_path)[0] == {"unannotated": 1}
    assert read_dataset(tmp_path, unannotated="ignore").image_ids == ("a.jpg",)
    data = read_dataset(tmp_path, unannotated="negatives")
    assert data.boxes_per_image().tolist() == [1, 0]
    assert data.sizes.tolist() == [[40, 30]] * 2


def test_a_file_called_unlike_its_image(tmp_path: Path) -> None:
    file = put(tmp_path, "a")
    file.rename(file.with_name("b.json"))
    with pytest.warns(DetkitWarning, match=r"1 JSON files are called unlike their image.*b\.json is about a\.jpg"):
        assert read_dataset(tmp_path).image_ids == ("a.jpg",)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    put(tmp_path, "good")
    put(tmp_path, "cut", '{"file": "cut.jpg",\n "annotations" []}')
    put(tmp_path, "list", "[]")
    put(tmp_path, "empty", "")
    put(tmp_path, "deep", "[" * 100_000)
    put(tmp_path, "nameless", record(""))
    put(tmp_path, "out", record("../secret.jpg"))
    put(tmp_path, "bmp", record("bmp.bmp"))
    boxes = ((0, float("nan"), 2, 3, 4), ("0", 1, 2, 3, 4), (1.0, 1, 2, 3, 4), (-1, 1, 2, 3, 4), (7, 1, 2, 3, 4))
    put(tmp_path, "boxes", record("boxes.jpg", *boxes))
    put(tmp_path, "none", record("none.jpg") | {"annotations": None})
    put(tmp_path, "kinds", record("kinds.jpg", categories=[7, {"class_id": "0", "name": "x"}, {"class_id": 3}]))
    put(tmp_path, "twice", record("good.jpg"))
    (tmp_path / "train/twice.jpg").unlink()
    with pytest.warns(DetkitWarning, match="unlike"):
        codes, _ = problems(tmp_path, unannotated="ignore")
    assert codes == {
        "malformed": 3,
        "bad-record": 2,
        "no-file-name": 1,
        "outside-folder": 1,
        "image-type": 1,
        "bad-box": 1,
        "bad-id": 5,
        "no-name": 1,
        "unknown-class": 1,
        "image-twice": 1,
    }
    with (
        pytest.raises(InvalidData, match=r"cut\.json: line 2, column 16: not JSON") as caught,
        pytest.warns(DetkitWarning),
    ):
        read_dataset(tmp_path, unannotated="ignore")
    assert any(finding.line == 2 and finding.column == 16 for finding in caught.value.findings)
    assert caught.value.partial is not None


def test_what_we_write(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures", classes=("disc", "square", "unused"))
    folder = write_dataset(replace(data, split_indices={"val": np.arange(8)}), tmp_path / "out", "sagemaker-json")
    assert sorted(path.name for path in folder.iterdir()) == ["unsplit", "unsplit_annotation", "val", "val_annotation"]
    assert read_dataset(folder).splits["val"].image_ids == data.image_ids
    folder = write_dataset(data, tmp_path / "whole", "sagemaker-json")
    found = json.loads((folder / "train_annotation/000.json").read_text())
    x0, y0, x1, y1 = data.boxes[0].astype(int).tolist()
    assert found == {
        "file": "000.jpg",
        "image_size": [{"width": 96, "height": 96, "depth": 3}],
        "annotations": [{"class_id": 0, "left": x0, "top": y0, "width": x1 - x0, "height": y1 - y0}],
        "categories": [{"class_id": i, "name": name} for i, name in enumerate(data.classes)],
    }
    assert (folder / "train/000.jpg").is_file()


def test_what_cannot_be_written(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    for ids, message in (
        (("x.jpg", "x.png"), "would share one JSON"),
        (("x.jpg", "y.bmp"), r"image 'y\.bmp'.*\.png only"),
    ):
        samples = [replace(data[i], image_id=image_id) for i, image_id in enumerate(ids)]
        with pytest.raises(InvalidData, match=message):
            write_dataset(Dataset.from_samples(data.classes, samples), tmp_path / "out", "sagemaker-json")
    with pytest.raises(InvalidData, match="cannot be called 'a_annotation'"):
        write_dataset(replace(data, split_indices={"a_annotation": np.arange(2)}), tmp_path / "out", "sagemaker-json")


@given(st.data())
def test_mutated_files_raise_only_our_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    file = put(folder, "a")
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(min_size=1, max_size=4))
    file.write_bytes(content)
    with contextlib.suppress(InvalidData), warnings.catch_warnings():
        warnings.simplefilter("ignore", DetkitWarning)
        FORMAT.read(folder, SageMakerJsonOptions())
