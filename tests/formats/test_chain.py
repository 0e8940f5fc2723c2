"""All formats together: a chain through six of them, every one into every other, and what each step leaves behind."""

from __future__ import annotations

import hashlib
import os
import warnings
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

from detkit import Dataset, check, merge, plugins, read_dataset, write_dataset
from detkit.errors import DetkitWarning
from detkit.images import read_bytes
from detkit.testing import tiny_dataset

REAL = Path(os.environ.get("DETKIT_DATA", Path(__file__).parents[2].parent / "shared/data"))

CHAIN = ("coco", "recordio", "manifest", "jumpstart", "voc")
FORMATS = (
    "voc",
    "coco",
    "lst",
    "recordio",
    "manifest",
    "sagemaker-json",
    "jumpstart",
    "yolo",
    "sku110k",
    "deepdetect",
)
SINGLE_FILES = {
    "voc": (),  # a folder, always
    "coco": ("annotations.json", "annotations/train.json", "annotations/val.json"),
    "lst": ("train.lst", "val.lst"),
    "recordio": ("train.rec", "val.rec"),
    "manifest": ("output.manifest", "train.manifest", "val.manifest"),
    "sagemaker-json": (),
    "jumpstart": ("annotations.json",),
    "yolo": ("data.yaml",),
    "sku110k": ("annotations.csv", "annotations/annotations_train.csv", "annotations/annotations_val.csv"),
    "deepdetect": ("list.txt", "train.txt", "val.txt"),
}


def written(data: Dataset, folder: Path, name: str) -> tuple[Path, dict[str, int]]:
    """Write, and return with the folder what the warning says was left behind."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        write_dataset(data, folder, name)
    told = [str(warning.message) for warning in caught]
    if not told:
        return folder, {}
    assert [warning.category for warning in caught] == [DetkitWarning]
    head, _, listed = told[0].partition("left behind: ")
    assert head == f"{folder}: {name} does not carry everything this data has; "
    counts = (entry.rpartition(" (") for entry in listed.split(", "))
    return folder, {field: int(count.rstrip(")")) for field, _, count in counts}


def assert_only_lost(before: Dataset, after: Dataset, lost: set[str]) -> None:
    """Compare every field that is not said to be lost."""
    assert len(after) == len(before)
    for one, other in zip(before.paths, after.paths, strict=True):
        assert read_bytes(one) == read_bytes(other)
    assert np.array_equal(after.sizes, before.sizes)
    assert np.array_equal(after.offsets, before.offsets)
    assert np.array_equal(after.boxes, before.boxes)
    assert after.boxes.dtype == np.float64
    assert [sample.names for sample in after] == [sample.names for sample in before]
    assert after.classes == before.classes
    if "file names" not in lost:
        assert after.image_ids == before.image_ids
    for field in ("difficult", "crowd", "area"):
        assert field in lost or np.array_equal(getattr(after, field), getattr(before, field)), field
    assert "masks" in lost or after.masks == before.masks
    for field in ("extra", "box_extra"):
        rows = [{k: v for k, v in extra.items() if k not in lost} for extra in getattr(before, field) or ()]
        assert list(getattr(after, field) or [{} for _ in rows]) == rows, field
    splits = {} if "splits" in lost else before.split_indices
    assert {k: list(v) for k, v in after.split_indices.items()} == {k: list(v) for k, v in splits.items()}


def steel(folder: Path) -> Path:
    """A VOC folder of the same kind as NEU-DET: difficult, truncated and pose, folders named anyhow."""
    data = tiny_dataset(folder / "pictures", num_images=9, classes=("scratches", "inclusion", "rolled-in_scale"))[:8]
    n = len(data.boxes)
    data = replace(
        data,
        image_ids=tuple(f"{data[i].names[0]}_{i:02}{Path(data.paths[i]).suffix}" for i in range(len(data))),
        difficult=np.arange(n) % 4 == 1,
        box_extra=tuple({"pose": ("Unspecified", "Left")[i % 2], "truncated": str(i % 3 % 2)} for i in range(n)),
    )
    with pytest.warns(DetkitWarning, match=r"left behind: class order \(3\)$"):
        write_dataset(data, folder / "steel", "voc")
    (folder / "steel/JPEGImages").rename(folder / "steel/IMAGES")
    (folder / "steel/Annotations").rename(folder / "steel/ANNOTATIONS")
    return folder / "steel"


@pytest.mark.parametrize("source", ["generated", "neu-det"])
def test_chain(source: str, tmp_path: Path) -> None:
    if source == "neu-det" and not (REAL / source).is_dir():
        pytest.skip("NEU-DET is not here")
    start = data = read_dataset(steel(tmp_path) if source == "generated" else REAL / source)
    difficult = int(data.difficult.sum())
    assert difficult
    n = len(data.boxes)
    expected: dict[str, dict[str, int]] = {name: {} for name in CHAIN}
    expected["recordio"] = {"file names": len(data), "difficult": difficult, "pose": n, "truncated": n}
    for name in CHAIN:
        assert plugins.formats()[name].not_carried(data) == expected[name]
        folder, told = written(data, tmp_path / name, name)
        assert told == expected[name]
        after = read_dataset(folder)
        assert_only_lost(data, after, set(expected[name]))
        data = after
    assert_only_lost(start, data, set(expected["recordio"]))
    assert not data.difficult.any()
    assert data.box_extra is None


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Seven pictures, each with a box; whole pixels, borders touched."""
    data = tiny_dataset(tmp_path_factory.mktemp("small") / "pictures", classes=("disc", "a square", "Ünïcode"))[:7]
    boxes = np.array(data.boxes)
    boxes[0], boxes[3] = (0, 0, 96, 96), (95, 0, 96, 95)
    return replace(data, boxes=boxes, area=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))


@pytest.fixture(scope="module")
def folders(small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("formats")
    return {name: written(small, root / name, name)[0] for name in FORMATS}


@pytest.fixture(scope="module")
def split_folders(small: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("split")
    data = replace(small, split_indices={"train": np.arange(5), "val": np.arange(5, 7)})
    return {name: written(data, root / name, name)[0] for name in FORMATS}


def content(data: Dataset) -> dict[str, Any]:
    """What every format carries: the images' bytes, and on each the names and boxes in their order."""
    return {
        hashlib.sha256(read_bytes(sample.path)).hexdigest(): (sample.names, sample.boxes.tolist()) for sample in data
    }


def test_all_formats_are_here() -> None:
    assert set(FORMATS) <= set(plugins.formats())


@pytest.mark.parametrize(("one", "other"), list(permutations(FORMATS, 2)), ids="-".join)
def test_every_format_into_every_other(
    one: str, other: str, small: Dataset, folders: dict[str, Path], tmp_path: Path
) -> None:
    data = read_dataset(folders[one])
    lost = plugins.formats()[other].not_carried(data)
    unsorted = {"class order"} if other in {"voc", "sku110k"} and data.classes != tuple(sorted(data.classes)) else set()
    assert set(lost) - {"file names"} == unsorted, "a small plain set has nothing else to lose"
    folder, told = written(data, tmp_path / "out", other)
    assert told == lost
    back = read_dataset(folder)
    assert content(back) == content(small)
    assert set(back.classes) == set(small.classes)
    assert back.image_ids == data.image_ids or "file names" in lost
    assert [str(finding) for finding in check(folder) if finding.severity == "error"] == []


@pytest.mark.parametrize("name", FORMATS)
def test_splits_go_through_every_format(name: str, split_folders: dict[str, Path], small: Dataset) -> None:
    if "split_indices" not in plugins.formats()[name].carries:
        assert not read_dataset(split_folders[name]).splits
        return
    back = read_dataset(split_folders[name])
    assert content(back.splits["train"]) == content(small[:5])
    assert content(back.splits["val"]) == content(small[5:])


def claims(path: Path) -> list[str]:
    return [name for name, known in plugins.formats().items() if name in FORMATS and known.sniff(path)]


@pytest.mark.parametrize("split", [False, True], ids=["whole", "split"])
@pytest.mark.parametrize("name", FORMATS)
def test_one_format_claims_each_path(
    name: str, split: bool, folders: dict[str, Path], split_folders: dict[str, Path]
) -> None:
    folder = (split_folders if split else folders)[name]
    assert claims(folder) == [name]
    single = {folder / file for file in SINGLE_FILES[name] if (folder / file).is_file()}
    assert bool(single) == bool(SINGLE_FILES[name])
    for path in sorted(folder.rglob("*")):
        if path in single:
            assert claims(path) == [name]
            assert len(read_dataset(path)) in {2, 5, 7}
        else:
            assert len(claims(path)) < 2, path


def coco_of_all_kinds(root: Path) -> dict[str, Any]:
    """String ids, gaps, no order; crowds in RLE, polygons, both and neither; further keys everywhere."""
    (root / "images/sub").mkdir(parents=True)
    for i, name in enumerate(("b.png", "sub/a.png", "c.png")):
        Image.new("RGB", (40 + i, 30), (i * 80, 9, 9)).save(root / "images" / name)
    content: dict[str, Any] = {
        "info": {"year": 2020, "version": "1.0", "contributors": ["a", {"b": [None, 1.5, True]}]},
        "licenses": [{"id": 1, "name": "none"}],
        "type": "instances",
        "images": [
            {"id": "x9", "file_name": "b.png", "width": 40, "height": 30, "license": 1, "tags": ["a", {"b": None}]},
            {"id": "x2", "file_name": "sub/a.png", "width": 41, "height": 30, "date_captured": "2020-01-01"},
            {"id": "x5", "file_name": "c.png", "width": 42, "height": 30},  # nothing is on it
        ],
        "categories": [
            {"id": 90, "name": "zebra", "supercategory": "animal"},
            {"id": 3, "name": "unused"},
            {"id": 17, "name": "ant", "supercategory": "", "keypoints": ["head", "tail"], "skeleton": [[1, 2]]},
        ],
        "annotations": [
            {
                "id": 700,
                "image_id": "x9",
                "category_id": 17,
                "bbox": [0.125, 1, 10.5, 20],
                "area": 99.75,
                "iscrowd": 0,
                "segmentation": [[0.125, 1, 10.625, 1, 10.625, 21]],
                "score": 0.5,
                "attributes": {"occluded": True, "ids": [1, 2]},
            },
            {
                "id": 3,
                "image_id": "x9",
                "category_id": 90,
                "bbox": [0, 0, 40, 30],
                "area": 600,
                "iscrowd": 1,
                "segmentation": {"size": [30, 40], "counts": [0, 600, 600]},
            },
            {
                "id": 5,
                "image_id": "x2",
                "category_id": 90,
                "bbox": [1, 2, 3, 4],
                "area": 12,
                "iscrowd": 1,
                "segmentation": {"size": [30, 41], "counts": "PPYo0"},
                "difficult": 1,
            },
            {"id": 6, "image_id": "x2", "category_id": 90, "bbox": [5, 6, 7, 8], "area": 56, "iscrowd": 0},
            {
                "id": 4,
                "image_id": "x9",
                "category_id": 17,
                "bbox": [3.07, 5.93, 28.65, 18.123456789],
                "area": 70.00495,
                "iscrowd": 0,
                "segmentation": [],
                "keypoints": [1, 2, 2, 0, 0, 0],
                "num_keypoints": 1,
            },
        ],
    }
    (root / "annotations.json").write_bytes(msgspec.json.encode(content))
    return content


def test_coco_keeps_every_field(tmp_path: Path) -> None:
    original = coco_of_all_kinds(tmp_path / "in")
    data = read_dataset(tmp_path / "in")
    assert plugins.formats()["coco"].not_carried(data) == {}
    folder, told = written(data, tmp_path / "out", "coco")
    assert told == {}
    assert_only_lost(data, read_dataset(folder), set())

    assert msgspec.json.decode((folder / "annotations.json").read_bytes()) == original
    twice, _ = written(read_dataset(folder), tmp_path / "again", "coco")
    assert (twice / "annotations.json").read_bytes() == (folder / "annotations.json").read_bytes()


@pytest.mark.parametrize(
    ("images", "categories", "boxes"), [(7, -3, 40), ("p", "c", "b"), (0, 0, 0), (1, 1, 1), (2**60, 5, "2")]
)
def test_coco_keeps_every_id(tmp_path: Path, images: int | str, categories: int | str, boxes: int | str) -> None:
    """Numbers, negative ones among them, and text; in any order."""
    original = coco_of_all_kinds(tmp_path / "in")

    def renumber(table: str, first: int | str, *references: str) -> None:
        other = {
            r["id"]: (i * 3 + first if isinstance(first, int) else first * (i + 1))
            for i, r in enumerate(original[table])
        }
        for record in original[table]:
            record["id"] = other[record["id"]]
        for box, reference in product(original["annotations"], references):
            box[reference] = other[box[reference]]

    renumber("images", images, "image_id")
    renumber("categories", categories, "category_id")
    renumber("annotations", boxes)
    (tmp_path / "in/annotations.json").write_bytes(msgspec.json.encode(original))
    folder, told = written(read_dataset(tmp_path / "in"), tmp_path / "out", "coco")
    assert told == {}
    assert msgspec.json.decode((folder / "annotations.json").read_bytes()) == original


def test_coco_splits_keep_what_each_file_says(tmp_path: Path) -> None:
    """Files of splits whose headings differ, and whose ids are their own."""
    original = coco_of_all_kinds(tmp_path / "in")
    (tmp_path / "in/annotations.json").unlink()
    (tmp_path / "in/annotations").mkdir()
    files = {}
    for split, image in (("train", 0), ("val", 1)):
        kept = original["images"][image]
        files[split] = {
            **original,
            "info": {"description": split},
            "images": [kept],
            "annotations": [box for box in original["annotations"] if box["image_id"] == kept["id"]],
        }
        (tmp_path / f"in/annotations/{split}.json").write_bytes(msgspec.json.encode(files[split]))
    data = read_dataset(tmp_path / "in")
    folder, told = written(data, tmp_path / "out", "coco")
    assert told == {}
    assert {f.stem: msgspec.json.decode(f.read_bytes()) for f in (folder / "annotations").iterdir()} == files
    one = data.take(range(2))
    with pytest.warns(DetkitWarning, match=r"coco: left behind: 'info' of .*val\.json, which another file contradicts"):
        write_dataset(one, tmp_path / "one", "coco")
    written(data.splits["val"], tmp_path / "val", "coco")
    assert msgspec.json.decode((tmp_path / "val/annotations.json").read_bytes()) == files["val"]


def test_what_coco_says_beside_the_boxes_is_told_by_others(tmp_path: Path) -> None:
    coco_of_all_kinds(tmp_path / "in")
    data = read_dataset(tmp_path / "in")
    _, told = written(data, tmp_path / "out", "voc")
    beside = {"info": 1, "licenses": 1, "type": 1, "supercategory": 2, "skeleton": 1, "ids": 3 + 3 + 5}
    assert {**beside, "order of categories": 1}.items() <= told.items()


def test_merged_ids_that_clash_are_numbered_anew(tmp_path: Path) -> None:
    coco_of_all_kinds(tmp_path / "in")
    data = read_dataset(tmp_path / "in")
    both = merge([data, data], prefixes=["a", "b"])
    with pytest.warns(DetkitWarning, match="the ids of images, .*; the ids of annotations, "):
        folder = write_dataset(both, tmp_path / "out", "coco")
    back = msgspec.json.decode((Path(folder) / "annotations.json").read_bytes())
    assert [image["id"] for image in back["images"]] == list(range(1, 7))
    assert [box["id"] for box in back["annotations"]] == list(range(1, 11))
    assert read_dataset(folder).boxes.tolist() == both.boxes.tolist()


def voc_year(root: Path, year: int) -> Dataset:
    """A folder as the VOC challenge of a year has it, with its four lists."""
    pictures = tiny_dataset(
        root / f"pictures-{year}", num_images=7, classes=("cat", "dog") if year == 2007 else ("dog", "tv"), seed=year
    )[:6]
    data = replace(
        pictures,
        image_ids=tuple(f"{year}_{i:06}{Path(path).suffix}" for i, path in enumerate(pictures.paths)),
        split_indices={
            "test": np.array([4, 5]),
            "train": np.array([0, 1]),
            "trainval": np.arange(4),
            "val": np.array([2, 3]),
        },
    )  # fmt: skip
    write_dataset(data, root / f"VOC{year}", "voc")
    return read_dataset(root / f"VOC{year}")


@pytest.mark.parametrize("name", ["voc", "coco", "yolo", "manifest"])
def test_two_years_of_voc_become_one(name: str, tmp_path: Path) -> None:
    years = [voc_year(tmp_path, 2007), voc_year(tmp_path, 2012)]
    both = merge(years)
    assert both.classes == ("cat", "dog", "tv")
    folder, told = written(both, tmp_path / "both", name)
    assert told == {}
    back = read_dataset(folder)
    assert set(back.splits) == {"test", "train", "trainval", "val"}
    assert content(back) == {**content(years[0]), **content(years[1])}
    for split in back.splits:
        assert content(back.splits[split]) == {**content(years[0].splits[split]), **content(years[1].splits[split])}
        assert set(back.splits[split].image_ids) == {i for year in years for i in year.splits[split].image_ids}
