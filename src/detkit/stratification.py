"""Cutting images into parts so that each part has its share of every class."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def stratify(
    counts: NDArray[np.int64], fractions: NDArray[np.float64], groups: NDArray[np.int64], seed: int
) -> list[list[int]]:
    """Return the image indices of each part, in order.

    ``counts`` is ``(images, classes)``, the boxes of each class on each image; ``fractions`` sum to 1; ``groups`` is
    ``(images,)``, and images of one group stay together. Where every image is its own group, each part has its exact
    share of images, rounded to whole ones.

    Large groups and those that hold most of a class come first, each goes to the part that lacks most of what it holds,
    a class weighing the more the rarer it is. That is iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011,
    "On the Stratification of Multi-label Data") with groups as units and all classes of a unit weighed at once.
    """
    rng = np.random.default_rng(seed)
    num_groups = int(groups.max(initial=-1)) + 1
    sizes = np.bincount(groups, minlength=num_groups)
    boxes = np.zeros((num_groups, counts.shape[1]), dtype=np.int64)
    np.add.at(boxes, groups, counts)
    totals = np.maximum(boxes.sum(axis=0), 1)
    share_of_class = boxes / totals
    room = largest_remainders(fractions, len(groups))
    lacking = np.repeat((boxes.sum(axis=0) > 0)[None, :], len(fractions), axis=0).astype(np.float64)
    part_of = np.full(num_groups, -1)
    shuffled = rng.permutation(num_groups)
    order = shuffled[np.lexsort((-share_of_class.max(axis=1, initial=0)[shuffled], -sizes[shuffled]))]
    for left, group in zip(range(num_groups, 0, -1), order.tolist(), strict=True):
        empty = np.flatnonzero(np.bincount(part_of[part_of >= 0], minlength=len(fractions)) == 0)
        # No part stays empty: the last groups go where there is none yet.
        parts = empty if len(empty) >= left else np.flatnonzero(room >= sizes[group])
        if not len(parts):
            parts = np.flatnonzero(room == room.max())
        lack = lacking[parts] @ share_of_class[group]
        best = int(parts[np.lexsort((-room[parts] / fractions[parts], -lack))[0]])
        part_of[group] = best
        room[best] -= sizes[group]
        lacking[best] -= share_of_class[group] / fractions[best]
    return [np.flatnonzero(part_of[groups] == part).tolist() for part in range(len(fractions))]


def largest_remainders(fractions: NDArray[np.float64], total: int) -> NDArray[np.int64]:
    """Round shares to whole numbers that sum to ``total``, each at least one."""
    exact = fractions * total
    whole = np.maximum(np.floor(exact).astype(np.int64), 1)
    while whole.sum() < total:
        whole[np.argmax(exact - whole)] += 1
    while whole.sum() > total:
        whole[np.argmax(np.where(whole > 1, whole - exact, -np.inf))] -= 1
    return whole
