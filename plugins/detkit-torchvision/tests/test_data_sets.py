"""torchvision's own data set classes open what detkit writes."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CocoDetection, VOCDetection

from detkit import Dataset, write_dataset
from detkit.testing import tiny_dataset


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """JPEG only, as torchvision expects of VOC; two splits; an image of the second has no box."""
    drawn = tiny_dataset(tmp_path / "pictures", num_images=8)
    paths = []
    for path in map(Path, drawn.paths):
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"))
        paths.append(str(path.with_suffix(".jpg")))
    n = len(drawn.boxes)
    return replace(
        drawn,
        paths=tuple(paths),
        image_ids=tuple(Path(path).name for path in paths),
        difficult=np.arange(n) % 3 == 0,
        box_extra=({"pose": "Left", "truncated": "1"},) * n,
        split_indices={"train": np.array([0, 2, 4, 5]), "val": np.array([1, 3, 7])},
    )


def test_voc_detection(data: Dataset, tmp_path: Path) -> None:
    folder = write_dataset(data, tmp_path / "voc", "voc")
    (tmp_path / "root/VOCdevkit").mkdir(parents=True)
    (tmp_path / "root/VOCdevkit/VOC2012").symlink_to(folder)
    for split, expected in data.splits.items():
        opened = VOCDetection(str(tmp_path / "root"), year="2012", image_set=split)
        assert len(opened) == len(expected)
        for sample, (image, target) in zip(expected, opened, strict=True):
            annotation = target["annotation"]
            assert np.array_equal(np.asarray(image), sample.image())
            assert annotation["filename"] == sample.image_id
            assert {k: int(v) for k, v in annotation["size"].items()} == {
                "width": sample.width,
                "height": sample.height,
                "depth": 3,
            }
            objects = annotation.get("object", [])
            corners = [[int(one["bndbox"][key]) for key in ("xmin", "ymin", "xmax", "ymax")] for one in objects]
            assert np.array_equal(np.reshape(corners, (-1, 4)), sample.boxes + np.array([1, 1, 0, 0]))
            assert [one["name"] for one in objects] == list(sample.names)
            assert sample.difficult is not None
            assert [one["difficult"] == "1" for one in objects] == sample.difficult.tolist()
            assert all(one["pose"] == "Left" and one["truncated"] == "1" for one in objects)


def test_coco_detection(data: Dataset, tmp_path: Path) -> None:
    folder = write_dataset(data, tmp_path / "coco", "coco")
    for split, expected in data.splits.items():
        with contextlib.redirect_stdout(io.StringIO()):
            opened = CocoDetection(str(folder / "images"), str(folder / f"annotations/{split}.json"))
        names = {number: category["name"] for number, category in opened.coco.cats.items()}
        assert tuple(names[number] for number in sorted(names)) == data.classes
        assert len(opened) == len(expected)
        for sample, (image, found) in zip(expected, opened, strict=True):
            assert np.array_equal(np.asarray(image), sample.image())
            xywh = np.reshape([one["bbox"] for one in found], (-1, 4))
            assert np.array_equal(np.hstack([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]]), sample.boxes)
            assert [names[one["category_id"]] for one in found] == list(sample.names)
