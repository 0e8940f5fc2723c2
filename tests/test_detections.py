"""`Detections` of our own, and out of the arrays of others."""

from __future__ import annotations

import sys
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hotcoco import mask as rle

from detkit.detections import COLUMNS, Detections, as_detections, to_pandas
from detkit.errors import ClassMismatch, DetkitError, InvalidData, UsageError
from detkit.wire import decode_detections, encode_detections

NAMES = ("crazing", "patches", "scratches")
BOXES = np.array([[0, 0, 10, 20], [5, 5, 6, 7], [1, 2, 3, 4]], dtype=np.float32)
SCORES = np.array([0.25, 0.75, 0.25], dtype=np.float32)
LABELS = [2, 0, 1]


def blobs(n: int = 3, height: int = 5, width: int = 7) -> np.ndarray:
    return np.random.default_rng(0).random((n, height, width)) > 0.5


def test_the_best_comes_first_and_equals_keep_their_order() -> None:
    found = Detections.from_arrays(BOXES, SCORES, LABELS, classes=NAMES, path="a.jpg", width=30, height=20)
    assert (found.path, found.width, found.height, found.classes) == ("a.jpg", 30, 20, NAMES)
    assert found.scores.tolist() == [0.75, 0.25, 0.25]
    assert found.names == ("crazing", "scratches", "patches")
    assert found.boxes.tolist() == BOXES[[1, 0, 2]].tolist()
    assert (found.boxes.dtype, found.labels.dtype, found.scores.dtype) == (np.float64, np.int64, np.float64)
    assert found.masks is None


def test_names_tell_the_classes() -> None:
    names = [NAMES[label] for label in LABELS]
    assert Detections.from_arrays(BOXES, SCORES, names=names, classes=NAMES).labels.tolist() == [0, 2, 1]
    alone = Detections.from_arrays(BOXES, SCORES, names=names)
    assert alone.classes == ("scratches", "crazing", "patches")
    assert alone.names == ("crazing", "scratches", "patches")
    with pytest.raises(ClassMismatch, match="unknown here: 'patch'.*did you mean 'patches'"):
        Detections.from_arrays(BOXES[:1], SCORES[:1], names=["patch"], classes=NAMES)


def test_one_class_needs_no_labels() -> None:
    assert Detections.from_arrays(BOXES, SCORES, classes=["defect"]).names == ("defect",) * 3
    with pytest.raises(UsageError, match="3 boxes without labels or names, and 3 classes"):
        Detections.from_arrays(BOXES, SCORES, classes=NAMES)


@pytest.mark.parametrize("none", [[], np.zeros((0, 4)), np.zeros(0, np.float32)])
def test_nothing_found(none: Any) -> None:
    found = Detections.from_arrays(none, [], [], classes=NAMES, masks=np.zeros((0, 4, 4), bool))
    assert found.boxes.shape == (0, 4)
    assert (len(found), found.names, found.masks) == (0, (), ())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"boxes": BOXES[:2]}, InvalidData, r"boxes of shape \(2, 4\) and scores of shape \(3,\); expected \(n, 4\)"),
        ({"boxes": BOXES[:, :3]}, InvalidData, r"boxes of shape \(3, 3\)"),
        ({"scores": SCORES[:, None]}, InvalidData, r"scores of shape \(3, 1\)"),
        ({"boxes": [[1, 2, 3, 4], [1, 2, 3]]}, InvalidData, "boxes are not an array of numbers"),
        ({"boxes": [["a"] * 4] * 3}, InvalidData, "boxes are not an array of numbers"),
        ({"boxes": BOXES * [1, 1, np.nan, 1]}, InvalidData, "boxes hold 3 values that are not finite"),
        ({"scores": [0.1, np.inf, 0.2]}, InvalidData, "scores hold 1 values that are not finite"),
        ({"scores": [0.1, 1.5, 0.2]}, InvalidData, "score 1.5; expected a number from 0 to 1"),
        ({"scores": [0.1, -0.5, 0.2]}, InvalidData, "score -0.5; expected a number from 0 to 1"),
        ({"boxes": [[5, 5, 2, 2], [0, 0, 1, 1], [0, 0, 1, 1]]}, InvalidData, "1 of 3 boxes are inverted.*xywh_to_xyxy"),
        ({"labels": [0, 3, 1]}, InvalidData, "label 3 stands for none of 3 classes.*0 to 2.*first_label=1"),
        ({"labels": [0, -1, 1]}, InvalidData, "label -1 stands for none"),
        ({"labels": [0, 0.5, 1]}, InvalidData, "label 0.5 stands for none"),
        ({"labels": [0, 1]}, InvalidData, "2 class names or labels for 3 boxes"),
        ({"labels": [[0], [1], [2]]}, InvalidData, r"labels of shape \(3, 1\)"),
        ({"masks": [None] * 2}, InvalidData, "2 masks for 3 boxes"),
        ({"masks": blobs()[0]}, InvalidData, r"masks of shape \(5, 7\); expected \(n, height, width\)"),
        ({"masks": ["x"] * 3}, InvalidData, "a mask is <class 'str'>"),
        ({"names": ["crazing"] * 3}, UsageError, "names and labels; give one"),
        ({"classes": None}, UsageError, "needs names=.* or labels= and classes="),
    ],
)
def test_arrays_that_are_none(change: dict[str, Any], error: type[DetkitError], message: str) -> None:
    given = {"boxes": BOXES, "scores": SCORES, "labels": LABELS, "classes": NAMES, "path": "a.jpg", **change}
    with pytest.raises(error, match=message) as caught:
        Detections.from_arrays(**given)
    assert str(caught.value).startswith("a.jpg: ") or error is UsageError


def test_masks_travel_along() -> None:
    masks = blobs()
    found = Detections.from_arrays(BOXES, SCORES, LABELS, classes=NAMES, masks=masks, width=7, height=5)
    assert found.masks is not None
    for one, mask in zip(found.masks, masks[[1, 0, 2]], strict=True):
        assert isinstance(one, dict) and isinstance(one["counts"], str) and one["size"] == [5, 7]
        np.testing.assert_array_equal(rle.decode(one), mask)
    assert found.above(0.5).masks == found.masks[:1]
    assert [record["mask"] for record in found.to_dict()["detections"]] == list(found.masks)
    (again,) = decode_detections(encode_detections([found]))
    assert again.masks == found.masks
    polygon = [[1.0, 1.0, 4.0, 1.0, 4.0, 4.0]]
    some = Detections.from_arrays(BOXES, SCORES, LABELS, classes=NAMES, masks=[polygon, None, found.masks[0]])
    assert some.masks == (None, polygon, found.masks[0])
    assert ["mask" in record for record in some.to_dict()["detections"]] == [False, True, True]
    assert Detections.from_dict(some.to_dict(), NAMES).masks == some.masks
    with pytest.raises(ValueError, match="1 masks"):
        Detections(
            path="", width=1, height=1, classes=NAMES, boxes=np.zeros((2, 4)), labels=np.zeros(2, np.int64),
            scores=np.zeros(2), masks=(None,),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 3], [0.5, 0.25], "labels from 0 to 3, 3 classes"),
        ([-1, 2], [0.5, 0.25], "labels from -1 to 2, 3 classes"),
        ([0, 1], [0.5, np.nan], "scores that are not finite"),
        ([0, 1], [np.inf, -np.inf], "scores that are not finite"),
    ],
)
def test_no_engine_makes_what_detections_cannot_be(labels: list[int], scores: list[float], message: str) -> None:
    def made(labels: list[int], scores: list[float], classes: tuple[str, ...] = NAMES) -> Detections:
        n = len(labels)
        return Detections(
            path="", width=1, height=1, classes=classes, boxes=np.zeros((n, 4)), labels=np.array(labels, np.int64),
            scores=np.array(scores),
        )  # fmt: skip

    with pytest.raises(ValueError, match=message):
        made(labels, scores)
    assert made([0, 2], [0.5, 0.25], ("a", "b", "a")).names == ("a", "a"), "several of theirs may be one of ours"
    assert len(made([], [], ())) == 0


def test_without_masks_nothing_speaks_of_them() -> None:
    found = Detections.from_arrays(BOXES, SCORES, LABELS, classes=NAMES)
    assert all(set(record) == {"name", "score", "box"} for record in found.to_dict()["detections"])
    assert Detections.from_dict(found.to_dict(), NAMES).masks is None
    assert found.above(0.5).masks is None


class Tensor:
    """Stands for a tensor that needs gradients and lies on a GPU: an array only after all three steps."""

    def __init__(self, values: Any, steps: tuple[str, ...] = ("detach", "cpu", "numpy")) -> None:
        self._values, self._steps = values, steps

    def _step(self, name: str) -> Any:
        assert self._steps[0] == name, f"{name} before {self._steps[0]}"
        return Tensor(self._values, self._steps[1:]) if len(self._steps) > 1 else self._values

    def detach(self) -> Any:
        return self._step("detach")

    def cpu(self) -> Any:
        return self._step("cpu")

    def numpy(self) -> Any:
        return self._step("numpy")

    def __array__(self, *_: Any) -> Any:
        raise TypeError("can't convert cuda tensor")


@pytest.mark.parametrize("wrap", [np.asarray, Tensor])
def test_torchvision(wrap: Any) -> None:
    shares = blobs()[:, None].astype(np.float32) * 0.9
    output = {"boxes": BOXES, "labels": np.array(LABELS) + 1, "scores": SCORES, "masks": shares}
    found = as_detections({k: wrap(v) for k, v in output.items()}, classes=NAMES, width=7, height=5, first_label=1)
    assert found.names == ("crazing", "scratches", "patches")
    assert (found.width, found.height) == (7, 5)
    assert found.masks is not None
    np.testing.assert_array_equal(rle.decode(found.masks[0]), blobs()[1])
    with pytest.raises(InvalidData, match="label 3 stands for none of 3.*first_label=1"):
        as_detections({k: wrap(v) for k, v in output.items()}, classes=NAMES, width=7, height=5)
    background = {**output, "labels": np.array([1, 0, 2])}
    with pytest.raises(InvalidData, match="label -1"):
        as_detections({k: wrap(v) for k, v in background.items()}, classes=NAMES, width=7, height=5, first_label=1)


def test_real_tensors() -> None:
    torch = pytest.importorskip("torch")
    output = {"boxes": torch.tensor(BOXES, requires_grad=True), "labels": torch.tensor(LABELS), "scores": SCORES}
    assert as_detections(output, classes=NAMES).names == ("crazing", "scratches", "patches")


@dataclass
class Supervision:
    """The attributes of ``supervision.Detections`` 0.31."""

    xyxy: np.ndarray
    mask: np.ndarray | None = None
    confidence: np.ndarray | None = None
    class_id: np.ndarray | None = None
    tracker_id: np.ndarray | None = None
    data: dict[str, Any] = field(default_factory=dict)


def test_supervision() -> None:
    named = Supervision(BOXES, blobs(), SCORES, np.array([9, 9, 9]), data={"class_name": np.array(NAMES)})
    found = as_detections(named, classes=NAMES[::-1], path="a.jpg", width=7, height=5)
    assert found.names == ("patches", "crazing", "scratches"), "names count, not ids"
    assert found.path == "a.jpg"
    assert found.masks is not None
    assert found.masks[0] is not None
    numbered = as_detections(Supervision(BOXES, None, SCORES, np.array(LABELS)), classes=NAMES)
    assert numbered.names == ("crazing", "scratches", "patches")
    assert numbered.masks is None
    assert len(as_detections(Supervision(np.zeros((0, 4), np.float32), None, np.zeros(0)), classes=NAMES)) == 0
    with pytest.raises(UsageError, match="no confidence"):
        as_detections(Supervision(BOXES, None, None, np.array(LABELS)), classes=NAMES)


def test_the_real_supervision() -> None:
    supervision = supervision_module()
    given = supervision.Detections(
        xyxy=BOXES, mask=blobs(), confidence=SCORES, class_id=np.array(LABELS), data={"class_name": np.array(NAMES)}
    )
    found = as_detections(given, width=7, height=5)
    assert found.names == ("patches", "crazing", "scratches")
    assert found.masks is not None
    np.testing.assert_array_equal(rle.decode(found.masks[0]), blobs()[1])
    assert len(as_detections(supervision.Detections.empty(), classes=NAMES)) == 0


def supervision_module() -> Any:
    pytest.importorskip("supervision", reason="pip install supervision")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that OpenCV is not there
        import supervision
    return supervision


@pytest.mark.parametrize("masks", [False, True])
def test_to_supervision_and_back(masks: bool) -> None:
    supervision = supervision_module()
    found = Detections.from_arrays(
        np.array(BOXES, float) / 3, [1 / 3, 0.75, 0.1], LABELS, classes=NAMES, path="a.jpg", width=7, height=5,
        masks=blobs() if masks else None,
    )  # fmt: skip
    given = found.to_supervision()
    assert isinstance(given, supervision.Detections)
    assert given.data["class_name"].tolist() == list(found.names)
    again = as_detections(given, path="a.jpg", width=7, height=5)
    assert again.to_dict() == found.to_dict()
    assert again.classes == found.classes
    assert again.boxes.tolist() == found.boxes.tolist() and again.scores.tolist() == found.scores.tolist()
    sure = as_detections(given[given.confidence > 0.2], path="a.jpg", width=7, height=5)
    assert sure.to_dict() == found.above(0.2).to_dict()
    assert len(supervision.Detections.merge([given, found.to_supervision()])) == 6


def test_nothing_and_polygons_to_supervision() -> None:
    supervision_module()
    empty = Detections.from_arrays([], [], classes=NAMES)
    assert as_detections(empty.to_supervision()).to_dict() == empty.to_dict()
    drawn = Detections.from_arrays(
        [[1, 1, 4, 4], [0, 0, 1, 1]], [0.5, 0.4], [0, 0], classes=NAMES, masks=[[[1.0, 1, 4, 1, 4, 4, 1, 4]], None]
    )
    with pytest.raises(UsageError, match="masks are polygons, and width and height of the image are not known"):
        drawn.to_supervision()
    masks = replace(drawn, width=6, height=5).to_supervision().mask
    assert masks.shape == (2, 5, 6)
    assert masks[0].sum() == 9 and masks[0, 1:4, 1:4].all()
    assert not masks[1].any()


def test_to_pandas() -> None:
    pandas = pytest.importorskip("pandas", reason="pip install pandas")
    found = Detections.from_arrays(BOXES, SCORES, LABELS, classes=NAMES, path="a.jpg", width=30, height=20)
    table = found.to_pandas()
    assert isinstance(table, pandas.DataFrame)
    assert tuple(table.columns) == COLUMNS
    assert [tuple(row) for row in table.itertuples(index=False)] == found.to_rows()
    empty = Detections.from_arrays([], [], classes=NAMES, path="b.jpg")
    both = to_pandas(iter([found, empty, replace(found, path="c.jpg")]))
    assert both["path"].tolist() == ["a.jpg"] * 3 + ["c.jpg"] * 3
    assert both.groupby("name")["score"].max().to_dict() == {"crazing": 0.75, "patches": 0.25, "scratches": 0.25}
    assert len(empty.to_pandas()) == 0
    assert empty.to_pandas().dtypes.to_dict()["xmin"] == np.float64


@pytest.mark.parametrize("package", ["pandas", "supervision"])
def test_packages_that_are_not_there_are_named(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    found = Detections.from_arrays(BOXES, SCORES, LABELS, classes=NAMES)
    with pytest.raises(UsageError, match=f"to_{package} needs {package}.*pip install {package}"):
        getattr(found, f"to_{package}")()


def test_our_own_stay() -> None:
    found = Detections.from_arrays(BOXES, SCORES, LABELS, classes=NAMES)
    again = as_detections(found, classes=NAMES, path="a.jpg", width=3, height=4)
    assert (again.path, again.width, again.height) == ("a.jpg", 3, 4)
    assert again.boxes is found.boxes
    assert as_detections(again, path="b.jpg", width=9).path == "a.jpg"
    with pytest.raises(ClassMismatch, match="unknown here: 'scratches'"):
        as_detections(found, classes=NAMES[:2])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"boxes": BOXES, "scores": SCORES}, "a mapping with 'boxes', 'scores'; expected .* 'labels'"),
        ({}, "a mapping with nothing"),
        ([BOXES, SCORES], "<class 'list'>; expected detkit.Detections, supervision.Detections, or a mapping"),
    ],
)
def test_what_is_none_of_these(given: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        as_detections(given, classes=NAMES, path="a.jpg")
