"""``python symbols.py FOLDER`` writes small networks as MXNet's ``example/ssd`` builds them, and what they find.

Each folder has ``NAME-symbol.json`` and ``NAME-0000.params``; ``found.json`` has the rows, class, score and corners,
that MXNet alone gives for the deployed network and the images ``a.png`` and ``b.png``, as SageMaker's notebooks ask it.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from detkit_gluoncv.runtime import mx

SIDE, NUM_CLASSES, SIZES = 128, 2, {"a": (128, 128), "b": (150, 90)}
SPREAD = {"cls": 3.0, "sca": 8.0}


def body(normalises: bool) -> list[Any]:
    """Return the feature maps of two scales; a ResNet of MXNet's begins with a normalisation of the image."""
    data = mx.sym.Variable("data")
    if normalises:
        data = mx.sym.BatchNorm(mx.sym.identity(data, name="id"), fix_gamma=True, eps=2e-5, name="bn_data")
    maps = []
    for number, filters in enumerate((8, 12, 16, 16)):
        data = mx.sym.Convolution(data, kernel=(3, 3), pad=(1, 1), num_filter=filters, name=f"conv{number}")
        data = mx.sym.BatchNorm(data, name=f"bn{number}")
        data = mx.sym.Dropout(mx.sym.Activation(data, act_type="relu", name=f"relu{number}"), p=0.5)
        data = mx.sym.Pooling(data, kernel=(2, 2), stride=(2, 2), pool_type="max", name=f"pool{number}")
        maps.append(data)
    scale = mx.sym.Variable("scale", shape=(1, 16, 1, 1))
    return [mx.sym.broadcast_mul(scale, mx.sym.L2Normalization(maps[2], mode="channel")), maps[3]]


def heads(maps: Iterable[Any]) -> tuple[Any, Any, Any]:
    """Return offsets, class scores and anchors, named as in ``example/ssd``."""
    offsets, scores, anchors = [], [], []
    for number, (features, sizes) in enumerate(zip(maps, ("(.2, .27)", "(.5, .6)"), strict=True)):
        for found, width, word in ((offsets, 4, "loc"), (scores, NUM_CLASSES + 1, "cls")):
            outputs = mx.sym.Convolution(
                features, kernel=(3, 3), pad=(1, 1), num_filter=4 * width, name=f"{word}{number}_pred_conv"
            )
            found.append(mx.sym.Flatten(mx.sym.transpose(outputs, axes=(0, 2, 3, 1))))
        priors = mx.sym.contrib.MultiBoxPrior(features, sizes=sizes, ratios="(1, 2, .5)", name=f"anchors{number}")
        anchors.append(mx.sym.Flatten(priors))
    table = mx.sym.Reshape(mx.sym.Concat(*scores, dim=1), shape=(0, -1, NUM_CLASSES + 1))
    return (
        mx.sym.Concat(*offsets, dim=1, name="multibox_loc_pred"),
        mx.sym.transpose(table, axes=(0, 2, 1), name="multibox_cls_pred"),
        mx.sym.Reshape(mx.sym.Concat(*anchors, dim=1), shape=(0, -1, 4), name="multibox_anchors"),
    )


def detection(scores: Any, offsets: Any, anchors: Any) -> Any:
    settings = {"nms_threshold": 0.45, "force_suppress": False, "variances": (0.1, 0.1, 0.2, 0.2), "nms_topk": 400}
    return mx.sym.contrib.MultiBoxDetection(scores, offsets, anchors, name="detection", **settings)


def networks(normalises: bool) -> dict[str, Any]:
    """Return the network for training, with and without detections to watch, and for deployment."""
    offsets, scores, anchors = heads(body(normalises))
    label = mx.sym.Variable("label")
    targets = mx.sym.contrib.MultiBoxTarget(anchors, label, scores, name="multibox_target")
    probabilities = mx.sym.SoftmaxOutput(
        scores, targets[2], ignore_label=-1, use_ignore=True, multi_output=True, normalization="valid", name="cls_prob"
    )
    loss = mx.sym.smooth_l1(targets[1] * (offsets - targets[0]), scalar=1.0, name="loc_loss_")
    losses = [
        probabilities,
        mx.sym.MakeLoss(loss, normalization="valid", name="loc_loss"),
        mx.sym.MakeLoss(targets[2], grad_scale=0, name="cls_label"),
    ]
    watched = mx.sym.MakeLoss(detection(probabilities, offsets, anchors), grad_scale=0, name="det_out")
    deployed = detection(mx.sym.SoftmaxActivation(scores, mode="channel", name="cls_prob"), offsets, anchors)
    return {
        "training": mx.sym.Group([*losses, watched]),
        "losses": mx.sym.Group(losses),
        "deployed": deployed,
    }


def weights(symbol: Any, image_mean: float) -> tuple[dict[str, Any], dict[str, Any]]:
    """Draw weights with which boxes of all scores are found; ``image_mean`` is what the image was like in training."""
    random = np.random.RandomState(7)
    shapes, _, states = symbol.infer_shape(data=(1, 3, SIDE, SIDE))
    arguments = {
        name: mx.nd.array(random.normal(0, SPREAD.get(name[:3], 1.0) / np.sqrt(np.prod(shape[1:])), shape))
        for name, shape in zip(symbol.list_arguments(), shapes, strict=True)
        if name != "data"
    }
    auxiliary = {
        name: mx.nd.array(random.uniform(0.5, 1.5, shape))
        for name, shape in zip(symbol.list_auxiliary_states(), states, strict=True)
    }
    if "bn_data_moving_mean" not in auxiliary:
        arguments["conv0_weight"] /= 70
    else:
        auxiliary["bn_data_moving_mean"][:] = image_mean
        auxiliary["bn_data_moving_var"][:] = 3000.0
    return arguments, auxiliary


def ask(symbol: Any, parameters: tuple[dict[str, Any], dict[str, Any]], image: Path, mean: tuple[int, ...]) -> Any:
    """Return the rows that MXNet finds on an image file, the empty ones left out."""
    module = mx.mod.Module(symbol, label_names=[], context=mx.cpu())
    module.bind(for_training=False, data_shapes=[("data", (1, 3, SIDE, SIDE))])
    module.set_params(*parameters)
    pixels = mx.image.imresize(mx.nd.array(np.asarray(Image.open(image)), dtype="uint8"), SIDE, SIDE, interp=1)
    values = pixels.asnumpy().astype(np.float32) - np.array(mean, dtype=np.float32)
    module.forward(mx.io.DataBatch([mx.nd.array(values.transpose(2, 0, 1)[None])]))
    rows = module.get_outputs()[0].asnumpy()[0]
    return rows[rows[:, 0] >= 0].tolist()


def write(root: Path) -> None:
    images = {name: root / f"{name}.png" for name in SIZES}
    for name, image in images.items():
        patches = Image.fromarray(np.random.RandomState(ord(name)).randint(0, 256, (7, 9, 3)).astype(np.uint8))
        patches.resize(SIZES[name], Image.Resampling.BICUBIC).save(image)
    variants = {"plain": (False, 0.0, (123, 117, 104)), "raw": (True, 120.0, (0, 0, 0))}
    variants["centred"] = (True, 1.5, (123, 117, 104))
    for variant, (normalises, image_mean, mean) in variants.items():
        symbols = networks(normalises)
        parameters = weights(symbols["deployed"], image_mean)
        found = {name: ask(symbols["deployed"], parameters, image, mean) for name, image in images.items()}
        for name, symbol in symbols.items():
            folder = root / f"{variant}-{name}"
            folder.mkdir()
            mx.model.save_checkpoint(str(folder / "model_algo_1"), 0, symbol, *parameters)
            (folder / "found.json").write_text(json.dumps(found))
    write_gluoncv(root / "gluoncv", images)
    write_others(root)


def write_gluoncv(folder: Path, images: dict[str, Path]) -> None:
    """An SSD of GluonCV's, exported: ids, scores and boxes in pixels of the input."""
    from gluoncv.data.transforms.presets.ssd import SSDDefaultValTransform
    from gluoncv.model_zoo import get_model

    mx.random.seed(3)
    net = get_model("ssd_300_mobilenet0.25_custom", classes=["disc", "square"], pretrained_base=False)
    net.initialize()
    net(mx.nd.zeros((1, 3, 300, 300)))
    for variance in net.collect_params(".*running_var").values():
        variance.set_data(mx.nd.zeros(variance.shape))
    for _ in range(40):  # running means of what comes through, which a pass backward writes down
        patches = mx.nd.random.normal(shape=(4, 3, 9, 9))
        with mx.autograd.record():
            classes = net(mx.nd.contrib.BilinearResize2D(patches, height=300, width=300))[0]
        classes.backward()
    for parameter in net.collect_params(".*predictor.*weight").values():
        parameter.set_data(parameter.data() * 0.1)
    net.hybridize()
    transform, found = SSDDefaultValTransform(300, 300), {}
    for name, image in images.items():
        pixels = mx.nd.array(np.asarray(Image.open(image)), dtype="uint8")
        outputs = net(transform(pixels, np.zeros((1, 5)))[0].expand_dims(0))
        rows = np.concatenate([one.asnumpy()[0] for one in outputs], axis=1)
        rows[:, 2:] /= 300
        found[name] = rows[rows[:, 0] >= 0].tolist()
    folder.mkdir()
    net.export(str(folder / "model"))
    (folder / "found.json").write_text(json.dumps(found))


def write_others(root: Path) -> None:
    """What cannot be opened: a classifier, and a detector that runs somebody's Python."""
    data = mx.sym.Variable("data")
    classifier = mx.sym.SoftmaxOutput(mx.sym.FullyConnected(data, num_hidden=3, name="fc"), name="softmax")
    mx.model.save_checkpoint(str(made(root / "classifier") / "model"), 0, classifier, *bare(classifier))
    for name in ("operator", "classes", "torn"):
        shutil.copytree(root / "plain-deployed", root / name)
    file = root / "operator/model_algo_1-symbol.json"
    graph = json.loads(file.read_text())
    next(node for node in graph["nodes"] if node["op"] == "Flatten")["op"] = "_Native"
    file.write_text(json.dumps(graph))
    weights_file = root / "torn/model_algo_1-0000.params"
    weights_file.write_bytes(weights_file.read_bytes()[:2000])


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def bare(symbol: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    shapes, _, _ = symbol.infer_shape(data=(1, 3, SIDE, SIDE))
    named = zip(symbol.list_arguments(), shapes, strict=True)
    return {name: mx.nd.zeros(shape) for name, shape in named if name not in {"data", "softmax_label"}}, {}


if __name__ == "__main__":
    write(Path(sys.argv[1]))
