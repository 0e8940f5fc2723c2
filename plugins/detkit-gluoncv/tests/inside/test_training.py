"""What a step learns from, and that a checkpoint holds all of it, for every optimizer."""

from __future__ import annotations

import random
import unittest
from typing import Any

import numpy as np
from workspaces import draw, lay_out

from detkit.data import Dataset
from detkit_gluoncv.engine import set_threads

set_threads(1)

from detkit_gluoncv import training  # noqa: E402
from detkit_gluoncv.batches import Targets, change, normalise, shrink, target, to_input  # noqa: E402
from detkit_gluoncv.networks import anchors, build, parameters, state  # noqa: E402
from detkit_gluoncv.runtime import mx  # noqa: E402
from detkit_gluoncv.training import Training  # noqa: E402

ALL = ("color", "expand", "crop", "hflip")


def trained(data: Dataset, steps: int, stop_at: int | None = None, **params: Any) -> Training:
    """Train, and where asked leave in the middle and continue from the checkpoint in another `Training`."""
    job, workspace = lay_out(data, iterations=steps, validate_every="2 iterations", checkpoint_every="2 iterations",
                             **params)  # fmt: skip
    training = Training(job, workspace)
    training.prepare()
    for step in training.steps():
        if step == stop_at:
            training = Training(job, workspace)
            training.prepare()
            assert training.step == stop_at - stop_at % 2
            for _ in training.steps():
                pass
            break
    return training


class Batches(unittest.TestCase):
    @classmethod
    def setUpClass(cls) -> None:
        cls.data = draw()
        cls.net = build("ssd_300_mobilenet0.25", cls.data.classes)
        cls.anchors = anchors(cls.net, 300, mx.cpu())

    def test_all_changes_are_gluoncvs_recipe(self) -> None:
        """Pixel by pixel and target by target what its own transform makes of the same random numbers."""
        from gluoncv.data.transforms.presets.ssd import SSDDefaultTrainTransform

        theirs = SSDDefaultTrainTransform(300, 300, self.anchors)
        targets = Targets(self.anchors)
        for number in range(12):
            sample, rows = self.data[number % 3], target(self.data, number % 3)
            pixels, boxes = change(sample.image(), rows, 300, ALL, [number])
            classes, offsets = targets([boxes])
            seed = int(np.random.default_rng([number]).integers(2**32))
            np.random.seed(seed)
            random.seed(seed)
            image, their_classes, their_offsets = theirs(mx.nd.array(sample.image(), dtype="uint8"), rows)
            np.testing.assert_allclose(normalise([pixels], mx.cpu())[0].asnumpy(), image.asnumpy(), atol=1e-5)
            np.testing.assert_array_equal(classes[0].asnumpy(), their_classes.asnumpy())
            np.testing.assert_allclose(offsets[0].asnumpy(), their_offsets.asnumpy(), atol=1e-5)

    def test_a_seed_of_its_own(self) -> None:
        image, rows = self.data[0].image(), target(self.data, 0)
        one = change(image, rows, 300, ALL, [1, 2])
        change(image, rows, 300, ALL, [9])
        again, other = change(image, rows, 300, ALL, [1, 2]), change(image, rows, 300, ALL, [1, 3])
        self.assertTrue((one[0] == again[0]).asnumpy().all())
        self.assertFalse(one[0].shape == other[0].shape and (one[0] == other[0]).asnumpy().all())

    def test_boxes_follow_their_pixels(self) -> None:
        """A bright rectangle on grey: wherever it goes, its box is where the bright pixels are."""
        image = np.full((120, 160, 3), 124, dtype=np.uint8)
        image[30:70, 40:100] = 255
        rows = np.array([[40, 30, 100, 70, 1]], dtype=np.float32)
        for names in (("hflip",), ("crop",), ("expand",), ("expand", "crop", "hflip"), ()):
            for seed in range(8):
                pixels, boxes = change(image, rows, 300, names, [seed])
                bright = pixels.asnumpy().mean(axis=2) > 190
                ys, xs = np.nonzero(bright)
                seen = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
                np.testing.assert_allclose(boxes[0, :4], seen, atol=3)

    def test_images_without_objects_are_background(self) -> None:
        classes, offsets = Targets(self.anchors)([np.zeros((0, 5), np.float32), target(self.data, 0)])
        self.assertEqual(classes[0].sum().asscalar(), 0)
        self.assertGreater(classes[1].sum().asscalar(), 0)
        self.assertTrue(np.isfinite(offsets.asnumpy()).all())

    def test_background_alone_is_learned(self) -> None:
        empty = self.data.take([3])
        losses = []
        for least in (3, 0):
            loop = trained_loop(empty, min_hard_negatives=least)
            losses.append([loop.train_step(batch)["loss"] for batch in loop.batches()])
        self.assertGreater(losses[0][0], 0)
        self.assertLess(losses[0][-1], losses[0][0])
        self.assertEqual(set(losses[1]), {0.0})

    def test_images_too_small_to_crop(self) -> None:
        for height, width in ((1, 1), (2, 200), (200, 2), (8, 8)):
            image = np.zeros((height, width, 3), np.uint8)
            for seed in range(20):
                rows = np.array([[0, 0, width, height, 0]], np.float32)
                pixels, boxes = change(image, rows, 64, ALL, [seed])
                self.assertEqual((pixels.shape, len(boxes)), ((64, 64, 3), 1))

    def test_large_images_are_shrunk_before_they_cost(self) -> None:
        """Down to what the smallest crop needs, boxes with them; others stay as they are."""
        large = np.zeros((1500, 2000, 3), np.uint8)
        self.assertEqual(shrink(large, 100).shape, (375, 500, 3))
        self.assertIs(shrink(large, 300), large)
        sample = draw(2, size=1200)
        seen = {}

        def look(image: np.ndarray, rows: np.ndarray, *others: Any) -> Any:
            seen[image.shape] = rows
            return change(image, rows, *others)

        change_, training.change = training.change, look
        try:
            next(trained_loop(sample, image_size=96).batches())
        finally:
            training.change = change_
        ((height, width, _),) = seen
        self.assertEqual((height, width), (400, 414))
        scale = [width / 1240, height / 1200] * 2
        boxes = [rows[0, :4].tolist() for rows in seen.values() if len(rows)]
        np.testing.assert_allclose(boxes, [sample.boxes[0] * scale] * len(boxes), rtol=1e-6)

    def test_input_of_any_shape(self) -> None:
        images = [np.zeros((10, 400, 3), np.uint8), np.full((333, 20, 3), 255, np.uint8)]
        found = to_input(images, 64, mx.cpu()).asnumpy()
        self.assertEqual(found.shape, (2, 3, 64, 64))
        mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
        np.testing.assert_allclose(found[0, :, 0, 0], -mean / std, rtol=1e-5)
        np.testing.assert_allclose(found[1, :, 5, 5], (1 - mean) / std, rtol=1e-5)


def trained_loop(data: Dataset, **params: Any) -> Training:
    job, workspace = lay_out(data, iterations=6, optimizer="sgd", learning_rate=0.01, **params)
    training = Training(job, workspace)
    training.prepare()
    return training


class Checkpoints(unittest.TestCase):
    def test_resumed_is_uninterrupted_for_every_optimizer(self) -> None:
        data = draw()
        for optimizer in ("sgd", "adam", "rmsprop", "adadelta"):
            with self.subTest(optimizer):
                whole = trained(data, 6, optimizer=optimizer, augmentations=ALL)
                cut = trained(data, 6, stop_at=3, optimizer=optimizer, augmentations=ALL)
                one, other = state(whole.net), state(cut.net)
                self.assertEqual([name for name in one if not np.array_equal(one[name], other[name])], [])
                self.assertEqual(whole.best.value, cut.best.value)
                self.assertGreater(len(whole._optimizer_state()), 0)

    def test_steps_are_counted_on_every_device(self) -> None:
        """Adam's correction of its first steps belongs to the device that trains."""
        data = draw()
        choose, training.choose_context = training.choose_context, lambda wanted: mx.cpu(1)
        try:
            one, other = (state(trained(data, 6, stop_at=at, optimizer="adam").net) for at in (None, 3))
        finally:
            training.choose_context = choose
        self.assertEqual([name for name in one if not np.array_equal(one[name], other[name])], [])

    def test_nothing_is_pickled(self) -> None:
        training = trained(draw(), 2)
        with np.load(next(training.workspace.checkpoints.glob("step-*")), allow_pickle=False) as saved:
            self.assertTrue(all(saved[name].dtype != object for name in saved.files))
            self.assertIn("optimizer/class_predictors.0.predictor.weight/0", saved.files)

    def test_frozen_parameters_stay(self) -> None:
        pattern = "features.*conv[0-9]_"
        training = trained_loop(draw(), freeze=pattern)
        before = state(training.net)
        for batch in training.batches():
            training.train_step(batch)
        after = state(training.net)
        changed = {name for name in before if not np.array_equal(before[name], after[name])}
        frozen = {name for name, parameter in parameters(training.net).items() if parameter.grad_req == "null"}
        self.assertTrue(any("conv" in name for name in frozen))
        self.assertEqual({name for name in changed & frozen if "running" not in name and "moving" not in name}, set())
        self.assertIn("class_predictors.0.predictor.weight", changed)


if __name__ == "__main__":
    unittest.main()
