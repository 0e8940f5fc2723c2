"""YOLO: the conformance suite, layouts, and what real folders get wrong."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit import read_dataset, write_dataset
from detkit.data import Dataset, Sample
from detkit.errors import DetkitWarning, InvalidData, UsageError
from detkit.formats.yololayout import twin
from detkit.io import recognise
from detkit.testing import FormatTests, tiny_dataset

YAML = "train: images/train\nval: images/val\nnames: [disc, square]\n"


class TestConformance(FormatTests):
    format_name = "yolo"


def put(root: Path, image: str, *lines: str, size: tuple[int, int] = (40, 30), label: bool = True) -> None:
    """Write one picture and, beside it, its labels."""
    for file in (root / image, root / twin(image)):
        file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size).save(root / image)
    if label:
        (root / twin(image)).write_text("".join(f"{line}\n" for line in lines))


def two_splits(root: Path, *lines: str, yaml: str = YAML) -> Path:
    put(root, "images/train/a.jpg", *(lines or ("0 0.5 0.5 0.25 0.2",)))
    put(root, "images/val/b.jpg", "1 0.5 0.5 0.5 0.5")
    (root / "data.yaml").write_text(yaml)
    return root


def faults(path: Path, **options: Any) -> list[tuple[str, str, int | None]]:
    """Return code, file and line of every finding; the format is named, so that sniffing has no part in it."""
    with pytest.raises(InvalidData) as caught:
        read_dataset(path, "yolo", **options)
    found = caught.value.findings
    assert all(f.place == f"line {f.line}" for f in found if f.line is not None)
    return [(f.code, Path(f.file).name, f.line) for f in found]


def test_centre_and_size_become_corners(tmp_path: Path) -> None:
    data = read_dataset(two_splits(tmp_path))
    assert data.boxes.tolist() == [[15, 12, 25, 18], [10, 7.5, 30, 22.5]]
    assert [sample.names for sample in data] == [("disc",), ("square",)]
    assert {name: part.image_ids for name, part in data.splits.items()} == {"train": ("a.jpg",), "val": ("b.jpg",)}


def test_six_decimals_become_whole_pixels_and_three_do_not(tmp_path: Path) -> None:
    put(tmp_path, "images/a.png", "0 0.500326 0.500000 0.000651 0.000814", size=(1536, 1229))
    put(tmp_path, "images/b.png", "0 0.500 0.500 0.001 0.001", size=(1536, 1229))
    (tmp_path / "classes.txt").write_text("disc\n")
    data = read_dataset(tmp_path)
    assert data.boxes[0].tolist() == [768, 614, 769, 615]
    assert not (data.boxes[1] == np.rint(data.boxes[1])).any()


def test_any_box_comes_back_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    picture = tmp_path / "pictures/a.png"
    picture.parent.mkdir()
    Image.new("L", (1537, 1231)).save(picture)
    low = rng.uniform(1, 700, (3000, 2))
    boxes = np.concatenate([low, low + rng.uniform(0.5, 500, (3000, 2))], axis=1)
    boxes = np.concatenate([boxes[:1000].round(), boxes[1000:2000].round(4), boxes[2000:].astype(np.float32)])
    sample = replace(
        tiny_dataset(tmp_path / "tiny")[0], path=str(picture), width=1537, height=1231, boxes=boxes, image_id="a.png"
    )
    sample = replace(sample, names=("disc",) * 3000, area=None, difficult=None, crowd=None, records=None)
    data = Dataset.from_samples(("disc",), [sample])
    back = read_dataset(write_dataset(data, tmp_path / "out", "yolo"))
    assert np.array_equal(back.boxes, data.boxes)


def test_pixels_next_to_whole_ones_stay_where_they_are(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures").take([0])
    box = [[3.00001, 4.0, 20.00001, 30.00002]]
    data = replace(data, boxes=np.array(box), area=np.array([17 * 26.00002]))
    assert read_dataset(write_dataset(data, tmp_path / "out", "yolo")).boxes.tolist() == box


def test_outlines_become_boxes_and_masks(tmp_path: Path) -> None:
    two_splits(tmp_path, "0 0.25 0.1 0.75 0.1 0.5 0.6", "1 0.5 0.5 0.25 0.2", "1 0.1 0.1 0.6 0.1 0.6 0.5 0.1 0.5")
    data = read_dataset(f"{tmp_path}:train")
    assert data.boxes.tolist() == [[10, 3, 30, 18], [15, 12, 25, 18], [4, 3, 24, 15]]
    assert data.masks == ([[10, 3, 30, 3, 20, 18]], None, [[4, 3, 24, 3, 24, 15, 4, 15]])
    assert data.area.tolist() == [150, 60, 240]
    with pytest.warns(DetkitWarning, match=r"left behind: area \(1\), masks \(2\)"):
        write_dataset(data, tmp_path / "out", "yolo")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("0 0.5 0.5 0.25", "bad-columns"),
        ("0 0.5 0.5 0.25 0.2 0.1 0.1 0.9", "bad-columns"),
        ("0,0.5,0.5,0.25,0.2", "bad-columns"),
        ("0 0.5 0.5 0.25 0.2 0.98", "predictions"),
        ("0 0.5 0.5 0.25 wide", "bad-number"),
        ("0 0.5 0.5 0.25 nan", "bad-number"),
        ("0 0.5 0.5 0.25 1e999", "bad-number"),
        ("0 0.5 0.5 0.25 0_1", "bad-number"),
        ("0 50% 50% 25% 20%", "bad-number"),
        ("0 50 50 25 20", "not-normalised"),
        ("0 -0.5 0.5 0.25 0.2", "not-normalised"),
        ("0 20 15 300 200", "not-normalised"),
        ("0 0.1 0.1 0.9 0.1 0.5 1.9", "not-normalised"),
        ("0.5 0.5 0.5 0.25 0.2", "bad-class"),
        ("1e300 0.5 0.5 0.25 0.2", "bad-class"),
        ("2 0.5 0.5 0.25 0.2", "unknown-class"),
        ("-1 0.5 0.5 0.25 0.2", "unknown-class"),
    ],
)
def test_lines_that_are_wrong(tmp_path: Path, line: str, code: str) -> None:
    two_splits(tmp_path, "0 0.5 0.5 0.25 0.2", "", line)
    assert faults(tmp_path) == [(code, "a.txt", 3)]


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    two_splits(tmp_path, "0 1 2", "7 0.5 0.5 0.1 0.1", "0 0.5 0.5 0.25 0.2")
    (tmp_path / "labels/val/b.txt").write_bytes(b"0 0.5 0.5 0.2 0.2\n\xff\xfe\n")
    (tmp_path / "labels/val/gone.txt").write_text("0 0.5 0.5 0.2 0.2\n")
    (tmp_path / "labels/val/classes.txt").write_text("disc\nsquare\n")
    assert faults(tmp_path) == [
        ("bad-columns", "a.txt", 1),
        ("unknown-class", "a.txt", 2),
        ("not-text", "b.txt", 2),
        ("orphan-labels", "gone.txt", None),
    ]
    with pytest.raises(InvalidData) as caught:
        read_dataset(tmp_path)
    assert caught.value.partial is not None
    assert caught.value.partial.boxes.tolist() == [[15, 12, 25, 18]]


@pytest.mark.parametrize(
    "text", ["0.0 0.5 0.5 0.25 0.2\r\n\r\n", "\ufeff0\t0.5  0.5 0.25 0.2", "0 .5 5e-1 0.25 0.2 \n"]
)
def test_unusual_but_right(tmp_path: Path, text: str) -> None:
    two_splits(tmp_path)
    (tmp_path / "labels/train/a.txt").write_bytes(text.encode())
    assert read_dataset(f"{tmp_path}:train").boxes.tolist() == [[15, 12, 25, 18]]


def test_images_without_labels(tmp_path: Path) -> None:
    two_splits(tmp_path)
    put(tmp_path, "images/train/bare.png", label=False)
    data = read_dataset(tmp_path)
    assert data.image_ids == ("a.jpg", "bare.png", "b.jpg")
    assert data.boxes_per_image().tolist() == [1, 0, 1]
    assert read_dataset(tmp_path, unlabelled="ignore").image_ids == ("a.jpg", "b.jpg")
    assert faults(tmp_path, unlabelled="raise") == [("unlabelled", "bare.png", None)]


def test_a_split_without_labels_is_told_and_a_set_without_is_refused(tmp_path: Path) -> None:
    two_splits(tmp_path)
    (tmp_path / "labels/val/b.txt").unlink()
    with pytest.warns(DetkitWarning, match=r"no image of val \(1\) has a label file"):
        assert read_dataset(tmp_path).boxes_per_image().tolist() == [1, 0]
    (tmp_path / "labels").rename(tmp_path / "annotations")
    assert faults(tmp_path) == [("no-labels", tmp_path.name, None)]


def test_two_images_with_one_label_file(tmp_path: Path) -> None:
    two_splits(tmp_path)
    put(tmp_path, "images/train/a.png", label=False)
    assert faults(tmp_path) == [("shared-labels", "a.txt", None)]
    data = tiny_dataset(tmp_path / "pictures")
    samples = [replace(data[0], image_id="x.jpg"), replace(data[1], image_id="x.png")]
    with pytest.raises(InvalidData, match=r"'x\.jpg' and 'x\.png' would share"):
        write_dataset(Dataset.from_samples(data.classes, samples), tmp_path / "out", "yolo")


@pytest.mark.parametrize(
    "yaml",
    [
        "path: .\n" + YAML,
        "path: ''\nnc: 2\n" + YAML,
        "path: ../datasets/set\n" + YAML,
        "path: /home/somebody/set\n" + YAML,
        "path: images\ntrain: train\nval: val\nnames: {1: square, 0: disc}\ntest:\n",
        "train: ../images/train\nval: [./images/val]\nnames:\n- disc\n- square\nroboflow: {license: none}\n",
        "train: /home/somebody/else/images/train\nval: C:\\else\\images\\val\nnames: [disc, square]\n",
        "train: train.txt\nval: val.txt\nnames: ['disc', \"square\"]\n",
    ],
)
def test_ways_to_name_folders(tmp_path: Path, yaml: str) -> None:
    root = two_splits(tmp_path / "set", yaml=yaml)
    (root / "train.txt").write_text("./images/train/a.jpg\n")
    (root / "val.txt").write_text("/home/somebody/images/val/b.jpg\n\n")
    data = read_dataset(root)
    assert data.classes == ("disc", "square")
    assert [part.paths for part in data.splits.values()] == [
        (f"{root}/images/train/a.jpg",),
        (f"{root}/images/val/b.jpg",),
    ]
    assert [sample.names for sample in data] == [("disc",), ("square",)]
    assert read_dataset(root / "data.yaml").boxes.tolist() == data.boxes.tolist()


@pytest.mark.parametrize(
    ("yaml", "expected"),
    [
        ("nc: 3\n" + YAML, [("wrong-count", 1)]),
        ("nc: many\n" + YAML, [("wrong-count", 1)]),
        (YAML.replace("square", "disc"), [("duplicate-name", 3)]),
        (YAML.replace("square", "''"), [("no-name", 3)]),
        (YAML.replace("square", "[square]"), [("no-name", 3)]),
        (YAML.replace("[disc, square]", "{0: disc, 2: square}"), [("bad-names", 3)]),
        (YAML.replace("[disc, square]", "{0: disc, one: square}"), [("bad-names", 3)]),
        (YAML.replace("[disc, square]", "disc, square"), [("bad-names", 3)]),
        (YAML + "val: images/val\n", [("duplicate-key", 4)]),
        (YAML + "test: images/test\n", [("missing-folder", 4)]),
        (YAML + "test: ../../etc\n", [("missing-folder", 4)]),
        (YAML + "test: images/../../etc\n", [("outside-folder", 4)]),
        (YAML + "test: /etc\n", [("outside-folder", 4)]),
        (YAML + "test: data.yaml\n", [("missing-folder", 4)]),
        (YAML + "test: {a: b}\n", [("malformed", 4)]),
        ("path: /etc\n" + YAML, [("outside-folder", 1)]),
        ("path: ../other\n" + YAML, [("outside-folder", 1)]),
        ("path: other\n" + YAML, [("outside-folder", 1)]),
        (YAML + "kpt_shape: [17, 3]\n", [("key-points", 4)]),
        (YAML + "test: [\n", [("malformed", 5)]),
        (YAML + "x: " + "[" * 9999, [("malformed", None)]),
        ("- disc\n", [("malformed", 1)]),
        ("", [("malformed", 1)]),
        ("a: &a [x, x]\nb: &b [*a, *a]\n" + YAML.replace("[disc, square]", "[*b, *b]"), [("no-name", 2)]),
        ("a: &a [*a]\n" + YAML.replace("[disc, square]", "*a"), [("no-name", 1)]),
    ],
)
def test_descriptions_that_are_wrong(tmp_path: Path, yaml: str, expected: list[tuple[str, int | None]]) -> None:
    root = two_splits(tmp_path / "set", "0 0.5 0.5 0.25 0.2", yaml=yaml)
    (tmp_path / "other").mkdir()
    found = faults(root / "data.yaml")
    assert [(code, line) for code, file, line in found if file == "data.yaml"][: len(expected)] == expected


def test_nothing_in_a_description_is_run(tmp_path: Path) -> None:
    command = f"!!python/object/apply:os.system ['touch {tmp_path}/hacked', square]"
    two_splits(tmp_path, yaml=YAML.replace("[disc, square]", command))
    assert read_dataset(tmp_path).classes == (f"touch {tmp_path}/hacked", "square")
    assert not (tmp_path / "hacked").exists()


def test_lists_that_are_wrong(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30)).save(tmp_path / "secret.jpg")
    root = two_splits(tmp_path / "set", yaml="train: train.txt\nval: images/val\nnames: [disc, square]\n")
    lines = [
        "./images/train/a.jpg",
        "../secret.jpg",
        "gone.jpg",
        "images/train/a.jpg",
        "/etc/passwd",
        "a\0b",
        "x" * 999,
    ]
    (root / "train.txt").write_text("\n".join(lines))
    expected = ["outside-folder", "missing-image", "image-twice", "outside-folder", "outside-folder", "missing-image"]
    assert faults(root) == [(code, "train.txt", line) for line, code in enumerate(expected, start=2)]


def test_one_place_twice_is_data_in_one_piece(tmp_path: Path) -> None:
    data = read_dataset(two_splits(tmp_path, yaml="train: images\nval: images\nnames: [disc, square]\n"))
    assert data.image_ids == ("train/a.jpg", "val/b.jpg")
    assert not data.split_indices


def test_one_name_in_two_splits(tmp_path: Path) -> None:
    two_splits(tmp_path)
    put(tmp_path, "images/val/a.jpg", "1 0.5 0.5 0.5 0.5")
    assert read_dataset(tmp_path).image_ids == ("train/a.jpg", "val/a.jpg", "val/b.jpg")


def test_an_image_by_folder_and_by_list(tmp_path: Path) -> None:
    two_splits(tmp_path, yaml=YAML + "test: test.txt\n")
    (tmp_path / "test.txt").write_text("images/train/a.jpg\n")
    data = read_dataset(tmp_path)
    assert data.image_ids == ("train/a.jpg", "val/b.jpg")
    assert data.splits["test"].image_ids == ("train/a.jpg",)


@pytest.mark.parametrize("names", ["classes.txt", "obj.names", "labels/classes.txt", None])
def test_folders_without_a_description(tmp_path: Path, names: str | None) -> None:
    put(tmp_path, "images/a.jpg", "1 0.5 0.5 0.5 0.5")
    put(tmp_path, "images/sub/b.jpg")
    if names is None:
        with pytest.raises(InvalidData, match=r"no names for its classes.*classes\.txt"):
            read_dataset(tmp_path)
        data = read_dataset(tmp_path, classes=["disc", "square"])
    else:
        (tmp_path / names).write_text("disc\nsquare\n")
        data = read_dataset(tmp_path)
    assert data.image_ids == ("a.jpg", "sub/b.jpg")
    assert data[0].names == ("square",)
    assert not data.split_indices


def test_two_files_of_names(tmp_path: Path) -> None:
    put(tmp_path, "images/a.jpg", "0 0.5 0.5 0.5 0.5")
    (tmp_path / "obj.names").write_text("disc\n")
    (tmp_path / "coco.names").write_text("person\n")
    with pytest.raises(InvalidData, match=r"coco\.names, obj\.names; keep one"):
        read_dataset(tmp_path)
    (tmp_path / "classes.txt").write_text("square\n")
    assert read_dataset(tmp_path).classes == ("square",)


@pytest.mark.parametrize("layout", ["train/images", "images/train"])
def test_splits_without_a_description(tmp_path: Path, layout: str) -> None:
    for split in ("train", "valid", "test"):
        put(tmp_path, f"{layout.replace('train', split)}/a.jpg", "0 0.5 0.5 0.5 0.5")
    (tmp_path / "classes.txt").write_text("disc\n")
    data = read_dataset(tmp_path)
    assert {name: part.image_ids for name, part in data.splits.items()} == {
        name: (f"{name}/a.jpg",) for name in ("test", "train", "valid")
    }


def test_two_descriptions(tmp_path: Path) -> None:
    two_splits(tmp_path)
    (tmp_path / "data.yaml").rename(tmp_path / "one.yaml")
    assert recognise(tmp_path).name == "yolo"
    (tmp_path / "two.yaml").write_text(YAML)
    with pytest.raises(InvalidData, match=r"one\.yaml, two\.yaml; name the one to read"):
        read_dataset(tmp_path)
    assert len(read_dataset(tmp_path / "two.yaml")) == 2


def test_an_image_turned_by_exif_is_measured_as_displayed(tmp_path: Path) -> None:
    two_splits(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "images/train/a.jpg", exif=exif)
    data = read_dataset(f"{tmp_path}:train")
    assert data.sizes.tolist() == [[30, 40]]
    assert data.boxes.tolist() == [[11.25, 16, 18.75, 24]]


def test_an_image_that_cannot_be_measured(tmp_path: Path) -> None:
    two_splits(tmp_path)
    (tmp_path / "images/train/a.jpg").write_bytes(b"none")
    assert faults(tmp_path) == [("unreadable-image", "a.txt", None)]


def test_what_we_write_is_what_trainers_read(tmp_path: Path) -> None:
    import yaml

    data = tiny_dataset(tmp_path / "pictures")
    folder = write_dataset(data, tmp_path / "one", "yolo")
    assert yaml.safe_load((folder / "data.yaml").read_text()) == {
        "train": "images",
        "val": "images",
        "nc": 2,
        "names": {0: "disc", 1: "square"},
    }
    assert (folder / "labels/007.txt").read_text() == ""
    label, *shares = (folder / "labels/000.txt").read_text().split()
    cx, cy, w, h = (float(share) * 96 for share in shares)
    assert data[0].names == (("disc", "square")[int(label)],)
    assert np.allclose([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2], data[0].boxes[0])

    splits = {"train": np.array([0, 1]), "val": np.array([2])}
    folder = write_dataset(replace(data, split_indices=splits), tmp_path / "apart", "yolo")
    described = yaml.safe_load((folder / "data.yaml").read_text())
    assert {key: described[key] for key in ("train", "val", "splits")} == {
        "train": "images/train",
        "val": "images/val",
        "splits": {"unsplit": "images/unsplit"},
    }
    assert (folder / "images/train/000.jpg").is_file()
    assert (folder / "labels/val/002.txt").is_file()

    splits["mini"] = np.array([1, 0])
    folder = write_dataset(replace(data, split_indices=splits), tmp_path / "shared", "yolo")
    assert yaml.safe_load((folder / "data.yaml").read_text())["train"] == "train.txt"
    assert (folder / "mini.txt").read_text() == "./images/001.png\n./images/000.jpg\n"


@pytest.mark.parametrize("names", [("no", "1.10", "~", "a: b"), ("Köder 缺陷 🙂", '"', "- x", "\x7f")])
def test_class_names_that_yaml_would_take_for_something_else(tmp_path: Path, names: tuple[str, ...]) -> None:
    data = replace(tiny_dataset(tmp_path / "pictures"), classes=names)
    assert read_dataset(write_dataset(data, tmp_path / "out", "yolo")).classes == names
    (tmp_path / "out/data.yaml").write_text("train: images\nval: images\nnames: [no, 1.10, yes, 007]\n")
    assert read_dataset(tmp_path / "out").classes == ("no", "1.10", "yes", "007")


@pytest.mark.parametrize("image_id", ["a.txt", ".a.jpg", "sub/.b/a.jpg", "a\nb.jpg", " a.jpg"])
def test_image_names_that_readers_would_not_find(tmp_path: Path, image_id: str) -> None:
    data = tiny_dataset(tmp_path / "pictures").take([0])
    with pytest.raises(InvalidData, match="rename it"):
        write_dataset(replace(data, image_ids=(image_id,)), tmp_path / "out", "yolo")


def test_folders_called_images_within_a_name(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures").take([0, 1])
    data = replace(data, image_ids=("images/a.jpg", "x/images/b.png"))
    overlapping = {"train": np.array([0]), "val": np.array([0, 1])}
    for splits in ({}, {"train": np.array([0]), "val": np.array([1])}, overlapping):
        folder = write_dataset(
            replace(data, split_indices=splits), tmp_path / f"out-{len(splits)}-{id(splits)}", "yolo"
        )
        back = read_dataset(folder)
        assert back.image_ids == data.image_ids
        assert np.array_equal(back.boxes, data.boxes)
        assert set(back.split_indices) == set(splits)


def test_boxes_that_yolo_cannot_say(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures").take([0])
    for box, message in (([-96.0, 0, 5, 5], "lies beyond"), ([0, 0, np.nan, 5], "not finite")):
        with pytest.raises(InvalidData, match=message):
            write_dataset(replace(data, boxes=np.array([box])), tmp_path / "out", "yolo")
    over = replace(data, boxes=np.array([[-0.5, 0, 96, 96.25]]), area=np.array([96.5 * 96.25]))
    assert read_dataset(write_dataset(over, tmp_path / "out", "yolo")).boxes.tolist() == [[-0.5, 0, 96, 96.25]]


def test_sniffs_no_other_yaml_or_text(tmp_path: Path) -> None:
    put(tmp_path, "images/a.jpg", "a picture of a disc")
    (tmp_path / "compose.yaml").write_text("services: {train: {}}\n")
    with pytest.raises(UsageError, match="none of the known formats"):
        recognise(tmp_path)
    (tmp_path / "labels/a.txt").write_text("0 0.5 0.5 0.5 0.5\n")
    assert recognise(tmp_path).name == "yolo"


def test_one_split_of_all_images_stays_one(tmp_path: Path) -> None:
    data = replace(tiny_dataset(tmp_path / "pictures"), split_indices={"train": np.arange(8)})
    back = read_dataset(write_dataset(data, tmp_path / "out", "yolo"))
    assert {name: list(at) for name, at in back.split_indices.items()} == {"train": list(range(8))}


def test_shares_are_those_of_the_image(tmp_path: Path) -> None:
    """Whoever reads them takes the size from the file, so a size that differs would move every box."""
    data = tiny_dataset(tmp_path / "pictures").take([0, 1])
    with pytest.raises(InvalidData, match="the annotation says 48x96, the image is 96x96"):
        write_dataset(replace(data, sizes=np.array([[48, 96], [96, 96]])), tmp_path / "out", "yolo")
    assert not (tmp_path / "out").exists()
    unknown = replace(data, sizes=np.array([[0, 0], [96, 96]]))
    assert np.array_equal(read_dataset(write_dataset(unknown, tmp_path / "out", "yolo")).boxes, data.boxes)


def test_boxes_turn_with_the_image(tmp_path: Path) -> None:
    """EXIF shows the picture on its side, and its box was drawn on the stored pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20), "grey").save(tmp_path / "a.jpg", exif=exif)
    stored = Sample(
        path=str(tmp_path / "a.jpg"), width=40, height=20, boxes=np.array([[2.0, 3, 12, 8]]), names=("disc",)
    )
    back = read_dataset(write_dataset(Dataset.from_samples(["disc"], [stored]), tmp_path / "out", "yolo"))
    assert back.sizes.tolist() == [[20, 40]]
    assert back.boxes.tolist() == [[12, 2, 17, 12]]
