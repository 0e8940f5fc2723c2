"""What containers answer, as `Detections`; what is not an answer is an error that names the image."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit import wire
from detkit.detections import Detections
from detkit.images import read_image
from detkit_sagemaker.answers import Answers, Kind, MalformedAnswer, file_to_send, look, pixels_to_send

CLASSES = ("crack", "dent", "scratch")
SIZE = {"path": "a.jpg", "width": 200, "height": 100}


def answers(kind: Kind, **more: Any) -> Answers:
    return Answers(kind=kind, classes=CLASSES, **more)


def read(kind: Kind, answer: Any, **more: Any) -> Detections:
    return answers(kind, **more).read(json.dumps(answer).encode(), **SIZE)


def test_the_built_in_s_shares_become_pixels_and_its_indices_our_classes() -> None:
    found = read("object-detection", {"prediction": [[0, 0.2, 0, 0, 1, 1], [2.0, 0.9, 0.1, 0.2, 0.3, 0.4]]})
    assert found.names == ("scratch", "crack")
    assert found.boxes.tolist() == [pytest.approx([20, 20, 60, 40]), [0, 0, 200, 100]]
    assert (found.path, found.width, found.height, found.classes) == ("a.jpg", 200, 100, CLASSES)


def test_jumpstart_s_shares_become_pixels_and_its_labels_our_classes() -> None:
    answer = {
        "normalized_boxes": [[0.5, 0.5, 1.0, 1.0], [0.0, 0.0, 0.5, 0.5]],
        "classes": [1.0, 0.0],
        "scores": [0.6, 0.7],
        "labels": ["scratch", "dent", "crack"],  # another order than ours
    }
    found = read("jumpstart", answer)
    assert found.names == ("scratch", "dent")
    assert found.boxes.tolist() == [[0, 0, 100, 50], [100, 50, 200, 100]]
    del answer["labels"]
    assert read("jumpstart", answer).names == ("crack", "dent")
    assert read("jumpstart", {**answer, "labels": ["0", "1", "2"]}).names == ("crack", "dent")
    digits = Answers(kind="jumpstart", classes=("2", "0", "1"))
    found = digits.read(json.dumps({**answer, "labels": ["0", "1", "2"]}).encode(), path="a.jpg", width=100, height=100)
    assert found.names == tuple({"crack": "2", "dent": "0"}[name] for name in ("crack", "dent")), "by their numbers"


@pytest.mark.parametrize(
    ("kind", "answer"),
    [
        ("object-detection", {"prediction": []}),
        ("jumpstart", {"normalized_boxes": [], "classes": [], "scores": []}),
        ("object-detection", {"prediction": [[-1, -1, -1, -1, -1, -1], [-1, 0.5, 0, 0, 1, 1]]}),
    ],
)
def test_nothing_found_is_no_error(kind: Kind, answer: Any) -> None:
    found = read(kind, answer)
    assert (len(found), found.classes) == (0, CLASSES)


def test_the_floor_and_the_limit_are_kept() -> None:
    rows = [[0, score, 0, 0, 1, 1] for score in (0.1, 0.5, 0.9, 0.7)]
    assert read("object-detection", {"prediction": rows}, score_threshold=0.5).scores.tolist() == [0.9, 0.7, 0.5]
    assert read("object-detection", {"prediction": rows}, max_detections=2).scores.tolist() == [0.9, 0.7]


def test_boxes_that_reach_out_are_clipped_and_those_beside_the_image_are_none() -> None:
    found = read("object-detection", {"prediction": [[0, 0.5, -0.02, 0.5, 1.1, 0.6], [0, 0.6, -0.2, 0, -0.1, 1]]})
    assert found.boxes.tolist() == [pytest.approx([0, 50, 200, 60])]


@pytest.mark.parametrize(
    ("kind", "answer", "said"),
    [
        ("object-detection", {"predictions": []}, "'prediction' is missing"),
        ("object-detection", [], "expected a JSON object"),
        ("object-detection", {"prediction": [[0, 0.5, 0, 0, 1]]}, r"\(1, 5\); expected \(n, 6\)"),
        ("object-detection", {"prediction": [[0, 0.5, 0, 0, 1, 1], [0, 0.5]]}, "no table of numbers"),
        ("object-detection", {"prediction": [["crack", 0.5, 0, 0, 1, 1]]}, "no table of numbers"),
        ("object-detection", {"prediction": [[3, 0.5, 0, 0, 1, 1]]}, "class 3; expected a whole number from 0 to 2"),
        ("object-detection", {"prediction": [[0.5, 0.5, 0, 0, 1, 1]]}, "class 0.5"),
        ("object-detection", {"prediction": [[0, 1.5, 0, 0, 1, 1]]}, "score of 1.5"),
        ("object-detection", {"prediction": [[0, 0.5, 10, 20, 110, 90]]}, "lies outside; expected shares"),
        ("object-detection", {"prediction": [[0, 0.5, 0.9, 0, 0.1, 1]]}, "inverted"),
        ("jumpstart", {"normalized_boxes": [[0, 0, 1, 1]], "classes": [0], "scores": []}, "1 normalized_boxes, 0"),
        ("jumpstart", {"normalized_boxes": [], "scores": []}, "'classes' is missing"),
        ("jumpstart", {"error": "no GPU"}, "the container says: no GPU"),
        ("detkit", {"error": "no image", "images": []}, "the container says: no image"),
        ("detkit", {"classes": list(CLASSES), "images": []}, "0 images, one was sent"),
        ("detkit", {"classes": list(CLASSES)}, "KeyError"),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error_that_names_the_image(kind: Kind, answer: Any, said: str) -> None:
    with pytest.raises(MalformedAnswer, match=said) as raised:
        read(kind, answer)
    assert str(raised.value).startswith("a.jpg: ")


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"prediction": [[0, NaN, 0, 0, 1, 1]]}', b"\xff\xfe"])
@pytest.mark.parametrize("kind", ["object-detection", "jumpstart", "detkit"])
def test_what_is_no_json_is_an_error(kind: Kind, body: bytes) -> None:
    with pytest.raises(MalformedAnswer, match="a.jpg"):
        answers(kind).read(body, **SIZE)


def ours(*found: Detections) -> bytes:
    return wire.encode_detections(found)


def detections(classes: tuple[str, ...] = CLASSES, width: int = 200) -> Detections:
    return Detections.from_arrays(
        [[1, 2, 3, 4]], [0.5], [1], classes=classes, path="there.jpg", width=width, height=100
    )


def test_our_container_s_answer_is_taken_with_our_path() -> None:
    found = answers("detkit").read(ours(detections()), **SIZE)
    assert (found.path, found.names, found.boxes.tolist()) == ("a.jpg", ("dent",), [[1, 2, 3, 4]])
    unknown = answers("detkit").read(ours(detections()), path="s3://b/a.jpg", width=0, height=0)
    assert (unknown.width, unknown.height) == (200, 100)


def test_our_container_s_answer_for_several_is_told_apart() -> None:
    found = answers("detkit").read_many(
        ours(detections(), detections(width=50)), paths=["a", "b"], sizes=[(200, 100), (50, 100)]
    )
    assert [one.path for one in found] == ["a", "b"]
    with pytest.raises(MalformedAnswer, match="2 images, 1 were sent"):
        answers("detkit").read_many(ours(detections(), detections()), paths=["a"], sizes=[(200, 100)])


def test_an_answer_of_another_model_or_image_is_an_error() -> None:
    with pytest.raises(MalformedAnswer, match="its classes are"):
        answers("detkit").read(ours(detections(classes=("dent", "crack"))), **SIZE)
    with pytest.raises(MalformedAnswer, match="pixels"):
        answers("detkit").read(ours(detections(width=300)), **SIZE)


def file(format: str, orientation: int = 1, size: tuple[int, int] = (6, 4)) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    into = io.BytesIO()
    Image.fromarray(pixels).save(into, format, exif=exif)
    return into.getvalue()


@pytest.mark.parametrize("kind", ["detkit", "object-detection", "jumpstart"])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_file_is_sent_as_it_is(kind: Kind, format: str) -> None:
    content = file(format)
    assert file_to_send(kind, content, "a") == (content, 6, 4)


@pytest.mark.parametrize(("format", "orientation"), [("JPEG", 6), ("BMP", 1), ("WEBP", 1)])
def test_aws_is_sent_a_lossless_picture_of_what_it_may_not_read_or_turn(format: str, orientation: int) -> None:
    content = file(format, orientation)
    assert file_to_send("detkit", content, "a")[0] == content
    sent, width, height = file_to_send("object-detection", content, "a")
    assert sent.startswith(b"\x89PNG")
    assert np.array_equal(read_image(sent), read_image(content))
    assert (width, height) == ((4, 6) if orientation == 6 else (6, 4))


def test_pixels_are_sent_without_loss(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (31, 17, 3), dtype=np.uint8)
    assert np.array_equal(read_image(pixels_to_send(pixels)), pixels)
    assert np.array_equal(read_image(pixels_to_send(pixels[::2, ::-1])), pixels[::2, ::-1])
    (tmp_path / "a.png").write_bytes(pixels_to_send(pixels))
    assert look("object-detection", tmp_path / "a.png", "a") == (17, 31, True)
