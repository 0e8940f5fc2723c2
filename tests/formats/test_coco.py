"""COCO JSON: the conformance suite, ids of every kind, and what real files get wrong."""

from __future__ import annotations

import json
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO

from detkit import merge, plugins, read_dataset, remap, write_dataset
from detkit.boxes import xywh_to_xyxy, xyxy_to_xywh
from detkit.data import Dataset, Sample
from detkit.errors import DetkitWarning, InvalidData
from detkit.formats.coco import to_coco, written_ids
from detkit.formats.findings import count_codes
from detkit.formats.parallel import Helper
from detkit.testing import FormatTests, tiny_dataset

if TYPE_CHECKING:
    from collections.abc import Callable

Document = dict[str, Any]


class TestConformance(FormatTests):
    format_name = "coco"


def document() -> Document:
    """Two pictures of 40 x 30 pixels, the second without a box."""
    return {
        "images": [
            {"id": 1, "file_name": "a.jpg", "width": 40, "height": 30},
            {"id": 2, "file_name": "b.jpg", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 10, 12], "area": 99, "iscrowd": 0},
            {"id": 2, "image_id": 1, "category_id": 2, "bbox": [0, 0, 40, 30], "iscrowd": 1},
        ],
        "categories": [{"id": 1, "name": "disc"}, {"id": 2, "name": "square"}],
    }


def put(root: Path, content: Document | str, json_name: str = "annotations.json", images: str = "images") -> Path:
    """Write a JSON file with the pictures a.jpg and b.jpg beside it."""
    for name in ("a.jpg", "b.jpg"):
        (root / images).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / images / name)
    (root / json_name).parent.mkdir(parents=True, exist_ok=True)
    (root / json_name).write_text(content if isinstance(content, str) else json.dumps(content))
    return root


def problems(path: Path, **options: Any) -> tuple[dict[str, int], str]:
    with pytest.raises(InvalidData) as caught:
        read_dataset(path, "coco", **options)
    return count_codes(caught.value.findings), str(caught.value)


def test_plain(tmp_path: Path) -> None:
    data = read_dataset(put(tmp_path, document()))
    assert data.boxes.tolist() == [[1, 2, 11, 14], [0, 0, 40, 30]]
    assert data.area.tolist() == [99, 1200]
    assert data.crowd.tolist() == [False, True]
    assert data.boxes_per_image().tolist() == [2, 0]
    assert data.paths == (str(tmp_path / "images/a.jpg"), str(tmp_path / "images/b.jpg"))


IDS: dict[str, Callable[[int], int | str]] = {
    "from 0": lambda i: i,
    "from 1": lambda i: i + 1,
    "sparse": lambda i: i * 1_000_003 + 17,
    "falling": lambda i: 100 - i,
    "text": lambda i: f"id-{i}",
}


@pytest.mark.parametrize("images", IDS)
@pytest.mark.parametrize("categories", IDS)
def test_ids_of_any_kind(tmp_path: Path, images: str, categories: str) -> None:
    data = tiny_dataset(tmp_path / "images", classes=("disc", "square", "zebra", "unused"))
    content = to_coco(data)
    for image in content["images"]:
        image["id"] = IDS[images](image["id"])
    for category in content["categories"]:
        category["id"] = IDS[categories](category["id"])
    for annotation in content["annotations"]:
        annotation["image_id"] = IDS[images](annotation["image_id"])
        annotation["category_id"] = IDS[categories](annotation["category_id"])
    random.Random(0).shuffle(content["annotations"])
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    back = read_dataset(tmp_path)
    assert back.image_ids == data.image_ids
    assert sorted(back.classes) == sorted(data.classes)
    assert back.classes == (data.classes[::-1] if categories == "falling" else data.classes)
    for before, after in zip(data, back, strict=True):
        assert after.records is not None
        rows = sorted(zip(after.records.tolist(), after.names, after.boxes.tolist(), strict=True))
        assert sorted(zip(before.names, before.boxes.tolist(), strict=True)) == sorted(row[1:] for row in rows)
        for record, name, box in rows:
            annotation = content["annotations"][record]
            assert xyxy_to_xywh(np.array([box]))[0].tolist() == annotation["bbox"]
            assert IDS[categories](data.classes.index(name) + 1) == annotation["category_id"]


def test_pycocotools_opens_what_we_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    folder = write_dataset(data, tmp_path / "out", "coco")
    coco = COCO(folder / "annotations.json")
    assert [category["name"] for category in coco.loadCats(coco.getCatIds())] == list(data.classes)
    for i, sample in enumerate(data, start=1):
        found = coco.loadAnns(coco.getAnnIds(imgIds=[i]))
        assert [annotation["bbox"] for annotation in found] == xyxy_to_xywh(sample.boxes).tolist()
        assert all(isinstance(value, int) for annotation in found for value in annotation["bbox"])
        assert (folder / "images" / coco.imgs[i]["file_name"]).is_file()


def test_unknown_keys_stay(tmp_path: Path) -> None:
    content = document()
    content["images"][1]["weather"] = {"rain": [1, 2]}
    content["annotations"][0] |= {"score": 0.5, "segmentation": [[1, 2, 3, 4, 5, 6]], "difficult": 1}
    data = read_dataset(put(tmp_path / "in", content))
    assert data.extra == ({}, {"weather": {"rain": [1, 2]}})
    assert data.box_extra == ({"score": 0.5}, {})
    assert data.difficult.tolist() == [True, False]
    written = to_coco(data)
    assert written["images"] == content["images"]
    assert written["annotations"] == [content["annotations"][0], {**content["annotations"][1], "area": 1200}]
    assert read_dataset(write_dataset(data, tmp_path / "out")).box_extra == data.box_extra


def test_no_annotations_are_negatives(tmp_path: Path) -> None:
    content = document()
    del content["annotations"]
    data = read_dataset(put(tmp_path, content))
    assert (len(data), len(data.boxes), data.classes) == (2, 0, ("disc", "square"))
    content["annotations"] = None
    assert len(read_dataset(put(tmp_path, content)).boxes) == 0


def test_no_size(tmp_path: Path) -> None:
    content = document()
    del content["images"][0]["width"]
    content["images"][1]["height"] = None
    assert read_dataset(put(tmp_path, content)).sizes.tolist() == [[40, 30], [40, 30]]
    (tmp_path / "images/b.jpg").unlink()
    found, text = problems(tmp_path)
    assert found == {"missing-image": 1}
    assert "images[1] has no size" in text


@pytest.mark.parametrize("side", [0, -3, "40", None, 1e300, 10**30, float("inf"), float("nan"), [40]])
def test_a_size_that_is_none_comes_from_the_file(tmp_path: Path, side: object) -> None:
    content = document()
    content["images"][0]["width"] = side
    assert read_dataset(put(tmp_path, content)).sizes.tolist() == [[40, 30], [40, 30]]


def test_every_bad_record_is_told(tmp_path: Path) -> None:
    content = document()
    good = content["annotations"][0]
    changes: list[Document] = [
        {"bbox": None},
        {"bbox": [1, 2, 3]},
        {"bbox": [1, 2, 3, "4"]},
        {"bbox": [1, 2, 3, float("nan")]},
        {"bbox": [1, 2, 3, float("inf")]},
        {"image_id": 77},
        {"image_id": "1"},
        {"category_id": 9},
        {"category_id": None},
        {"id": 1},
        {"id": [1]},
    ]
    content["annotations"] += [{**good, "id": 100 + i, **change} for i, change in enumerate(changes)] + [7]
    found, text = problems(put(tmp_path, content))
    assert found == {
        "bad-box": 5,
        "unknown-image": 2,
        "bad-id": 2,
        "unknown-category": 1,
        "duplicate-id": 1,
        "bad-record": 1,
    }
    assert "annotations[5]: 'bbox' is [1, 2, 3, nan]; expected [x, y, width, height] [bad-box]" in text
    assert len(text.splitlines()) < 15
    del content["annotations"][2:7]
    assert "annotations[3]: image_id '1' is the id of no image, only as a number" in problems(put(tmp_path, content))[1]


def test_negative_width_is_left_to_check(tmp_path: Path) -> None:
    content = document()
    content["annotations"][0]["bbox"] = [10, 10, -5, 5]
    assert read_dataset(put(tmp_path, content)).boxes[0].tolist() == [10, 10, 5, 15]


def test_bad_tables(tmp_path: Path) -> None:
    content = document()
    content["categories"].append({"id": 3, "name": "disc"})
    content["categories"].append({"id": 2, "name": "other"})
    content["categories"].append({"id": 5})
    content["images"].append({"id": 2, "file_name": "c.jpg", "width": 1, "height": 1})
    content["images"].append({"id": 4, "file_name": "a.jpg", "width": 1, "height": 1})
    content["images"].append({"id": 5})
    found, text = problems(put(tmp_path, content))
    assert found == {"duplicate-id": 2, "duplicate-name": 1, "no-name": 1, "duplicate-file-name": 1, "no-file-name": 1}
    assert "categories[2]: name 'disc' is there already, in categories[0]" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [1, 2', r"line 1, column \d+: not JSON"),
        ("", r"not JSON"),
        ('[{"image_id": 1}]', r"expected an object with 'images'"),
        ('{"images": {}, "categories": []}', r"'images' is {}; expected a list"),
        ('{"images": [], "categories": {}}', r"'categories' is {}; expected a list"),
        ('{"images": [NaN], "annotations": 3, "categories": {}}', r"expected an object, found nan"),
        ('{"images": [], "annotations": []}', r"no 'categories'.*JumpStart"),
        ('{"images": [], "annotations": {}, "categories": []}', r"'annotations' is {}; expected a list"),
    ],
)
def test_not_coco(tmp_path: Path, content: str, message: str) -> None:
    put(tmp_path, content)
    with pytest.raises(InvalidData, match=message):
        read_dataset(tmp_path / "annotations.json", "coco")


@pytest.mark.parametrize("name", ["../secret.jpg", "/secret.jpg", "a/../../secret.jpg", "..\\secret.jpg"])
def test_file_name_cannot_lead_out(tmp_path: Path, name: str) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.jpg")
    content = document()
    content["images"][0] = {"id": 1, "file_name": name}
    found, _ = problems(put(tmp_path / "set", content))
    assert found == {"outside-folder": 1}


@pytest.mark.parametrize(
    ("json_name", "images"),
    [
        ("annotations.json", "images"),
        ("annotations.json", "."),
        ("annotations/instances_val2017.json", "val2017"),
        ("annotations/instances_default.json", "images"),
        ("annotations/instances_default.json", "images/default"),
        ("instances.json", "JPEGImages"),
        ("train/_annotations.coco.json", "train"),
    ],
)
def test_images_are_found(tmp_path: Path, json_name: str, images: str) -> None:
    put(tmp_path, document(), json_name, images)
    for path in (tmp_path, tmp_path / json_name):
        data = read_dataset(path)
        assert all(Path(file).is_file() for file in data.paths)
        assert data.image_ids == ("a.jpg", "b.jpg")
        assert not data.split_indices


def test_images_elsewhere(tmp_path: Path) -> None:
    put(tmp_path, document(), images="far/away")
    data = read_dataset(tmp_path, images="far/away")
    assert all(Path(file).is_file() for file in data.paths)
    with pytest.raises(InvalidData, match=r"images='nowhere'\): there is no folder"):
        read_dataset(tmp_path, images="nowhere")


@pytest.mark.parametrize(
    ("names", "images", "splits"),
    [
        (("annotations/instances_train2017.json", "annotations/instances_val2017.json"), "{}2017", ("train", "val")),
        (("train.json", "test.json"), "images/{}", ("train", "test")),
        (("train/_annotations.coco.json", "valid/_annotations.coco.json"), "{}", ("train", "valid")),
    ],
)
def test_files_become_splits(tmp_path: Path, names: tuple[str, str], images: str, splits: tuple[str, str]) -> None:
    other = document()
    other["categories"] = [{"id": 7, "name": "square"}, {"id": 8, "name": "zebra"}]
    other["annotations"] = [{"id": 1, "image_id": 2, "category_id": 7, "bbox": [0, 0, 9, 9]}]
    for name, content, split in zip(names, (document(), other), splits, strict=True):
        put(tmp_path, content, name, images.format(split))
    (tmp_path / "annotations").mkdir(exist_ok=True)
    (tmp_path / "annotations/captions_train2017.json").write_text('{"images": [], "annotations": []}')
    with pytest.warns(DetkitWarning, match=r"'id' of class 'square' is \d in .*, and \d before. the first counts"):
        data = read_dataset(tmp_path)
    assert sorted(data.classes) == ["disc", "square", "zebra"]
    first, second = (data.splits[split] for split in splits)
    assert [sample.names for sample in first] == [("disc", "square"), ()]
    assert [sample.names for sample in second] == [(), ("square",)]
    assert all(Path(path).is_file() for path in data.paths)
    assert second.image_ids[0] == f"{images.format(splits[1])}/a.jpg"


def test_one_image_annotated_in_two_ways(tmp_path: Path) -> None:
    changed = document()
    changed["annotations"].pop()
    put(tmp_path, document(), "annotations/train.json")
    put(tmp_path, changed, "annotations/val.json")
    with pytest.raises(InvalidData, match=r"val\.json: a\.jpg: its annotations differ from those in .*train\.json"):
        read_dataset(tmp_path)


def test_years_are_kept_where_they_tell_files_apart(tmp_path: Path) -> None:
    for year in ("2014", "2017"):
        put(tmp_path, document(), f"annotations/instances_train{year}.json", f"train{year}")
    data = read_dataset(tmp_path)
    assert {name: part.image_ids for name, part in data.splits.items()} == {
        f"instances_train{year}": (f"train{year}/a.jpg", f"train{year}/b.jpg") for year in ("2014", "2017")
    }
    assert all(Path(path).is_file() for path in data.paths)


def test_names_of_splits_come_back(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    splits = {"train2014": np.array([0, 1]), "train2017": np.array([2, 3])}
    back = read_dataset(write_dataset(replace(data, split_indices=splits), tmp_path / "out", "coco"))
    assert {name: len(part) for name, part in back.splits.items()} == {"train2014": 2, "train2017": 2}
    for name, message in {
        "a/b": "cannot be called 'a/b'",
        "instances_x": "read back as 'x'",
        "unsplit": "cannot be called",
    }.items():
        with pytest.raises(InvalidData, match=message):
            write_dataset(replace(data, split_indices={name: np.array([0])}), tmp_path / "none", "coco")


def test_every_detection_file_is_read(tmp_path: Path) -> None:
    put(tmp_path, document(), "annotations/instances_train2017.json", "train2017")
    put(tmp_path, document(), "annotations/val.json", "val")
    for other in ("captions_train2017", "person_keypoints_train2017", "image_info_test2017"):
        put(tmp_path, document(), f"annotations/{other}.json")
    data = read_dataset(tmp_path)
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 2, "val": 2}


def test_many_files_are_splits_and_labelme_is_none(tmp_path: Path) -> None:
    """A folder is not refused for its many files; which has one for each image is told by some of them."""
    for i in range(70):
        put(tmp_path / "coco", document(), f"annotations/part{i:02}.json")
    assert len(read_dataset(tmp_path / "coco").split_indices) == 70
    labelme = {"version": "5", "shapes": [], "imagePath": "a.jpg", "imageData": "AAAA" * 1000}
    for i in range(70):
        (tmp_path / "labelme").mkdir(exist_ok=True)
        (tmp_path / f"labelme/{i:03}.json").write_text(json.dumps(labelme))
    assert not plugins.formats()["coco"].sniff(tmp_path / "labelme")
    content = {**document(), "info": "x" * 5000}
    put(tmp_path / "labelme", content, "instances.json")
    assert len(read_dataset(tmp_path / "labelme")) == 2, "the largest is the one"


def test_empty_segmentations_stay(tmp_path: Path) -> None:
    """Many tools write one for each box; a table with nothing else is read without looking at each record."""
    content = document()
    content["annotations"] = [{**box, "area": 9, "segmentation": []} for box in content["annotations"]]
    data = read_dataset(put(tmp_path / "in", content))
    assert to_coco(data) == content
    assert plugins.formats()["voc"].not_carried(data) == {"crowd": 1, "area": 2}
    content["annotations"][1]["segmentation"] = [[0, 0, 9, 0, 9, 9]]
    assert to_coco(read_dataset(put(tmp_path / "in", content))) == content


@given(
    boxes=st.lists(st.tuples(*[st.integers(-(10**10), 10**13)] * 2, *[st.integers(0, 10**13)] * 2), max_size=6),
    decimals=st.integers(0, 9),
)
def test_decimals_come_back(boxes: list[tuple[int, int, int, int]], decimals: int) -> None:
    """Left and width become edges and width again; nine decimals of numbers below 10,000 are always the same."""
    xywh = np.array(boxes, dtype=np.float64).reshape(-1, 4) / 10.0**9
    xywh = np.round(xywh, decimals)
    sample = Sample(path="a.jpg", width=64, height=64, boxes=xywh_to_xyxy(xywh), names=("disc",) * len(boxes))
    content = to_coco(Dataset.from_samples(("disc",), [sample]))
    assert [annotation["bbox"] for annotation in content["annotations"]] == xywh.tolist()


def test_files_in_two_places_are_refused(tmp_path: Path) -> None:
    put(tmp_path, document())
    put(tmp_path, document(), "train/_annotations.coco.json", "train")
    with pytest.raises(InvalidData, match=r"2 places.*: annotations\.json; train/_annotations\.coco\.json\. name"):
        read_dataset(tmp_path)
    assert len(read_dataset(tmp_path / "train")) == len(read_dataset(tmp_path / "annotations.json")) == 2


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"iscrowd": "0"}, "bad-flag"),
        ({"difficult": [0]}, "bad-flag"),
        ({"area": "99"}, "bad-area"),
        ({"area": float("nan")}, "bad-area"),
        ({"area": 10**400, "more": 1}, "bad-area"),
        ({"area": -1}, "bad-area"),
        ({"area": -1, "more": 1}, "bad-area"),
        ({"iscrowd": True, "difficult": None, "area": None}, ""),
    ],
)
def test_flags_and_areas_are_numbers(tmp_path: Path, change: Document, code: str) -> None:
    content = document()
    content["annotations"][1] |= change
    put(tmp_path, content)
    if not code:
        assert read_dataset(tmp_path).crowd.tolist() == [False, True]
        return
    found, text = problems(tmp_path)
    assert found == {code: 1}
    assert "annotations[1]" in text


@pytest.mark.parametrize(("old", "new"), [("[1, 2, 10, 12]", "[1e400, 2, 10, 12]"), ('"width": 40', '"width": 1e400')])
def test_a_number_too_large(tmp_path: Path, old: str, new: str) -> None:
    found, text = problems(put(tmp_path, json.dumps(document()).replace(old, new, 1)))
    assert found == {"malformed": 1}
    assert "out of range" in text


@given(
    boxes=st.lists(
        st.tuples(*[st.integers(-5, 50)] * 2, *[st.integers(1, 50)] * 2),
        max_size=5,
    ),
    fraction=st.sampled_from([1.0, 0.5, 0.25]),
)
def test_to_coco_keeps_boxes(boxes: list[tuple[int, int, int, int]], fraction: float) -> None:
    xyxy = np.array([(x, y, x + w, y + h) for x, y, w, h in boxes], dtype=np.float64).reshape(-1, 4) * fraction
    sample = Sample(path="a.jpg", width=64, height=64, boxes=xyxy, names=("disc",) * len(boxes))
    content = to_coco(Dataset.from_samples(("disc",), [sample]))
    back = np.array([annotation["bbox"] for annotation in content["annotations"]]).reshape(-1, 4)
    assert np.array_equal(back, xyxy_to_xywh(xyxy))


def many(count: int) -> Document:
    """Two pictures with so many boxes in all, in no order."""
    content = document()
    content["annotations"] = [
        {"id": i + 5, "image_id": 1 + i * 7 % 2, "category_id": 1 + i % 2, "bbox": [i % 30, i / 7 % 20, 5, i % 9 + 0.5]}
        for i in range(count)
    ]
    return content


@pytest.mark.parametrize("piece", [1, 50, 500, 5000, 1 << 20])
@pytest.mark.parametrize("indent", [None, 1])
def test_pieces_join_without_a_seam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int, indent: int | None
) -> None:
    """Cuts that fall within a record are found out, whatever it holds."""
    content = many(60)
    content["annotations"][7]["attributes"] = [{"a": 1}, {"b": "}, {"}, {"c": [{}, {}]}]
    content["annotations"][8]["note"] = '}, {"id": 3}], \\" }, {' * 5
    content["annotations"][30]["score"] = 0.25
    content["annotations"][40]["segmentation"] = {"counts": "a},{b", "size": [30, 40]}
    content["images"][0]["camera"] = [{"x": 1}, {"y": "},{"}]
    put(tmp_path, json.dumps(content, indent=indent))
    whole = read_dataset(tmp_path)
    monkeypatch.setattr("detkit.formats.cocoscan.PIECE", piece)
    data = read_dataset(tmp_path)
    assert data.digest() == whole.digest()
    for column in ("extra", "box_extra", "masks", "image_ids"):
        assert getattr(data, column) == getattr(whole, column)
    assert data.records.tolist() == whole.records.tolist() == [*range(0, 60, 2), *range(1, 60, 2)]
    assert data.box_extra is not None
    by_record = dict(zip(data.records.tolist(), data.box_extra, strict=True))
    assert {i for i, extra in by_record.items() if extra} == {7, 8, 30}
    assert by_record[7]["attributes"] == content["annotations"][7]["attributes"]


@pytest.mark.parametrize("piece", [1, 500, 1 << 20])
def test_findings_have_the_record_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    monkeypatch.setattr("detkit.formats.cocoscan.PIECE", piece)
    content = many(60)
    for i, change in {
        3: {"bbox": None},
        20: {"image_id": 9},
        33: {"id": 5},
        41: {"iscrowd": "0"},
        50: {"area": -1},
        55: {"image_id": "1"},
    }.items():
        content["annotations"][i] |= change
    content["annotations"][59] = 7
    put(tmp_path, content)
    with pytest.raises(InvalidData) as caught:
        read_dataset(tmp_path)
    assert {(finding.code, finding.record) for finding in caught.value.findings} == {
        ("bad-box", 3),
        ("unknown-image", 20),
        ("duplicate-id", 33),
        ("bad-flag", 41),
        ("bad-area", 50),
        ("unknown-image", 55),
        ("bad-record", 59),
    }


def test_cuts_in_the_wrong_place_cost_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every place where one might cut lies within one record; 50,000 attempts of 400 kB each would take minutes."""
    monkeypatch.setattr("detkit.formats.cocoscan.PIECE", 1)
    content = document()
    content["annotations"][0]["attributes"] = [{"a": 1}] * 50_000
    put(tmp_path, content)
    began = time.process_time()
    assert read_dataset(tmp_path).box_extra[0]["attributes"][-1] == {"a": 1}  # type: ignore[index]
    assert time.process_time() - began < 5


def odd(seed: int) -> Document:
    """A megabyte of boxes, most of them plain, with every kind of fault and what looks like the end of a record."""
    content = many(12_000)
    choose = random.Random(seed)
    changes: list[Document] = [
        {"bbox": None},
        {"bbox": [1, 2, 3, "4"]},
        {"image_id": 9},
        {"image_id": "1"},
        {"id": 5},
        {"id": 2**70},
        {"iscrowd": "0"},
        {"iscrowd": 1, "difficult": 1},
        {"area": -1},
        {"segmentation": []},
        {"segmentation": [[1, 2, 3, 4, 5, 6]]},
        {"score": 0.5},
        {"note": '}, {"id": 3}], \\" }, {' * 50},
        {"attributes": [{"a": 1}, {"b": "}, {"}, {"c": [{}, {}]}] * 5000},
    ]
    for change in changes:
        content["annotations"][choose.randrange(2000, 8000)] |= change
    content["annotations"][6000] |= changes[-1]  # where the second of two shares would begin
    return content


def outcome(path: Path) -> list[object]:
    """Everything that was read, and everything that is wrong with it."""
    with pytest.raises(InvalidData) as caught:
        read_dataset(path)
    data = caught.value.partial
    assert data is not None
    assert len(data.boxes) > 11_000
    return [
        caught.value.findings,
        data.digest(),
        data.records.tolist(),
        data.masks,
        data.box_extra,
        data.area.tolist(),
        data.difficult.tolist(),
    ]


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What helpers wrote, of which even a small file has some here."""
    given: list[bytes] = []
    answer = Helper.answer
    monkeypatch.setattr(Helper, "answer", lambda helper: given.append(answer(helper)) or given[-1])
    monkeypatch.setattr("detkit.formats.cococolumns._BYTES_PER_HELPER", 1 << 17)
    monkeypatch.setenv("DETKIT_WORKERS", "1")
    return given


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("seed", range(3))
def test_helpers_decode_what_one_process_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[bytes], seed: int, indent: int | None
) -> None:
    put(tmp_path, "\ufeff" * (seed == 1) + json.dumps(odd(seed), indent=indent))
    alone = outcome(tmp_path)
    assert len(alone[0]) == 7  # type: ignore[arg-type]
    assert not answers
    for workers in (2, 5):
        monkeypatch.setenv("DETKIT_WORKERS", str(workers))
        assert outcome(tmp_path) == alone
        assert len(answers) == workers - 1
        assert workers == 2 or len(answers[-1]) > 100_000
        answers.clear()


@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/false", "/bin/echo", "killed"])
def test_without_helpers_one_process_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answers: list[bytes], executable: str
) -> None:
    put(tmp_path, odd(0))
    alone = outcome(tmp_path)
    (tmp_path / "killed").write_text("#!/bin/sh\necho 12345678\nkill -9 $$\n")
    (tmp_path / "killed").chmod(0o755)
    monkeypatch.setenv("DETKIT_WORKERS", "3")
    monkeypatch.setattr("sys.executable", str(tmp_path / executable))
    assert outcome(tmp_path) == alone
    assert len(answers) == 2


@pytest.mark.usefixtures("answers")
def test_helpers_end_with_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path, many(12_000))
    monkeypatch.setenv("DETKIT_WORKERS", "3")

    asked: list[Helper] = []

    def interrupted(helper: Helper) -> bytes:
        asked.append(helper)
        raise KeyboardInterrupt

    monkeypatch.setattr(Helper, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_dataset(tmp_path)
    assert [helper._process.returncode is not None for helper in asked] == [True]  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("old", "new"), [('"disc"', '"\\ud800"'), ("99", "9" * 30), ('"a.jpg"', '"\xff.jpg"'), ('"iscrowd"', '"\xff"')]
)
def test_values_that_no_column_holds(tmp_path: Path, old: str, new: str) -> None:
    put(tmp_path, document())
    file = tmp_path / "annotations.json"
    file.write_bytes(file.read_text().replace(old, new, 1).encode("latin-1"))
    try:
        read_dataset(tmp_path)
    except InvalidData as error:
        assert count_codes(error.findings) == {"malformed": 1}


@pytest.mark.parametrize("key", ["images", "annotations"])
def test_ids_of_more_than_64_bits(tmp_path: Path, key: str) -> None:
    content = document()
    content[key][0]["id"] = 2**70
    if key == "images":
        for annotation in content["annotations"]:
            annotation["image_id"] = 2**70
    assert read_dataset(put(tmp_path, content)).boxes_per_image().tolist() == [2, 0]


def test_not_finite(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path)
    boxes = data.boxes.copy()
    boxes[2, 1] = np.inf
    with pytest.raises(InvalidData, match=r"00\d\.\w+: 1 box\(es\) are not finite"):
        to_coco(replace(data, boxes=boxes))


def of_split(split: str, first: int, boxes: int | str, count: int = 4) -> Document:
    """Pictures and boxes with ids from a number on; the boxes in another order than the pictures."""
    images = [{"id": first + i, "file_name": f"{split}{i}.jpg", "width": 40, "height": 30} for i in range(count)]
    annotations = [
        {
            "id": boxes + i if isinstance(boxes, int) else f"{boxes}{i}",
            "image_id": first + (i * 3 + 1) % count,
            "category_id": 1 + i % 2,
            "bbox": [i, 2, 10, 12],
            "area": 120,
            "iscrowd": 0,
        }
        for i in range(count)
    ]
    return {"images": images, "annotations": annotations, "categories": document()["categories"]}


def splits_of(root: Path, **files: Document) -> Dataset:
    for split, content in files.items():
        (root / "images").mkdir(parents=True, exist_ok=True)
        for image in content["images"]:
            Image.new("RGB", (40, 30)).save(root / "images" / image["file_name"])
        put(root, content, f"annotations/{split}.json")
    return read_dataset(root)


def back(data: Dataset, folder: Path) -> dict[str, Document]:
    write_dataset(data, folder, "coco")
    return {file.stem: json.loads(file.read_text()) for file in sorted(folder.rglob("*.json"))}


@pytest.mark.parametrize("boxes", [1, 5, 100, "text"])
def test_ids_of_splits_are_their_own(tmp_path: Path, boxes: int | str) -> None:
    files = {"train": of_split("t", 1, 1), "val": of_split("v", 5, boxes)}
    assert back(splits_of(tmp_path / "in", **files), tmp_path / "out") == files


def test_a_part_keeps_its_ids(tmp_path: Path) -> None:
    data = splits_of(tmp_path / "in", train=of_split("t", 1, 1), val=of_split("v", 5, 5))
    part = data.take([1, 2, 6]).keep_boxes(np.array([True, False, True]))
    (written,) = back(part, tmp_path / "part").values()
    assert [(image["id"], image["file_name"]) for image in written["images"]] == [
        (2, "t1.jpg"),
        (3, "t2.jpg"),
        (7, "v2.jpg"),
    ]
    assert [(box["id"], box["image_id"]) for box in written["annotations"]] == [(1, 2), (8, 7)]
    for dropped in (remap(data.splits["val"], {}, drop=["disc"]), remap(data.splits["val"], {"disc": "square"})):
        assert to_coco(dropped)["categories"] == [{"id": 2, "name": "square"}]
    one = read_dataset(tmp_path / "in/annotations/train.json")
    assert [image["id"] for image in to_coco(one.take([3, 1]))["images"]] == [4, 2]
    with pytest.warns(DetkitWarning, match="the ids of images, .* twice; .*the ids of annotations, .* 1 to 8 now"):
        write_dataset(merge([one, one], prefixes=["a", "b"]), tmp_path / "twice", "coco")


def test_the_order_of_classes_counts_before_their_ids(tmp_path: Path) -> None:
    content = document()
    content["categories"] = [{"id": 7, "name": "disc"}, {"id": 9, "name": "square"}]
    for box, category in zip(content["annotations"], (7, 9), strict=True):
        box["category_id"] = category
    data = read_dataset(put(tmp_path, content))
    longer = data.with_classes(["disc", "square", "new"])
    assert [category["id"] for category in to_coco(longer)["categories"]] == [7, 9, 10]
    for classes in (["square", "disc"], ["new", "disc", "square"]):
        moved = data.with_classes(classes)
        with pytest.warns(DetkitWarning, match="the ids of categories, which do not rise with the classes; they are 1"):
            folder = write_dataset(moved, tmp_path / f"out{len(classes)}", "coco")
        assert read_dataset(folder).classes == moved.classes
    merged = remap(data, {"disc": "square"})
    assert to_coco(merged)["categories"] == [{"id": 9, "name": "square"}]


def test_records_without_an_id_get_the_next(tmp_path: Path) -> None:
    content = document()
    content["annotations"][1]["id"] = 1
    del content["annotations"][0]["id"]
    assert [box["id"] for box in to_coco(read_dataset(put(tmp_path, content)))["annotations"]] == [2, 1]


def test_what_a_file_without_images_says_is_told(tmp_path: Path) -> None:
    empty = {**of_split("v", 1, 1, count=0), "info": {"about": "nothing"}}
    data = splits_of(tmp_path / "in", train=of_split("t", 1, 1), val=empty)
    with pytest.warns(DetkitWarning, match=r"left behind: what .*val\.json says beside images and boxes"):
        write_dataset(data, tmp_path / "out", "coco")


def test_keys_of_any_name_stay(tmp_path: Path) -> None:
    content = {**document(), "order of categories": 5, "numbered": [1]}
    content["categories"] = content["categories"][::-1]
    content["annotations"] = [{**box, "area": 9} for box in content["annotations"]]
    data = read_dataset(put(tmp_path, content))
    assert to_coco(data) == content
    assert plugins.formats()["voc"].not_carried(data)["order of categories"] == 2


def test_written_ids_are_those_that_are_written(tmp_path: Path) -> None:
    data = splits_of(tmp_path / "in", train=of_split("t", 1, 1), val=of_split("v", 1, 1))
    image_ids, category_ids = written_ids(data)
    written = back(data, tmp_path / "out")
    listed = {image["file_name"]: image["id"] for content in written.values() for image in content["images"]}
    assert dict(zip(data.image_ids, image_ids, strict=True)) == listed
    assert category_ids == {"disc": 1, "square": 2}
    plain = tiny_dataset(tmp_path / "plain")
    plain = replace(plain, split_indices={"a": np.array([3, 1]), "b": np.array([1, 5])})
    assert written_ids(plain)[0] == [1, 2, 2, 1, 3, 2, *range(4, len(plain) - 2)]
