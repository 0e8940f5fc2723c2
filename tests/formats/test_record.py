"""RecordIO packs as data sets: images stay in the pack, whoever reads them; what MXNet would choke on is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
import struct
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import detkit
from detkit import read_dataset, write_dataset
from detkit.columns import concatenate
from detkit.data import Sample
from detkit.drawing import draw
from detkit.errors import DetkitWarning, InvalidData, UsageError
from detkit.files import file_sha256
from detkit.formats.checks import prepare
from detkit.job import Job, Workspace
from detkit.recordio import RecordFile, RecordWriter, pack, read_index, unpack
from detkit.testing import FormatTests, tiny_dataset


class TestRecordIO(FormatTests):
    format_name = "recordio"
    carries_empty_images = False


@pytest.fixture
def data(tmp_path: Path) -> detkit.Dataset:
    """Seven small pictures with objects and one without."""
    return tiny_dataset(tmp_path / "pictures")


@pytest.fixture
def sound(data: detkit.Dataset) -> detkit.Dataset:
    return data.take(range(7))


def to_pack(data: detkit.Dataset, folder: Path, **options: object) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DetkitWarning)
        return write_dataset(data, folder, "recordio", **options)


def put(folder: Path, records: list[tuple[object, int, bytes]], classes: str = "disc\nsquare\n") -> Path:
    """Write (label, number, image) by hand."""
    folder.mkdir(exist_ok=True)
    with (folder / "train.rec").open("wb") as file:
        writer = RecordWriter(file)
        for label, number, image in records:
            writer.write(number, pack(label, number, image))  # type: ignore[arg-type]
    if classes:
        (folder / "classes.txt").write_text(classes)
    return folder


def codes(error: pytest.ExceptionInfo[InvalidData]) -> list[tuple[str, int | None]]:
    return [(finding.code, finding.record) for finding in error.value.findings]


def test_images_stay_in_the_pack(sound: detkit.Dataset, tmp_path: Path) -> None:
    """Names, paths, digests and pixels, all of them without a file."""
    folder = to_pack(sound, tmp_path / "out")
    assert sorted(path.name for path in folder.iterdir()) == ["classes.txt", "train.idx", "train.rec"]
    back = read_dataset(folder)
    assert back.image_ids == tuple(f"train/{i:08}.{('jpg', 'png')[i % 2]}" for i in range(7))
    offsets = list(read_index(folder / "train.idx").values())
    assert back.paths == tuple(f"{folder}/train.rec#{offset}" for offset in offsets)
    ready = prepare(back, on_invalid="raise")
    assert ready.image_digests == [file_sha256(Path(path)) for path in sound.paths]
    assert not ready.warnings
    assert not [finding for finding in detkit.check(back) if finding.severity == "error"]
    for one, other in zip(back, sound, strict=True):
        assert np.array_equal(one.image(), other.image())
    assert draw(back.paths[0]).size == draw(sound.paths[0]).size


def test_without_an_index(sound: detkit.Dataset, tmp_path: Path) -> None:
    folder = to_pack(sound, tmp_path / "out")
    whole = read_dataset(folder)
    (folder / "train.idx").unlink()
    assert read_dataset(folder).digest() == whole.digest()
    assert read_dataset(folder / "train.rec").digest() == whole.digest()


def test_an_index_of_another_pack(sound: detkit.Dataset, tmp_path: Path) -> None:
    folder = to_pack(sound, tmp_path / "out")
    other = to_pack(sound.take([3, 2, 1, 0]), tmp_path / "other")
    shutil.copy(other / "train.idx", folder / "train.idx")
    with pytest.warns(DetkitWarning, match="train.idx does not belong to train.rec: no record begins at byte"):
        assert len(read_dataset(folder)) == 7
    (folder / "train.idx").write_text("oops\n")
    with pytest.warns(DetkitWarning, match="train.idx: line 1: expected a key"):
        assert len(read_dataset(folder)) == 7


def test_out_of_the_pack_into_files(sound: detkit.Dataset, tmp_path: Path) -> None:
    """Another format gets the very bytes of the images, and so does another pack."""
    packed = read_dataset(to_pack(sound, tmp_path / "out"))
    for name in ("coco", "voc", "lst"):
        back = read_dataset(write_dataset(packed, tmp_path / name, name))
        assert back.image_ids == packed.image_ids
        assert [file_sha256(Path(path)) for path in back.paths] == [file_sha256(Path(path)) for path in sound.paths]
        assert np.array_equal(back.boxes, sound.boxes)
    again = to_pack(packed, tmp_path / "again")
    assert (again / "train.rec").read_bytes() == (tmp_path / "out/train.rec").read_bytes()
    (tmp_path / "out/train.rec").unlink()
    with pytest.raises(InvalidData, match=r"7 of 7 images are not there, for example .*train\.rec#0"):
        write_dataset(packed, tmp_path / "late")


def test_float32_is_exact_for_whole_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sides = [(int(w), int(h)) for w, h in rng.integers(3, 6000, (40, 2))] + [(1, 1), (65500, 7)]
    samples = []
    for i, (width, height) in enumerate(sides):
        Image.new("L", (width, height)).save(tmp_path / f"{i}.png")
        corners = np.sort(rng.integers(0, [[width + 1, height + 1]], (20, 2, 2)), axis=1).reshape(-1, 4)
        corners = corners[
            ((corners[:, 2:] - corners[:, :2]) > 0).all(axis=1) & ((corners[:, 2:] - corners[:, :2]) > 1).any(axis=1)
        ]
        if len(corners):
            boxes = corners.astype(np.float64)
            names = ("a",) * len(boxes)
            samples.append(
                Sample(path=str(tmp_path / f"{i}.png"), width=width, height=height, boxes=boxes, names=names)
            )
    data = detkit.Dataset.from_samples(["a"], samples)
    assert np.array_equal(read_dataset(to_pack(data, tmp_path / "out")).boxes, data.boxes)


def test_headers_and_objects_of_any_width(sound: detkit.Dataset, tmp_path: Path) -> None:
    image = Path(sound.paths[0]).read_bytes()
    box = [0.25, 0.25, 0.5, 0.5]
    labels = [
        [4, 5, 9, 9, 0, *box],
        [2, 6, 1, *box, 1, 0, *box, 0],
        [2, 5, 1, *box, *[-1.0] * 5],
        [2, 5, 1, *box, *[-1.0] * 7],
        [2, 6, 1, *box, 0],
        [2, 5, -1, 0, 0, 0, 0],
        [2, 5],
    ]
    folder = put(tmp_path / "out", [(label, i, image) for i, label in enumerate(labels)])
    back = read_dataset(folder)
    assert back.boxes_per_image().tolist() == [1, 2, 1, 1, 1, 0, 0]
    assert back.difficult.tolist() == [False, True, False, False, False, False]
    assert back.boxes[0].tolist() == [24, 24, 48, 48]
    assert [back.classes[label] for label in back.labels] == ["disc", "square", "disc", "square", "square", "square"]


def test_every_record_at_fault_is_told(sound: detkit.Dataset, tmp_path: Path) -> None:
    image = Path(sound.paths[0]).read_bytes()
    size = (8 + 24 + 7 * 4 + len(image) + 3) // 4 * 4
    good = [2.0, 5.0, 0.0, 0.25, 0.25, 0.5, 0.5]
    records: list[tuple[object, int, bytes]] = [
        (good, 0, image),
        (good, 0, image),
        ([1.0, *good[1:]], 2, image),
        ([2.0, 4.0, *good[2:]], 3, image),
        ([*good, 1.0], 4, image),
        ([2.0], 5, image),
        ([*good[:2], 7.0, *good[3:]], 6, image),
        ([*good[:3], 25.0, 25.0, 50.0, 50.0], 7, image),
        ([*good[:3], np.nan, 0.0, 1.0, 1.0], 8, image),
        (good, 9, b"no image"),
        (good, 10, image[:20]),
        (2.0, 11, image),
    ]
    folder = put(tmp_path / "out", records)
    with (folder / "train.rec").open("ab") as file:
        file.write(b"garbage")
    with pytest.raises(InvalidData) as caught:
        read_dataset(folder)
    assert sorted(codes(caught), key=lambda found: found[1] or 0) == [
        ("duplicate-index", 1),
        ("bad-header", 2),
        ("bad-header", 3),
        ("bad-width", 4),
        ("bad-header", 5),
        ("unknown-class", 6),
        ("not-normalised", 7),
        ("non-finite", 8),
        ("unreadable-image", 9),
        ("unreadable-image", 10),
        ("no-boxes-packed", 11),
        ("broken-record", 12),
    ]
    by_record = {finding.record: str(finding) for finding in caught.value.findings}
    assert by_record[1].startswith(f"{folder}/train.rec: record 1 at byte {size}: the number 0 is that of record 0")
    assert ", object 1: a corner lies at 50; " in by_record[7]
    assert f"{folder}/train.rec: record 9 at byte " in by_record[9]
    assert " (train/00000009.bin): cannot read image" in by_record[9]
    assert "amid a frame" in by_record[12]


def test_a_check_tells_record_and_byte(sound: detkit.Dataset, tmp_path: Path) -> None:
    image = Path(sound.paths[0]).read_bytes()
    good, wide = [2, 5, 0, 0.1, 0.1, 0.5, 0.5], [2, 5, 0, 0.1, 0.1, 0.5, 0.5, 1, 0.1, 0.1, 1.5, 0.5]
    folder = put(tmp_path / "out", [(good, 0, image), (wide, 1, image)])
    (found,) = [finding for finding in detkit.check(read_dataset(folder)) if finding.code == "outside"]
    offset = RecordFile(folder / "train.rec").offsets()[1]
    assert (found.file, found.record) == (f"{folder}/train.rec", 1)
    assert found.place == f"record 1 at byte {offset}, object 2 (square)"


def test_im2rec_without_pack_label(sound: detkit.Dataset, tmp_path: Path) -> None:
    images = [Path(path).read_bytes() for path in sound.paths]
    folder = put(tmp_path / "a", [(2.0, i, image) for i, image in enumerate(images)])
    with pytest.raises(
        InvalidData, match=r"7 record\(s\).*one number for a label, here 2; .*--pack-label --pass-through"
    ):
        read_dataset(folder)
    folder = put(tmp_path / "b", [(float(i), i, image) for i, image in enumerate(images)])
    with pytest.raises(InvalidData, match="a pack for classification"):
        read_dataset(folder)


def test_no_class_names(sound: detkit.Dataset, tmp_path: Path) -> None:
    folder = to_pack(sound, tmp_path / "out")
    (folder / "classes.txt").unlink()
    with pytest.raises(InvalidData, match=r"names for its classes \(ids 0 to 1 occur\)"):
        read_dataset(folder)
    assert read_dataset(folder, classes="a,b").classes == ("a", "b")


@pytest.mark.parametrize(
    ("box", "code"),
    [
        ([10, 10, 98, 20], "outside"),
        ([-2, 10, 20, 20], "outside"),
        ([10, 10, 10, 20], "zero-area"),
        ([20, 10, 10, 30], "inverted"),
        ([np.nan, 10, 20, 30], "non-finite"),
    ],
)
def test_boxes_that_mxnet_drops_or_learns(sound: detkit.Dataset, tmp_path: Path, box: list[float], code: str) -> None:
    boxes = sound.boxes.copy()
    boxes[2] = box
    faulty = replace(sound, boxes=boxes)
    with pytest.raises(InvalidData, match=code):
        write_dataset(faulty, tmp_path / "out", "recordio")
    assert not (tmp_path / "out").exists()
    with pytest.warns(DetkitWarning) as caught:
        folder = write_dataset(faulty, tmp_path / "out", "recordio", on_invalid="drop")
    assert f"left out 1 of 10 boxes: {code} 1" in {str(w.message) for w in caught}
    back = read_dataset(folder)
    assert np.array_equal(back.boxes, np.delete(sound.boxes, 2, axis=0))


def test_a_box_that_hangs_over_by_rounding(sound: detkit.Dataset, tmp_path: Path) -> None:
    boxes = sound.boxes.copy()
    boxes[0, 2] = 96.75
    back = read_dataset(to_pack(replace(sound, boxes=boxes), tmp_path / "out"))
    assert back.boxes[0, 2] == pytest.approx(96.75, abs=1e-4)


def test_dropping_the_last_box_makes_a_negative(sound: detkit.Dataset, tmp_path: Path) -> None:
    boxes = sound.boxes.copy()
    boxes[0] = 0
    faulty = replace(sound, boxes=boxes)
    with (
        pytest.warns(DetkitWarning, match="left out 1 of 10"),
        pytest.raises(InvalidData, match="000.jpg: there is no"),
    ):
        write_dataset(faulty, tmp_path / "out", "recordio", on_invalid="drop")


def test_images_without_objects(data: detkit.Dataset, tmp_path: Path) -> None:
    with pytest.warns(DetkitWarning) as caught:
        folder = write_dataset(data, tmp_path / "dropped", "recordio", negatives="drop")
    assert "left out 1 of 8 images, on which is no object" in {str(warning.message) for warning in caught}
    assert {warning.filename for warning in caught} == {__file__}
    assert len(read_dataset(folder)) == 7
    back = read_dataset(to_pack(data, tmp_path / "dummy", negatives="dummy"))
    assert back.boxes_per_image().tolist() == data.boxes_per_image().tolist()
    last = list(RecordFile(tmp_path / "dummy/train.rec"))[-1][1]
    np.testing.assert_array_equal(unpack(last)[0].label, [2, 5, -1, 0, 0, 0, 0])


def test_difficult(sound: detkit.Dataset, tmp_path: Path) -> None:
    marked = replace(sound, difficult=np.arange(len(sound.boxes)) % 2 == 1)
    assert np.array_equal(read_dataset(to_pack(marked, tmp_path / "a", difficult=True)).difficult, marked.difficult)
    with pytest.warns(DetkitWarning, match=r"file names \(7\), difficult \(5\)"):
        write_dataset(marked, tmp_path / "b", "recordio")


def test_images_that_mxnet_does_not_decode(sound: detkit.Dataset, tmp_path: Path) -> None:
    """Judged by the bytes; a name means nothing."""
    Image.open(sound.paths[2]).save(tmp_path / "pictures/a.webp")
    (tmp_path / "pictures/a.webp").rename(sound.paths[2])
    with pytest.raises(InvalidData, match="002.jpg: MXNet decodes JPEG and PNG only") as caught:
        write_dataset(sound, tmp_path / "out", "recordio")
    assert codes(caught) == [("not-packable", None)]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["recordio", "lst"])
def test_images_that_mxnet_does_not_turn(tmp_path: Path, name: str) -> None:
    """Boxes on the picture as displayed are refused; those on the stored pixels are MXNet's own."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (60, 20)).save(tmp_path / "turned.jpg", exif=exif)
    box = np.array([[2.0, 2, 10, 18]])
    sample = Sample(path=str(tmp_path / "turned.jpg"), width=20, height=60, boxes=box, names=("a",))
    with pytest.raises(InvalidData, match=r"turned.jpg: EXIF orientation 6 turns it, but not in MXNet"):
        write_dataset(detkit.Dataset.from_samples(["a"], [sample]), tmp_path / "out", name)
    stored = detkit.Dataset.from_samples(["a"], [replace(sample, width=60, height=20)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DetkitWarning)
        folder = write_dataset(stored, tmp_path / "out", name)
    back = read_dataset(folder)
    assert back.sizes.tolist() == [[20, 60]], "they are turned along when they are read"
    assert back.boxes.tolist() == [[2, 2, 18, 10]]
    assert prepare(back, on_invalid="raise").warnings == []


@pytest.mark.parametrize("orientation", range(2, 9))
def test_boxes_of_a_list_turn_with_their_image(tmp_path: Path, orientation: int) -> None:
    """Whatever EXIF does, also to a square, the box stays on the white spot."""
    for name, (width, height) in {"square.jpg": (40, 40), "long.jpg": (60, 40)}.items():
        exif = Image.Exif()
        exif[0x0112] = orientation
        picture = np.zeros((height, width, 3), dtype=np.uint8)
        picture[4:12, 8:16] = 255
        Image.fromarray(picture).save(tmp_path / name, exif=exif, quality=100)
    shares = {"square.jpg": (8 / 40, 4 / 40, 16 / 40, 12 / 40), "long.jpg": (8 / 60, 4 / 40, 16 / 60, 12 / 40)}
    lines = [f"{i}\t2\t5\t0\t" + "\t".join(map(repr, box)) + f"\t{n}\n" for i, (n, box) in enumerate(shares.items())]
    (tmp_path / "train.lst").write_text("".join(lines))
    (tmp_path / "classes.txt").write_text("spot\n")
    for sample in read_dataset(tmp_path / "train.lst"):
        x0, y0, x1, y1 = sample.boxes[0].astype(int)
        assert (x1 - x0, y1 - y0) == (8, 8)
        assert sample.image()[y0:y1, x0:x1].mean() > 200
        assert (sample.width, sample.height) == sample.image().shape[1::-1]


def test_an_image_in_two_splits(sound: detkit.Dataset, tmp_path: Path) -> None:
    split = replace(sound, split_indices={"train": np.array([0, 1, 2]), "trainval": np.arange(7)})
    with pytest.warns(DetkitWarning) as caught:
        folder = write_dataset(split, tmp_path / "out", "recordio")
    assert any("3 images are in more than one split and packed once for each" in str(w.message) for w in caught)
    assert len(read_dataset(folder)) == 10


def test_a_split_that_only_puts_others_together_is_not_packed_again(sound: detkit.Dataset, tmp_path: Path) -> None:
    splits = {"train": np.array([0, 1, 2]), "val": np.arange(3, 7), "trainval": np.arange(7)}
    with pytest.warns(DetkitWarning, match="file names"), pytest.warns(match="trainval: all of it is in other splits"):
        folder = write_dataset(replace(sound, split_indices=splits), tmp_path / "out", "recordio")
    back = read_dataset(folder)
    assert (len(back), sorted(back.split_indices)) == (7, ["train", "val"])


def test_other_files_are_not_recognised(tmp_path: Path) -> None:
    (tmp_path / "a.rec").write_bytes(b"something else")
    with pytest.raises(UsageError, match="none of the known formats"):
        read_dataset(tmp_path)


def test_a_pack_that_announces_too_much(tmp_path: Path) -> None:
    """A number in a file sizes nothing."""
    (tmp_path / "classes.txt").write_text("a\n")
    header = struct.pack("<IfQQ", 2**32 - 1, 0, 0, 0)
    with (tmp_path / "train.rec").open("wb") as file:
        RecordWriter(file).write(0, header)
    with pytest.raises(InvalidData, match="record 0 at byte 0: a label of 4294967295 numbers is announced"):
        read_dataset(tmp_path)


JOB = Job(
    backend="echo",
    engine="detkit_echo.engine:EchoEngine",
    model="memory",
    params={},
    options={},
    classes=["disc", "square"],
)


@pytest.fixture
def packed(sound: detkit.Dataset, tmp_path: Path) -> detkit.Dataset:
    split = replace(sound, split_indices={"train": np.arange(4), "val": np.arange(4, 7)})
    return read_dataset(to_pack(split, tmp_path / "packs"))


def test_run_directory(packed: detkit.Dataset, sound: detkit.Dataset, tmp_path: Path) -> None:
    """Packs are linked whole, images beside them stay files, and the copy is complete without the original."""
    mixed = concatenate([packed.take([5, 0, 1]), sound.take([6])])
    workspace = Workspace(tmp_path / "run")
    workspace.create(JOB)
    workspace.write_dataset("train", mixed, [hashlib.sha256(str(i).encode()).hexdigest() for i in range(4)])
    root = workspace.channel("train")
    assert sorted(path.name for path in root.iterdir() if path.name.startswith("images")) == [
        "images",
        "images-2.rec",
        "images.rec",
    ]
    assert (root / "images.rec").samefile(tmp_path / "packs/val.rec")
    assert (root / "images-2.rec").samefile(tmp_path / "packs/train.rec")
    assert [path.name for path in (root / "images").iterdir()] == ["006.jpg"]
    loaded = workspace.dataset("train")
    assert loaded is not None
    assert loaded.digest() == mixed.digest()
    assert all(Path(path).is_relative_to(root) for path in loaded.paths)
    names = [image["file_name"] for image in json.loads((root / "annotations.json").read_bytes())["images"]]
    assert names == list(mixed.image_ids)
    shutil.rmtree(tmp_path / "packs")
    moved = Workspace(workspace.path.rename(tmp_path / "moved")).dataset("train")
    assert moved is not None
    for one, expected in zip(moved, [5, 0, 1, 6], strict=True):
        assert np.array_equal(one.image(), sound[expected].image())


def test_run_directories_of_detkit_0_1(sound: detkit.Dataset, tmp_path: Path) -> None:
    """Their columns tell of no places: images lie in images/."""
    workspace = Workspace(tmp_path / "run")
    workspace.create(JOB)
    workspace.write_dataset("train", sound, [""] * 7)
    file = workspace.channel("train") / "columns.npz"
    with np.load(file) as columns:
        old = {name: columns[name] for name in columns if name != "places"}
        assert len(old) == len(columns) - 1
    np.savez(file, **old)
    loaded = workspace.dataset("train")
    assert loaded is not None
    assert loaded.paths == tuple(f"{workspace.channel('train')}/images/{name}" for name in sound.image_ids)


def test_a_model_from_a_pack(packed: detkit.Dataset, sound: detkit.Dataset, tmp_path: Path) -> None:
    """Train, predict, evaluate and draw; nothing of it knows of packs."""
    run = detkit.Trainer(model="echo/memory", epochs=2).fit(packed, name=str(tmp_path / "run"), quiet=True)
    assert run.model.seen()["train"] == [file_sha256(Path(path)) for path in sound.paths[:4]]
    assert not (run.workspace.channel("train") / "images").exists()
    with detkit.Predictor(run) as predictor:
        found = list(predictor.predict(packed))
        assert [one.path for one in found] == list(packed.paths)
        assert predictor(packed.paths[2]).names == sound[2].names
    assert draw(packed.paths[0], found[0]).size == (96, 96)
    plain = replace(sound, split_indices=packed.split_indices)
    from_files = detkit.Trainer(model="echo/memory", epochs=2).fit(plain, name=str(tmp_path / "plain"), quiet=True)
    assert run.metrics == from_files.metrics
    scores = detkit.evaluate(run, packed.splits["train"], allow_seen=True)
    assert dict(scores) == dict(detkit.evaluate(from_files, sound.take(range(4)), allow_seen=True))
    with pytest.raises(UsageError, match="4 of 7 images"):
        detkit.evaluate(run, sound)
