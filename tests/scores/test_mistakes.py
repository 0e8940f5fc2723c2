"""Mistakes planted on purpose are told, and models that are merely good or bad are not suspected of any."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detkit.data import Dataset, Sample
from detkit.detections import Detections
from detkit.scores import score

SIDES = {"landscape": (640, 480), "square": (512, 512), "large": (2000, 1500)}
MODELS: dict[str, dict[str, float]] = {
    "perfect": {"noise": 0.0, "found": 1.0, "named": 1.0, "ghosts": 0.0},
    "good": {"noise": 0.03, "found": 0.95, "named": 0.97, "ghosts": 0.3},
    "mediocre": {"noise": 0.1, "found": 0.6, "named": 0.7, "ghosts": 3.0},
    "bad": {"noise": 0.25, "found": 0.3, "named": 0.4, "ghosts": 10.0},
    "guessing names": {"noise": 0.05, "found": 0.9, "named": 0.0, "ghosts": 1.0},
    "only ghosts": {"noise": 0.0, "found": 0.0, "named": 1.0, "ghosts": 5.0},
    "nothing": {"noise": 0.0, "found": 0.0, "named": 1.0, "ghosts": 0.0},
}
"""Noise of corners in shares of the object, shares of objects found and rightly named, ghosts for each image."""


def imagine(
    seed: int,
    model: str,
    *,
    images: int = 60,
    objects: tuple[int, int] = (1, 12),
    classes: int = 4,
    sizes: tuple[float, float] = (20, 150),
    side: str = "landscape",
    square: bool = False,
) -> tuple[Dataset, list[Detections]]:
    """Draw images, and what such a model would find on them."""
    rng, quality, (width, height) = np.random.default_rng(seed), MODELS[model], SIDES[side]
    names = tuple(f"class {k}" for k in range(classes))
    samples, found = [], []
    for i in range(images):
        n = int(rng.integers(objects[0], objects[1] + 1))
        boxes, labels = place(rng, n, sizes, (width, height), square=square), rng.integers(0, classes, n)
        samples.append(
            Sample(path=f"{i}.jpg", width=width, height=height, boxes=boxes, names=tuple(names[k] for k in labels))
        )
        seen = rng.random(n) < quality["found"]
        extent = np.tile(boxes[seen, 2:] - boxes[seen, :2], 2)
        near = boxes[seen] + rng.normal(0, 1, extent.shape) * quality["noise"] * extent
        near = np.concatenate([np.minimum(near[:, :2], near[:, 2:]), np.maximum(near[:, :2], near[:, 2:])], axis=1)
        called = np.where(rng.random(len(near)) < quality["named"], labels[seen], rng.integers(0, classes, len(near)))
        ghosts = place(rng, int(rng.poisson(quality["ghosts"])), sizes, (width, height), square=square)
        values = np.concatenate([rng.beta(4, 2, len(near)), rng.beta(2, 4, len(ghosts))])
        order = np.argsort(-values)
        found.append(
            Detections(
                path="",
                width=width,
                height=height,
                classes=names,
                boxes=np.concatenate([near, ghosts])[order],
                labels=np.concatenate([called, rng.integers(0, classes, len(ghosts))])[order],
                scores=values[order],
            )
        )
    return Dataset.from_samples(names, samples), found


def place(
    rng: np.random.Generator, number: int, sizes: tuple[float, float], image: tuple[int, int], *, square: bool
) -> np.ndarray:
    extent = np.exp(rng.uniform(*np.log(sizes), (number, 2)))
    if square:
        extent[:, 1] = extent[:, 0]
    low = rng.uniform(0, np.maximum(np.array(image) - extent, 1))
    return np.concatenate([low, low + extent], axis=1)


def told(data: Dataset, found: list[Detections], **options: Any) -> str:
    return "\n".join(score(data, found, **options).warnings)


# --- no suspicion without reason ----------------------------------------------------------------------------------


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    model=st.sampled_from(list(MODELS)),
    images=st.sampled_from([1, 3, 10, 60]),
    objects=st.sampled_from([(0, 2), (3, 3), (1, 12), (20, 40)]),
    classes=st.sampled_from([1, 2, 3, 10]),
    sizes=st.sampled_from([(4, 12), (20, 150), (150, 450)]),
    side=st.sampled_from(list(SIDES)),
    square=st.booleans(),
)
@example(seed=0, model="perfect", images=60, objects=(3, 3), classes=1, sizes=(20, 150), side="square", square=True)
@example(
    seed=0, model="guessing names", images=3, objects=(3, 3), classes=2, sizes=(20, 150), side="square", square=True
)
@example(
    seed=21416689,
    model="only ghosts",
    images=60,
    objects=(20, 40),
    classes=1,
    sizes=(300, 470),
    side="landscape",
    square=False,
)
def test_no_model_is_suspected_without_reason(seed: int, model: str, **kind: Any) -> None:
    assert told(*imagine(seed, model, **kind)) == ""


@pytest.mark.parametrize("model", ["good", "mediocre", "bad", "guessing names"])
@pytest.mark.parametrize("classes", [1, 2, 5])
def test_small_sets_are_not_suspected(model: str, classes: int) -> None:
    for seed in range(60):
        assert told(*imagine(seed, model, images=4, objects=(1, 8), classes=classes)) == ""


def test_objects_of_many_classes_are_not_too_many() -> None:
    """120 objects of an image do not reach a limit of 100 detections for each class."""
    data, found = imagine(1, "perfect", images=6, objects=(120, 120), classes=10)
    assert told(data, found) == ""


def test_fixed_numbers_of_detections_are_no_cut() -> None:
    """Five best detections of each image, where no image has more objects."""
    data, found = imagine(1, "good", images=40, objects=(5, 5))
    ghosts = imagine(2, "only ghosts", images=40)[1]
    joined = [
        replace(
            a,
            boxes=np.concatenate([a.boxes, b.boxes, a.boxes[:1]])[:5],
            labels=np.concatenate([a.labels, b.labels, a.labels[:1]])[:5],
            scores=np.concatenate([a.scores, b.scores * a.scores.min(initial=1), [0.0]])[:5],
        )
        for a, b in zip(found, ghosts, strict=True)
    ]
    assert told(data, joined) == ""


def test_numbers_that_merely_end_are_no_cut() -> None:
    """Ten or nine detections of twelve objects: a model that misses two or three."""
    data, found = imagine(1, "perfect", images=30, objects=(12, 12))
    some = [cut([one], 9 if i % 3 == 0 else 10)[0] for i, one in enumerate(found)]
    assert told(data, some) == ""
    assert "cut at 10" in told(data, cut(found, 10))


def test_a_model_that_calls_all_by_one_name_is_bad_but_not_mixed_up() -> None:
    data, found = imagine(1, "good", classes=4)
    assert told(data, [replace(one, labels=np.zeros_like(one.labels)) for one in found]) == ""


# --- classes ------------------------------------------------------------------------------------------------------


def rename(found: list[Detections], table: list[int]) -> list[Detections]:
    return [replace(one, labels=np.array(table, dtype=np.int64)[one.labels]) for one in found]


@pytest.mark.parametrize("model", ["good", "mediocre"])
@pytest.mark.parametrize("classes", [2, 3, 8])
def test_classes_rotated_by_one(model: str, classes: int) -> None:
    data, found = imagine(3, model, images=120, classes=classes)
    text = told(data, rename(found, [(k + 1) % classes for k in range(classes)]))
    assert text.startswith("the class names look mixed up")
    assert "'class 0' as 'class 1' (" in text and f"'class {classes - 1}' as 'class 0' (" in text
    assert "right order?" in text


@pytest.mark.parametrize("model", ["good", "mediocre"])
@pytest.mark.parametrize("classes", [2, 3, 8])
def test_two_classes_swapped(model: str, classes: int) -> None:
    data, found = imagine(3, model, images=120, classes=classes)
    text = told(data, rename(found, [1, 0, *range(2, classes)]))
    assert text.startswith("the class names look mixed up")
    assert "'class 0' as 'class 1' (" in text and "'class 1' as 'class 0' (" in text
    assert "'class 2'" not in text


def test_labels_that_begin_with_1() -> None:
    """Each class is called the next, and the last one is never found."""
    data, found = imagine(3, "good", classes=5)
    kept = [one.labels < 4 for one in found]
    cut = [
        replace(one, boxes=one.boxes[keep], labels=one.labels[keep] + 1, scores=one.scores[keep])
        for one, keep in zip(found, kept, strict=True)
    ]
    assert "'class 3' as 'class 4'" in told(data, cut)


# --- boxes --------------------------------------------------------------------------------------------------------

SIZE = np.array(SIDES["landscape"], dtype=float)
PLANTED = {
    "x, y, width, height, read as corners": lambda b: np.hstack([b[:, :2], b[:, 2:] - b[:, :2]]),
    "corners, read as x, y, width, height": lambda b: np.hstack([b[:, :2], b[:, :2] + b[:, 2:]]),
    "centre x, centre y, width, height, read as x, y, width, height": lambda b: (
        b + np.tile((b[:, 2:] - b[:, :2]) / 2, 2)
    ),
    "y before x": lambda b: b[:, [1, 0, 3, 2]],
    "shares of the image's size instead of pixels": lambda b: b / np.tile(SIZE, 2),
}


@pytest.mark.parametrize("model", ["perfect", "good", "mediocre"])
@pytest.mark.parametrize("convention", PLANTED)
@pytest.mark.parametrize("images", [5, 60])
def test_boxes_in_another_convention(model: str, convention: str, images: int) -> None:
    data, found = imagine(5, model, images=images)
    text = told(data, [replace(one, boxes=PLANTED[convention](one.boxes)) for one in found])
    assert text.startswith(f"the boxes look like {convention}: "), text


@pytest.mark.parametrize("offset", [1.0, -1.0])
def test_boxes_a_pixel_beside(offset: float) -> None:
    data, found = imagine(5, "good", images=400, sizes=(20, 80))
    moved = [replace(one, boxes=one.boxes + offset) for one in found]
    (text,) = score(data, moved).warnings
    x, y = (float(part.split()[0]) for part in text.removeprefix("the boxes lie ").split("pixels in x and "))
    assert (x, y) == pytest.approx((offset, offset), abs=0.1)
    assert text.endswith("does one side count pixels from 1?")
    assert told(data, found) == ""


# --- limits -------------------------------------------------------------------------------------------------------


def shelves(images: int = 8) -> tuple[Dataset, list[Detections]]:
    return imagine(7, "good", images=images, objects=(147, 147), classes=1, sizes=(20, 50), side="large")


def cut(found: list[Detections], limit: int) -> list[Detections]:
    return [
        replace(one, boxes=one.boxes[:limit], labels=one.labels[:limit], scores=one.scores[:limit]) for one in found
    ]


def test_a_limit_below_the_number_of_objects() -> None:
    data, found = shelves()
    assert told(data, found) == (
        "8 image(s) have more than 100 objects of a class, up to 147, and at most 100 detections of it count; "
        "ask for max_detections=294"
    )
    assert told(data, found, max_detections=294) == ""


def test_detections_cut_before_they_came() -> None:
    data, found = shelves()
    assert told(data, cut(found, 100), max_detections=300) == (
        "no image has more than 100 detections, 8 have exactly that, and 8 of these have more objects: the model or "
        "the file was cut at 100; ask for more at prediction"
    )


def test_detections_of_many_classes_cut_before_they_came() -> None:
    data, found = imagine(7, "good", images=8, objects=(147, 147), classes=10, sizes=(20, 50), side="large")
    assert "cut at 100" in told(data, cut(found, 100))
    assert told(data, found) == ""
