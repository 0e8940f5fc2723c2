"""`fit`, `predict`, `evaluate` and `export` of a model whose framework is not here."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image as PillowImage

import detkit
from detkit.boxes import iou
from detkit.errors import DetkitError, RunFailed, Unsupported, WorkerDied
from detkit.images import Image
from detkit.job import Model
from detkit.predictor import Predictor
from detkit.verification import agreement_of


def test_a_model_that_knows_eight_images_by_heart(memorised: detkit.Run, tiny: detkit.Dataset) -> None:
    """Their boxes, their names, and a perfect score."""
    with Predictor(memorised) as predictor:
        found = list(predictor.predict(tiny))
    for sample, one in zip(tiny, found, strict=True):
        assert sorted(one.names) == sorted(sample.names)
        assert one.path == sample.path
        if len(sample.boxes):
            overlaps = iou(one.boxes, sample.boxes)
            best = overlaps.argmax(axis=1)
            assert (overlaps.max(axis=1) > 0.8).all()
            assert [sample.names[i] for i in best] == list(one.names)
    scores = detkit.evaluate(memorised, tiny, allow_seen=True)
    assert scores["AP"] == pytest.approx(1.0)
    assert scores["AP50"] == pytest.approx(1.0)
    assert memorised.metrics["val/AP"] == pytest.approx(scores["AP"]), "the worker counts as the controller does"
    assert "mxnet" not in sys.modules


def test_the_manifest_tells_the_frameworks(memorised: detkit.Run) -> None:
    manifest = memorised.model.manifest
    assert manifest.versions["mxnet"] == "1.9.1"
    assert manifest.versions["gluoncv"] == "0.10.5.post0"
    assert manifest.native["anchors"] == 2268
    assert set(manifest.artifacts) == {"weights.params", "seen.json"}


def test_onnx_finds_the_same(memorised: detkit.Run, tiny: detkit.Dataset, tmp_path: Path) -> None:
    """In ONNX Runtime, prepared and suppressed by detkit: the boxes of MXNet, also from the file alone."""
    pytest.importorskip("onnxruntime")
    main = detkit.export(memorised, "onnx", verify=tiny)
    agreement = agreement_of(Model(main.parent))
    assert agreement is not None and agreement.disagreeing == 0 and agreement.detections >= len(tiny.boxes)
    assert agreement.corners_px_max < 0.1 and agreement.original == pytest.approx(agreement.exported, abs=1e-3)
    alone = shutil.copy(main, tmp_path / "alone.onnx")
    with Predictor(memorised) as mxnet, Predictor(alone) as bare:
        assert bare.score_threshold == mxnet.score_threshold
        for theirs, ours in zip(mxnet.predict(tiny), bare.predict(tiny), strict=True):
            assert ours.names == theirs.names
            np.testing.assert_allclose(ours.boxes, theirs.boxes, atol=0.2)
    assert "mxnet" not in sys.modules


def enlarge(path: str) -> Image:
    """Return an image at the network's own size: Pillow and MXNet do not enlarge alike."""
    return np.asarray(PillowImage.open(path).convert("RGB").resize((300, 300)))


def test_mxnets_own_format(memorised: detkit.Run, worker_python: str, tiny: detkit.Dataset, tmp_path: Path) -> None:
    """Symbol and parameters, opened by MXNet alone, give what the predictor gives."""
    main = detkit.export(memorised, "mxnet", tmp_path / "deep/folder")
    assert sorted(path.name for path in main.parent.iterdir()) == [
        "model-0000.params",
        "model-symbol.json",
        "model.json",
    ]
    with Predictor(memorised, score_threshold=0.3) as predictor:
        expected = predictor(enlarge(tiny.paths[0]))
    picture = tmp_path / "enlarged.png"
    PillowImage.fromarray(enlarge(tiny.paths[0])).save(picture)
    script = f"""
import json
import numpy as np
np.bool, np.float, np.int, np.object, np.complex, np.str = bool, float, int, object, complex, str
import mxnet as mx
net = mx.gluon.SymbolBlock.imports({str(main)!r}, ["data"], {str(main.with_name("model-0000.params"))!r})
image = mx.image.imread({str(picture)!r})
known = json.load(open({str(main.with_name("model.json"))!r}))
data = mx.nd.image.normalize(mx.nd.image.to_tensor(image), mean=known["mean"], std=known["std"]).expand_dims(0)
ids, scores, boxes = net(data)
keep = scores[0, :, 0].asnumpy() > 0.3
names = [known["classes"][int(i)] for i in ids[0, :, 0].asnumpy()[keep]]
print(json.dumps([names, boxes[0].asnumpy()[keep].tolist()]))
"""
    done = subprocess.run([worker_python, "-W", "ignore", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    names, boxes = json.loads(done.stdout.splitlines()[-1])
    assert names == list(expected.names)
    np.testing.assert_allclose(boxes, expected.boxes, atol=1e-2)


def test_what_detkit_cannot_open_is_not_verified(memorised: detkit.Run, tiny: detkit.Dataset, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match="detkit does not open 'mxnet' itself"):
        detkit.export(memorised, "mxnet", tmp_path / "out", verify=tiny)
    assert not list(tmp_path.iterdir())


def test_formats_it_does_not_write(memorised: detkit.Run, tmp_path: Path) -> None:
    with pytest.raises(Unsupported, match=r"'onxn'.*did you mean 'onnx'.*mxnet, onnx"):
        detkit.export(memorised, "onxn", tmp_path)


def test_mxnets_error_is_one_line(memorised: detkit.Run, tmp_path: Path) -> None:
    """Weights cut off: what MXNet says of them and which file it is, not the stack of its C++."""
    folder = Path(shutil.copytree(memorised.model.path, tmp_path / "model"))
    weights = folder / "weights.params"
    weights.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(RunFailed) as caught:
        Predictor(folder)
    (line,) = str(caught.value).splitlines()
    assert line.startswith(f"{weights} does not fill a gluoncv/ssd_300_mobilenet0.25: ")
    assert "MXNetError" not in line


def test_settings_that_mxnet_cannot_do(worker_python: str, tiny: detkit.Dataset) -> None:
    for settings, message in (
        ({"optimizer": "adamw"}, "no adamw"),
        ({"anchor_sizes": (1, 2, 3)}, "7 ascending sides"),
        ({"anchor_sizes": (9, 8, 7, 6, 5, 4, 3)}, "ascending"),
        ({"weights": "auto"}, "no published weights are in the cache"),
        ({"weights": "coco"}, "coco"),
    ):
        with pytest.raises(DetkitError, match=message):
            detkit.Trainer(model="gluoncv/ssd_300_mobilenet0.25", **settings).start(tiny, tiny)


def test_like_sagemaker(worker_python: str, tiny: detkit.Dataset, tmp_path: Path) -> None:
    """A job of the built-in algorithm, rehearsed: its words, here."""
    trainer = detkit.Trainer(like="sagemaker-object-detection", base_network="resnet-50", mini_batch_size=4, epochs=1,
                             use_pretrained_model=0, num_classes=2, num_training_samples=8)  # fmt: skip
    run = trainer.fit(tiny, tiny, name=str(tmp_path / "run"), quiet=True)
    manifest = run.model.manifest
    assert (manifest.backend, manifest.model) == ("gluoncv", "ssd_300_resnet50_v1")
    assert (manifest.params["batch_size"], manifest.params["momentum"]) == (4, 0.9)
    told = [event.values["message"] for event in run.events(follow=False) if event.kind == "log"]
    assert any("approximat" in str(message) for message in told)


def test_a_crash_in_native_code(worker_python: str, tiny: detkit.Dataset, tmp_path: Path) -> None:
    """Told as what it is, with the place; nothing is left, and the run can be resumed."""
    trainer = detkit.Trainer(model="gluoncv/ssd_300_mobilenet0.25", epochs=500, batch_size=2, threads=1)
    run = trainer.start(tiny, tiny, name=str(tmp_path / "run"), leash=True)
    next(event for event in run.events() if event.kind == "metric")
    pid = run.record.pid  # type: ignore[attr-defined]
    os.kill(pid, signal.SIGSEGV)
    with pytest.raises(WorkerDied, match=r"SIGSEGV.* crashed in native code(.|\n)*most recent call first"):
        run.wait()
    assert run.status == "interrupted"
    assert not psutil.pid_exists(pid)
    run.resume(leash=True).stop()
    assert run.status == "stopped"


def test_a_crash_while_predicting(memorised: detkit.Run, tiny: detkit.Dataset) -> None:
    with Predictor(memorised) as predictor:
        predictor(tiny.paths[0])
        os.kill(predictor._detector._process.pid, signal.SIGSEGV)  # type: ignore[attr-defined]
        with pytest.raises(WorkerDied, match=r"SIGSEGV.* crashed in native code(.|\n)*most recent call first"):
            predictor(tiny.paths[0])
