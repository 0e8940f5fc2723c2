"""Pascal VOC: the conformance suite, the convention, and what real folders get wrong."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from detkit import read_dataset, write_dataset
from detkit.data import Dataset
from detkit.errors import DetkitWarning, InvalidData
from detkit.formats import vocxml
from detkit.formats.checks import check_annotations
from detkit.formats.findings import count_codes
from detkit.formats.imagefiles import read_headers
from detkit.formats.parallel import Helper
from detkit.formats.vocxml import Objects
from detkit.testing import FormatTests, tiny_dataset

if TYPE_CHECKING:
    from collections.abc import Iterable

REAL = Path(os.environ.get("DETKIT_DATA", Path(__file__).parents[2].parent / "shared/data"))


class TestConformance(FormatTests):
    format_name = "voc"


def an_object(name: str = "disc", box: Iterable[object] = (2, 3, 10, 12), more: str = "") -> str:
    tags = zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
    bndbox = "".join(f"<{tag}>{value}</{tag}>" for tag, value in tags)
    return f"<object><name>{name}</name>{more}<bndbox>{bndbox}</bndbox></object>"


def put(root: Path, name: str, *objects: str, filename: str | None = None, size: str | None = None) -> Path:
    """Write one picture of 40 x 30 pixels and its XML into a VOC folder."""
    picture, xml = root / "JPEGImages" / f"{name}.jpg", root / "Annotations" / f"{name}.xml"
    for file in (picture, xml):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30)).save(picture)
    size = "<size><width>40</width><height>30</height></size>" if size is None else size
    shown = f"{name}.jpg" if filename is None else filename
    xml.write_text(f"<annotation><filename>{shown}</filename>{size}{''.join(objects)}</annotation>")
    return xml


def codes(path: Path, **options: Any) -> dict[str, int]:
    with pytest.raises(InvalidData) as caught:
        read_dataset(path, "voc", **options)
    assert all(str(finding.file).startswith(str(path)) for finding in caught.value.findings)
    return count_codes(caught.value.findings)


def test_pixels_count_from_one(tmp_path: Path) -> None:
    put(tmp_path, "a", an_object(box=(1, 1, 40, 30)), an_object(box=(2.5, 3.25, 10, 12)))
    data = read_dataset(tmp_path)
    assert data.boxes.tolist() == [[0, 0, 40, 30], [1.5, 2.25, 10, 12]]
    assert read_dataset(tmp_path, origin=0).boxes[0].tolist() == [1, 1, 40, 30]


def test_a_zero_proves_the_whole_set_0_based(tmp_path: Path) -> None:
    put(tmp_path, "a", an_object(box=(0, 5, 40, 30)))
    put(tmp_path, "b", an_object(box=(2, 3, 10, 12)))
    with pytest.warns(DetkitWarning, match="1 of 2 boxes"):
        assert read_dataset(tmp_path).boxes.tolist() == [[0, 5, 40, 30], [2, 3, 10, 12]]
    assert read_dataset(tmp_path, origin=1).boxes.tolist() == [[-1, 4, 40, 30], [1, 2, 10, 12]]


def test_what_we_write_is_plain_voc(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    folder = write_dataset(replace(data, difficult=np.arange(len(data.boxes)) == 0), tmp_path / "out", "voc")
    for i, sample in enumerate(data):
        root = ElementTree.parse(folder / f"Annotations/{i:03}.xml").getroot()
        assert (folder / "JPEGImages" / str(root.findtext("filename"))).is_file()
        assert root.findtext("size/width") == str(sample.width)
        for item, name, box in zip(root.iter("object"), sample.names, sample.boxes.tolist(), strict=True):
            assert item.findtext("name") == name
            corners = [int(item.findtext(f"bndbox/{tag}") or "") for tag in ("xmin", "ymin", "xmax", "ymax")]
            assert corners == [box[0] + 1, box[1] + 1, box[2], box[3]]
    first = next(ElementTree.parse(folder / "Annotations/000.xml").getroot().iter("object"))
    assert first.findtext("difficult") == "1"


def test_unusual_but_right(tmp_path: Path) -> None:
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    put(tmp_path, "plain", an_object(" red cell ", more=f"{part}<difficult>Unspecified</difficult><pose>Left</pose>"))
    put(tmp_path, "sub/deep", an_object(more="<difficult>1</difficult>"), size="", filename="deep")
    put(tmp_path, "other name", filename="C:\\old\\other name.jpg", size="<size><width>0</width></size>")
    picture = tmp_path / "JPEGImages/renamed.PNG"
    Image.new("L", (7, 9)).save(picture)
    put(tmp_path, "by filename", an_object(box=(1, 1, 7, 9)), filename="renamed", size="").with_suffix(".xml")
    (tmp_path / "JPEGImages/by filename.jpg").unlink()
    data = read_dataset(tmp_path)
    assert data.image_ids == ("renamed.PNG", "other name.jpg", "plain.jpg", "sub/deep.jpg")
    assert data.sizes.tolist() == [[7, 9], [40, 30], [40, 30], [40, 30]]
    assert data.classes == ("disc", "red cell")
    assert data.difficult.tolist() == [False, False, True]
    assert data.box_extra == ({}, {"pose": "Left"}, {})
    assert not check_annotations(data, read_headers(data.paths))


@pytest.mark.parametrize("side", ["", "0", "-3", "1e300", "inf", "nan", "wide"])
def test_a_size_that_is_none_comes_from_the_file(tmp_path: Path, side: str) -> None:
    put(tmp_path, "a", size=f"<size><width>{side}</width><height>30</height></size>")
    assert read_dataset(tmp_path).sizes.tolist() == [[40, 30]]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "gb2312", "utf-8-sig"])
def test_encodings(tmp_path: Path, encoding: str) -> None:
    name = "缺陷" if encoding == "gb2312" else "Köder"
    xml = put(tmp_path, "a", an_object(name))
    declared = "utf-8" if encoding == "utf-8-sig" else encoding
    xml.write_bytes(f'<?xml version="1.0" encoding="{declared}"?>{xml.read_text("utf-8")}'.encode(encoding))
    assert read_dataset(tmp_path).classes == (name,)


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    put(tmp_path, "good", an_object())
    put(tmp_path, "cut").write_text("<annotation>\n  <object><name>disc</name>")
    put(tmp_path, "html").write_text("<html/>")
    put(tmp_path, "empty").write_text("")
    put(tmp_path, "text", an_object(box=(1, "wide", 3, "")))
    put(tmp_path, "bare", "<object><name>disc</name></object>", "<object><bndbox/></object>")
    put(tmp_path, "lost", an_object())
    (tmp_path / "JPEGImages/lost.jpg").unlink()
    found = codes(tmp_path)
    assert found == {"bad-box": 6, "malformed": 3, "no-box": 1, "no-name": 1, "missing-image": 1}
    with pytest.raises(InvalidData, match=r"cut\.xml: line 2, column \d+: not well-formed XML"):
        read_dataset(tmp_path)
    with pytest.raises(InvalidData, match=r"text\.xml: object 1 \(disc\): <ymin> is 'wide', not a number"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_entity_bomb(tmp_path: Path, encoding: str) -> None:
    lines = ['<!ENTITY a0 "ha">', *(f'<!ENTITY a{i} "{f"&a{i - 1};" * 10}">' for i in range(1, 10))]
    bomb = f'<?xml version="1.0"?><!DOCTYPE x [{"".join(lines)}]><annotation><filename>&a9;</filename></annotation>'
    put(tmp_path, "bomb").write_bytes(bomb.encode(encoding))
    put(tmp_path, "file").write_text(
        '<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]><annotation>&f;</annotation>'
    )
    assert codes(tmp_path) == {"malformed": 2}
    with pytest.raises(InvalidData, match=r"bomb\.xml: it declares a document type"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("filename", ["../../secret.jpg", "/secret.jpg", "..\\secret.jpg", "C:\\secret.jpg"])
@pytest.mark.parametrize("keep", [True, False])
def test_filename_cannot_lead_out(tmp_path: Path, filename: str, keep: bool) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.jpg")
    put(tmp_path / "set", "b", an_object())
    put(tmp_path / "set", "a", an_object(), filename=filename)
    if not keep:
        (tmp_path / "set/JPEGImages/a.jpg").unlink()
    found = codes(tmp_path / "set")
    assert found.pop("outside-folder") == 1
    assert set(found) <= {"unannotated"}


def test_class_order_and_typos(tmp_path: Path) -> None:
    put(tmp_path, "a", an_object("disc"), an_object("sqare"))
    assert codes(tmp_path, classes=("square", "disc")) == {"unknown-class": 1}
    with pytest.raises(InvalidData, match=r"object 2 \(sqare\): no class 'sqare'.* did you mean 'square'"):
        read_dataset(tmp_path, classes=("square", "disc"))
    assert read_dataset(tmp_path, classes=("sqare", "disc", "unused")).classes == ("sqare", "disc", "unused")


def test_images_without_xml(tmp_path: Path) -> None:
    put(tmp_path, "a", an_object())
    put(tmp_path, "b").unlink()
    assert codes(tmp_path) == {"unannotated": 1}
    assert read_dataset(tmp_path, unannotated="ignore").image_ids == ("a.jpg",)
    data = read_dataset(tmp_path, unannotated="negatives")
    assert data.image_ids == ("a.jpg", "b.jpg")
    assert data.sizes.tolist() == [[40, 30], [40, 30]]
    assert data.boxes_per_image().tolist() == [1, 0]


def move(folder: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(target)


def test_no_folder_of_annotations_is_left_out(tmp_path: Path) -> None:
    for split in ("train", "val"):
        put(tmp_path / split / "set", split, an_object())
        move(tmp_path / split / "set/JPEGImages", tmp_path / "all" / split)
        move(tmp_path / split / "set/Annotations", tmp_path / "all" / f"{split}_annotations")
    assert codes(tmp_path / "all") == {"unused-folder": 2}
    with pytest.raises(InvalidData, match=r"val_annotations: 1 XML files are not read: only .*train_annotations is"):
        read_dataset(tmp_path / "all", "voc", unannotated="ignore")


def test_no_folder_of_images_is_left_out(tmp_path: Path) -> None:
    put(tmp_path, "a", an_object())
    put(tmp_path, "empty").unlink()
    move(tmp_path / "JPEGImages/empty.jpg", tmp_path / "images2/neg.jpg")
    assert codes(tmp_path) == codes(tmp_path, unannotated="negatives") == {"unused-folder": 1}
    assert read_dataset(tmp_path, unannotated="ignore").image_ids == ("a.jpg",)


def test_split_folders_beside_other_xml(tmp_path: Path) -> None:
    for split in ("train", "valid", "test"):
        put(tmp_path / "from", split, an_object())
        for file in (tmp_path / "from").rglob(f"{split}.*"):
            move(file, tmp_path / "set" / split / file.name)
    (tmp_path / "set/meta.xml").write_text("<?xml version='1.0'?><!-- <annotation> --><annotations/>")
    data = read_dataset(tmp_path / "set")
    assert {name: len(part) for name, part in data.splits.items()} == {"train": 1, "valid": 1, "test": 1}
    (tmp_path / "set/test/test.xml").unlink()
    assert codes(tmp_path / "set") == {"unannotated": 1}
    assert list(read_dataset(tmp_path / "set", unannotated="negatives").splits) == ["test", "train", "valid"]


def test_filename_of_another_image(tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        put(tmp_path, name, an_object(), filename="a.jpg")
    with pytest.warns(DetkitWarning, match=r"2 XML files.*b\.xml names 'a\.jpg' and is taken for b\.jpg; ") as told:
        assert read_dataset(tmp_path).image_ids == ("a.jpg", "b.jpg", "c.jpg")
    assert len(told) == 1


def test_split_files(tmp_path: Path) -> None:
    for name in ("a", "b", "c 1"):
        put(tmp_path, name, an_object())
    main = tmp_path / "ImageSets/Main"
    main.mkdir(parents=True)
    (main / "train.txt").write_text("b\na.jpg\n\n")
    (main / "test.txt").write_text("c 1\n")
    (main / "disc_train.txt").write_text("a  1\nb -1\n")
    data = read_dataset(tmp_path)
    assert {name: part.image_ids for name, part in data.splits.items()} == {
        "test": ("c 1.jpg",),
        "train": ("b.jpg", "a.jpg"),
    }
    (main / "val.txt").write_text("a\ngone\n")
    assert codes(tmp_path) == {"missing-annotation": 1}
    with pytest.raises(InvalidData, match=r"val\.txt: line 2: 'gone' has no XML file"):
        read_dataset(tmp_path)


@pytest.mark.parametrize("layout", ["IMAGES+ANNOTATIONS", "one folder", "train/valid", "VOCdevkit/VOC2007", "xmls"])
def test_layouts(tmp_path: Path, layout: str) -> None:
    for name in ("a", "b"):
        put(tmp_path / "set", name, an_object())
    root = tmp_path / "set"
    pictures, annotations = root / "JPEGImages", root / "Annotations"
    if layout == "IMAGES+ANNOTATIONS":
        pictures.rename(root / "IMAGES")
        annotations.rename(root / "ANNOTATIONS")
    elif layout == "one folder":
        for file in [*pictures.iterdir(), *annotations.iterdir()]:
            file.rename(root / file.name)
        pictures.rmdir()
        annotations.rmdir()
    elif layout == "train/valid":
        for name, split in (("a", "train"), ("b", "valid")):
            (root / split).mkdir()
            (pictures / f"{name}.jpg").rename(root / split / f"{name}.jpg")
            (annotations / f"{name}.xml").rename(root / split / f"{name}.xml")
        pictures.rmdir()
        annotations.rmdir()
    elif layout == "VOCdevkit/VOC2007":
        (root / "SegmentationClass").mkdir()
        Image.new("L", (40, 30)).save(root / "SegmentationClass/a.png")
        (tmp_path / "kit/VOCdevkit").mkdir(parents=True)
        root = root.rename(tmp_path / "kit/VOCdevkit/VOC2007").parent.parent
    else:
        annotations.rename(root / "xmls")
        annotations.mkdir()
        (root / "xmls").rename(annotations / "xmls")
        (annotations / "trimaps").mkdir()
        Image.new("L", (40, 30)).save(annotations / "trimaps/a.png")
    data = read_dataset(root)
    folder = ("train/", "valid/") if layout == "train/valid" else ("", "")
    assert data.image_ids == (f"{folder[0]}a.jpg", f"{folder[1]}b.jpg")
    assert list(data.splits) == (["train", "valid"] if layout == "train/valid" else [])
    assert not check_annotations(data, read_headers(data.paths))


def test_names_that_would_collide(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    samples = [replace(data[0], image_id="sub/x.jpg"), replace(data[1], image_id="sub/x.png")]
    with pytest.raises(InvalidData, match=r"'sub/x\.jpg' and 'sub/x\.png' would share"):
        write_dataset(Dataset.from_samples(data.classes, samples), tmp_path / "out", "voc")
    samples[1] = replace(data[1], image_id="x.png")
    back = read_dataset(write_dataset(Dataset.from_samples(data.classes, samples), tmp_path / "out", "voc"))
    assert sorted(back.image_ids) == ["sub/x.jpg", "x.png"]


def test_what_voc_cannot_say(tmp_path: Path) -> None:
    data = replace(tiny_dataset(tmp_path / "all"), split_indices={"a/b": np.array([0])})
    with pytest.raises(InvalidData, match="cannot be called 'a/b'"):
        write_dataset(data, tmp_path / "out", "voc")
    first = tiny_dataset(tmp_path / "pictures")[0]
    for box, message in (([-1.0, 0, 5, 5], "begins at -1"), ([0, 0, np.nan, 5], "not finite")):
        data = Dataset.from_samples(("disc",), [replace(first, boxes=np.array([box]), names=("disc",))])
        with pytest.raises(InvalidData, match=message):
            write_dataset(data, tmp_path / "out", "voc")


@pytest.mark.skipif(not (REAL / "neu-det").is_dir(), reason="NEU-DET is not here")
def test_neu_det() -> None:
    data = read_dataset(REAL / "neu-det")
    assert (len(data), len(data.boxes), len(data.classes)) == (1800, 4189, 6)
    assert count_codes(check_annotations(data, read_headers(data.paths))) == {"duplicate": 3}


@pytest.mark.skipif(not (REAL / "bccd").is_dir(), reason="BCCD is not here")
def test_bccd(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = read_dataset(REAL / "bccd")
    assert (len(data), len(data.boxes)) == (364, 4888)
    assert data.boxes_per_class() == {"Platelets": 361, "RBC": 4155, "WBC": 372}
    assert list(data.splits) == ["test", "train", "trainval", "val"]
    assert [finding.file.rpartition("_")[2] for finding in check_annotations(data, read_headers(data.paths))] == [
        "00338.xml",
        "00343.xml",
    ]
    for name in ("voc", "coco"):
        back = read_dataset(write_dataset(data, tmp_path / name, name))
        assert len(back) == len(data)
        for split in data.splits:
            assert back.splits[split].digest() == data.splits[split].digest()


def odd_files(folder: Path) -> list[str]:
    """Files with every kind of fault, between good ones."""
    good = "<object><name>{}</name><pose>{}</pose><difficult>{}</difficult><bndbox>{}</bndbox></object>"
    corners = [
        "<xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8.5</ymax>",
        "<ymin>2</ymin><xmin>1</xmin><ymax>8</ymax><xmax>9</xmax>",
    ]
    head = f"<part><name>head</name><bndbox>{corners[1]}</bndbox></part>"
    objects = [
        good.format("disc", "Left", 0, corners[0]) + good.format("square", "Right", 1, corners[0]),
        good.format("disc", "", 0, corners[1]) * 2,
        good.format(" disc ", "Left", " 1 ", corners[0]) * 3,
        good.format("", "Left", 0, corners[0]) + good.format("disc", "Left", 0, corners[0]),
        good.format("disc", "Left", 0, "<xmin>a</xmin><ymin/><xmax>9</xmax>"),
        "<object><name>disc</name></object>",
        f"<object>{head}<name>disc</name><bndbox>{corners[0]}</bndbox></object>",
        "<object>",
        "",
    ]
    files = []
    for i in range(40):
        file = folder / f"{i:02}-\u00e4.xml"
        size = f"<size><width>{i}</width><height>1e400</height></size>"
        file.write_text(f"<annotation><filename>{i}.jpg</filename>{size}{objects[i % 9]}</annotation>")
        files.append(str(file))
    (folder / "gone.xml").mkdir()
    return [*files, str(folder / "gone.xml"), str(folder / "nowhere.xml")]


def columns(files: list[str]) -> list[object]:
    found = Objects(files)
    return [
        found.filenames,
        found.sizes.tolist(),
        found.counts.tolist(),
        [found.vocabulary[i] for i in found.names],
        found.corners.tolist(),
        found.difficult.tolist(),
        found.records.tolist(),
        found.extra,
        found.findings,
    ]


def test_helpers_read_what_one_process_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = odd_files(tmp_path)
    monkeypatch.setenv("DETKIT_WORKERS", "1")
    alone = columns(files)
    assert len(alone[-1]) == 27  # type: ignore[arg-type]
    answered: list[int] = []
    answer = Helper.answer
    monkeypatch.setattr(Helper, "answer", lambda helper: [answer(helper), answered.append(helper._process.wait())][0])
    monkeypatch.setattr(vocxml, "_FILES_PER_HELPER", 10)
    monkeypatch.setenv("DETKIT_WORKERS", "3")
    assert columns(files) == alone
    assert answered == [0, 0]


@pytest.mark.parametrize("executable", ["/nowhere/python", "/bin/false", "/bin/echo"])
def test_without_helpers_one_process_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, executable: str) -> None:
    files = odd_files(tmp_path)
    alone = columns(files)
    monkeypatch.setattr(vocxml, "_FILES_PER_HELPER", 10)
    monkeypatch.setenv("DETKIT_WORKERS", "3")
    monkeypatch.setattr("sys.executable", executable)
    assert columns(files) == alone
