"""Every network: built as GluonCV builds it, filled by name, trained a step, saved, opened."""

from __future__ import annotations

import hashlib
import os
import unittest
from pathlib import Path

import numpy as np
from workspaces import draw, folder, lay_out

from detkit.backends import PredictOptions
from detkit.errors import DetkitError, UsageError, WeightsMissing
from detkit.job import Model
from detkit_gluoncv import params as light
from detkit_gluoncv.engine import GluoncvEngine, set_threads

set_threads(1)

from detkit_gluoncv import networks  # noqa: E402
from detkit_gluoncv.runtime import MXNetError, explained_errors, mx  # noqa: E402

GLUONCV_NAMES = {
    name: name + "_custom" for name in light.NETWORKS if name not in {"ssd_300_resnet50_v1", "ssd_300_mobilenet1.0"}
}
"""Those that GluonCV has, too."""

TRAINED = ("person", "thing", "dog")


def values(net: networks.Net) -> dict[str, np.ndarray]:
    return {name.split("anchor", 1)[-1]: value for name, value in networks.state(net).items()}


class Networks(unittest.TestCase):
    def test_they_are_gluoncvs(self) -> None:
        """The same parameters and shapes as GluonCV's presets, so its files fit; the same anchors but for one."""
        from gluoncv.model_zoo import get_model

        for name, preset in GLUONCV_NAMES.items():
            with self.subTest(name):
                ours = networks.state(networks.build(name, TRAINED))
                net = get_model(preset, classes=list(TRAINED), pretrained_base=False)
                net.initialize()
                size = light.NETWORKS[name].size
                net(mx.nd.zeros((1, 3, size, size)))
                theirs = networks.state(net)
                self.assertEqual({k: v.shape for k, v in ours.items()}, {k: v.shape for k, v in theirs.items()})
                anchors = [key for key in ours if "anchor" in key]
                self.assertEqual(len(anchors), len(light.NETWORKS[name].sizes) - 1)
                same = all(np.array_equal(ours[key], theirs[key]) for key in anchors)
                self.assertEqual(same, name != "ssd_300_mobilenet0.25")

    def test_anchors_cover_the_input(self) -> None:
        """The centres of each map's anchors are spread over the whole image, as many as the map has cells."""
        for name, network in light.NETWORKS.items():
            with self.subTest(name):
                net = networks.build(name, TRAINED)
                found = networks.anchors(net, network.size, mx.cpu())[0].asnumpy()
                for size in network.sizes[:-1]:
                    centres = found[np.isclose(found[:, 2], size) & np.isclose(found[:, 3], size)][:, 0]
                    self.assertGreater(centres.max(), 0.8 * network.size if len(set(centres)) > 2 else 0)
                    self.assertLessEqual(centres.max(), network.size + 4)

    def test_asking_for_anchors_moves_nothing(self) -> None:
        net = networks.build("ssd_300_mobilenet0.25", TRAINED)
        before = networks.state(net)
        networks.anchors(net, 300, mx.cpu())
        after = networks.state(net)
        self.assertEqual([name for name in before if not np.array_equal(before[name], after[name])], [])

    def test_published_files_are_gluoncvs(self) -> None:
        from gluoncv.model_zoo import model_store

        for (model, word), name in light.PUBLISHED.items():
            network = light.NETWORKS[model]
            known = network.base if word == "imagenet" else f"ssd_{network.size}_{network.base}_{word}"
            self.assertEqual(name, f"{known}-{model_store.short_hash(known)}")
        ours = {f"ssd_{n.size}_{n.base}_{word}" for n in light.NETWORKS.values() for word in ("coco", "voc")}
        listed = {name for name in model_store._model_sha1 if name in ours}
        self.assertEqual(listed, {file.rpartition("-")[0] for file in light.PUBLISHED.values() if file[:3] == "ssd"})

    def test_every_model_trains_a_step_is_saved_and_opened(self) -> None:
        data = draw(2)
        for name in light.NETWORKS:
            with self.subTest(name):
                job, workspace = lay_out(data, name, iterations=1, optimizer="sgd")
                engine = GluoncvEngine()
                trained = engine.train(job, workspace)
                workspace.finish(job, trained, started=0.0)
                detector = engine.load(Model(workspace.model), PredictOptions(score_threshold=0.001))
                images = [sample.image() for sample in data]
                both, one = detector.detect(images), detector.detect(images[:1])
                self.assertEqual([len(found.scores) > 0 for found in both], [True, True])
                np.testing.assert_allclose(both[0].boxes, one[0].boxes, atol=0.05)
                self.assertEqual((both[0].width, both[0].height), (160, 120))
                self.assertLessEqual(len(both[0].scores), 100)


class Weights(unittest.TestCase):
    def setUp(self) -> None:
        mx.random.seed(3)
        os.environ["MXNET_HOME"] = str(folder())

    def parent(self) -> tuple[networks.Net, Path]:
        net = networks.build("ssd_300_mobilenet0.25", TRAINED)
        path = folder() / "mine.params"
        net.save_parameters(str(path))
        return net, path

    def rows(self, net: networks.Net, name: str | None) -> np.ndarray:
        """The weights of a class's outputs over all anchors of the first map; of the background where None."""
        classes = list(net.classes)
        weight = networks.state(net)["class_predictors.0.predictor.weight"]
        return weight[0 if name is None else 1 + classes.index(name) :: len(classes) + 1]

    def test_classes_are_matched_by_name(self) -> None:
        old, path = self.parent()
        model = Path(path.parent)
        filled = networks._with_classes(old, ["cat", "dog", "person"], TRAINED, source=str(model), file=path)
        fresh = networks.build("ssd_300_mobilenet0.25", TRAINED)
        fresh.load_parameters(str(path))
        self.assertEqual((filled.origin.kept, filled.origin.new), (["dog", "person"], ["cat"]))
        for name in ("dog", "person", None):
            np.testing.assert_array_equal(self.rows(filled.net, name), self.rows(fresh, name))
        self.assertFalse(any(np.array_equal(self.rows(filled.net, "cat"), self.rows(fresh, n)) for n in TRAINED))
        self.assertEqual(filled.net.cls_decoder._thresh, 0.001)
        filled.net(mx.nd.zeros((1, 3, 300, 300)))

    def test_a_file_without_names_keeps_no_class(self) -> None:
        _, path = self.parent()
        job, workspace = lay_out(draw(2), weights=str(path))
        filled = networks.initialise(job, workspace)
        self.assertEqual((filled.origin.kept, filled.origin.new), ([], ["disc", "square"]))
        loaded = networks.state(networks.build("ssd_300_mobilenet0.25", TRAINED))
        found = networks.state(filled.net)
        self.assertEqual(found["class_predictors.0.predictor.bias"].shape, (12,))
        self.assertEqual(loaded["class_predictors.0.predictor.bias"].shape, (16,))
        self.assertEqual(filled.origin.sha256, hashlib.sha256(path.read_bytes()).hexdigest())

    def test_wrong_files_are_refused_by_name(self) -> None:
        root = folder()
        rubbish = root / "rubbish.params"
        rubbish.write_bytes(b"PK\x03\x04 no parameters at all")
        other = root / "other.params"
        mx.nd.save(str(other), {"a": mx.nd.zeros(3)})
        vgg = networks.build("ssd_300_mobilenet1.0", TRAINED)
        wide = root / "wide.params"
        vgg.save_parameters(str(wide))
        for path in (rubbish, other, wide):
            job, workspace = lay_out(draw(2), weights=str(path))
            with self.subTest(path.name), self.assertRaisesRegex(UsageError, path.name):
                networks.initialise(job, workspace)

    def test_published_weights_from_the_cache(self) -> None:
        """A file in GluonCV's cache, of the right hash, fills the network; classes of its data set are known."""
        from gluoncv.model_zoo import model_store

        name = "ssd_512_mobilenet1.0"
        classes = networks.published_classes("voc")
        self.assertEqual(len(classes), 20)
        self.assertEqual(len(networks.published_classes("coco")), 80)
        net = networks.build(name, classes)
        path = light.weights_file(name, "voc")
        path.parent.mkdir(parents=True)
        net.save_parameters(str(path))
        known = model_store._model_sha1["ssd_512_mobilenet1.0_voc"]
        job, workspace = lay_out(draw(2).with_classes(["disc", "square", "person"]), name, weights="auto")
        self.assertEqual(light.cached_word(name), "voc")
        digest = hashlib.sha1(path.read_bytes()).hexdigest()
        short = known[:8]
        model_store._model_sha1["ssd_512_mobilenet1.0_voc"] = short + digest[8:]
        try:
            with self.assertRaisesRegex(WeightsMissing, "cannot be fetched"):  # the hash is looked at
                networks.initialise(job, workspace)
            net.save_parameters(str(path))
            check, model_store.check_sha1 = model_store.check_sha1, lambda file, wanted: True
            try:
                filled = networks.initialise(job, workspace)
            finally:
                model_store.check_sha1 = check
        finally:
            model_store._model_sha1["ssd_512_mobilenet1.0_voc"] = known
        self.assertEqual((filled.origin.source, filled.origin.kept), ("voc", ["person"]))
        self.assertEqual(filled.origin.new, ["disc", "square"])
        self.assertIn("Pascal VOC", filled.origin.licence)
        np.testing.assert_array_equal(self.rows(filled.net, "person"), self.rows(net, "person"))

    def test_what_cannot_be_fetched_says_where_to_put_it(self) -> None:
        os.environ["MXNET_GLUON_REPO"] = "http://127.0.0.1:9/"
        self.addCleanup(os.environ.pop, "MXNET_GLUON_REPO")
        for word in ("coco", "imagenet"):
            job, workspace = lay_out(draw(2), "ssd_512_mobilenet1.0", weights=word)
            with self.subTest(word), self.assertRaises(WeightsMissing) as caught:
                networks.initialise(job, workspace)
            self.assertIn(str(light.weights_file("ssd_512_mobilenet1.0", word)), str(caught.exception))

    def test_anchors_come_with_the_weights(self) -> None:
        _, path = self.parent()
        job, workspace = lay_out(draw(2), weights=str(path), anchor_sizes=(10, 20, 40, 80, 160, 200, 250))
        with self.assertRaisesRegex(UsageError, "anchor_sizes"):
            networks.initialise(job, workspace)
        job, workspace = lay_out(draw(2), anchor_sizes=(10, 20, 40, 80, 160, 200, 250))
        net = networks.initialise(job, workspace).net
        found = networks.anchors(net, 300, mx.cpu())[0].asnumpy()
        self.assertEqual(found[0, 2:].tolist(), [10, 10])

    def test_freezing(self) -> None:
        net = networks.build("ssd_300_vgg16_atrous", TRAINED)
        frozen = networks.freeze(net, r"features\.stages\.[01]\.")
        self.assertEqual(len(frozen), 8)
        self.assertEqual(networks.parameters(net)["features.stages.1.0.weight"].grad_req, "null")
        self.assertEqual(networks.parameters(net)["features.stages.2.0.weight"].grad_req, "write")
        with self.assertRaisesRegex(DetkitError, "matches no parameter"):
            networks.freeze(net, "conv1_1")
        with self.assertRaisesRegex(DetkitError, "no regular expression"):
            networks.freeze(net, "(")
        with self.assertRaisesRegex(DetkitError, "nothing to train"):
            networks.freeze(net, ".*")

    def test_the_smallest_and_the_largest_input(self) -> None:
        """What `image_sizes` says is what the networks can do."""
        for name in ("ssd_300_vgg16_atrous", "ssd_512_vgg16_atrous", "ssd_300_mobilenet0.25"):
            sizes = light.image_sizes(name)
            net = networks.build(name, TRAINED)
            for size, works in ((sizes.start, True), (sizes.stop - 1, True), (sizes.stop + 15, False)):
                with self.subTest(name, size=size):
                    try:
                        networks.anchors(net, size, mx.cpu())
                    except MXNetError:
                        self.assertFalse(works)
                    else:
                        self.assertTrue(works)
            if sizes.start > 32:
                with self.subTest(name, size=sizes.start - 1), self.assertRaises(MXNetError):
                    networks.anchors(networks.build(name, TRAINED), sizes.start - 1, mx.cpu())


class Errors(unittest.TestCase):
    def test_mxnets_own_text_is_the_line_that_matters(self) -> None:
        with self.assertRaises(DetkitError) as caught, explained_errors():
            mx.nd.dot(mx.nd.ones((2, 3)), mx.nd.ones((2, 3))).asnumpy()
        message = str(caught.exception)
        self.assertNotIn("Traceback", message)
        self.assertTrue(message.startswith("MXNet: "), message)
        self.assertIn("shape", message)
        self.assertIsInstance(caught.exception.__cause__, MXNetError)


if __name__ == "__main__":
    unittest.main()
