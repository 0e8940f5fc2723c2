"""Predictions of other tools: read, refused with every fault named, written so that others load them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hotcoco import mask as rle
from hypothesis import HealthCheck, given, settings
from pycocotools import mask as pycoco_mask
from pycocotools.coco import COCO

from detkit import Dataset, Detections, Sample, read_dataset, read_predictions, write_dataset, write_predictions
from detkit.errors import ClassMismatch, DetkitError, DetkitWarning, InvalidData, StorageError, UsageError
from detkit.formats.resultmasks import mask_fault
from detkit.predictions import looks_like_predictions
from detkit.scores.matching import pairs_of_any_class

NAMES = ("crazing", "patches")
SIDE = 100


def dataset(*image_ids: str, folder: str = "/pictures") -> Dataset:
    samples = [
        Sample(path=f"{folder}/{i}", width=SIDE, height=SIDE, image_id=i, boxes=np.array([[1.0, 2, 30, 40]]),
               names=("patches",))
        for i in image_ids
    ]  # fmt: skip
    return Dataset.from_samples(NAMES, samples)


DATA = dataset("a.jpg", "sub/b.jpg", "c.jpg")


def coco_file(folder: Path, ids: Sequence[Any] = (12, 7, 9), categories: Sequence[Any] = (3, 1)) -> Path:
    """Write a COCO data set whose ids follow neither the order of its images nor that of its classes."""
    (folder / "images").mkdir(parents=True)
    data = dataset("a.jpg", "sub/b.jpg", "c.jpg")
    content = {
        "images": [
            {"id": number, "file_name": name, "width": SIDE, "height": SIDE}
            for number, name in zip(ids, data.image_ids, strict=True)
        ],
        "categories": [{"id": number, "name": name} for number, name in zip(categories, NAMES, strict=True)],
        "annotations": [{"id": 1, "image_id": ids[0], "category_id": categories[0], "bbox": [1, 2, 3, 4]}],
    }
    path = folder / "annotations.json"
    path.write_text(json.dumps(content))
    return path


def result(image: Any, category: Any, score: Any = 0.5, bbox: Any = (1, 2, 30, 40), **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": bbox, "score": score, **more}


def saved(folder: Path, content: Any, name: str = "found.json") -> Path:
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def findings(error: pytest.ExceptionInfo[InvalidData]) -> list[tuple[str, str]]:
    return [(finding.code, finding.place) for finding in error.value.findings]


def test_ids_are_those_of_the_coco_file(tmp_path: Path) -> None:
    data = read_dataset(coco_file(tmp_path))
    path = saved(tmp_path, [result(7, 1, 0.25), result(12, 3), result(7, 3, 0.75, [0, 0, 5.5, 100])])
    for some in (data, data.take([2, 1, 0])):
        found = dict(zip(some.image_ids, read_predictions(path, some), strict=True))
        assert found["a.jpg"].names == ("crazing",)
        assert found["a.jpg"].boxes.tolist() == [[1, 2, 31, 42]]
        assert found["sub/b.jpg"].names == ("crazing", "patches")
        assert found["sub/b.jpg"].scores.tolist() == [0.75, 0.25]
        assert found["sub/b.jpg"].boxes.tolist() == [[0, 0, 5.5, 100], [1, 2, 31, 42]]
        empty = found["c.jpg"]
        assert (len(empty), empty.boxes.shape, empty.width, empty.height) == (0, (0, 4), SIDE, SIDE)
        assert [one.path for one in found.values()] == list(some.paths)
        assert all(one.classes == some.classes and one.masks is None for one in found.values())


def test_ids_from_one_in_order_are_known_in_a_part_of_the_data_too(tmp_path: Path) -> None:
    """They are not kept with the data, so the annotation file tells them; the part's own order would be wrong."""
    data = read_dataset(coco_file(tmp_path, (1, 2, 3), (1, 2)))
    path = saved(tmp_path, [result(3, 2)])
    assert [len(one) for one in read_predictions(path, data)] == [0, 0, 1]
    assert [len(one) for one in read_predictions(path, data.take([2]))] == [1]
    with pytest.raises(InvalidData, match=r"1 image\(s\) of the file .* are not in the data, for example 3"):
        read_predictions(path, data.take([0, 1]))
    (tmp_path / "annotations.json").unlink()
    with pytest.raises(InvalidData, match="not in the data, for example 3. a number is an id in the COCO file"):
        read_predictions(path, data)


def test_ids_that_two_files_share_stand_for_nothing(tmp_path: Path) -> None:
    for split in ("train", "val"):
        path = coco_file(tmp_path / split, (1, 2, 3) if split == "train" else (3, 4, 5))
        (tmp_path / "annotations").mkdir(exist_ok=True)
        renamed = path.read_text().replace(".jpg", f"-{split}.jpg")
        (tmp_path / f"annotations/{split}.json").write_text(renamed)
    data = read_dataset(tmp_path / "annotations")
    assert len(data) == 6
    found = read_predictions(saved(tmp_path, [result(1, 1), result(5, 1)]), data)
    assert [len(one) for one in found] == [1, 0, 0, 0, 0, 1]
    with pytest.raises(InvalidData, match="unknown-image 1"):
        read_predictions(saved(tmp_path, [result(3, 1)]), data)
    assert [len(one) for one in read_predictions(saved(tmp_path, [result(3, 1)]), data.splits["val"])] == [1, 0, 0]


@pytest.mark.parametrize(
    "image", ["sub/b.jpg", "b.jpg", "sub/b", "b", "/pictures/sub/b.jpg", "/elsewhere/b.jpg", "C:\\x\\b.jpg", "b.png"]
)
def test_text_is_a_name(image: str, tmp_path: Path) -> None:
    found = read_predictions(saved(tmp_path, [result(image, 0)]), DATA, classes=NAMES)
    assert [len(one) for one in found] == [0, 1, 0]
    found = read_predictions(saved(tmp_path, [result(1, 0, file_name=image)]), DATA, classes=NAMES)
    assert [len(one) for one in found] == [0, 1, 0], "a file name counts before a number"


def test_a_name_of_several_images_is_none(tmp_path: Path) -> None:
    data = dataset("x/a.jpg", "y/a.jpg", "b.jpg", "b.png")
    path = saved(tmp_path, [result("a.jpg", 0), result("a", 0), result("y/a.jpg", 0), result("b", 0)])
    with pytest.raises(InvalidData, match=r"3 image\(s\) of the file .* may be any of several in the data, .* 'a.jpg'"):
        read_predictions(path, data, classes=NAMES)
    path = saved(tmp_path, [result("old/a.jpg", 0), result("a.jpg", 0)])
    with pytest.raises(InvalidData, match="'a.jpg' and 'old/a.jpg' both fit 'a.jpg'"):
        read_predictions(path, DATA, classes=NAMES)


def test_a_number_is_no_name(tmp_path: Path) -> None:
    """Image 1 of an exported data set is not the image called 1.jpg; nobody could tell."""
    data = dataset("1.jpg", "10.jpg", "2.jpg")
    with pytest.raises(InvalidData, match="for example 1, 2. a number is an id in the COCO file that the data was re"):
        read_predictions(saved(tmp_path, [result(1, 0), result(2, 0)]), data, classes=NAMES)
    assert len(read_predictions(saved(tmp_path, [result("1", 0)]), data, classes=NAMES)[0]) == 1


def test_what_category_ids_stand_for(tmp_path: Path) -> None:
    coco = read_dataset(coco_file(tmp_path))
    path = saved(tmp_path, [result("a.jpg", 1)])

    def names(data: Dataset, **told: Any) -> tuple[str, ...]:
        return read_predictions(path, data, **told)[0].names

    assert names(coco) == ("patches",)
    assert names(coco, classes=["patches", "crazing"]) == ("crazing",), "what the user says counts first"
    assert names(DATA, class_ids={1: "crazing"}) == ("crazing",)
    with pytest.raises(InvalidData, match="1 category ids .* have no name: 1 .nameless-class.\nsay what .* class_ids="):
        names(DATA)
    with pytest.raises(InvalidData, match="nameless-class"):
        names(coco, class_ids={7: "crazing"})
    with pytest.raises(UsageError, match="classes and class_ids; give one"):
        names(DATA, class_ids={1: "crazing"}, classes=NAMES)
    saved(tmp_path, [result("a.jpg", 1, category_name="patches"), result("a.jpg", "crazing")])
    assert names(DATA) == ("patches", "crazing")
    saved(tmp_path, {"categories": [{"id": 1, "name": "crazing"}], "annotations": [result("a.jpg", 1)]})
    assert names(DATA) == ("crazing",)
    assert names(coco) == ("crazing",), "the file itself counts before the data"


def test_results_beside_their_images(tmp_path: Path) -> None:
    """Numbers are then the file's own, and no other's."""
    content = {
        "images": [{"id": 12, "file_name": "c.jpg", "width": 5}, {"id": 9, "file_name": "b.jpg"}],
        "categories": [{"id": 3, "name": "patches", "supercategory": "defect"}],
        "annotations": [result(12, 3, id=1, area=7, iscrowd=0), result(9, 3)],
    }
    for data in (DATA.take([1, 2]), read_dataset(coco_file(tmp_path)).take([1, 2])):
        for text in (json.dumps(content), json.dumps(content, indent=1), "\ufeff " + json.dumps(content) + "\n\n"):
            assert [len(one) for one in read_predictions(saved(tmp_path, text), data)] == [1, 1]


def test_images_that_the_file_passes_over(tmp_path: Path) -> None:
    """A file that tells what images it is about says nothing of the others; in another only many of them are a sign."""
    found = some_detections(DATA)
    images = [{"id": 7, "file_name": "sub/b.jpg"}, {"id": 8, "file_name": "a.jpg"}]
    for content in (
        lines(found[1::-1]),
        [one.to_dict() for one in found[:2]],
        {"images": images, "annotations": [result(8, "patches")]},
    ):
        with pytest.warns(DetkitWarning, match=r"found.json: no detections for 1 of 3 images, for example 'c.jpg': it"):
            again = read_predictions(saved(tmp_path, content), DATA)
        assert len(again) == 3
        read_predictions(saved(tmp_path, content), DATA.take([0, 1]))  # and nothing is said, though "a.jpg" has none
    many = dataset(*(f"{i}.jpg" for i in range(40)))
    for known in (40, 20, 19, 0):
        path = saved(tmp_path, [result(f"{i}.jpg", 0) for i in range(known) for _ in range(2)])
        if known >= 20:
            assert sum(map(len, read_predictions(path, many, classes=NAMES))) == known * 2
            continue
        with pytest.warns(
            DetkitWarning, match=f"{40 - known} of 40 images, for example '{known}.jpg', .*: it does not"
        ):
            read_predictions(path, many, classes=NAMES)
    none_known = saved(tmp_path, [result("x.jpg", 0)])
    with (
        pytest.warns(DetkitWarning, match="no detections for 40 of 40 images"),
        pytest.warns(DetkitWarning, match="left out: 1 image"),
    ):
        read_predictions(none_known, many, classes=NAMES, on_unknown="drop")


def test_names_of_theirs(tmp_path: Path) -> None:
    """The map comes after ids have got their names, and once: names may change places."""
    records = [
        result("a.jpg", 0, 0.9), result("a.jpg", 1, 0.8), result("b.jpg", 5, category_name="crack"),
        result("b.jpg", 5, 0.25, category_name="patches"),
    ]  # fmt: skip
    path = saved(tmp_path, records)
    theirs = ["crack", "crazing"]
    class_map = {"crack": "crazing", "patches": "crazing", "crazing": "patches", "never": "patches"}
    found = read_predictions(path, DATA, classes=theirs, class_map=class_map)
    assert [one.names for one in found] == [("crazing", "patches"), ("crazing", "crazing"), ()]
    assert all(one.classes == DATA.classes for one in found)
    with pytest.raises(InvalidData, match=r"no class 'crack' \(2 detections\)") as caught:
        read_predictions(path, DATA, classes=theirs)
    assert "class_map={'crack': 'crazing'}" in caught.value.hint
    assert "file_name" not in caught.value.hint
    with pytest.raises(InvalidData, match="no class 'crazin' .2 detections. did you mean 'crazing'"):
        read_predictions(path, DATA, classes=theirs, class_map={"crack": "crazin"})
    own = saved(tmp_path, lines([replace(one, classes=("x", "y")) for one in some_detections(DATA)]))
    assert same(read_predictions(own, DATA, class_map=dict(zip("xy", NAMES, strict=True))), some_detections(DATA))


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([], True),
        (" [ ]", True),
        ([result(1, 1)], True),
        ("\ufeff\n [\n {\"score\" :1", True),
        ([{"segmentation": [[1.5] * 50_000], **result(1, 1)}], False),
        ([{**result(1, 1), "segmentation": [[1.5] * 50_000]}], True),
        ([{"path": "a.jpg", "detections": []}], True),
        ({"images": [{"id": 1}], "annotations": [result(1, 1)]}, True),
        ({"info": {"a": "}{][\\\""}, "annotations": [result(1, 1)] * 2000, "images": []}, True),
        ({"annotations": [{"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}], "score": 1}, False),
        ({"annotations": []}, False),
        ({"annotations": {"score": 1}}, False),
        ({"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(9000)], "annotations": [result(1, 1)]}, False),
        ('{"path": "a.jpg", "width": 3, "detections": []}\n{"path"', True),
        ('{"path": "a.jpg", "detections": [' + '{"name": "x"},' * 9000, True),
        ('{"source-ref": "s3://a/b.jpg", "score": 1}\n', False),
        ("7", False), ("", False), ("{", False), ("[{", False), ("[7]", False), ("{}", False), ("<xml/>", False),
        ('{"a":' * 3000, False), ("[" * 60_000, False), ('{"a": ' + "[" * 60_000, False), ("\x00\xff", False),
        ('{"a" "detections": []}', False),
    ],
)  # fmt: skip
def test_predictions_are_known_by_their_first_record(content: Any, expected: bool, tmp_path: Path) -> None:
    assert looks_like_predictions(saved(tmp_path, content)) is expected


def test_ground_truth_does_not_look_like_predictions(tiny: Dataset, tmp_path: Path) -> None:
    assert not looks_like_predictions(coco_file(tmp_path / "first"))
    for name in ("coco", "manifest", "sagemaker-json"):
        written = write_dataset(tiny, tmp_path / name, name)
        files = [file for file in Path(written).rglob("*") if file.suffix in {".json", ".jsonl", ".manifest", ".lst"}]
        assert files
        assert not any(map(looks_like_predictions, files))
    assert not looks_like_predictions(tmp_path / "nowhere.json")
    assert not looks_like_predictions(tmp_path)
    pixels = tmp_path / "a.jpg"
    pixels.write_bytes(np.random.default_rng(0).bytes(1000))
    assert not looks_like_predictions(pixels)


def lines(found: Sequence[Detections], **more: Any) -> str:
    return "".join(json.dumps({**one.to_dict(), **more}) + "\n" for one in found)


def some_detections(data: Dataset, *, masks: bool = False, seed: int = 0) -> list[Detections]:
    rng = np.random.default_rng(seed)
    found = []
    for i, path in enumerate(data.paths):
        low = rng.random((i * 2, 2)) * 50
        pictures = rng.random((i * 2, SIDE, SIDE)) > 0.5 if masks else None
        found.append(
            Detections.from_arrays(
                np.hstack([low, low + rng.random((i * 2, 2)) * 50]), rng.random(i * 2), rng.integers(0, 2, i * 2),
                classes=data.classes, path=path, width=SIDE, height=SIDE, masks=pictures,
            )
        )  # fmt: skip
    return found


def same(a: Sequence[Detections], b: Sequence[Detections], *, tolerance: float = 0) -> bool:
    return all(
        (x.path, x.names, x.width, x.height) == (y.path, y.names, y.width, y.height)
        and x.scores.tolist() == y.scores.tolist()
        and np.allclose(x.boxes, y.boxes, rtol=0, atol=tolerance)
        and (x.masks or None) == (y.masks or None)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("masks", [False, True])
def test_our_own_lines(masks: bool, tmp_path: Path) -> None:
    found = some_detections(DATA, masks=masks)
    assert sum(map(len, found)) > 3
    for order in ([0, 1, 2], [2, 0], [2]):
        path = saved(tmp_path, lines([found[i] for i in order]))
        assert same(read_predictions(path, DATA.take(order)), [found[i] for i in order])
    as_list = saved(tmp_path, [one.to_dict() for one in found])
    assert same(read_predictions(as_list, DATA), found)
    by_id = saved(tmp_path, json.dumps({**found[1].to_dict(), "path": "", "image_id": "sub/b.jpg"}, indent=2))
    assert same(read_predictions(by_id, DATA.take([1])), found[1:2])


@pytest.mark.parametrize("masks", [False, True])
def test_what_is_written_is_read(masks: bool, tmp_path: Path) -> None:
    coco = read_dataset(coco_file(tmp_path))
    for data in (DATA, coco, coco.take([1, 2])):
        found = some_detections(data, masks=masks)
        path = write_predictions(tmp_path / "deep/found.json", data, iter(found))
        assert same(read_predictions(path, data), found, tolerance=1e-12)
        assert looks_like_predictions(path)
        assert [p.name for p in path.parent.iterdir()] == ["found.json"]
    elsewhere = [replace(one, path=path_there) for one, path_there in zip(found, DATA.paths[1:], strict=True)]
    assert same(read_predictions(path, DATA.take([1, 2])), elsewhere, tolerance=1e-12), "names count, not ids"


@pytest.mark.parametrize("masks", [False, True])
def test_pycocotools_loads_what_is_written(
    masks: bool, tiny: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = write_dataset(tiny, tmp_path / "whole", "coco")
    for i, data in enumerate((tiny, read_dataset(original), tiny.take([5, 1, 6]))):
        written = Path(write_dataset(data, tmp_path / str(i), "coco")) / "annotations.json"
        found = [
            Detections.from_arrays(
                sample.boxes, np.linspace(0.9, 0.5, len(sample.boxes)), names=sample.names, classes=data.classes,
                masks=np.ones((len(sample.boxes), sample.height, sample.width), bool) if masks else None,
            )
            for sample in data
        ]  # fmt: skip
        results = write_predictions(tmp_path / f"{i}.json", data, found)
        truth = COCO(str(written))
        loaded = truth.loadRes(str(results))
        capsys.readouterr()
        names = {number: image["file_name"] for number, image in truth.imgs.items()}
        classes = {number: category["name"] for number, category in truth.cats.items()}
        assert len(loaded.anns) == len(data.boxes) > 0
        truths = {(a["image_id"], a["category_id"], tuple(a["bbox"])) for a in truth.anns.values()}
        for annotation in loaded.anns.values():
            assert (annotation["image_id"], annotation["category_id"], tuple(annotation["bbox"])) in truths
            assert annotation["file_name"] == names[annotation["image_id"]]
            assert annotation["category_name"] == classes[annotation["category_id"]]
            if masks:
                assert rle.decode(annotation["segmentation"]).all()


def test_nothing_found_is_a_list_of_nothing(tmp_path: Path) -> None:
    none = [Detections.from_arrays([], [], classes=NAMES)] * 3
    path = write_predictions(tmp_path / "none.json", DATA, none)
    assert json.loads(path.read_text()) == []
    assert [len(one) for one in read_predictions(path, DATA)] == [0, 0, 0]


def test_what_is_not_written(tmp_path: Path) -> None:
    found = some_detections(DATA)
    for some, count in ((found[:2], "2"), ([*found, found[0]], "more")):
        with pytest.raises(UsageError, match=f"{count} detections for 3 images; expected one for each, in order"):
            write_predictions(tmp_path / "found.json", DATA, some)
    foreign = Detections.from_arrays([[0, 0, 1, 1]], [0.5], names=["patch"])
    with pytest.raises(ClassMismatch, match="detections on sub/b.jpg: .*unknown here: 'patch'"):
        write_predictions(tmp_path / "found.json", DATA, [found[0], foreign, found[2]])
    broken = replace(found[1], boxes=found[1].boxes * np.nan)
    with pytest.raises(InvalidData, match="detections on sub/b.jpg hold numbers that are not finite"):
        write_predictions(tmp_path / "found.json", DATA, [found[0], broken, found[2]])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_every_file_has_finite_numbers_alone(ending: str, tmp_path: Path) -> None:
    found = some_detections(DATA)[1]
    broken = replace(found, boxes=found.boxes * np.nan)
    with pytest.raises(InvalidData, match="detections on .*sub/b.jpg hold numbers that are not finite"):
        write_predictions(tmp_path / f"found{ending}", None, [broken])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("data", [None, DATA])
def test_an_error_of_who_makes_the_detections_stays_what_it_is(
    data: Dataset | None, ending: str, tmp_path: Path
) -> None:
    def camera() -> Iterator[Detections]:
        yield some_detections(DATA)[0]
        raise OSError("camera gone")

    with pytest.raises(OSError, match="^camera gone$"):
        write_predictions(tmp_path / f"found{ending}", data, camera())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write_predictions(tmp_path / f"file/found{ending}", data, camera())


def test_every_fault_is_told(tmp_path: Path) -> None:
    good = result("a.jpg", 0)
    faults: list[tuple[Any, str, str]] = [
        ({**good, "score": None}, "bad-score", "[1].score"),
        ({**good, "score": "0.5"}, "bad-score", "[2].score"),
        ({**good, "score": math.nan}, "bad-score", "[3].score"),
        ({**good, "score": 1.25}, "bad-score", "[4].score"),
        ({**good, "score": -0.25}, "bad-score", "[5].score"),
        ({**good, "bbox": [1, 2, 3]}, "bad-box", "[6].bbox"),
        ({**good, "bbox": [1, 2, math.inf, 3]}, "bad-box", "[7].bbox"),
        ({**good, "bbox": [1, 2, -3, 3]}, "bad-box", "[8].bbox"),
        ({**good, "bbox": None}, "bad-box", "[9].bbox"),
        ({**good, "image_id": None}, "bad-id", "[10].image_id"),
        ({**good, "category_id": [1]}, "bad-id", "[11].category_id"),
        (7, "bad-record", "[12]"),
        ({**good, "file_name": 7}, "bad-record", "[13].file_name"),
        ({**good, "bbox": [1.5e308, 0, 1.5e308, 1]}, "bad-box", "[14].bbox"),
    ]
    listed = [good, *(record for record, _, _ in faults)]
    for content, prefix in ((listed, ""), ({"annotations": listed}, "annotations")):
        with pytest.raises(InvalidData, match=r"14 error\(s\) in the data \(bad-score 5, bad-box 5") as caught:
            read_predictions(saved(tmp_path, content), DATA, classes=NAMES)
        assert sorted(findings(caught)) == sorted((code, prefix + place) for _, code, place in faults)
        assert [f.record for f in caught.value.findings if f.code == "bad-score"] != []
        assert all(f.file == str(tmp_path / "found.json") for f in caught.value.findings)
    for record, code, place in faults:
        with pytest.raises(InvalidData) as caught:
            read_predictions(saved(tmp_path, [record]), DATA, classes=NAMES)
        assert findings(caught) == [(code, "[0]" + place.partition("]")[2])], "alike, whichever records are beside it"


def test_ground_truth_is_no_prediction(tmp_path: Path) -> None:
    data = read_dataset(coco_file(tmp_path))
    with pytest.raises(InvalidData, match="'score'|score: missing or null; .*; only ground truth has none"):
        read_predictions(tmp_path / "annotations.json", data)


def test_what_the_data_lacks(tmp_path: Path) -> None:
    records = [
        *(result(f"{i}.jpg", 0) for i in range(5)), result("a.jpg", 0), result("a.jpg", 2), result("a.jpg", 3, 0.75)
    ]  # fmt: skip
    path = saved(tmp_path, records)
    classes = ["crazing", "patches", "patch", "patch"]
    with pytest.raises(InvalidData) as caught:
        read_predictions(path, DATA, classes=classes)
    assert findings(caught) == [("unknown-image", "[0]"), ("unknown-class", "[6]")]
    images, kinds = (finding.message for finding in caught.value.findings)
    assert images.startswith(
        "5 image(s) of the file (5 detections) are not in the data, for example '0.jpg', '1.jpg', '2."
    )
    assert kinds == "the data has no class 'patch' (2 detections) did you mean 'patches'?"
    for part in ('detkit.read_predictions(..., on_unknown="drop")', "class_map={", "'file_name'"):
        assert part in caught.value.hint
    with pytest.warns(DetkitWarning, match="left out: 5 image.s. .*; the data has no class 'patch'"):
        found = read_predictions(path, DATA, classes=classes, on_unknown="drop")
    assert [one.names for one in found] == [("crazing",), (), ()]
    with pytest.raises(UsageError, match="'raise' or 'drop'"):
        read_predictions(path, DATA, on_unknown="ignore")  # type: ignore[arg-type]


def test_faults_in_lines(tmp_path: Path) -> None:
    found = some_detections(DATA)
    good = [one.to_dict() for one in found]
    odd = [{"name": "patches", "box": [0, 0, 1, 1]}, 7, {"name": 1, "box": [1], "score": 2}]
    texts = [
        json.dumps(good[1]),
        '{"path": "a.jpg", ',
        json.dumps(good[1]),
        json.dumps({**good[0], "width": 50}),
        "",
        json.dumps({**good[2], "detections": odd}),
        json.dumps({"path": "a.jpg", "detections": 7}),
        json.dumps({"detections": []}),
        json.dumps({"path": "elsewhere.jpg", "detections": []}),
    ]  # fmt: skip
    with pytest.raises(InvalidData) as caught:
        read_predictions(saved(tmp_path, "\n".join(texts)), DATA)
    assert sorted(findings(caught)) == sorted(
        [
            ("malformed", "line 2, column 18"), ("image-twice", "line 3"), ("size-differs", "line 4"),
            ("bad-score", "line 6, detections[0].score"), ("bad-record", "line 6, detections[1]"),
            ("bad-box", "line 6, detections[2].box"), ("no-name", "line 6, detections[2].name"),
            ("bad-record", "line 7"), ("bad-record", "line 8"), ("unknown-image", "line 9"),
        ]
    )  # fmt: skip
    twice = next(f for f in caught.value.findings if f.code == "image-twice")
    assert (twice.message, twice.line) == ("'sub/b.jpg' is there already in line 1", 3)
    turned = saved(tmp_path, json.dumps({**good[0], "width": 50, "height": 60}) + "\n")
    sized = replace(DATA.take([0]), sizes=np.array([[60, 50]]))
    assert len(read_predictions(turned, sized)) == 1, "a picture that EXIF turns"


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"size": [SIDE, SIDE], "counts": "o"}, "counts cannot be read: 'o'; expected COCO's text"),
        ({"size": [SIDE, SIDE], "counts": ""}, "do not add up to 100x100"),
        ({"size": [SIDE, SIDE], "counts": "0" * 8}, "do not add up to 100x100"),
        ({"size": [SIDE, SIDE], "counts": "5:\u00e9"}, "counts cannot be read"),
        ({"size": [SIDE, SIDE], "counts": "5/"}, "counts cannot be read"),
        ({"size": [SIDE, SIDE], "counts": "5z"}, "counts cannot be read"),
        ({"size": [SIDE, SIDE], "counts": "P" * 13 + "0"}, "counts cannot be read"),
        ({"size": [SIDE, SIDE], "counts": "o" * 11 + "?0"}, "do not add up to 100x100"),
        ({"size": [10**6, 10**6], "counts": "zz"}, r"size is \[1000000, 1000000\]; that of the image, height first"),
        ({"size": [SIDE, SIDE], "counts": [5, 5]}, "do not add up to 100x100"),
        ({"size": [SIDE, SIDE], "counts": [-5, SIDE * SIDE + 5]}, "do not add up to 100x100"),
        ({"size": [SIDE, SIDE], "counts": 5}, "counts cannot be read"),
        ({"counts": "zz"}, "expected COCO's encoding"),
        ("zz", "expected COCO's encoding"),
        ([[1, 2, 3, 4]], "no list of at least three points"),
        ([[1, 2, 3, 4, 5, "6"]], "no list of at least three points"),
    ],
)
def test_masks_that_are_none(mask: Any, message: str, tmp_path: Path) -> None:
    good = {"size": [SIDE, SIDE], "counts": [5, SIDE * SIDE - 5]}
    polygon = [[0, 0, 9, 0, 9, 9.5]]
    sound = [
        result("a.jpg", 0, 0.5, segmentation=good),
        result("c.jpg", 0, segmentation=polygon),
        result("c.jpg", 1, 0.25),
    ]
    found = read_predictions(saved(tmp_path, sound), DATA, classes=NAMES)
    assert [one.masks for one in found] == [(good,), (), (polygon, None)]
    with pytest.raises(InvalidData, match=message) as caught:
        read_predictions(saved(tmp_path, [*sound, result("a.jpg", 0, segmentation=mask)]), DATA, classes=NAMES)
    assert findings(caught) == [("bad-mask", "[3].segmentation")]


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("", "not-predictions"), ("  \n ", "malformed"), ("{}", "not-predictions"), ("7", "not-predictions"),
        ('"found"', "not-predictions"), ('{"results": []}', "not-predictions"), ("[", "malformed"),
        ('[{"image_id": 1]', "malformed"), ("[1e999]", "malformed"), ("[] x", "malformed"), ("\x00\x01", "malformed"),
        ('{"annotations": 7}', "not-predictions"), ('{"annotations": null}', "not-predictions"),
        ('{"annotations": Infinity}', "not-predictions"), ('{"annotations": 7, "a": NaN}', "not-predictions"),
        ('{"annotations": [NaN]}', "bad-record"), ("[" * 5000, "malformed"), ("{\n}", "not-predictions"),
        ('{"annotations": [], "images": [{"id": 1}], "categories": 7}', "bad-record"),
    ],
)  # fmt: skip
def test_files_of_another_kind(text: str, code: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidData) as caught:
        read_predictions(saved(tmp_path, text), DATA, classes=NAMES)
    assert {found for found, _ in findings(caught)} == {code}


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no file .*nowhere.json \(looked for from"):
        read_predictions(tmp_path / "nowhere.json", DATA)
    with pytest.raises(InvalidData, match="cannot read"):
        read_predictions(tmp_path, DATA)


def test_boxes_made_in_another_way_are_noticed(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    low = rng.random((40, 2)) * 60
    corners = np.hstack([low, low + 5 + rng.random((40, 2)) * 35])

    def written(boxes: np.ndarray) -> Path:
        return saved(tmp_path, [result("a.jpg", 0, bbox=box) for box in boxes.tolist()])

    with pytest.warns(DetkitWarning, match="% of the boxes leave their image and all would fit as corners"):
        read_predictions(written(corners), DATA, classes=NAMES)
    sides = np.hstack([low, corners[:, 2:] - low])
    with pytest.warns(DetkitWarning, match="as if they were shares of the image's sides"):
        read_predictions(written(sides / SIDE), DATA, classes=NAMES)
    read_predictions(written(sides), DATA, classes=NAMES)  # and nothing is said


def test_boxes_beyond_all_images_match_nothing(tmp_path: Path) -> None:
    boxes = [[0, 0, 1e200, 1e200], [-1e307, -1e307, 1e308, 1e308], [1, 2, 29, 38]]
    found = read_predictions(saved(tmp_path, [result("a.jpg", 1, 0.9 - i / 10, b) for i, b in enumerate(boxes)]),
                             DATA.take([0]), classes=NAMES)  # fmt: skip
    detection, target, overlap = pairs_of_any_class(DATA.take([0]), np.zeros(3, np.int64), found[0].boxes, 0.1)
    assert (detection.tolist(), target.tolist(), overlap.tolist()) == ([2], [0], [1.0])
    endless = {"path": "a.jpg", "detections": [{"name": "patches", "score": 1, "box": [-1e308, 0, 1e308, 1]}]}
    with pytest.raises(InvalidData, match="is beyond all numbers .bad-box"):
        read_predictions(saved(tmp_path, f"{json.dumps(endless)}\n" * 2), DATA)


def test_a_large_file_is_read_in_pieces(tmp_path: Path) -> None:
    """Pieces of a megabyte meet anywhere, and one odd record does not change the others' numbers."""
    rng = np.random.default_rng(2)
    records = [
        result(
            "a.jpg" if i % 3 else "c.jpg", i % 2, round(float(s), 6), [1, 2, 3, 4 + i % 7], note="} , {" * (i % 5 == 0)
        )
        for i, s in enumerate(rng.random(30_000))
    ]
    found = read_predictions(saved(tmp_path, records), DATA, classes=NAMES)
    assert (tmp_path / "found.json").stat().st_size > 2 << 20
    for one, name in ((found[0], "a.jpg"), (found[2], "c.jpg")):
        own = sorted((r for r in records if r["image_id"] == name), key=lambda r: -r["score"])
        assert one.scores.tolist() == [r["score"] for r in own]
        assert one.boxes[:, 3].tolist() == [2 + r["bbox"][3] for r in own]
        assert one.labels.tolist() == [r["category_id"] for r in own]
    records[29_000]["score"] = 2
    records[17]["bbox"] = [1]
    with pytest.raises(InvalidData) as caught:
        read_predictions(saved(tmp_path, records), DATA, classes=NAMES)
    assert findings(caught) == [("bad-box", "[17].bbox"), ("bad-score", "[29000].score")]


KEYS = [
    *("image_id", "category_id", "bbox", "score", "segmentation", "file_name", "category_name"),
    *("images", "categories", "annotations", "id", "name", "size", "counts"),
    *("detections", "path", "box", "mask", "width", "height"),
]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=6),
    max_leaves=20,
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=json_values, cut=st.integers(0, 12))
def test_whatever_comes_only_our_errors(value: Any, cut: int, tmp_path: Path) -> None:
    text = json.dumps(value)
    for content in (text, text[: len(text) - cut], json.dumps({"path": "a.jpg", "detections": []}) + "\n" + text):
        try:
            found = read_predictions(saved(tmp_path, content), DATA, classes=NAMES)
        except DetkitError:
            continue
        assert len(found) == len(DATA)
        assert all(np.isfinite(one.boxes).all() and (one.scores <= 1).all() for one in found)


@settings(max_examples=200)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), share=st.floats(0, 1), seed=st.integers(0, 999),
    cut=st.integers(1, 9),
)  # fmt: skip
def test_masks_that_are_cut_off(height: int, width: int, share: float, seed: int, cut: int) -> None:
    picture = np.random.default_rng(seed).random((height, width)) < share
    encoded = {**rle.encode(np.asfortranarray(picture)), "size": [height, width]}
    text = encoded["counts"].decode()
    assert not mask_fault({**encoded, "counts": text}, [width, height])
    runs = np.diff(np.flatnonzero(np.diff(picture.T.ravel(), prepend=~picture[0, 0], append=~picture[-1, -1])))
    assert not mask_fault({**encoded, "counts": [0] * int(picture[0, 0]) + runs.tolist()}, [width, height])
    assert mask_fault({**encoded, "counts": text[:-cut]}, [width, height]) or not any(runs[-1:])


def test_masks_of_a_large_image() -> None:
    """Runs of several characters, and both signs of the differences, as pycocotools packs them too."""
    picture = np.zeros((3000, 4000), bool)
    picture[100:2900, 50:3000] = True
    picture[7, 3999] = True
    for encode in (rle.encode, pycoco_mask.encode):
        encoded = encode(np.asfortranarray(picture.astype(np.uint8)))
        text = encoded["counts"].decode()
        assert not mask_fault({"size": [3000, 4000], "counts": text}, [4000, 3000])
        assert "add up to 4000x3000" in mask_fault(
            {"size": [3000, 4000], "counts": text[: len(text) // 2]}, [4000, 3000]
        )
    (polygon,) = pycoco_mask.frPyObjects([[10.5, 10, 3000, 20, 2000.25, 2900]], 3000, 4000)
    assert not mask_fault({"size": [3000, 4000], "counts": polygon["counts"].decode()}, [4000, 3000])


def test_masks_decode_to_what_was_found(tmp_path: Path) -> None:
    found = some_detections(DATA, masks=True)
    again = read_predictions(write_predictions(tmp_path / "found.json", DATA, found), DATA)
    assert found[2].masks is not None and again[2].masks is not None
    for a, b in zip(found[2].masks, again[2].masks, strict=True):
        np.testing.assert_array_equal(rle.decode(a), rle.decode(b))
