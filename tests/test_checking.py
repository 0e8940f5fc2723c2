"""What `detkit.check` finds, and where it says it is."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit import Dataset, check, checking, plugins, read_dataset, write_dataset
from detkit.backends import LocalBackend, ModelSpec
from detkit.boxes import area
from detkit.checking import report
from detkit.checking.overview import write_overview
from detkit.data import Sample
from detkit.dialects import Dialect, Limits
from detkit.errors import DetkitWarning
from detkit.formats import imagefacts
from detkit.formats.findings import Finding, count_codes
from detkit.hookspecs import hookimpl
from detkit.params import Params
from detkit.testing import tiny_dataset


@pytest.fixture(autouse=True)
def _own_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Forty pictures as VOC with files of their own."""
    data = tiny_dataset(tmp_path / "drawn", num_images=40)
    return write_dataset(data, tmp_path / "voc", "voc", images="copy")


def codes(findings: list[Finding]) -> dict[str, int]:
    return count_codes(findings)


def edit(file: Path, pattern: str, new: str) -> None:
    text = file.read_text()
    changed = re.sub(pattern, new, text, count=1)
    assert changed != text
    file.write_text(changed)


def test_sound_data(voc: Path) -> None:
    assert check(voc) == []
    assert check(read_dataset(voc), look="none") == []


def test_every_finding_in_one_pass(voc: Path) -> None:
    """Broken files, broken boxes and broken images are told together, each with its place."""
    edit(voc / "Annotations/002.xml", r"<xmax>\d+</xmax>", "<xmax>999</xmax>")
    (voc / "JPEGImages/004.jpg").write_bytes((voc / "JPEGImages/004.jpg").read_bytes()[:-600])
    (voc / "JPEGImages/005.png").write_bytes(b"no image")
    shutil.copy(voc / "JPEGImages/006.jpg", voc / "JPEGImages/008.jpg")
    (voc / "Annotations/010.xml").write_text("<annotation><object>")
    edit(voc / "Annotations/012.xml", r"<xmin>\d+</xmin>", "<xmin>far left</xmin>")
    (voc / "JPEGImages/014.jpg").unlink()
    found = check(voc)
    assert codes(found) == {
        **{"outside": 1, "truncated-image": 1, "unreadable-image": 1, "duplicate-image": 1},
        **{"malformed": 1, "bad-box": 1, "missing-image": 1},
    }
    outside = next(f for f in found if f.code == "outside")
    lines = Path(outside.file).read_text().splitlines()
    assert outside.line is not None and outside.column is not None
    assert lines[outside.line - 1][outside.column - 1 :].startswith("<object>")
    assert next(f for f in found if f.code == "duplicate-image").message.endswith("006.jpg")
    files = {f.code: Path(f.image_file).name for f in found if f.image_file}
    assert files == {
        **{"outside": "002.jpg", "truncated-image": "004.jpg", "unreadable-image": "005.png"},
        "duplicate-image": "008.jpg",
    }


def test_an_image_at_fault_is_named_beside_its_annotation(voc: Path) -> None:
    """The place is a line of the XML file; the image is told, too."""
    edit(voc / "Annotations/002.xml", r"<width>\d+</width>", "<width>9</width>")
    data, findings = checking.read_and_check(voc, look="headers")
    (wrong,) = [f for f in findings if f.code == "wrong-size"]
    assert (Path(wrong.file).name, Path(wrong.image_file).name) == ("002.xml", "002.jpg")
    listed = report.as_json(data, [wrong])["findings"]
    assert [Path(f["image_file"]).name for f in listed] == ["002.jpg"]


def test_headers_do_not_show_what_pixels_show(voc: Path) -> None:
    (voc / "JPEGImages/004.jpg").write_bytes((voc / "JPEGImages/004.jpg").read_bytes()[:-600])
    assert codes(check(voc, look="headers")) == {}
    assert codes(check(voc, look="none")) == {}
    assert codes(check(voc)) == {"truncated-image": 1}


def test_looked_at_once_until_it_changes(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    look = imagefacts._look  # what reads a file
    monkeypatch.setattr(imagefacts, "_look", lambda path, decode: (looked.append(path), look(path, decode))[1])
    monkeypatch.setattr(imagefacts, "_SETTLED_S", 0.0)
    check(voc, look="headers")
    assert len(looked) == 40
    check(voc, look="headers")
    assert len(looked) == 40
    check(voc)  # pixels were not looked at so far
    assert len(looked) == 80
    check(voc, look="headers")
    assert len(looked) == 80
    file = voc / "JPEGImages/004.jpg"
    file.write_bytes(file.read_bytes()[:-600])
    assert codes(check(voc)) == {"truncated-image": 1}
    assert looked[80:] == [str(file)]


def test_a_file_that_has_just_changed_is_looked_at_again(voc: Path) -> None:
    file = voc / "JPEGImages/004.jpg"
    content = file.read_bytes()
    file.write_bytes(content[:-600] + bytes(600))
    check(voc)
    file.write_bytes(content)
    assert codes(check(voc)) == {}


def test_broken_memory_is_no_obstacle(voc: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache/images-1.sqlite").write_bytes(b"not a database" * 100)
    assert check(voc) == []
    (tmp_path / "cache/images-1.sqlite").unlink()
    (tmp_path / "cache").rmdir()
    (tmp_path / "cache").write_text("a file where a folder should be")
    assert check(voc) == []


def test_json_place_has_pointer_id_line_and_column(voc: Path, tmp_path: Path) -> None:
    coco = write_dataset(read_dataset(voc), tmp_path / "coco", "coco")
    file = coco / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"][3] |= {"id": 77, "bbox": [-50, 0, 9, 9]}
    file.write_text(json.dumps(content, indent=1))
    (found,) = check(coco)
    assert (found.code, found.place.split(" (")[0]) == ("outside", "annotations[3], id 77")
    assert found.line is not None and found.column is not None
    following = file.read_text().splitlines()[found.line - 1 :]
    assert following[0][found.column - 1 :] == "{"
    assert json.JSONDecoder().raw_decode("\n".join(following).strip())[0]["id"] == 77
    file.write_text(json.dumps(content))
    (found,) = check(coco)
    assert found.line == 1
    assert json.JSONDecoder().raw_decode(file.read_text()[found.column - 1 :])[0]["id"] == 77  # type: ignore[operator]


def test_coco_with_broken_records_is_checked_all_the_same(voc: Path, tmp_path: Path) -> None:
    coco = write_dataset(read_dataset(voc), tmp_path / "coco", "coco")
    file = coco / "annotations.json"
    content = json.loads(file.read_text())
    content["annotations"][3]["bbox"] = [-50, 0, 9, 9]
    content["annotations"][4]["image_id"] = 999
    content["annotations"][5]["category_id"] = 99
    content["annotations"][6]["bbox"] = "wide"
    content["images"][7]["file_name"] = "../up.jpg"
    content["images"][8]["file_name"] = content["images"][9]["file_name"]
    file.write_text(json.dumps(content))
    found = codes(check(coco))
    for code in ("outside", "unknown-image", "unknown-category", "bad-box", "outside-folder", "duplicate-file-name"):
        assert found[code] == 1, (code, found)


def test_what_the_reader_had_to_assume(voc: Path) -> None:
    edit(voc / "Annotations/002.xml", r"<xmin>\d+</xmin>", "<xmin>0</xmin>")
    assert [f.code for f in check(voc) if f.severity == "warning"] == ["assumed"]
    assert check(voc, origin=0) == []


# ------------------------------------------------------------------------------------------------- classes


def labelled(counts: dict[str, int], **splits: list[int]) -> Dataset:
    """One image for each class, with so many boxes; nothing is on disk."""
    samples = [
        Sample(
            path=f"/nowhere/{i}.jpg",
            width=9999,
            height=9,
            boxes=np.array([[3.0 * k, 0, 3 * k + 2, 3] for k in range(count)]).reshape(-1, 4),
            names=(name,) * count,
        )
        for i, (name, count) in enumerate(counts.items())
    ]
    return Dataset.from_samples(list(counts), samples, splits)


@pytest.mark.parametrize(
    ("counts", "found"),
    [
        ({"cat": 30, "dog": 40}, {}),
        ({"scratches": 300, "scratchs": 12}, {"class-typo": 1, "crowded-image": 1, "sagemaker-label-width": 1}),
        ({"traffic light": 50, "Traffic_Light": 50}, {"class-typo": 1}),
        ({"type 1": 60, "type 2": 10}, {}),
        ({"bolt": 60, "nut": 60}, {}),
        ({"cat": 60, "dog": 0}, {"empty-class": 1}),
        ({"cat": 60, "dog": 9}, {"rare-class": 1}),
        ({"cat": 69, "dog": 20, "x": 69}, {}),
        ({"cat": 70, "dog": 20, "y": 70}, {"sagemaker-label-width": 1}),
        ({"cat": 101, "dog": 20}, {"crowded-image": 1, "sagemaker-label-width": 1}),
    ],
)
def test_classes_and_limits(counts: dict[str, int], found: dict[str, int]) -> None:
    told = check(labelled(counts), look="none")
    assert codes(told) == found
    width = 2 + 5 * max(counts.values())
    assert all(f"label_width={width}," in f.message for f in told if f.code == "sagemaker-label-width")


def test_imbalance_and_missing_in_splits() -> None:
    data = labelled({"cat": 2000, "dog": 12, "cow": 30}, train=[0, 1], val=[0, 2])
    assert codes(check(data, look="none")) == {
        "class-imbalance": 1,
        "class-missing-in-split": 2,
        "crowded-image": 1,
        "sagemaker-label-width": 1,
    }
    messages = [f.message for f in check(data, look="none") if f.code == "class-missing-in-split"]
    assert messages == [
        "split 'train' has no box of cow, which cannot be learnt",
        "split 'val' has no box of dog, which cannot be scored on it",
    ]


# ------------------------------------------------------------------------------------------------- limits of others


def renumbered(folder: Path, number: Callable[[int], int]) -> Path:
    """Give the classes of a COCO folder other ids."""
    file = folder / "annotations.json"
    content = json.loads(file.read_text())
    for record, key in (
        *((r, "id") for r in content["categories"]),
        *((r, "category_id") for r in content["annotations"]),
    ):
        record[key] = number(record[key])
    file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (lambda i: i, ""),
        (lambda i: i - 1, ""),
        (lambda i: 3 * i, "the class ids of the file are 3 to 9 with gaps for 3 classes; "),
        (lambda i: i + 4, "the class ids of the file are 5 to 7 for 3 classes; "),
    ],
)
def test_class_ids_of_coco(number: Callable[[int], int], told: str, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "drawn", num_images=40, classes=("disc", "square", "triangle"))
    folder = renumbered(write_dataset(data, tmp_path / "coco"), number)
    found = check(folder, look="none")
    assert codes(found) == ({"class-ids": 1} if told else {})
    if told:
        assert found[0].severity == "note"
        assert found[0].file == str(folder / "annotations.json")
        assert found[0].message.startswith(f"{told}SageMaker's built-in object detection takes 0 to 2 without gaps")
        with pytest.warns(DetkitWarning, match=r"left behind: ids \(3\)$"):
            written = write_dataset(read_dataset(folder), tmp_path / "again", "sagemaker-json")
        assert codes(check(written, look="none")) == {}


def test_class_ids_of_sagemaker(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "drawn", num_images=41)[:40]
    manifest = write_dataset(data, tmp_path / "manifest", "manifest") / "output.manifest"
    text = manifest.read_text()
    manifest.write_text(text.replace('"class_id":1', '"class_id":5').replace('"1":', '"5":'))
    empty = [i for i, count in enumerate(data.boxes_per_image()) if not count]
    assert codes(check(manifest, look="none")) == {"class-ids": 1, **({"no-objects": 1} if empty else {})}
    jumpstart = write_dataset(data, tmp_path / "jumpstart", "jumpstart")
    assert codes(check(jumpstart, look="none")) == {}
    content = json.loads((jumpstart / "annotations.json").read_text())
    for box in content["annotations"]:
        box["category_id"] += 1
    (jumpstart / "annotations.json").write_text(json.dumps(content))
    assert codes(check(jumpstart, look="none", first_id=1)) == {"class-ids": 1}


def test_lines_without_a_box(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "drawn", num_images=40)
    data = data.keep_boxes(np.repeat(np.arange(40), data.boxes_per_image()) != 7)
    folder = write_dataset(data, tmp_path / "manifest", "manifest")
    (found,) = [f for f in check(folder, look="none") if f.code == "no-objects"]
    assert (found.severity, found.line) == ("note", 8)
    assert "no-objects" not in codes(check(write_dataset(data, tmp_path / "coco"), look="none"))


@pytest.mark.parametrize("format", ["coco", "manifest", "sagemaker-json"])
def test_corners_that_are_read_as_sizes(format: str, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "drawn", num_images=40)
    boxes = data.boxes.copy()
    boxes[:, 2:] += boxes[:, :2]
    folder = write_dataset(replace(data, boxes=boxes, area=area(boxes)), tmp_path / "out", format)
    (found,) = [f for f in check(folder, look="none") if f.code == "sizes-are-corners"]
    x0, y0, x1, y1 = data.boxes[found.box or 0].tolist()
    assert f"goes from {x0:g}, {y0:g} to {x1:g}, {y1:g}; write its width {x1 - x0:g} and height {y1 - y0:g}" in str(
        found
    )
    assert found.severity == "error"
    wrong = np.array(boxes)
    wrong[5, 2:] = wrong[5, :2] - 3  # another fault hides nothing
    (some,) = [f for f in check(replace(data, boxes=wrong), look="none") if f.code == "sizes-are-corners"]
    assert f"and {len(boxes) - 1} fit if" in some.message
    boxes = data.boxes.copy()
    boxes[5, 2] += 300  # one box outside is only that
    assert codes(check(replace(data, boxes=boxes), look="none")) == {"outside": 1}
    infinite = np.where(np.arange(len(boxes))[:, None] == 5, np.inf, data.boxes)
    assert codes(check(replace(data, boxes=infinite), look="none")) == {"non-finite": 1}


def test_images_made_smaller_after_annotation(tmp_path: Path) -> None:
    """Large boxes in the middle are right then, and look like corners; which of both it is, nobody knows."""
    data = tiny_dataset(tmp_path / "drawn", num_images=8)
    data = data.keep_boxes(np.isin(np.arange(len(data.boxes)), data.offsets[:-1]))
    boxes = np.array([[10.0 + i, 12, 105, 100] for i in range(len(data.boxes))])
    (found,) = [f for f in check(replace(data, boxes=boxes), look="none") if f.code == "sizes-are-corners"]
    assert found.severity == "warning"
    assert "unless the images were made smaller" in found.message


def test_limits_of_installed_backends_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dialect declares what its tool refuses; nothing of its backend but the declaration is loaded."""
    strict = Limits(who="the service of somebody", label_width=100)
    dialect = Dialect(name="somebody", summary="-", params=Params(), translate=lambda *_: (), limits=strict)

    class Guest:
        @hookimpl
        def detkit_backends(self) -> list[LocalBackend]:
            model = ModelSpec(params=Params(), summary="-")
            engine = "no_such_package.engine:Engine"
            return [LocalBackend(name="guest", engine=engine, models={"m": model}, install="-", dialects=(dialect,))]

    plugins.registry.cache_clear()
    try:
        plugins.registry().manager.register(Guest(), name="guest")
        found = [f for f in check(labelled({"cat": 30, "dog": 40}), look="none") if f.code == "sagemaker-label-width"]
    finally:
        plugins.registry.cache_clear()
    assert [f.message for f in found] == [
        "with 40 boxes, the service of somebody needs label_width=202, and stops at its default of 100"
    ]


# ------------------------------------------------------------------------------------------------- images


@pytest.fixture
def photos(tmp_path: Path) -> Callable[..., Dataset]:
    """Pictures with structure; ``photos(edited=f)`` adds an edited copy of the first as the last."""

    def make(edited: Callable[[Image.Image], Image.Image] | None = None, **splits: list[int]) -> Dataset:
        rng = np.random.default_rng(0)
        samples = []
        pictures = [
            Image.fromarray(rng.integers(0, 256, (12, 12, 3)).astype(np.uint8)).resize(
                (120, 120), Image.Resampling.BICUBIC
            )
            for _ in range(6)
        ]
        for i, picture in enumerate([*pictures, edited(pictures[0])] if edited else pictures):
            path = tmp_path / f"photo{i}.png"
            picture.save(path)
            boxes = np.array([[10.0 * k, 10, 10 * k + 8, 20] for k in range(10)])
            samples.append(
                Sample(
                    path=str(path), width=picture.width, height=picture.height, boxes=boxes / 2, names=("thing",) * 10
                )
            )
        return Dataset.from_samples(["thing"], samples, splits)

    return make


@pytest.mark.parametrize(
    ("edited", "alone", "across"),
    [
        (lambda p: p, "duplicate-image", "leaked-image"),
        (lambda p: p.resize((90, 90)), "near-duplicate", "near-duplicate-leak"),
        (lambda p: p.point(lambda v: min(255, v * 1.1 + 4)), "near-duplicate", "near-duplicate-leak"),
        (lambda p: p.transpose(Image.Transpose.ROTATE_90), "", ""),
    ],
)
def test_copies_and_near_copies(
    edited: Callable[[Image.Image], Image.Image], alone: str, across: str, photos: Callable[..., Dataset]
) -> None:
    assert codes(check(photos(edited))) == ({alone: 1} if alone else {})
    assert codes(check(photos(edited, train=[0, 1, 6], val=[2]))) == ({alone: 1} if alone else {})
    assert codes(check(photos(edited, train=[0, 1, 2], test=[5, 6]))) == ({across: 1} if across else {})
    both = {"train": [0, 1], "val": [2, 6], "trainval": [0, 1, 2, 6]}
    assert codes(check(photos(edited, **both))) == ({across: 1} if across else {})


def test_split_that_contains_others_leaks_nothing(photos: Callable[..., Dataset]) -> None:
    assert check(photos(train=[0, 1], val=[2], trainval=[0, 1, 2])) == []
    (found,) = check(photos(train=[0, 1], val=[1, 2]))
    assert (found.code, found.severity) == ("leaked-image", "error")
    assert "1 image(s) are in split train and in val, for example photo1.png" in found.message
    for inside in ([1], [0, 1]):
        assert codes(check(photos(train=[0, 1], test=inside))) == {"leaked-image": 1}
        assert codes(check(photos(train=[0, 1], val=inside))) == {"leaked-image": 1}


def test_every_copy_counts(photos: Callable[..., Dataset]) -> None:
    """The first copy may be in no split; the leak is between the two others."""
    data = photos(lambda picture: picture)
    Path(data.paths[1]).write_bytes(Path(data.paths[0]).read_bytes())
    data = replace(data, split_indices={"train": np.array([1]), "val": np.array([6])})
    assert codes(check(data)) == {"duplicate-image": 1, "leaked-image": 1}


def test_channels_and_flat_pictures(tmp_path: Path) -> None:
    samples = []
    for i, mode in enumerate(("L", "CMYK", "P", "RGB", "RGBA", "I;16")):
        path = tmp_path / f"{i}.{'tif' if mode == 'CMYK' else 'png'}"
        Image.new(mode, (40, 40), 200 if mode in {"L", "P", "I;16"} else 0).save(path)
        boxes = np.array([[k, 0.0, k + 3, 3] for k in range(2)])
        samples.append(Sample(path=str(path), width=40, height=40, boxes=boxes, names=("a",) * 2))
    found = check(Dataset.from_samples(["a"], samples))
    assert [Path(f.file).name for f in found if f.code == "channels"] == ["0.png", "1.tif", "4.png", "5.png"]
    assert "near-duplicate" not in codes(found), "pictures without structure all look alike"


def test_images_that_no_annotation_names(tmp_path: Path) -> None:
    coco = write_dataset(tiny_dataset(tmp_path / "drawn", num_images=40), tmp_path / "coco")
    Image.new("RGB", (9, 9)).save(coco / "images/left over.png")
    (found,) = check(coco)
    assert (found.code, Path(found.file).name) == ("orphan-image", "left over.png")
    assert check(read_dataset(coco)) == [], "of data in memory nobody knows where it should be"


# ------------------------------------------------------------------------------------------------- printing


def test_github_and_sarif(voc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(voc)
    edit(voc / "Annotations/002.xml", r"<name>\w+</name>", "<name>100%,\n a:b</name>")
    edit(voc / "Annotations/002.xml", r"<xmax>\d+</xmax>", "<xmax>999</xmax>")
    data, findings = checking.read_and_check(voc)
    lines = list(report.as_github(findings))
    error = next(line for line in lines if line.startswith("::error"))
    assert re.match(r"::error file=Annotations/002\.xml,line=\d+,col=\d+,title=outside::object 1 \(", error)
    assert all("\n" not in line for line in lines)
    sarif = report.as_sarif(findings)
    assert sarif["version"] == "2.1.0"
    result = next(r for r in sarif["runs"][0]["results"] if r["ruleId"] == "outside")
    location = result["locations"][0]["physicalLocation"]
    assert location["artifactLocation"]["uri"] == "Annotations/002.xml"
    assert location["region"]["startLine"] > 1
    assert {r["ruleId"] for r in sarif["runs"][0]["results"]} == {
        r["id"] for r in sarif["runs"][0]["tool"]["driver"]["rules"]
    }
    assert json.loads(json.dumps(report.as_json(data, findings)))["counts"]["outside"] == 1


def test_page_escapes_what_the_data_says(voc: Path, tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    data = replace(read_dataset(voc), classes=(evil, '" onerror="x'))
    findings = [Finding(code="x", severity="error", message=evil, file=evil)]
    write_overview(data, findings, tmp_path / "page.html", title=evil)
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert '" onerror="x' not in page
    assert "http" not in page.replace("https://json", ""), "the page fetches nothing"
    assert page.count("data:image/jpeg") == 16


def test_page_of_odd_data(tmp_path: Path) -> None:
    data = labelled({"a": 3})
    odd = replace(data, boxes=np.array([[np.nan, 0, 1, 1], [5.0, 5, 5, 5], [0, 0, 9999, 9]]))
    write_overview(odd, [], tmp_path / "odd.html", title="odd")
    none = data.keep_boxes(np.zeros(3, dtype=bool))
    write_overview(none, [], tmp_path / "none.html", title="none")
    assert "None." in (tmp_path / "none.html").read_text()


def test_near_duplicates_among_many() -> None:
    from detkit.checking import pictures

    rng = np.random.default_rng(0)
    facts = [
        imagefacts.ImageFacts(
            imagefacts.Header(9, 9, 1), str(i), 3, rng.integers(0, 256, 32).astype(np.uint8).tobytes()
        )
        for i in range(5000)
    ]
    facts.append(replace(facts[17], digest="copy"))
    assert list(pictures._near(facts)) == [(5000, {17: 0})]
