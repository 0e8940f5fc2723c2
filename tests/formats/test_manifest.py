"""SageMaker's augmented manifest: the conformance suite, Ground Truth's habits, and what real files get wrong."""

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
from detkit.data import Dataset, Sample
from detkit.errors import DetkitWarning, InvalidData, InvalidValue, UnknownName
from detkit.formats.findings import count_codes
from detkit.formats.manifest import FORMAT, ManifestOptions
from detkit.testing import FormatTests, tiny_dataset

Line = dict[str, Any]


class TestConformance(FormatTests):
    format_name = "manifest"


def metadata(**more: Any) -> Line:
    return {
        "objects": [{"confidence": 0.8}],
        "class-map": {"0": "dog"},
        "type": "groundtruth/object-detection",
        "human-annotated": "yes",
        "creation-date": "2018-10-18T22:18:13.527256",
        "job-name": "identify-dogs",
        **more,
    }


def line(name: str = "a.jpg", *boxes: Any, label: str = "pets", more: Line | None = None, **other: Any) -> Line:
    """One image of 40 x 30 pixels with a box of the class 0, or with others: (class_id, left, top, width, height)."""
    keys = ("class_id", "left", "top", "width", "height")
    found = [dict(zip(keys, box, strict=True)) for box in boxes or [(0, 1, 2, 10, 12)]]
    about = metadata(**{"objects": [{"confidence": 0.8}] * len(found), **(more or {})})
    value = {"image_size": [{"width": 40, "height": 30, "depth": 3}], "annotations": found}
    return {"source-ref": name, **other, label: value, f"{label}-metadata": about}


def put(root: Path, *lines: Line | str, name: str = "output.manifest", pictures: tuple[str, ...] = ("a.jpg",)) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        (root / picture).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30)).save(root / picture)
    (root / name).write_text("".join(f"{x if isinstance(x, str) else json.dumps(x)}\n" for x in lines))
    return root


def problems(path: Path, **options: Any) -> tuple[dict[str, int], str]:
    with pytest.raises(InvalidData) as caught:
        read_dataset(path, "manifest", **options)
    return count_codes(caught.value.findings), str(caught.value)


def test_plain(tmp_path: Path) -> None:
    data = read_dataset(put(tmp_path, line("a.jpg", (0, 1, 2, 10, 12), (0, 0.5, 0, 39.5, 30))))
    assert data.boxes.tolist() == [[1, 2, 11, 14], [0.5, 0, 40, 30]]
    assert (data.classes, data.image_ids, data.sizes.tolist()) == (("dog",), ("a.jpg",), [[40, 30]])
    assert data.paths == (f"{tmp_path}/a.jpg",)
    assert data.box_extra == ({"confidence": 0.8}, {"confidence": 0.8})
    assert data.extra == ({"creation-date": "2018-10-18T22:18:13.527256", "job-name": "identify-dogs"},)


def test_class_maps_are_united_and_keep_their_order(tmp_path: Path) -> None:
    put(
        tmp_path,
        line("a.jpg", (5, 1, 2, 3, 4), more={"class-map": {"5": "bone"}}),
        line("b.jpg", (0, 1, 2, 3, 4), more={"class-map": {"0": "dog", "2": "unused"}}),
        line("c.jpg", (5, 1, 2, 3, 4), (0, 1, 2, 3, 4), (11, 0, 0, 2, 2), more={"class-map": {"11": "cat"}}),
        line("d.jpg", (7, 1, 2, 3, 4), more={"class-map": {"7": "dog"}}),
    )
    data = read_dataset(tmp_path)
    assert data.classes == ("dog", "unused", "bone", "cat")
    assert [sample.names for sample in data] == [("bone",), ("dog",), ("bone", "dog", "cat"), ("dog",)]


def test_a_contradiction_names_both_lines(tmp_path: Path) -> None:
    cat = {"class-map": {"0": "cat"}}
    put(tmp_path, line("a.jpg"), "", line("b.jpg", more=cat), line("c.jpg", more=cat))
    codes, text = problems(tmp_path)
    assert codes == {"class-contradiction": 1}
    assert "line 3, class-map: class 0 is 'cat' here and 'dog' in line 1" in text


def test_an_id_without_a_name(tmp_path: Path) -> None:
    put(tmp_path, line("a.jpg"), line("b.jpg", (0, 1, 2, 3, 4), (3, 1, 2, 3, 4)))
    with pytest.raises(
        InvalidData, match=r"output\.manifest: line 2: class 3 has no name; those that have: 0"
    ) as caught:
        read_dataset(tmp_path)
    assert [finding.line for finding in caught.value.findings] == [2]
    assert caught.value.partial is not None
    assert caught.value.partial.boxes_per_image().tolist() == [1, 1]


def test_no_boxes_and_no_label(tmp_path: Path) -> None:
    empty = line("b.jpg", more={"class-map": {}, "objects": []})
    empty["pets"]["annotations"] = []
    failed: Line = {"source-ref": "c.jpg", "pets-metadata": {"failure-reason": "too dark"}}
    put(tmp_path, line("a.jpg"), empty, failed, {"source-ref": "d.jpg"}, pictures=("c.jpg", "d.jpg"))
    codes, text = problems(tmp_path)
    assert codes == {"unlabelled": 2}
    assert "line 3: has no label 'pets' (too dark)" in text
    assert "line 4: has no label 'pets'. in Python, read_dataset(..., unlabelled='negatives')" in text
    data = read_dataset(tmp_path, unlabelled="negatives")
    assert data.boxes_per_image().tolist() == [1, 0, 0, 0]
    assert data.sizes.tolist() == [[40, 30]] * 4
    assert read_dataset(tmp_path, unlabelled="ignore").image_ids == ("a.jpg", "b.jpg")


def test_of_several_labels_the_last_one_is_read_and_never_mixed(tmp_path: Path) -> None:
    chained = line("a.jpg", (0, 9, 9, 9, 9), label="adjusted-pets", more={"adjustment-status": "adjusted"})
    put(tmp_path, line("b.jpg"), line("a.jpg") | chained)
    with pytest.warns(DetkitWarning, match=r"'adjusted-pets', the last one, is read; 'pets' stay"):
        codes, text = problems(tmp_path)
    assert codes == {"unlabelled": 1}
    assert "line 1: has no label 'adjusted-pets'" in text
    with pytest.warns(DetkitWarning):
        data = read_dataset(tmp_path, unlabelled="ignore")
    assert data.boxes.tolist() == [[9, 9, 18, 18]]
    assert data.extra is not None
    assert data.extra[0]["adjustment-status"] == "adjusted"
    assert data.extra[0]["pets"]["annotations"][0]["left"] == 1
    assert read_dataset(tmp_path, label="pets").boxes.tolist() == [[1, 2, 11, 14]] * 2
    with pytest.raises(UnknownName, match="did you mean 'pets'"):
        read_dataset(tmp_path, label="petz")


def test_other_labels_travel_and_the_same_one_is_read_again(tmp_path: Path) -> None:
    put(tmp_path / "in", line("a.jpg") | line("a.jpg", (0, 9, 9, 9, 9), label="second"))
    with pytest.warns(DetkitWarning, match="'second', the last one"):
        data = read_dataset(tmp_path / "in")
    write_dataset(data, tmp_path / "out", "manifest", label="second")
    with pytest.warns(DetkitWarning, match="'second', the last one"):
        back = read_dataset(tmp_path / "out")
    assert (back.boxes.tolist(), back.extra) == (data.boxes.tolist(), data.extra)


def test_jobs_that_have_no_boxes(tmp_path: Path) -> None:
    verified = {
        "verified": 0,
        "verified-metadata": {"class-map": {"0": "good"}, "type": "groundtruth/label-verification"},
    }
    put(tmp_path / "verification", {"source-ref": "a.jpg", **verified})
    assert (
        "a verification job says whether boxes are right and has none itself" in problems(tmp_path / "verification")[1]
    )
    put(tmp_path / "both", line("a.jpg") | verified)
    with pytest.warns(DetkitWarning, match="'verified' says which boxes a verification job found wrong; this is kept"):
        assert read_dataset(tmp_path / "both").boxes_per_image().tolist() == [1]
    assert "'verified' is of the type" in problems(tmp_path / "both", label="verified")[1]
    kind = {"x-ref": "s3://b/SeqLabel.json", "x-ref-metadata": {"type": "groundtruth/video-object-detection"}}
    put(tmp_path / "video", {"source-ref": "s3://b/seq1.json", **kind})
    assert "sequences of video frames whose boxes lie in a SeqLabel.json" in problems(tmp_path / "video")[1]
    put(tmp_path / "sequence", line("s3://b/seq1.json"))
    assert problems(tmp_path / "sequence")[0] == {"video": 1}
    put(tmp_path / "masks", {"source-ref": "a.jpg", "m-ref-metadata": {"type": "groundtruth/semantic-segmentation"}})
    assert "expected 'groundtruth/object-detection'" in problems(tmp_path / "masks")[1]


def test_images_in_s3_keep_their_url(tmp_path: Path) -> None:
    urls = ("s3://bucket/set/x/a 1.jpg", "s3://bucket/set/y/b.jpg")
    put(tmp_path / "in", *map(line, urls))
    data = read_dataset(tmp_path / "in")
    assert (data.paths, data.image_ids) == (urls, ("x/a 1.jpg", "y/b.jpg"))
    local = tiny_dataset(tmp_path / "pictures", num_images=2)[0]
    mixed = Dataset.from_samples(("dog", "disc"), [*data, replace(local, names=("disc",) * len(local.names))])
    folder = write_dataset(mixed, tmp_path / "out", "manifest")
    lines = [json.loads(text) for text in (folder / "output.manifest").read_text().splitlines()]
    assert [found["source-ref"] for found in lines] == [*urls, "images/000.jpg"]
    assert [file.name for file in (folder / "images").iterdir()] == ["000.jpg"]
    assert read_dataset(folder).paths == (*urls, f"{folder}/images/000.jpg")


@pytest.mark.parametrize("begin", ["s3://bucket/set/", "/home/me/set/", "C:\\set\\", "file:///set/", "set/"])
@pytest.mark.parametrize("flat", [True, False])
def test_images_mapped_to_a_folder(tmp_path: Path, begin: str, flat: bool) -> None:
    names = ("a.jpg", "b.jpg") if flat else ("x/a.jpg", "y/b.jpg")
    put(tmp_path, line(f"{begin}x/a.jpg"), line(f"{begin}y/b.jpg"), pictures=tuple(f"local/{name}" for name in names))
    data = read_dataset(tmp_path, images="local")
    assert data.paths == tuple(f"{tmp_path}/local/{name}" for name in names)
    assert data.image_ids == ("x/a.jpg", "y/b.jpg")
    assert read_dataset(tmp_path, images=str(tmp_path / "local")).paths == data.paths
    with pytest.raises(InvalidData, match="there is no folder"):
        read_dataset(tmp_path, images="nowhere")


def test_two_images_of_one_name_are_not_mapped_to_one_file(tmp_path: Path) -> None:
    put(tmp_path, line("s3://bucket/x/a.jpg"), line("s3://bucket/y/a.jpg"), pictures=("local/a.jpg",))
    assert len(set(read_dataset(tmp_path, images="local").paths)) == 2


@pytest.mark.parametrize(
    "name", ["../a.jpg", "/etc/a.jpg", "x/../../a.jpg", "C:\\a.jpg", "http://x/a.jpg", "s3://b/../../a.jpg"]
)
def test_no_image_outside(tmp_path: Path, name: str) -> None:
    put(tmp_path, line("a.jpg"), line(name))
    codes, text = problems(tmp_path)
    assert codes == {"outside-folder": 1}
    assert "line 2: source-ref" in text


def test_everything_wrong_is_told_at_once(tmp_path: Path) -> None:
    nan = json.dumps(line("n.jpg", (0, float("nan"), 2, 3, 4)))
    lines = [
        line("a.jpg"),
        '{"source-ref" "b.jpg"}',
        "[1]",
        {"source": "text"},
        nan,
        line("c.jpg", ("0", 1, 2, 3, 4), (0, 1, 2, "3", 4), (0, 1, 2, None, 4), (-1, 1, 2, 3, 4), (True, 1, 2, 3, 4)),
        line("d.jpg", more={"objects": []}),
        line("e.jpg", more={"class-map": {"x": "dog", "1": 5, "²": "cat"}}),
        line("f.jpg", more={"class-map": []}),
        line("a.jpg"),
        {"source-ref": "g.jpg", "pets": 7},
        line("h.jpg", weather=[{"rain": float("inf")}]),
        '{"source-ref": "\\ud800.jpg"}',
        '{"source-ref": ' + "[" * 100_000,
        line("i.jpg", deep=json.loads("[" * 200 + "]" * 200)),
        line("j.jpg", (0, 10**400, 1, 2, 3)),
    ]
    codes, _ = problems(put(tmp_path, *lines))
    assert codes == {
        "malformed": 4,
        "bad-record": 4,
        "no-file-name": 1,
        "bad-box": 4,
        "bad-id": 5,
        "no-name": 1,
        "image-twice": 1,
        "non-finite": 1,
    }
    with pytest.raises(InvalidData) as caught:
        read_dataset(tmp_path)
    told = [str(finding) for finding in caught.value.findings]
    assert any("line 2, column 15: not JSON" in text for text in told)
    assert any("line 5, annotations[0]: left, top, width, height are nan, 2, 3, 4" in text for text in told)
    assert any("line 12, weather[0].rain: inf is no number" in text for text in told)


def test_splits_and_labels_of_their_own(tmp_path: Path) -> None:
    cat = {"class-map": {"0": "cat"}}
    put(tmp_path, line("a.jpg"), name="train.manifest")
    put(tmp_path, line("b.jpg", label="job-2", more=cat), name="val.jsonl")
    put(tmp_path, name="predictions.jsonl")
    data = read_dataset(tmp_path)
    assert {name: part[0].names for name, part in data.splits.items()} == {"train": ("dog",), "val": ("cat",)}
    assert data.classes == ("dog", "cat")
    assert read_dataset(tmp_path / "val.jsonl").image_ids == ("b.jpg",)


def test_a_ground_truth_job(tmp_path: Path) -> None:
    put(tmp_path / "manifests/output", line("s3://bucket/a.jpg"))
    put(tmp_path / "manifests/intermediate", line("s3://bucket/a.jpg"))
    assert read_dataset(tmp_path).paths == ("s3://bucket/a.jpg",)


def test_what_we_write_is_what_ground_truth_writes(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures")
    n = len(data.boxes)
    data = replace(
        data,
        extra=({"job-name": "mine", "weather": "rain"}, *({},) * 7),
        box_extra=({"confidence": 0.25, "left": "lost"}, *({},) * (n - 1)),
    )
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        with pytest.warns(DetkitWarning, match=r"left behind: left \(1\)$"):
            write_dataset(data, folder, "manifest", label="discs", prefix="s3://bucket/set/")
    written = (folders[0] / "output.manifest").read_bytes()
    assert written == (folders[1] / "output.manifest").read_bytes()
    lines = [json.loads(text) for text in written.splitlines()]
    first = lines[0]
    assert list(first) == ["source-ref", "weather", "discs", "discs-metadata"]
    assert first["source-ref"] == "s3://bucket/set/images/000.jpg"
    assert first["discs"]["image_size"] == [{"width": 96, "height": 96, "depth": 3}]
    x0, y0, x1, y1 = data.boxes[0].astype(int).tolist()
    assert first["discs"]["annotations"][0] == {
        "class_id": int(data.labels[0]), "left": x0, "top": y0, "width": x1 - x0, "height": y1 - y0
    }  # fmt: skip
    assert first["discs-metadata"]["job-name"] == "mine"
    assert first["discs-metadata"]["objects"] == [{"confidence": 0.25}]
    assert first["discs-metadata"]["human-annotated"] == "yes"
    for found in lines:
        assert found["discs-metadata"]["class-map"] == {"0": "disc", "1": "square"}
        assert len(found["discs-metadata"]["objects"]) == len(found["discs"]["annotations"])
    assert lines[-1]["discs"]["annotations"] == []
    back = read_dataset(folders[0], images="images")
    assert back.image_ids == data.image_ids
    assert np.array_equal(back[0].image(), data[0].image())


@pytest.mark.parametrize("label", ["", "a_b", "x-ref", "x-metadata", "a-metadata-b", "-a", "a-", "123", "a" * 128, "ä"])
def test_label_names_that_sagemaker_refuses(tmp_path: Path, label: str) -> None:
    with pytest.raises(InvalidValue, match="letters and digits"):
        write_dataset(tiny_dataset(tmp_path / "pictures"), tmp_path / "out", "manifest", label=label)


def test_prefix_is_a_url(tmp_path: Path) -> None:
    for prefix in ("bucket/x", "s3://", "s3:///x"):
        with pytest.raises(InvalidValue, match="s3://BUCKET/FOLDER"):
            write_dataset(tiny_dataset(tmp_path / prefix), tmp_path / "out", "manifest", prefix=prefix)


def test_lines_too_long_for_ground_truth(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "pictures", num_images=3)
    first: Sample = data[1]
    crowd = replace(
        first, boxes=np.tile([0.0, 0, 5, 5], (2500, 1)), names=("disc",) * 2500,
        area=None, difficult=None, crowd=None, records=None,
    )  # fmt: skip
    with pytest.warns(DetkitWarning, match=r"1 line\(s\) are longer than 100,000 characters.*: 2$"):
        write_dataset(Dataset.from_samples(data.classes, [data[0], crowd, data[2]]), tmp_path / "out", "manifest")


def test_sniffing(tmp_path: Path) -> None:
    (tmp_path / "predictions.jsonl").write_text('{"path": "a.jpg"}\n')
    assert not FORMAT.sniff(tmp_path)
    put(tmp_path, line(), name="x.jsonl")
    assert FORMAT.sniff(tmp_path)
    assert not FORMAT.sniff(tmp_path / "predictions.jsonl")


@given(st.data())
def test_mutated_files_raise_only_our_errors(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = tmp_path_factory.mktemp("mutated")
    content = bytearray("".join(json.dumps(line(f"images/{i}.jpg")) + "\n" for i in range(2)).encode())
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 9))] = data.draw(st.binary(max_size=4))
        if not content:
            return
    (folder / "output.manifest").write_bytes(content)
    with contextlib.suppress(InvalidData), warnings.catch_warnings():
        warnings.simplefilter("ignore", DetkitWarning)
        FORMAT.read(folder, ManifestOptions(unlabelled="negatives"))
