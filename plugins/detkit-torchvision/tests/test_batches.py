"""Batches depend on seed, epoch and position alone; boxes follow their pixels through every augmentation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from detkit.data import Dataset, Sample
from detkit.errors import InvalidData
from detkit.loading import load_ahead
from detkit.sampling import epoch_order
from detkit_torchvision.augmentation import Example, augment, copy_paste, mosaic, resized
from detkit_torchvision.batches import Batch, Inputs, cache_budget, load_batch

ALONE = ("zoom", "hflip", "vflip", "color", "iou_crop")
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


def bright(left: int, top: int, right: int, bottom: int, value: int = 200) -> Example:
    """Return a bright ellipse on black with its box and its mask."""
    y, x = np.mgrid[:64, :96] + 0.5
    inside = ((2 * x - left - right) / (right - left)) ** 2 + ((2 * y - top - bottom) / (bottom - top)) ** 2 < 1
    mask = torch.from_numpy(inside.astype(np.uint8))
    box = np.array([[left, top, right, bottom]], dtype=np.float64)
    return Example(mask.expand(3, 64, 96) * value, box, np.array([1]), mask[None])


def overlap(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


@pytest.mark.parametrize("name", ALONE)
def test_boxes_and_masks_follow_their_pixels(name: str) -> None:
    """After each change the box of a bright ellipse is around the bright pixels, and its mask is on them."""
    before = bright(30, 20, 60, 40)
    changes = set()
    for seed in range(20):
        changed = augment(before, [name], np.random.default_rng(seed))
        assert changed.image.shape == before.image.shape
        assert changed.labels.tolist() == [1]
        shown = changed.image[0] > 100
        assert changed.masks is not None
        assert overlap(changed.masks[0] > 0, shown) > 0.88
        places = torch.nonzero(shown)
        low, high = places.min(dim=0).values.tolist(), (places.max(dim=0).values + 1).tolist()
        assert np.abs(changed.boxes[0] - [low[1], low[0], high[1], high[0]]).max() <= 2.5
        changes.add(changed.image.sum().item())
    assert len(changes) > 5 or name in {"hflip", "vflip"}


def test_a_crop_around_objects_has_their_centres() -> None:
    """Objects whose centre is inside stay, the others go; torch's own generator, which threads share, is not used."""
    two = Example(
        torch.zeros(3, 80, 80, dtype=torch.uint8),
        np.array([[0.0, 0.0, 10.0, 10.0], [60.0, 60.0, 80.0, 80.0]]),
        np.array([1, 2]),
    )
    state = torch.get_rng_state()
    kept = [augment(two, ["iou_crop"], np.random.default_rng(seed)) for seed in range(60)]
    assert torch.equal(state, torch.get_rng_state())
    assert {tuple(one.labels.tolist()) for one in kept} == {(1,), (2,), (1, 2)}
    sides = np.concatenate([one.boxes[:, 2:] - one.boxes[:, :2] for one in kept])
    assert (sides > 0).all()
    assert sides.max() > 30  # cut out and stretched
    nothing = two.only(np.zeros(2, dtype=bool))
    assert torch.equal(augment(nothing, ["iou_crop"], np.random.default_rng(0)).image, nothing.image)


def pasted(example: Example, source: Example, seeds: range = range(60)) -> list[Example]:
    """Return the examples into which something was pasted."""
    found = [copy_paste(example, lambda: source, np.random.default_rng(seed)) for seed in seeds]
    return [one for one in found if not torch.equal(one.image, example.image)]


def test_pasted_objects_hide_what_is_below() -> None:
    below, above = bright(20, 10, 60, 50, 90), bright(50, 10, 80, 50, 200)
    found = pasted(below, above)
    assert 8 < len(found) < 25  # of 60: a half of the images, then a half of the objects
    for one in found:
        assert one.masks is not None
        assert one.labels.tolist() == [1, 1]
        assert torch.equal(one.masks[1] > 0, one.image[0] == 200)
        assert torch.equal(one.masks[0] > 0, one.image[0] == 90)
        columns = torch.nonzero((one.image[0] == 90).any(dim=0))
        assert one.boxes[0].tolist() == [20, 10, float(columns.max()) + 1, 50]
        assert one.boxes[1].tolist() == [50, 10, 80, 50]


def test_objects_that_are_all_but_hidden_go() -> None:
    below, above = bright(20, 10, 60, 50, 90), bright(20, 10, 54, 54, 200)
    for one in pasted(below, above):
        assert one.labels.tolist() == [1]
        assert one.boxes.tolist() == [[20, 10, 54, 54]]


def test_a_source_of_another_size_is_cut_off() -> None:
    source = resized(bright(60, 20, 90, 50), 192, 64)  # its object begins beyond the 96 pixels of the other
    assert pasted(bright(20, 10, 60, 50, 90), source) == []
    smaller = resized(bright(10, 20, 50, 50), 48, 32)
    for one in pasted(bright(60, 40, 90, 60, 90), smaller):
        assert one.image.shape == (3, 64, 96)
        assert one.masks is not None
        assert one.masks.shape == (2, 64, 96)


def test_masks_are_those_of_the_file(masked: Dataset) -> None:
    """Polygons and both run-length encodings are drawn at the input's size; the colours of the pictures tell where."""
    inputs = Inputs(masked, "maskrcnn_resnet50_fpn", 192, cache_budget())
    seeds, names = [[0, i] for i in range(len(masked))], ("hflip", "mosaic", "zoom", "copy_paste")
    plain = load_batch(inputs, range(len(masked)), seeds=seeds, label_offset=1, augmentations=())
    for image, target in zip(plain.images, plain.targets, strict=True):
        assert target["masks"].dtype == torch.uint8
        assert target["masks"].shape == (len(target["boxes"]), 192, 192)
        coloured = (image.amax(dim=0).int() - image.amin(dim=0).int()) > 90
        if len(target["boxes"]):
            assert overlap(target["masks"].bool().any(dim=0), coloured) > 0.9
    changed = load_batch(inputs, range(len(masked)), seeds=seeds, label_offset=1, augmentations=names, scale=1.5)
    for image, target in zip(changed.images, changed.targets, strict=True):
        assert image.shape == (3, 288, 288)
        assert target["masks"].shape == (len(target["boxes"]), 288, 288)
        for box, mask in zip(target["boxes"].tolist(), target["masks"], strict=True):
            x0, y0, x1, y1 = (round(side) for side in box)
            inside = mask[max(0, y0 - 2) : y1 + 2, max(0, x0 - 2) : x1 + 2]
            assert inside.sum() >= 0.98 * mask.sum() > 0
    boxes_only = Inputs(masked, "fasterrcnn_resnet50_fpn", 96, 0)
    batch = load_batch(boxes_only, [0], seeds=[[0]], label_offset=1, augmentations=())
    assert set(batch.targets[0]) == {"boxes", "labels"}


def test_a_mask_that_cannot_be_read_names_its_image(masked: Dataset) -> None:
    assert masked.masks is not None
    broken = replace(masked, masks=({"size": [96, 96], "counts": "!"}, *masked.masks[1:]))
    with pytest.raises(InvalidData, match=f"{masked.image_ids[0]}: a mask cannot be read"):
        Inputs(broken, "maskrcnn_resnet50_fpn", 64, 0).example(0, 1)


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
        rng = np.random.default_rng(seed)
        others = [inputs.example(int(other), 1) for other in rng.integers(0, 5, 3)]
        image, boxes, labels, _ = mosaic(inputs.example(0, 1), others, rng)
        assert image.shape == (3, 64, 64)
        assert len(labels) == len(boxes) and set(labels.tolist()) <= {1}
        assert (boxes >= 0).all() and (boxes <= 64).all()
        shown = image[0] > 0
        for x0, y0, x1, y1 in boxes.astype(int).tolist():
            assert shown[y0:y1, x0:x1].all()
        inside = sum(int((y1 - y0) * (x1 - x0)) for x0, y0, x1, y1 in boxes.astype(int).tolist())
        assert inside <= int(shown.sum())  # slivers that are cut off have no box
        several += len(boxes) > 1
    assert several > 4
