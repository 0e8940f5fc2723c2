"""What a data set keeps beside its boxes goes where its images, boxes and classes go."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from detkit import Dataset, remap
from detkit.columns import concatenate, load_columns, save_columns
from detkit.errors import InvalidData
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
    for some in (data, replace(data, box_ids=None, class_extra=None, file_extra={}, masks=None, extra=None)):
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
    n = len(parts[0].boxes)
    assert mixed.box_ids[n:].tolist() == list(range(1, len(plain.boxes) + 1))


def test_what_classes_say_follows_their_names(data: Dataset) -> None:
    assert data.with_classes(["c", "new", "b", "a"]).class_extra == (
        {"supercategory": "z"}, {}, {}, {"supercategory": "x"}
    )  # fmt: skip
    assert remap(data, {"c": "d"}, drop=["a"]).class_extra == ({}, {"supercategory": "z"})
    merged = remap(data, {"a": "one", "c": "one"})
    assert (merged.classes, merged.class_extra) == (("one", "b"), ({"supercategory": "x"}, {}))
    with pytest.raises(InvalidData, match="3 class_extra for 2 classes"):
        replace(merged, class_extra=data.class_extra)


def test_what_boxes_say_goes_with_them(data: Dataset) -> None:
    keep = data.labels == 1
    kept = data.keep_boxes(keep)
    assert data.box_ids is not None
    assert kept.box_ids is not None
    assert kept.box_ids.tolist() == data.box_ids[keep].tolist()
    assert kept.file_extra == data.file_extra
