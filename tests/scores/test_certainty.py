"""The bootstrap: replicates are what `score` would say of the images drawn, and intervals hold what they should."""

from __future__ import annotations

import math
from dataclasses import replace
from statistics import NormalDist
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from detkit.data import Dataset, Sample
from detkit.detections import Detections
from detkit.errors import InvalidValue
from detkit.scores import certainty, score
from detkit.scores.certainty import Resampling, holm, interval, p_value, summarize

if TYPE_CHECKING:
    from conftest import Detect, Make, Referee

TEN = np.linspace(0.5, 0.95, 10)


def repeat(data: Dataset, detections: list[Detections], weights: np.ndarray) -> tuple[Dataset, list[Detections]]:
    """Return a data set in which image i is there ``weights[i]`` times."""
    drawn = [(i, copy) for i, weight in enumerate(weights.tolist()) for copy in range(weight)]
    samples = [replace(data[i], image_id=f"{i}, copy {copy}") for i, copy in drawn]
    return Dataset.from_samples(data.classes, samples), [detections[i] for i, _ in drawn]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(1, 7),
    max_objects=st.sampled_from([0, 2, 9]),
    max_found=st.sampled_from([0, 4, 25]),
    flags=st.sampled_from([0.0, 0.2, 1.0]),
    limit=st.sampled_from([2, 100]),
)
@example(seed=5, num_images=7, max_objects=9, max_found=25, flags=0.2, limit=100)
@example(seed=5, num_images=7, max_objects=2, max_found=25, flags=0.0, limit=2)
def test_a_replicate_is_what_score_says_of_its_images(
    make: Make, *, seed: int, num_images: int, max_objects: int, max_found: int, flags: float, limit: int
) -> None:
    data, detections = make(
        seed, num_images=num_images, max_objects=max_objects, max_found=max_found, levels=None, flags=flags
    )
    weights = np.random.default_rng(seed).poisson(1.0, num_images)
    resampling = Resampling(score(data, detections, max_detections=limit).basis.matching)
    ap = resampling.average_precision(weights)
    again = score(*repeat(data, detections, weights), max_detections=limit)
    assert ap.shape == (10, len(data.classes))
    expected = Resampling(again.basis.matching).average_precision(np.ones(len(again.data), dtype=np.int64))
    np.testing.assert_allclose(ap, expected, rtol=0, atol=1e-9)
    for k, name in enumerate(data.classes):
        of_class = {"AP": ap[:, k].mean(), "AP50": ap[0, k], "AP75": ap[5, k]}
        assert of_class == pytest.approx(
            {number: again.per_class[name][number] for number in of_class}, abs=1e-9, nan_ok=True
        )
    for number in certainty.NUMBERS:
        assert float(summarize(ap, number)) == pytest.approx(again[number], abs=1e-9, nan_ok=True)


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_images=st.integers(0, 6),
    levels=st.sampled_from([1, 3, None]),
    flags=st.sampled_from([0.0, 0.2]),
)
def test_weights_of_one_are_the_headline(
    make: Make, seed: int, num_images: int, levels: int | None, flags: float
) -> None:
    data, detections = make(seed, num_images=num_images, max_objects=9, max_found=25, levels=levels, flags=flags)
    scores = score(data, detections)
    ap = Resampling(scores.basis.matching).average_precision(np.ones(num_images, dtype=np.int64))
    for name in certainty.NUMBERS:
        assert float(summarize(ap, name)) == pytest.approx(scores[name], abs=1e-9, nan_ok=True)


def test_every_overlap_is_that_of_pycocotools(make: Make, referee: Referee) -> None:
    for seed in range(10):
        data, detections = make(seed, num_images=6, max_objects=9, max_found=25, levels=20, flags=0.2)
        ap = Resampling(score(data, detections).basis.matching).average_precision(np.ones(6, dtype=np.int64))
        precision = referee(data, detections).precision[:, :, :, 0, 2]
        expected = np.where(precision > -1, precision, np.nan).mean(axis=1)
        np.testing.assert_allclose(ap, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("later", [0, 1])
def test_of_equal_overlaps_the_later_object_is_taken(detected: Detect, later: int) -> None:
    """As cocoapi does: then one of the two orders leaves the second detection the object it lies on."""
    boxes = np.array([[0, 0, 20, 20], [4, 0, 24, 20]], dtype=float)
    ordered = boxes if later else boxes[::-1]
    sample = Sample(path="a.jpg", width=640, height=640, boxes=ordered, names=("bolt", "bolt"))
    data = Dataset.from_samples(("bolt",), [sample])
    scores = score(data, [detected([[2, 0, 22, 20], [0, 0, 20, 20]], [0, 0], [0.9, 0.8], ("bolt",))])
    ap = Resampling(scores.basis.matching).average_precision(np.ones(1, dtype=np.int64))
    assert float(summarize(ap, "AP75")) == pytest.approx(scores["AP75"])
    assert (scores["AP75"] == pytest.approx(1)) == bool(later)


def test_the_same_seed_draws_the_same_images(make: Make) -> None:
    data, detections = make(3, num_images=12, max_objects=6, max_found=12, levels=100)
    scores = score(data, detections)
    first, second = scores.replicates(number=50), score(data, detections).replicates(number=50)
    assert first.tolist() == second.tolist()
    assert first.tolist() != scores.replicates(number=50, seed=1).tolist()
    assert len(set(first.tolist())) > 40
    assert first.tolist() != scores.replicates("AP50", number=50).tolist()


def test_draws_of_a_seed_do_not_depend_on_the_model(make: Make) -> None:
    """A model that finds all of image 0 and nothing else has AP by whether image 0 was drawn."""
    data, _ = make(3, num_images=12, max_objects=6, max_found=0, levels=1, flags=0)
    only = np.zeros(12, dtype=np.int64)
    for i in np.flatnonzero(data.boxes_per_image()):
        found = [
            Detections(
                path="",
                width=640,
                height=640,
                classes=data.classes,
                boxes=data[j].boxes if j == i else np.zeros((0, 4)),
                labels=data.labels[data.offsets[j] : data.offsets[j + 1]] if j == i else only[:0],
                scores=np.ones(data.boxes_per_image()[j] if j == i else 0),
            )
            for j in range(12)
        ]
        rng = np.random.default_rng(7)
        drawn = [bool(np.any(rng.integers(0, 12, 12) == i)) for _ in range(30)]
        replicates = score(data, found).replicates(number=30, seed=7)
        assert [value > 0 for value in replicates.tolist()] == drawn


def test_paired_differences_spread_less(make: Make) -> None:
    """Two models that err on the same images."""
    data, detections = make(9, num_images=40, max_objects=6, max_found=12, levels=None, flags=0)
    rng = np.random.default_rng(0)
    other = [replace(one, boxes=one.boxes + rng.normal(0, 0.5, one.boxes.shape)) for one in detections]
    a, b = (score(data, found) for found in (detections, other))
    paired = a.replicates(number=300) - b.replicates(number=300)
    unpaired = a.replicates(number=300) - b.replicates(number=300, seed=1)
    assert paired.std() < 0.5 * unpaired.std()


def test_only_numbers_with_replicates_have_intervals(make: Make) -> None:
    scores = score(*make(3, num_images=12, max_objects=6, max_found=12, levels=100))
    with pytest.raises(InvalidValue, match="APs"):
        scores.interval("APs")
    found = scores.interval("AP50", replicates=200, level=0.9)
    assert found.value == scores["AP50"] and found.level == 0.9 and found.replicates == 200
    assert found.low < found.value < found.high
    assert str(found) == f"{found.value:.3f} [{found.low:.3f}, {found.high:.3f}]"
    wider = scores.interval("AP50", replicates=200)
    assert wider.low <= found.low and found.high <= wider.high


def test_nothing_measured_has_no_interval(make: Make) -> None:
    for case in (make(3, num_images=0, max_objects=0, max_found=0, levels=1),
                 make(3, num_images=3, max_objects=0, max_found=5, levels=1)):  # fmt: skip
        found = score(*case).interval(replicates=20)
        assert math.isnan(found.value) and math.isnan(found.low) and math.isnan(found.high)
        assert math.isnan(p_value(math.nan, np.full(20, np.nan)))


# --- intervals and tests from replicates --------------------------------------------------------------------------


def test_without_bias_the_interval_is_the_plain_one() -> None:
    replicates = np.arange(1001) / 1000
    found = interval(0.5, replicates)
    assert (found.low, found.high) == (0.024, 0.976)  # number 25 of 1,001 from either end, counted from 1
    assert math.isnan(interval(math.nan, replicates).low)


def test_the_bias_is_corrected_as_efron_does() -> None:
    """Replicates N(0.1, 1) of an estimate 0: z0 = -0.1, so the percentiles are those of -0.2 -+ 1.96."""
    normal = NormalDist()
    replicates = np.array([normal.inv_cdf((i + 0.5) / 20000) + 0.1 for i in range(20000)])
    found = interval(0.0, replicates)
    assert found.low == pytest.approx(-1.95996 - 0.2 + 0.1, abs=0.01)
    assert found.high == pytest.approx(1.95996 - 0.2 + 0.1, abs=0.01)


@settings(deadline=None, max_examples=400)
@given(
    seed=st.integers(0, 2**32 - 1),
    centre=st.floats(-4, 4),
    shift=st.floats(-1, 1),
    skewed=st.booleans(),
    same=st.sampled_from([0.0, 0.03, 0.3, 1.0]),
    level=st.sampled_from([0.9, 0.95, 0.99]),
)
def test_p_is_the_interval_turned_around(
    *, seed: int, centre: float, shift: float, skewed: bool, same: float, level: float
) -> None:
    rng = np.random.default_rng(seed)
    noise = rng.gamma(2.0, 1.0, 500) - 2.0 if skewed else rng.normal(0, 1, 500)
    replicates, value = centre + noise, centre + shift
    replicates[rng.random(500) < same] = 0.0
    found, p = interval(value, replicates, level), p_value(value, replicates)
    assert (p < 1 - level) == (not found.low <= 0 <= found.high)


def test_p_values_of_plain_cases() -> None:
    replicates = np.array([NormalDist(1.0, 0.5).inv_cdf((i + 0.5) / 10000) for i in range(10000)])
    assert p_value(1.0, replicates) == pytest.approx(2 * NormalDist().cdf(-2), abs=0.001)
    assert p_value(-1.0, -replicates) == pytest.approx(2 * NormalDist().cdf(-2), abs=0.001)
    assert p_value(0.0, np.zeros(100)) == 1.0
    assert p_value(0.5, np.full(999, 0.5)) == pytest.approx(1 / 1000)
    assert math.isnan(p_value(0.5, np.array([0.5])))


def test_holm_by_hand() -> None:
    # Sorted .005 .01 .03 .04, times 4 3 2 1: .02 .03 .06 .04, and none below the one before it.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.7]) == [1.0, 1.0]
    assert holm([]) == []
    corrected = holm([0.02, math.nan, 0.03])
    assert math.isnan(corrected[1]) and corrected[0::2] == pytest.approx([0.04, 0.04])


# --- coverage -----------------------------------------------------------------------------------------------------


def sample_world(rng: np.random.Generator, num_images: int) -> tuple[Dataset, list[Detections]]:
    """Images of up to six objects of three classes; some images are harder than others for the model."""
    samples, found = [], []
    for i in range(num_images):
        n = int(rng.integers(1, 7))
        size = np.exp(rng.uniform(np.log(20), np.log(120), (n, 2)))
        corner = rng.uniform(0, 500, (n, 2))
        boxes, labels = np.concatenate([corner, corner + size], axis=1), rng.integers(0, 3, n)
        hard = rng.beta(2, 2)
        seen = rng.random(n) < 1 - 0.6 * hard
        near = boxes[seen] + rng.normal(0, 0.03 + 0.06 * hard, (seen.sum(), 4)) * np.tile(size[seen], 2)
        extra = int(rng.poisson(2 * hard))
        corner = rng.uniform(0, 500, (extra, 2))
        ghosts = np.concatenate([corner, corner + rng.uniform(20, 120, (extra, 2))], axis=1)
        all_boxes = np.concatenate([near, ghosts])
        all_labels = np.concatenate([labels[seen], rng.integers(0, 3, extra)])
        values = np.concatenate([rng.beta(4, 2, seen.sum()), rng.beta(2, 4, extra)])
        order = np.argsort(-values)
        samples.append(
            Sample(path=f"{i}.jpg", width=640, height=640, boxes=boxes, names=tuple("abc"[k] for k in labels))
        )
        found.append(
            Detections(
                path="",
                width=640,
                height=640,
                classes=("a", "b", "c"),
                boxes=all_boxes[order],
                labels=all_labels[order],
                scores=values[order],
            )
        )
    return Dataset.from_samples(("a", "b", "c"), samples), found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AP", "AP50"])
def test_intervals_hold_the_true_value(name: str) -> None:
    """150 test sets of 60 images; the truth is the AP of 20,000 images of the same kind."""
    truth = score(*sample_world(np.random.default_rng(1), 20_000))[name]
    held = plain = 0
    for seed in range(150):
        scores = score(*sample_world(np.random.default_rng(1000 + seed), 60))
        replicates = scores.replicates(name, number=400)
        found = interval(scores[name], replicates)
        held += found.low <= truth <= found.high
        low, high = np.quantile(replicates, [0.025, 0.975])
        plain += low <= truth <= high
    print(f"{name}: corrected {held}, plain {plain} of 150")
    assert 0.88 <= held / 150 <= 0.99
