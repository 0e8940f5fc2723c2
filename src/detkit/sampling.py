"""Which images an epoch has, and in which order; both depend on a seed and the epoch alone."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from detkit.data import Dataset, Indices


def epoch_order(
    num_images: int, batch_size: int, seed: int, epoch: int, shares: NDArray[np.float64] | None = None
) -> list[Indices]:
    """Return the image indices of each batch of an epoch; a last batch of one image joins the one before it.

    Each image comes once, or with ``shares`` (as `class_balanced_shares` returns) as often as that, rounded up or down.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(num_images)
    if shares is not None:  # systematic sampling: the least random that keeps the expected numbers
        steps = np.cumsum(shares[order])
        order = rng.permutation(
            order[np.searchsorted(steps, (rng.random() + np.arange(num_images)) * steps[-1] / num_images)]
        )
    batches = [order[start : start + batch_size] for start in range(0, num_images, batch_size)]
    if len(batches) > 1 and len(batches[-1]) == 1:  # batch normalisation cannot train on one image's 1x1 maps
        last = batches.pop()
        batches[-1] = np.concatenate([batches[-1], last])
    return batches


def class_balanced_shares(data: Dataset) -> NDArray[np.float64]:
    """Return how often each image comes in an epoch on average, so that rare classes are seen more; they sum to ``n``.

    An image counts as its rarest class does, sqrt(images of the most frequent class / images of this one) times one
    without objects or with frequent ones only: the repeat factor of Gupta et al., "LVIS" (2019), with that frequency
    as its threshold.
    """
    images = np.repeat(np.arange(len(data)), data.boxes_per_image())
    pairs = np.unique(np.stack([images, data.labels]), axis=1)
    frequency = np.bincount(pairs[1], minlength=len(data.classes))
    factors = np.ones(len(data))
    if len(pairs[0]):
        np.maximum.at(factors, pairs[0], np.sqrt(frequency.max() / frequency[pairs[1]]))
    shares: NDArray[np.float64] = factors * len(data) / factors.sum()
    return shares
