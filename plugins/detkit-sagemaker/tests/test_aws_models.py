"""AWS's own models by the trainer's call: data that is streamed, JumpStart's two frameworks, answers from endpoints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import detkit
from detkit import Dataset, Run, Trainer
from detkit.errors import SeenImages, Unsupported, UsageError
from detkit.files import file_sha256
from detkit.testing import tiny_dataset
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.testing import Simulator

BUILTIN: Mapping[str, Any] = {"model": "object-detection", "mini_batch_size": 4, "learning_rate": 0.3, "epochs": 3}
JUMPSTART: Mapping[str, Any] = {"model": "jumpstart/mxnet-od-ssd-512-resnet50-v1-coco", "epochs": 2}


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    with Simulator(folder=tmp_path_factory.mktemp("aws")) as aws, pytest.MonkeyPatch.context() as patch:
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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def trainer(aws: Simulator, settings: Mapping[str, Any], **more: Any) -> Trainer:
    return Trainer(backend="sagemaker", role=aws.role, max_cost=5, **{**settings, **more})


def reported(run: Run) -> list[float]:
    """Return the scores that the algorithm told of itself, one an epoch."""
    return [row["aws/validation:mAP"] for row in run.history if "aws/validation:mAP" in row]


@pytest.mark.parametrize(("streamed", "copied"), [("manifest", "json"), ("recordio", "recordio")])
def test_what_is_streamed_trains_as_what_lies_on_a_disk(
    streamed: str, copied: str, aws: Simulator, data: Dataset
) -> None:
    stream = trainer(aws, BUILTIN, data_format=streamed, input_mode="pipe").fit(data, data, name="stream", quiet=True)
    disk = trainer(aws, BUILTIN, data_format=copied, input_mode="file").fit(data, data, name="disk", quiet=True)
    of_stream, of_disk = (sent for operation, sent in aws.created[-2:] if operation == "CreateTrainingJob")
    assert of_stream["AlgorithmSpecification"]["TrainingInputMode"] == "Pipe"
    assert of_disk["AlgorithmSpecification"]["TrainingInputMode"] == "File"
    assert len(reported(stream)) == 3
    # The images of a manifest come in another order in each epoch.
    assert reported(stream) == (pytest.approx(reported(disk), abs=0.2) if streamed == "manifest" else reported(disk))


def test_nothing_goes_on_from_a_model_of_another_network_or_other_classes(aws: Simulator, data: Dataset) -> None:
    run = trainer(aws, BUILTIN).fit(data, data, name="parent", quiet=True)
    before = list(aws.created)
    with pytest.raises(UsageError, match="base_network=vgg-16, and this one resnet-50; write the same one"):
        trainer(aws, BUILTIN, weights=run, base_network="resnet-50").fit(data, data, name="never", quiet=True)
    other = data.with_classes([*data.classes, "star"])
    with pytest.raises(UsageError, match="the earlier model has 2 classes"):
        trainer(aws, BUILTIN, weights=run).fit(other, other, name="neither", quiet=True)
    assert aws.created == before


@pytest.mark.parametrize("data_format", ["manifest", "recordio"])
def test_fastfile_is_refused_before_anything_is_there(data_format: str, aws: Simulator, data: Dataset) -> None:
    before = aws.created
    with pytest.raises(UsageError, match="input_mode=fastfile is not for the built-in algorithm; choose file or pipe"):
        trainer(aws, BUILTIN, data_format=data_format, input_mode="fastfile").fit(data, data, name="never")
    assert aws.created == before


@pytest.mark.parametrize(
    ("model", "framework", "metric"),
    [
        ("mxnet-od-ssd-512-resnet50-v1-coco", "mxnet", "aws/val_cross_entropy"),
        ("pytorch-od1-fasterrcnn-resnet50-fpn", "pytorch", "aws/val_loss"),
    ],
)
def test_a_model_of_jumpstart_s_answers_from_an_endpoint(
    model: str, framework: str, metric: str, aws: Simulator, data: Dataset
) -> None:
    """Its boxes have the names that they had in training, also where a class before them occurs nowhere."""
    train = data.with_classes(("arrow", *data.classes))
    run = trainer(aws, {"model": f"jumpstart/{model}"}, learning_rate=0.3, epochs=4).fit(train, train, quiet=True)
    assert run.model.classes == data.classes
    assert run.metrics[metric] == run.history[-1][metric] < run.history[0][metric]
    with (
        detkit.deploy(run, ttl="1h", role=aws.role, max_cost=1) as endpoint,
        detkit.Predictor(endpoint, score_threshold=0.1) as predictor,
    ):
        answers = list(predictor.predict(data))
    sent = dict(aws.created)
    assert f"{framework}-training" in sent["CreateTrainingJob"]["AlgorithmSpecification"]["TrainingImage"]
    assert f"{framework}-inference" in sent["CreateModel"]["PrimaryContainer"]["Image"]
    for answer, sample in zip(answers, data, strict=True):
        if len(sample.boxes):  # an engine that knows nothing but boxes finds one in the picture without any
            assert answer.names == sample.names
            assert np.allclose(answer.boxes, sample.boxes, atol=0.01)
    aws.wait()
    assert aws.live() == []
    assert Ledger.of(Aws()).pending() == []


def test_a_class_that_occurs_nowhere_is_told_before(aws: Simulator, data: Dataset) -> None:
    train = data.with_classes(("arrow", *data.classes))
    plan = trainer(aws, JUMPSTART).plan(train, train)
    assert "no image that is sent has a box of arrow, so the model will not know it" in plan.notes
    assert not any("has a box of" in note for note in trainer(aws, JUMPSTART).plan(data, data).notes)


def test_jumpstart_sees_the_validation_images(aws: Simulator, data: Dataset) -> None:
    """Its script divides anew all that it is given, so that nothing says which of them it has trained on."""
    train, val, test = data.take(range(4)), data.take(range(4, 6)), data.take(range(6, 8))
    plan = trainer(aws, JUMPSTART).plan(train, val)
    assert any("the 2 validation images are given to it as well, and count as seen" in note for note in plan.notes)
    run = trainer(aws, JUMPSTART).fit(train, val, test, name="js", quiet=True)
    digests = {name: [file_sha256(Path(path)) for path in part.paths] for name, part in (("t", train), ("v", val))}
    assert run.model.seen() == {"train": digests["t"], "validation": digests["v"]}
    with pytest.raises(SeenImages, match="2 of 2"):
        detkit.evaluate(run, val)
    with pytest.raises(Unsupported, match="detkit sagemaker transform"):
        detkit.evaluate(run, test)


def test_jumpstart_goes_on_with_the_same_classes_only(aws: Simulator, data: Dataset) -> None:
    first = trainer(aws, JUMPSTART).fit(data, data, name="first", quiet=True)
    again = trainer(aws, JUMPSTART, weights=first)
    (sent,) = (
        channel
        for channel in again.plan(data, data).requests[0][1]["InputDataConfig"]
        if channel["ChannelName"] == "model"
    )
    assert sent["DataSource"]["S3DataSource"]["S3Uri"].endswith("/output/model.tar.gz")
    assert again.fit(data, data, name="again", quiet=True).status == "finished"
    turned = data.with_classes(data.classes[::-1])
    with pytest.raises(
        UsageError, match="the classes disc, square, and the data square, disc(.|\n)*order them the same"
    ):
        again.fit(turned, turned, name="turned")
    discs = data.take([i for i, sample in enumerate(data) if set(sample.names) == {"disc"}])
    (error,) = again.plan(discs, discs).errors
    assert "has 2 classes (disc, square), and the data 1 (disc); JumpStart goes on only with as many" in str(error)
