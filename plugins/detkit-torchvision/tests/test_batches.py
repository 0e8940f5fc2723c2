"""Batches depend on seed, epoch and position alone; boxes follow their pixels through every augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detkit.data import Dataset, Sample
from detkit.loop import epoch_order, load_ahead
from detkit_torchvision.batches import Batch, Inputs, augment, cache_budget, load_batch, mosaic

ALONE = ("zoom", "hflip", "vflip", "color")
EVERYTHING = (*ALONE, "mosaic")


def collect(data: Dataset, steps: range, num_workers: int, seed: int = 3) -> list[Batch]:
    """Return the batches of three images of some steps, three of them to an epoch."""
    inputs = Inputs(data, "fcos_tiny", 64, cache_budget())

    def load(step: int) -> Batch:
        epoch, position = divmod(step, 3)
        indices = epoch_order(len(data), 3, seed, epoch)[position].tolist()
        seeds = [[seed, epoch, index] for index in indices]
        return load_batch(inputs, indices, seeds=seeds, label_offset=0, augmentations=EVERYTHING)

    return list(load_ahead(load, steps, num_workers))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        x.indices == y.indices
        and all(torch.equal(i, j) for i, j in zip(x.images, y.images, strict=True))
        and all(torch.equal(s["boxes"], t["boxes"]) for s, t in zip(x.targets, y.targets, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def test_workers_and_resume_change_nothing(tiny: Dataset) -> None:
    whole = collect(tiny, range(8), num_workers=0)
    assert same(whole, collect(tiny, range(8), num_workers=3))
    assert same(whole[5:], collect(tiny, range(5, 8), num_workers=0))
    assert not same(whole, collect(tiny, range(8), num_workers=0, seed=4))


@pytest.mark.parametrize("name", ALONE)
def test_boxes_follow_their_pixels(name: str) -> None:
    """A bright rectangle on black: after each change its box is where the bright pixels are."""
    image = torch.zeros(3, 64, 96, dtype=torch.uint8)
    image[:, 20:40, 30:60] = 200
    for seed in range(20):
        changed, boxes, labels = augment(
            image, np.array([[30.0, 20.0, 60.0, 40.0]]), np.array([1]), [name], np.random.default_rng(seed)
        )
        assert changed.shape == image.shape
        assert labels.tolist() == [1]
        bright = torch.nonzero(changed[0] > 100)
        low, high = bright.min(dim=0).values.tolist(), (bright.max(dim=0).values + 1).tolist()
        assert np.abs(boxes[0] - [low[1], low[0], high[1], high[0]]).max() <= 1.5


def test_crowd_regions_are_no_targets(tiny: Dataset) -> None:
    first = tiny[0]
    assert isinstance(first, Sample)
    crowd = Dataset.from_samples(
        tiny.classes,
        [
            Sample(
                path=first.path,
                width=first.width,
                height=first.height,
                boxes=first.boxes,
                names=first.names,
                crowd=np.ones(len(first.names), dtype=bool),
            )
        ],
    )
    boxes, labels = Inputs(crowd, "fcos_tiny", 64, 0).target(0, 0)
    assert len(first.names) > 0
    assert boxes.shape == (0, 4)
    assert len(labels) == 0


def test_a_mosaic_shows_four_images_and_their_boxes(tmp_path: Path) -> None:
    """Each image is one bright rectangle: whatever is bright in a mosaic is in a box, and each box is bright."""
    samples = []
    for i in range(5):
        pixels = np.zeros((64, 64, 3), dtype=np.uint8)
        pixels[8 : 30 + 5 * i, 12 : 28 + 6 * i] = 50 * (i + 1)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
        box = np.array([[12.0, 8.0, 28.0 + 6 * i, 30.0 + 5 * i]])
        samples.append(Sample(path=str(tmp_path / f"{i}.png"), width=64, height=64, boxes=box, names=("bolt",)))
    inputs = Inputs(Dataset.from_samples(["bolt"], samples), "fcos_tiny", 64, cache_budget())
    several = 0
    for seed in range(40):
        image, boxes, labels = mosaic(inputs, 0, 1, np.random.default_rng(seed))
        assert image.shape == (3, 64, 64)
        assert len(labels) == len(boxes) and set(labels.tolist()) <= {1}
        assert (boxes >= 0).all() and (boxes <= 64).all()
        bright = image[0] > 0
        for x0, y0, x1, y1 in boxes.astype(int).tolist():
            assert bright[y0:y1, x0:x1].all()
        inside = sum(int((y1 - y0) * (x1 - x0)) for x0, y0, x1, y1 in boxes.astype(int).tolist())
        assert inside <= int(bright.sum())  # slivers that are cut off have no box
        several += len(boxes) > 1
    assert several > 4
