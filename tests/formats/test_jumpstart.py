"""JumpStart's annotations.json: the conformance suite, corners that are none, ids from 0 and from 1."""

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
from detkit.errors import DetkitWarning, InvalidData
from detkit.formats.coco import to_coco
from detkit.formats.findings import count_codes
from detkit.formats.jumpstart import FORMAT, JumpStartOptions
from detkit.testing import FormatTests, tiny_dataset

Document = dict[str, Any]


class TestConformance(FormatTests):
    format_name = "jumpstart"


def document(*annotations: tuple[Any, Any, Any]) -> Document:
    """Two pictures of 40 x 30 pixels, and annotations: (image_id, category_id, bbox)."""
    keys = ("image_id", "category_id", "bbox")
    return {
        "images": [
            {"file_name": "a.jpg", "height": 30, "width": 40, "id": 7},
            {"file_name": "b.jpg", "height": 30, "width": 40, "id": "b"},
        ],
        "annotations": [dict(zip(keys, annotation, strict=True)) for annotation in annotations],
    }


def put(root: Path, content: Document | str, classes: str = "dog\ncat\n", images: str = "images") -> Path:
    for name in ("a.jpg", "b.jpg"):
        (root / images).mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / images / name)
    (root / "annotations.json").write_text(content if isinstance(content, str) else json.dumps(content))
    if classes:
        (root / "classes.txt").write_text(classes)
    return root


def problems(path: Path, **options: Any) -> tuple[dict[str, int], str]:
    with pytest.raises(InvalidData) as caught:
        read_dataset(path, "jumpstart", **options)
    return count_codes(caught.value.findings), str(caught.value)


def test_boxes_are_corners(tmp_path: Path) -> None:
    content = document(("b", 1, [0, 0, 40, 30]), (7, 0, [1.5, 2, 11, 14]), ("b", 0, [3, 4, 5, 6]))
    content["images"][1]["license"] = content["annotations"][1]["area"] = 3
    data = read_dataset(put(tmp_path, content))
    assert data.boxes.tolist() == [[1.5, 2, 11, 14], [0, 0, 40, 30], [3, 4, 5, 6]]
    assert [sample.names for sample in data] == [("dog",), ("cat", "dog")]
    assert data.records.tolist() == [1, 0, 2]
    assert (data.extra, data.box_extra) == (({}, {"license": 3}), ({"area": 3}, {}, {}))
    assert data.paths == (f"{tmp_path}/images/a.jpg", f"{tmp_path}/images/b.jpg")


def test_names_are_never_invented(tmp_path: Path) -> None:
    put(tmp_path, document((7, 0, [1, 2, 11, 14]), (7, 1, [1, 2, 11, 14])), classes="")
    assert "ids 0 to 1 occur" in problems(tmp_path)[1]
    assert read_dataset(tmp_path, classes=("dog", "cat"))[0].names == ("dog", "cat")
    codes, text = problems(tmp_path, classes=("dog",))
    assert codes == {"unknown-class": 1}
    assert "class 1 has no name" in text


def test_ids_from_one(tmp_path: Path) -> None:
    put(tmp_path, document((7, 1, [1, 2, 11, 14]), (7, 2, [1, 2, 11, 14])))
    with pytest.warns(DetkitWarning, match=r"ids 1 to 2 occur for 2 class names, so they are taken as counted from 1"):
        assert read_dataset(tmp_path)[0].names == ("dog", "cat")
    assert read_dataset(tmp_path, first_id=1)[0].names == ("dog", "cat")
    assert problems(tmp_path, first_id=0)[0] == {"unknown-class": 1}


def test_ids_that_may_be_either(tmp_path: Path) -> None:
    put(tmp_path, document((7, 1, [1, 2, 11, 14])), classes="dog\ncat\ncow\n")
    with pytest.warns(
        DetkitWarning, match="taken as counted from 0; first_id=0 says so for good, first_id=1 the other"
    ):
        assert read_dataset(tmp_path)[0].names == ("cat",)
    assert read_dataset(tmp_path, first_id=1)[0].names == ("dog",)


def test_ids_that_fit_nothing(tmp_path: Path) -> None:
    put(tmp_path, document((7, 0, [1, 2, 11, 14]), (7, 2, [1, 2, 11, 14])))
    assert problems(tmp_path)[0] == {"unknown-class": 1}
    assert problems(tmp_path, first_id=1)[0] == {"unknown-class": 1}
    put(tmp_path, document((7, 17, [1, 2, 11, 14])))
    assert problems(tmp_path)[0] == {"unknown-class": 1}


def test_coco_boxes_are_refused(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "images")
    content = to_coco(data)
    del content["categories"]
    (tmp_path / "annotations.json").write_text(json.dumps(content))
    codes, text = problems(tmp_path, classes=data.classes, first_id=1)
    assert codes == {"not-corners": 1}
    assert "[x, y, width, height], which is COCO's. JumpStart wants [xmin, ymin, xmax, ymax]" in text
    with pytest.raises(InvalidData, match="--format jumpstart reads it"):
        read_dataset(tmp_path / "annotations.json", "coco")


def test_one_swapped_corner_is_no_coco(tmp_path: Path) -> None:
    boxes = [[30, 20, 25, 28], [20, 20, 39, 29], [25, 15, 40, 30]]
    data = read_dataset(put(tmp_path, document(*((7, 0, box) for box in boxes))))
    assert data.boxes.tolist() == boxes


def test_sniffing(tmp_path: Path) -> None:
    put(tmp_path, document())
    assert FORMAT.sniff(tmp_path)
    assert FORMAT.sniff(tmp_path / "annotations.json")
    (tmp_path / "annotations.json").write_text(json.dumps(document() | {"categories": []}))
    assert not FORMAT.sniff(tmp_path)
    assert problems(tmp_path)[0] == {"not-jumpstart": 1}
    (tmp_path / "annotations.json").write_text("")
    assert not FORMAT.sniff(tmp_path)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    box = [1, 2, 11, 14]
    content = document(
        (7, 0, box),
        (8, 0, box),
        (None, 0, box),
        ([], 0, box),
        (7, "0", box),
        (7, 0.0, box),
        (7, -1, box),
        (7, True, box),
        (7, 2**40, box),
        (7, 0, [1, 2, 3]),
        (7, 0, None),
        (7, 0, [1, 2, float("nan"), 3]),
        (7, 0, [1, "2", 3, 10**400]),
    )
    content["annotations"] += [3, {"image_id": 7, "category_id": 0, "bbox": box, "score": float("-inf")}]
    content["images"] += [
        {"id": 7, "file_name": "c.jpg"},
        {"id": 9, "file_name": "../c.jpg"},
        {"id": 10, "file_name": ""},
        {"id": None, "file_name": "c.jpg"},
        {"id": 11, "file_name": "a.jpg", "width": 4, "height": 4},
        {"id": 12, "file_name": "lost.jpg", "width": "wide"},
        "image",
    ]
    codes, _ = problems(put(tmp_path, content))
    assert codes == {
        "unknown-image": 3,
        "bad-id": 6,
        "bad-box": 4,
        "bad-record": 2,
        "non-finite": 1,
        "duplicate-id": 1,
        "outside-folder": 1,
        "no-file-name": 1,
        "image-twice": 1,
        "missing-image": 1,
    }
    with pytest.raises(InvalidData) as caught:
        read_dataset(tmp_path)
    told = [str(finding) for finding in caught.value.findings]
    assert any("annotations[11]: 'bbox' is [1, 2, nan, 3]; expected [xmin, ymin, xmax, ymax]" in text for text in told)
    assert any("annotations[14].score: -inf is no number" in text for text in told)
    assert caught.value.partial is not None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [],\n"annotations" [], "file_name": 1}', r"annotations\.json: line 2, column 15: not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "expected an object"),
        ('{"images": 3}', "'images' is 3; expected a list"),
        ('{"images": [{"id": 1, "file_name": "\\ud800.jpg"}]}', "not JSON"),
        ('{"images": [], "annotations": {}}', "'annotations' is {}; expected a list"),
    ],
)
def test_what_is_no_such_file(tmp_path: Path, text: str, message: str) -> None:
    put(tmp_path, text)
    with pytest.raises(InvalidData, match=message):
        read_dataset(tmp_path, "jumpstart")


def test_images_elsewhere(tmp_path: Path) -> None:
    put(tmp_path, document((7, 0, [1, 2, 11, 14])), images="pictures")
    assert read_dataset(tmp_path, images="pictures").paths[0] == f"{tmp_path}/pictures/a.jpg"
    with pytest.raises(InvalidData, match="there is no folder"):
        read_dataset(tmp_path, images="nowhere")


def test_what_we_write(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures", num_images=2)
    folder = write_dataset(data, tmp_path / "out", "jumpstart")
    content = json.loads((folder / "annotations.json").read_text())
    assert list(content) == ["images", "annotations"]
    assert content["images"][0] == {"file_name": "000.jpg", "height": 96, "width": 96, "id": 0}
    corners = data.boxes[0].astype(int).tolist()
    assert content["annotations"] == [{"image_id": 0, "bbox": corners, "category_id": int(data.labels[0])}]
    assert all(isinstance(value, int) for value in content["annotations"][0]["bbox"])
    assert (folder / "classes.txt").read_text() == "disc\nsquare\n"


def test_splits_are_told_to_be_left(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    data = replace(data, split_indices={"train": np.arange(3)})
    with pytest.warns(DetkitWarning, match=r"left behind: splits \(1\)"):
        write_dataset(data, tmp_path / "out", "jumpstart")


@given(st.data())
def test_mutated_files_raise_only_our_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = put(tmp_path_factory.mktemp("mutated"), document((7, 0, [1, 2, 11, 14]), ("b", 1, [3, 4, 5, 6])))
    file = folder / "annotations.json"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(min_size=1, max_size=4))
    file.write_bytes(content)
    with contextlib.suppress(InvalidData), warnings.catch_warnings():
        warnings.simplefilter("ignore", DetkitWarning)
        FORMAT.read(folder, JumpStartOptions())


def test_swapped_corners_are_not_written(tmp_path: Path) -> None:
    """Reading would refuse them as COCO's."""
    data = tiny_dataset(tmp_path / "pictures").take([0])
    with pytest.raises(InvalidData, match="corners swapped"):
        write_dataset(replace(data, boxes=np.array([[40.0, 30, 20, 25]])), tmp_path / "out", "jumpstart")
    assert not (tmp_path / "out").exists()
