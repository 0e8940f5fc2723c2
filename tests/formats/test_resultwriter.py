"""What models found, as COCO results without a data set, lines of JSON, and tables."""

from __future__ import annotations

import csv
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detkit import Dataset, Detections, Sample, read_predictions, write_predictions
from detkit.detections import COLUMNS
from detkit.errors import InvalidData, InvalidValue, StorageError, UsageError
from detkit.predictions import looks_like_predictions

NAMES = ("nut", "bolt, long", 'a "quoted" one')

corners = st.tuples(*[st.floats(0, 500)] * 2, *[st.floats(500, 1000)] * 2)
names = st.text(st.characters(min_codepoint=1, exclude_categories=["Cs"]), max_size=12)


def found_on(path: str, boxes: object = (), scores: object = (), labels: object = ()) -> Detections:
    return Detections.from_arrays(
        np.array(boxes, float),
        np.array(scores, float),
        np.array(labels, int),
        classes=NAMES,
        path=path,
        width=64,
        height=48,
    )


SOME = [
    found_on("a/one.jpg", [[1, 2, 30.5, 40], [0, 0, 64, 48]], [0.25, 0.75], [1, 2]),
    found_on("b/two.jpg"),
    found_on("street.mp4#12", [[5, 5, 6, 7]], [1 / 3], [0]),
]


def data_of(found: list[Detections]) -> Dataset:
    samples = [Sample(path=one.path, width=one.width, height=one.height, image_id=one.path) for one in found]
    return Dataset.from_samples(NAMES, samples)


def same(a: Detections, b: Detections, tolerance: float = 0) -> bool:
    return (
        (a.names, len(a)) == (b.names, len(b))
        and np.allclose(a.boxes, b.boxes, atol=tolerance, rtol=0)
        and np.array_equal(a.scores, b.scores)
    )


@pytest.mark.parametrize("name", ["found.json", "deep/found.jsonl", "found.JSON"])
def test_what_is_written_without_data_is_read_with_it(name: str, tmp_path: Path) -> None:
    path = write_predictions(tmp_path / name, None, iter(SOME))
    assert looks_like_predictions(path)
    again = read_predictions(path, data_of(SOME))
    assert all(same(a, b, 1e-12) for a, b in zip(again, SOME, strict=True))
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_coco_has_images_and_categories(tmp_path: Path) -> None:
    content = json.loads(write_predictions(tmp_path / "found.json", None, SOME).read_text())
    assert list(content) == ["annotations", "images", "categories"]
    assert content["images"] == [
        {"id": i, "file_name": one.path, "width": 64, "height": 48} for i, one in enumerate(SOME, start=1)
    ]
    assert content["categories"] == [{"id": i, "name": name} for i, name in enumerate(NAMES, start=1)]
    assert [(one["image_id"], one["category_id"], one["bbox"]) for one in content["annotations"]] == [
        (1, 3, [0, 0, 64, 48]), (1, 2, [1, 2, 29.5, 38]), (3, 1, [5, 5, 1, 2]),
    ]  # fmt: skip
    empty = json.loads(write_predictions(tmp_path / "none.json", None, []).read_text())
    assert empty == {"annotations": [], "images": [], "categories": []}


def test_lines_are_those_of_the_command(tmp_path: Path) -> None:
    lines = write_predictions(tmp_path / "found.jsonl", None, SOME).read_text().splitlines()
    assert [json.loads(line) for line in lines] == [one.to_dict() for one in SOME]


def test_a_table(tmp_path: Path) -> None:
    with write_predictions(tmp_path / "found.csv", None, SOME).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS
    assert [(row["path"], row["name"], float(row["score"]), float(row["xmax"])) for row in rows] == [
        ("a/one.jpg", 'a "quoted" one', 0.75, 64),
        ("a/one.jpg", "bolt, long", 0.25, 30.5),
        ("street.mp4#12", "nut", 1 / 3, 6),
    ]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(names, st.lists(st.tuples(corners, st.floats(0, 1), names), max_size=4)), max_size=4))
def test_nothing_is_lost(tmp_path: Path, images: list[tuple[str, list[tuple[tuple[float, ...], float, str]]]]) -> None:
    found = [
        Detections.from_arrays(
            [box for box, _, _ in some], [score for _, score, _ in some], names=[name for _, _, name in some], path=path
        )
        for path, some in images
    ]
    with write_predictions(tmp_path / "x.csv", None, found).open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))[1:]
    expected = [row for one in found for row in one.to_rows()]
    assert [[*row[:4], *map(float, row[4:])] for row in rows] == [[*map(str, row[:4]), *row[4:]] for row in expected]
    lines = write_predictions(tmp_path / "x.jsonl", None, found).read_text(encoding="utf-8").split("\n")
    assert [json.loads(line) for line in lines[:-1]] == [one.to_dict() for one in found]


def test_a_file_name_that_is_no_text(tmp_path: Path) -> None:
    name = b"a\xff.jpg".decode(errors="surrogateescape")
    for ending in (".csv", ".jsonl", ".json"):
        content = write_predictions(
            tmp_path / f"x{ending}", None, [found_on(name, [[0, 0, 1, 1]], [0.5], [0])]
        ).read_bytes()
        assert b"a\xff.jpg" in content or b"a\\udcff.jpg" in content


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_all_or_nothing(ending: str, tmp_path: Path) -> None:
    def breaks_off() -> Iterator[Detections]:
        yield from SOME
        raise UsageError("no more")

    path = tmp_path / f"found{ending}"
    path.write_text("before")
    with pytest.raises(UsageError, match="no more"):
        write_predictions(path, None, breaks_off())
    with pytest.raises(UsageError, match="2 detections for 3 images"):
        write_predictions(path, data_of(SOME), SOME[:2])
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot write"):
        write_predictions(tmp_path / f"file/found{ending}", None, SOME)


def test_what_cannot_be_written(tmp_path: Path) -> None:
    for name in ("found", "found.xml", "found.json.gz"):
        with pytest.raises(InvalidValue, match=r"a file name that ends in .json, .jsonl, .csv"):
            write_predictions(tmp_path / name, None, SOME)
    broken = Detections(
        path="x.jpg",
        width=1,
        height=1,
        classes=NAMES,
        boxes=np.full((1, 4), np.inf),
        labels=np.zeros(1, int),
        scores=np.ones(1),
    )
    for name in ("x.json", "x.jsonl"):
        with pytest.raises(InvalidData, match=r"detections on x.jpg hold numbers that are not finite"):
            write_predictions(tmp_path / name, None, [broken])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("ending", [".json", ".jsonl", ".csv"])
def test_memory_does_not_grow_with_the_images(ending: str, tmp_path: Path) -> None:
    def many() -> Iterator[Detections]:
        for i in range(10_000):
            yield found_on(f"images/of/a/long/name/{i:012d}.jpg", [[0, 0, 1, 1]], [0.5], [0])

    write_predictions(tmp_path / f"warm{ending}", None, SOME)
    tracemalloc.start()
    try:
        write_predictions(tmp_path / f"found{ending}", None, many())
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 5_000_000
