"""From pictures to one report and an empty account, on the simulated one; and what is said to whom on the way."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import detkit
from detkit import Dataset, Trainer
from detkit.backends import PredictOptions
from detkit.cli.places import app as endpoint_verbs
from detkit.errors import Unsupported
from detkit.images import read_image
from detkit.shapes import write_shapes
from detkit.testing import tiny_dataset
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.rescoring import transform
from detkit_sagemaker.testing import Simulator

JUMPSTART = "jumpstart/mxnet-od-ssd-512-resnet50-v1-coco"


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    images = {"detkit:latest": [sys.executable, "-m", "detkit_sagemaker.container"]}
    with (
        Simulator(images=images, folder=tmp_path_factory.mktemp("aws")) as aws,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("boto3.DEFAULT_SESSION", None)
        for name, value in aws.environment.items():
            patch.setenv(name, value)
        yield aws


@pytest.fixture(autouse=True)
def aws(account: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulator:
    """The account; runs, cache and ledger are the test's own."""
    for name, place in {"RUNS": "runs", "CACHE": "cache", "LEDGER": "ledger.jsonl"}.items():
        monkeypatch.setenv(f"DETKIT_{name}", str(tmp_path / place))
    monkeypatch.setenv("DETKIT_SCHEDULER_ROLE", account.role)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))
    return account


def trainer(aws: Simulator, model: str, **settings: Any) -> Trainer:
    return Trainer(backend="sagemaker", model=model, role=aws.role, max_cost=5, **settings)


def remove_all() -> list[str]:
    done = CliRunner().invoke(endpoint_verbs, ["rm", "--all", "--json"])
    assert done.exit_code == 0, done.output
    return list(json.loads(done.stdout)["removed"])


def assert_nothing_lives(aws: Simulator) -> None:
    aws.wait()
    assert aws.live() == []
    assert Ledger.of(Aws()).pending() == []


def saved_again(data: Dataset, folder: Path) -> Dataset:
    """The same pictures in other files: nobody has seen those, and what remembers pictures knows them."""
    folder.mkdir()
    paths = tuple(str(folder / f"{number}.jpg") for number in range(len(data)))
    for path, other in zip(data.paths, paths, strict=True):
        Image.open(path).convert("RGB").save(other, quality=70)
    return dataclasses.replace(data, paths=paths, image_ids=tuple(Path(path).name for path in paths))


def test_three_ways_one_report_and_nothing_left(aws: Simulator, tmp_path: Path) -> None:
    train, val = tiny_dataset(tmp_path / "pictures", num_images=16).split(0.75, 0.25, seed=1)
    test = saved_again(train, tmp_path / "test")
    ours_image = aws.image("detkit:latest")
    runs = {
        "built-in": trainer(aws, "object-detection", mini_batch_size=4, learning_rate=0.3).fit(train, val, name="ssd"),
        "jumpstart": trainer(aws, JUMPSTART, learning_rate=0.3, epochs=4).fit(train, val, name="js"),
        "ours": trainer(aws, "echo/memory", image_uri=ours_image).fit(train, val, name="ours"),
        "local": Trainer(model="echo/memory").fit(train, val, name="local"),
    }
    for name in ("built-in", "jumpstart"):
        with pytest.raises(Unsupported, match="detkit sagemaker transform(.|\n)*detkit deploy"):
            detkit.evaluate(runs[name], test)
        options = TransformOptions(role=aws.role, max_cost=1)
        assert transform(runs[name].model, test, options) == (len(test), len(test))
    compared = detkit.compare(runs, test)
    assert compared["ours"]["AP"] == compared["local"]["AP"]
    assert min(compared[name]["AP50"] for name in runs) > 0.5
    report = compared.to_html(tmp_path / "report.html").read_text()
    assert all(name in report for name in runs)

    detkit.deploy(runs["built-in"], ttl="1h", role=aws.role, max_cost=1)
    endpoint = detkit.deploy(runs["ours"], ttl="1h", role=aws.role, image_uri=ours_image, max_cost=1)
    pictures = [read_image(path) for path in test.paths]
    floor = PredictOptions(score_threshold=0.1)
    with contextlib.closing(endpoint.open(floor)) as detector:
        there = detector.detect(pictures)
    with detkit.Predictor(runs["local"], score_threshold=0.1) as predictor:
        for one, other in zip(there, predictor.predict(test), strict=True):
            assert one.names == other.names
            assert np.allclose(one.boxes, other.boxes)
    assert len(detkit.deployment.list_endpoints()) == 2
    assert len(aws.live("endpoint")) == 2
    assert len(remove_all()) == 2
    assert remove_all() == []
    assert_nothing_lives(aws)


def test_code_travels_to_training_and_transform(aws: Simulator, tmp_path: Path) -> None:
    data, code = tiny_dataset(tmp_path / "pictures"), tmp_path / "my_own.py"
    code.write_text(
        "from detkit_echo import engine\n"
        "print('hello from my_own', flush=True)\n"
        "before = engine.thumbnail\n"
        "engine.thumbnail = lambda image: before(image) * 0.5\n",
    )
    settings: dict[str, Any] = {"code": code, "imports": ["my_own"], "epochs": 8}
    run = trainer(aws, "echo/memory", image_uri=aws.image("detkit:latest"), **settings).fit(
        data, data, name="there", quiet=True
    )
    assert "hello from my_own" in run.workspace.log_file.read_text()
    here = Trainer(model="echo/memory", **settings).fit(data, data, name="here", quiet=True)
    assert run.model.manifest.artifacts["memory.npz"] == here.model.manifest.artifacts["memory.npz"]
    options = TransformOptions(role=aws.role, image_uri=aws.image("detkit:latest"), yes=True)
    assert transform(run.model, data, options) == (len(data), len(data))
    assert detkit.evaluate(run, data, allow_seen=True)["AP50"] > 0.85, "answers that this process has not made"


WHOLE_WAY = """
import os, sys
import detkit
from detkit.backends import PredictOptions
from detkit.images import read_image
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.rescoring import transform

role, image, folder, place = sys.argv[1:]
data = detkit.read_dataset(folder)
paid = {"backend": "sagemaker", "role": role, "yes": True}
built_in = {"model": "object-detection", "mini_batch_size": 4, "epochs": 1}
if place:  # images that s3fs reads, and leaves there
    detkit.write_dataset(data, place)
    detkit.Trainer(**paid, **built_in, data_format="manifest").fit(place, place, name="there", quiet=True)
ssd = detkit.Trainer(**paid, **built_in).fit(data, data, name="ssd", quiet=True)
transform(ssd.model, data, TransformOptions(role=role, yes=True))
detkit.Trainer(**paid, model=JUMPSTART, epochs=1).fit(data, data, name="js", quiet=True)
search = {"space": {"learning_rate": detkit.Float(0.01, 0.5, log=True)}, "trials": 2, "parallel": 2}
detkit.Tuner(detkit.Trainer(**paid, **built_in), **search).fit(data, data, name="search", quiet=True)
trainer = detkit.Trainer(backend="sagemaker", model="echo/memory", role=role, image_uri=image, yes=True)
trainer.plan(data, data)
run = trainer.fit(data, data, name="heard", quiet=True)
transform(run.model, data, TransformOptions(role=role, image_uri=image, yes=True))
with detkit.deploy(run, ttl="1h", role=role, image_uri=image, yes=True) as endpoint:
    detector = endpoint.open(PredictOptions())
    detector.detect([read_image(path) for path in data.paths])
    detector.close()
print("done")
"""

LISTENS = """
import os, sys

def hear(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        told = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[:2]
        with open(HEARD, "a") as file:
            print(" ".join(sys.orig_argv[-3:])[-60:].replace(chr(10), " "), event, *told, sep="\\t", file=file)

sys.addaudithook(hear)
"""
"""A `sitecustomize.py`, below a line with ``HEARD``: every process of Python's, also each container, tells whom it
talks to there."""


def test_nobody_else_is_talked_to(aws: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan, training in all three ways, search, transform, endpoint and clean-up: what runs here, and in the
    containers, knows one address.
    """
    (tmp_path / "hook").mkdir()
    heard_in = (
        f"HEARD = {str(tmp_path / 'heard')!r}\n"  # containers get PYTHONPATH, and no variable that they do not know
    )
    (tmp_path / "hook" / "sitecustomize.py").write_text(heard_in + LISTENS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'hook'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    detkit.write_dataset(tiny_dataset(tmp_path / "pictures"), tmp_path / "coco")
    place = f"s3://{aws.bucket}/pictures" if importlib.util.find_spec("s3fs") else ""
    words = [aws.role, aws.image("detkit:latest"), str(tmp_path / "coco"), place]
    script = f"JUMPSTART = {JUMPSTART!r}\n{WHOLE_WAY}"
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("done\n"), done.stderr
    heard = [line.split("\t") for line in (tmp_path / "heard").read_text().splitlines()]
    url = urlsplit(aws.url)
    known = {url.hostname, "localhost", "0.0.0.0", "::", "None"}
    connected = {tuple(address) for _, event, *address in heard if event == "socket.connect"}
    assert connected == {(url.hostname, str(url.port))}
    assert {address[0] for _, event, *address in heard if event != "socket.connect"} <= known
    assert_nothing_lives(aws)


def test_looking_creates_nothing(aws: Simulator, tmp_path: Path) -> None:
    """Importing makes no call; planning and what it checks make none that changes anything."""
    before = len(aws.calls)
    imports = "import sys, detkit_sagemaker.backend, detkit; detkit.Trainer(backend='sagemaker').explain; "
    imports += "from detkit import plugins; plugins.backends(); print('boto3' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", imports], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert len(aws.calls) == before
    data, created = tiny_dataset(tmp_path / "pictures"), aws.created
    ways: dict[str, dict[str, Any]] = {
        "object-detection": {"mini_batch_size": 4},
        JUMPSTART: {},
        "echo/memory": {"image_uri": "docker.io/it"},
    }
    for model, more in ways.items():
        assert trainer(aws, model, **more).plan(data, data).requests
    search = {"space": {"learning_rate": detkit.Float(0.01, 0.5, log=True)}, "trials": 2}
    built_in = trainer(aws, "object-detection", mini_batch_size=4)
    assert detkit.Tuner(built_in, **search).plan(data, data).requests  # type: ignore[arg-type]
    calls = set(aws.calls[before:])
    assert {"HeadBucket", "GetRole", "ListServiceQuotas", "DescribeHubContent"} <= calls
    assert not [call for call in calls if not call.startswith(("Head", "Get", "List", "Describe", "Batch"))]
    assert aws.created == created
    assert not Path(os.environ["DETKIT_RUNS"]).exists()
    assert not Path(os.environ["DETKIT_LEDGER"]).exists()


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="needs torchvision")
def test_a_real_engine_goes_the_whole_way(aws: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = detkit.read_dataset(write_shapes(tmp_path / "shapes", num_images=24))
    train, val, test = data.split(0.6, 0.2, 0.2, seed=0)
    image = aws.image("detkit:latest")
    settings: dict[str, Any] = {"image_size": 64, "iterations": 6, "batch_size": 2, "seed": 3}
    run = trainer(aws, "torchvision/fcos_tiny", image_uri=image, **settings).fit(train, val, name="there")
    here = Trainer(model="torchvision/fcos_tiny", device="cpu", **settings).fit(train, val, name="here")
    assert run.model.name == here.model.name == "torchvision/fcos_tiny"
    losses, same = ([row["train/loss"] for row in one.history if "train/loss" in row] for one in (run, here))
    assert losses == pytest.approx(same, rel=1e-3)
    answers: dict[str, Any] = {}
    floor = 0.01
    with detkit.Predictor(run, score_threshold=floor, device="cpu") as predictor:
        answers["here"] = list(predictor.predict(test))
    options = TransformOptions(role=aws.role, image_uri=image, yes=True)
    assert transform(run.model, test, options) == (len(test), len(test))
    with (
        detkit.deploy(run, ttl="1h", role=aws.role, image_uri=image, yes=True) as endpoint,
        contextlib.closing(endpoint.open(PredictOptions(score_threshold=floor))) as detector,
    ):
        answers["endpoint"] = detector.detect([read_image(path) for path in test.paths])
    for one, other in zip(answers["here"], answers["endpoint"], strict=True):
        assert len(one) == len(other) > 0
        assert np.allclose(one.boxes, other.boxes, atol=0.1)
    monkeypatch.setenv("DETKIT_STAND_IN_ENGINE", "torchvision/fcos_tiny")
    others = {
        "built-in": trainer(aws, "object-detection", mini_batch_size=4, epochs=1).fit(train, val, name="ssd"),
        "jumpstart": trainer(aws, JUMPSTART, epochs=1).fit(train, val, name="js"),
    }
    for other in others.values():
        assert "torchvision/fcos_tiny of detkit runs here" in other.workspace.log_file.read_text()
        assert transform(other.model, test, TransformOptions(role=aws.role, yes=True)) == (len(test), len(test))
    compared = detkit.compare({"there": run, "here": here, **others}, test)
    assert compared["there"]["AP"] == pytest.approx(compared["here"]["AP"], abs=0.02)
    report = compared.to_html(tmp_path / "report.html").read_text()
    assert all(name in report for name in others)
    assert_nothing_lives(aws)
