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
    share of images, rounded to whole ones. Groups of the rarest class are dealt out first, each to the part that still
    lacks most boxes of that class: iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011, "On the
    Stratification of Multi-label Data"), with groups as its units.
    """
    rng = np.random.default_rng(seed)
    num_groups = int(groups.max(initial=-1)) + 1
    sizes = np.bincount(groups, minlength=num_groups)
    boxes = np.zeros((num_groups, counts.shape[1]), dtype=np.int64)
    np.add.at(boxes, groups, counts)
    room = largest_remainders(fractions, len(groups))
    wanted = fractions[:, None] * boxes.sum(axis=0)[None, :]
    part_of = np.full(num_groups, -1)
    # A large group that comes late would find no room.
    shuffled = rng.permutation(num_groups)
    shuffled = shuffled[np.argsort(-sizes[shuffled], kind="stable")]

    def put(group: int, part: int) -> None:
        part_of[group] = part
        room[part] -= sizes[group]
        wanted[part] -= boxes[group]

    def open_parts(group: int) -> NDArray[np.int64]:
        fitting = np.flatnonzero(room >= sizes[group])
        return fitting if len(fitting) else np.flatnonzero(room == room.max())

    for label in np.argsort(boxes.sum(axis=0), kind="stable"):
        members = shuffled[(part_of[shuffled] < 0) & (boxes[shuffled, label] > 0)]
        for group in members[np.argsort(-boxes[members, label], kind="stable")].tolist():
            parts = open_parts(group)
            lack = wanted[parts, label] / fractions[parts]
            put(group, int(parts[np.lexsort((-room[parts], -lack))[0]]))
    for group in shuffled[part_of[shuffled] < 0].tolist():
        parts = open_parts(group)
        put(group, int(parts[np.argmax(room[parts] / fractions[parts])]))
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
