"""What a data set keeps beside its boxes goes where its images, boxes and classes go."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from detkit import Dataset, remap
from detkit.columns import concatenate, load_columns, save_columns
from detkit.errors import DetkitWarning, InvalidData
from detkit.testing import tiny_dataset

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    """Images of two files, with something in every column."""
    data = tiny_dataset(tmp_path / "pictures", classes=("a", "b", "c"))
    n = len(data.boxes)
    return replace(
        data,
        sources=tuple("first.json" if i < 4 else "second.json" for i in range(len(data))),
        masks=tuple([[0.0, 0.0, 4.0, 0.0, 4.0, float(i)]] if i % 2 else None for i in range(n)),
        extra=tuple({"id": i + 40} for i in range(len(data))),
        box_extra=tuple({"pose": f"side {i % 2}"} for i in range(n)),
        class_extra=({"supercategory": "x"}, {}, {"supercategory": "z"}),
        file_extra={"first.json": {"info": 1}, "second.json": {"info": 2}},
        box_ids=np.arange(n) * 3 + 100,
    )


def columns(data: Dataset) -> dict[str, Any]:
    values = {field.name: getattr(data, field.name) for field in fields(data)}
    return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}


def test_saved_columns_come_back(data: Dataset, tmp_path: Path) -> None:
    bare = replace(data, box_ids=None, class_extra=None, file_extra={}, masks=None, extra=None, numbered=True)
    for some in (data, bare):
        with (tmp_path / "columns.npz").open("wb") as file:
            save_columns(some, file, [f"images/{image_id}" for image_id in some.image_ids])
        back = load_columns(tmp_path / "columns.npz", tmp_path)
        assert back.paths == tuple(f"{tmp_path}/images/{image_id}" for image_id in some.image_ids)
        assert columns(replace(back, paths=some.paths)) == columns(some)


def test_columns_of_earlier_versions(data: Dataset, tmp_path: Path) -> None:
    """Neither places nor what files and classes say was kept once."""
    with (tmp_path / "columns.npz").open("wb") as file:
        save_columns(data, file, ["x"] * len(data))
    with np.load(tmp_path / "columns.npz") as found:
        new = {"places", "class_extra", "file_extra", "box_ids"}
        old = {name: found[name] for name in found.files if name not in new}
    np.savez(tmp_path / "old.npz", **old)
    back = load_columns(tmp_path / "old.npz", tmp_path)
    assert back.paths == tuple(f"{tmp_path}/images/{image_id}" for image_id in data.image_ids)
    assert (back.class_extra, back.file_extra, back.box_ids) == (None, {}, None)
    assert back.digest() == data.digest()


def test_parts_put_together_are_the_whole(data: Dataset) -> None:
    parts = [data.take(range(4)), data.take(range(4, len(data)))]
    assert [part.file_extra for part in parts] == [{"first.json": {"info": 1}}, {"second.json": {"info": 2}}]
    assert columns(concatenate(parts)) == columns(data)
    assert columns(concatenate([parts[0], replace(parts[1], class_extra=None)])) == columns(data)
    plain = replace(parts[1], box_ids=None)
    mixed = concatenate([parts[0], plain])
    assert mixed.box_ids is not None
    n, following = len(parts[0].boxes), int(parts[0].box_ids.max()) + 1  # type: ignore[union-attr]
    assert mixed.box_ids[n:].tolist() == list(range(following, following + len(plain.boxes)))
    named = replace(plain, box_extra=tuple({"id": f"box {i}"} for i in range(len(plain.boxes))))
    mixed = concatenate([parts[0], named])
    assert mixed.box_ids is None
    assert parts[0].box_ids is not None
    assert mixed.box_extra is not None
    assert [extra["id"] for extra in mixed.box_extra[n - 1 : n + 1]] == [parts[0].box_ids[-1], "box 0"]
    assert mixed.box_extra[0]["pose"] == "side 0"


def test_what_two_files_say_of_one_class(data: Dataset) -> None:
    parts = [data.take(range(4)), data.take(range(4, len(data)))]
    further = replace(parts[1], class_extra=({"colour": 1}, {"colour": 2}, {"supercategory": "y"}))
    with pytest.warns(DetkitWarning, match="'supercategory' of class 'c' is 'y' in second.json, and 'z' before"):
        joined = concatenate([parts[0], further])
    assert joined.class_extra == ({"supercategory": "x", "colour": 1}, {"colour": 2}, {"supercategory": "z"})


def test_ids_that_follow_from_the_order(data: Dataset) -> None:
    """They are kept once the order says something else."""
    data = replace(data, extra=None, box_ids=None, class_extra=None, numbered=True)
    n = len(data)
    assert data.image_numbers.tolist() == [1, 2, 3, 4, *range(1, n - 3)]
    assert data.take(range(n)).extra is None
    assert data.take([0, 1, 4]).extra is None
    assert data.take([1, 5]).extra == ({"id": 2}, {"id": 2})
    assert data.take([1, 5]).take([1]).extra == ({"id": 2},)
    assert data.with_classes(["c", "new", "a", "b"]).class_extra == ({"id": 3}, {}, {"id": 1}, {"id": 2})
    parts = [data.take(range(4)), data.take(range(4, n))]
    assert columns(concatenate(parts)) == columns(data)
    other = replace(parts[1], box_ids=parts[1].records + 1000)
    both = concatenate([parts[0], other])
    assert both.box_ids is not None
    assert both.box_ids.tolist() == [*(parts[0].records + 1), *(parts[1].records + 1000)]
    assert (both.extra, both.numbered) == (None, True)
    unnumbered = concatenate([parts[0], replace(parts[1], numbered=False)])
    assert unnumbered.extra == ({"id": 1}, {"id": 2}, {"id": 3}, {"id": 4}, *({} for _ in range(n - 4)))
    assert (unnumbered.class_extra, unnumbered.numbered) == (({"id": 1}, {"id": 2}, {"id": 3}), False)


def test_what_classes_say_follows_their_names(data: Dataset) -> None:
    assert data.with_classes(["c", "new", "b", "a"]).class_extra == (
        {"supercategory": "z"}, {}, {}, {"supercategory": "x"}
    )  # fmt: skip
    assert remap(data, {"c": "d"}, drop=["a"]).class_extra == ({}, {"supercategory": "z"})
    merged = remap(data, {"a": "one", "c": "one"})
    assert (merged.classes, merged.class_extra) == (("one", "b"), ({"supercategory": "x"}, {}))
    surviving = remap(data, {"a": "c"})
    assert (surviving.classes, surviving.class_extra) == (("b", "c"), ({}, {"supercategory": "z"}))
    with pytest.raises(InvalidData, match="3 class_extra for 2 classes"):
        replace(merged, class_extra=data.class_extra)


def test_what_boxes_say_goes_with_them(data: Dataset) -> None:
    keep = data.labels == 1
    kept = data.keep_boxes(keep)
    assert data.box_ids is not None
    assert kept.box_ids is not None
    assert kept.box_ids.tolist() == data.box_ids[keep].tolist()
    assert kept.file_extra == data.file_extra
