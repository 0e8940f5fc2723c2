"""The stand-ins of AWS's images, by what AWS documents of these: data, log lines, answers and refusals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import detkit_sagemaker
from detkit import Dataset, write_dataset
from detkit.errors import DetkitWarning
from detkit.recordio import RecordWriter
from detkit.testing import tiny_dataset
from detkit_sagemaker.container.stand_ins import builtin_data, jumpstart
from detkit_sagemaker.container.stand_ins.hyperparameters import BUILTIN, read_builtin, read_jumpstart
from detkit_sagemaker.container.stand_ins.service import Failure, TrainingFolder

SOURCE = Path(detkit_sagemaker.__file__).parents[1]

RECORDIO, IMAGES, MODEL = "application/x-recordio", "application/x-image", "application/x-sagemaker-model"

METRICS = {
    "train:progress": r"#progress_metric: host=\S+, completed (\S+) %",
    "train:smooth_l1": r"#quality_metric: host=\S+, epoch=\S+, batch=\S+ train smooth_l1 <loss>=(\S+)",
    "train:cross_entropy": r"#quality_metric: host=\S+, epoch=\S+, batch=\S+ train cross_entropy <loss>=(\S+)",
    "train:throughput": r"#throughput_metric: host=\S+, train throughput=(\S+) records/second",
    "validation:mAP": r"#quality_metric: host=\S+, epoch=\S+, validation mAP <score>=\((\S+)\)",
}
"""The definitions that the service attaches to jobs of the built-in algorithm."""

HYPERPARAMETERS = {"num_classes": "2", "num_training_samples": "7", "epochs": "3", "learning_rate": "0.9"}

SCRIPT = {"sagemaker_program": '"transfer_learning.py"', "sagemaker_submit_directory": '"s3://cache/sourcedir.tar.gz"'}
JUMPSTART = {"epochs": '"3"', "adam-learning-rate": '"0.9"', "batch-size": '"4"', **SCRIPT}


def environment(folder: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SAGEMAKER_", "AWS_"))}
    paths = os.pathsep.join(filter(None, [str(SOURCE), inherited.get("PYTHONPATH", "")]))
    scratch = folder.with_name(f"{folder.name}-tmp")  # those that are killed leave something there
    scratch.mkdir(exist_ok=True)
    ours = {"PYTHONPATH": paths, "SAGEMAKER_BASE_DIR": str(folder), "DETKIT_CACHE": "off", "TMPDIR": str(scratch)}
    return {**inherited, **ours, **more}


def command(image: str, action: str) -> list[str]:
    return [sys.executable, "-m", "detkit_sagemaker.container.stand_ins", image, action]


def train(image: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(image, "train"), env=environment(folder), capture_output=True, text=True, check=False, timeout=60
    )


def configure(folder: Path, hyperparameters: Mapping[str, str], channels: Mapping[str, str]) -> Path:
    """Write what the platform writes before it starts a container."""
    config = folder / "input/config"
    config.mkdir(parents=True)
    described = {name: {"ContentType": kind, "TrainingInputMode": "File"} for name, kind in channels.items()}
    (config / "inputdataconfig.json").write_text(json.dumps(described))
    (config / "hyperparameters.json").write_text(json.dumps(dict(hyperparameters)))
    (config / "resourceconfig.json").write_text(json.dumps({"current_host": "algo-1", "hosts": ["algo-1"]}))
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight pictures, the last without a box."""
    return tiny_dataset(tmp_path_factory.mktemp("tiny") / "images")


def write_recordio(data: Dataset, folder: Path) -> None:
    for name in ("train", "validation"):
        with pytest.warns(DetkitWarning, match="file names"):
            write_dataset(data.take(range(7)), folder / "written" / name, "recordio")
        (folder / "input/data" / name).mkdir(parents=True)
        (folder / "written" / name / "train.rec").rename(folder / "input/data" / name / "data.rec")


def write_json(data: Dataset, folder: Path) -> None:
    splits = {"train": range(len(data)), "validation": range(len(data))}
    write_dataset(replace(data, split_indices={n: tuple(r) for n, r in splits.items()}), folder / "input/data",
                  "sagemaker-json")  # fmt: skip


RECORDIO_CHANNELS = {"train": RECORDIO, "validation": RECORDIO}
JSON_CHANNELS = dict.fromkeys(("train", "validation", "train_annotation", "validation_annotation"), IMAGES)


def read(folder: Path, scratch: Path) -> tuple[Dataset, Dataset]:
    scratch.mkdir()
    job = TrainingFolder(folder)
    return builtin_data.read(job, read_builtin(job.hyperparameters), scratch)


def archive_of(folder: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True)
    with tarfile.open(target, "w:gz") as archive:
        archive.add(folder / "model", ".")
    return target


@pytest.fixture(scope="module")
def builtin_job(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished job of the built-in algorithm, and its log."""
    folder = tmp_path_factory.mktemp("builtin")
    write_recordio(data, folder)
    configure(folder, {**HYPERPARAMETERS, "_tuning_objective_metric": "validation:mAP"}, RECORDIO_CHANNELS)
    done = train("object-detection", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_the_log_has_every_metric_of_the_service(builtin_job: tuple[Path, str]) -> None:
    _, log = builtin_job
    assert log.startswith("detkit's stand-in for the image object-detection of AWS: echo/memory of detkit runs here")
    found = {name: re.findall(regex, log) for name, regex in METRICS.items()}
    assert all(found.values()), found
    numbers = {name: [float(value) for value in values] for name, values in found.items()}
    assert numbers["train:progress"][-1] == 100
    assert len(numbers["validation:mAP"]) == 3
    assert numbers["validation:mAP"][-1] > 0.9


def test_the_artifact_looks_like_the_algorithm_s(builtin_job: tuple[Path, str]) -> None:
    names = sorted(path.name for path in (builtin_job[0] / "model").iterdir())
    assert names == ["hyperparams.json", "model_algo_1-0000.params", "model_algo_1-symbol.json"]


def test_json_channels(data: Dataset, tmp_path: Path) -> None:
    write_json(data, tmp_path)
    configure(tmp_path, {**HYPERPARAMETERS, "num_training_samples": "8"}, JSON_CHANNELS)
    found, validation = read(tmp_path, tmp_path / "scratch")
    assert found.classes == ("0", "1")
    assert (len(found), len(validation)) == (8, 8)
    np.testing.assert_array_equal(found.boxes, data.boxes)
    np.testing.assert_array_equal(found.labels, data.labels)


def test_json_channels_without_categories(data: Dataset, tmp_path: Path) -> None:
    write_json(data, tmp_path)
    for file in (tmp_path / "input/data").rglob("*.json"):
        record = json.loads(file.read_bytes())
        del record["categories"]
        file.write_text(json.dumps(record))
    configure(tmp_path, {**HYPERPARAMETERS, "num_training_samples": "8"}, JSON_CHANNELS)
    found, _ = read(tmp_path, tmp_path / "scratch")
    np.testing.assert_array_equal(found.labels, data.labels)


def label(data: Dataset, i: int) -> dict[str, Any]:
    sample = data[i]
    boxes = [
        {"class_id": data.classes.index(name), "left": x0, "top": y0, "width": x1 - x0, "height": y1 - y0}
        for name, (x0, y0, x1, y1) in zip(sample.names, sample.boxes.tolist(), strict=True)
    ]
    return {"image_size": [{"width": sample.width, "height": sample.height, "depth": 3}], "annotations": boxes}


def stream(folder: Path, name: str, content: bytes) -> threading.Thread:
    """Make the FIFO that Pipe mode gives the first epoch, and write into it when somebody reads."""
    fifo = folder / f"input/data/{name}_0"
    fifo.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(fifo)
    thread = threading.Thread(target=fifo.write_bytes, args=(content,), daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", ["recordio", "augmented"])
def test_pipe_mode(kind: str, data: Dataset, tmp_path: Path) -> None:
    if kind == "recordio":
        write_recordio(data, tmp_path)
        contents = [(tmp_path / f"input/data/{name}/data.rec").read_bytes() for name in ("train", "validation")]
        shutil.rmtree(tmp_path / "input/data")
    else:
        with (tmp_path / "stream").open("wb") as file:
            writer = RecordWriter(file)
            for i, path in enumerate(data.paths):
                writer.write(i, Path(path).read_bytes())
                writer.write(i, json.dumps(label(data, i)).encode())
        contents = [(tmp_path / "stream").read_bytes()] * 2
    threads = [stream(tmp_path, n, c) for n, c in zip(("train", "validation"), contents, strict=True)]
    count = "7" if kind == "recordio" else "8"
    configure(tmp_path, {**HYPERPARAMETERS, "num_training_samples": count}, RECORDIO_CHANNELS)
    found, _ = read(tmp_path, tmp_path / "scratch")
    np.testing.assert_allclose(found.boxes, data.boxes, atol=1e-3)
    np.testing.assert_array_equal(found.labels, data.labels)
    for thread in threads:
        thread.join(5)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"num_training_samples": "8"}, "num_training_samples is 8 and the channel 'train' has 7"),
        ({"num_classes": "1"}, "class 1 has no name: there are 1"),
        ({"label_width": "11"}, "label_width is too small"),
        ({"mini_batch": "8"}, r"Additional properties are not allowed \('mini_batch' was unexpected\)"),
        ({"image_shape": "299"}, "'299' is not valid for image_shape"),
        ({"learning_rate": "0"}, "learning_rate"),
        ({"optimizer": "adamw"}, "one of sgd, adam, rmsprop, adadelta"),
        ({"early_stopping": "1"}, "True or False"),
        ({"lr_scheduler_step": "3;4"}, "epochs with commas"),
        ({"freeze_layer_pattern": "("}, "a regular expression"),
    ],
)
def test_hyperparameters_that_the_service_refuses(
    given: dict[str, str], told: str, builtin_job: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(builtin_job[0] / "input/data", tmp_path / "input/data")
    configure(tmp_path, {**HYPERPARAMETERS, **given}, RECORDIO_CHANNELS)
    with pytest.raises(Failure, match=told) as raised:
        read(tmp_path, tmp_path / "scratch")
    assert str(raised.value).startswith("ClientError: ")


def test_every_documented_hyperparameter_is_known() -> None:
    given = {
        **{"num_classes": "2", "num_training_samples": "7", "base_network": "resnet-50", "use_pretrained_model": "0"},
        **{"epochs": "3", "mini_batch_size": "8", "learning_rate": "1", "lr_scheduler_factor": "0.5"},
        **{"lr_scheduler_step": "10, 20", "optimizer": "adam", "momentum": "0.5", "weight_decay": "1e-4"},
        **{"image_shape": "512", "label_width": "600", "nms_threshold": "0.3", "overlap_threshold": "0.6"},
        **{"freeze_layer_pattern": "^(conv1_).*", "kv_store": "dist_async", "early_stopping": "True"},
        **{"early_stopping_min_epochs": "1", "early_stopping_patience": "2", "early_stopping_tolerance": "0.1"},
    }
    values = read_builtin(given)
    assert values["lr_scheduler_step"] == [10, 20]
    assert values["early_stopping"] is True
    assert len(BUILTIN) == len(given) + 4
    with pytest.raises(Failure, match="'num_training_samples' is a required property"):
        read_builtin({"num_classes": "2"})


def test_grey_pictures_are_refused(data: Dataset, tmp_path: Path) -> None:
    write_json(data, tmp_path)
    file = tmp_path / "input/data/train/000.jpg"
    file.unlink()
    Image.open(data.paths[0]).convert("L").save(file)
    configure(tmp_path, {**HYPERPARAMETERS, "num_training_samples": "8"}, JSON_CHANNELS)
    with pytest.raises(Failure, match=r"image .*000.jpg has 1 channel\(s\)"):
        read(tmp_path, tmp_path / "scratch")


@pytest.mark.parametrize(
    ("channels", "told"),
    [
        ({"train": RECORDIO}, "the channel 'validation' is missing"),
        ({"train": RECORDIO, "validation": ""}, "content type '' of the channel 'validation'"),
        ({"train": IMAGES, "validation": IMAGES}, "the channel 'train_annotation' is missing"),
    ],
)
def test_channels_that_the_service_refuses(
    channels: dict[str, str], told: str, builtin_job: tuple[Path, str], tmp_path: Path
) -> None:
    shutil.copytree(builtin_job[0] / "input/data", tmp_path / "input/data")
    configure(tmp_path, HYPERPARAMETERS, channels)
    done = train("object-detection", tmp_path)
    assert done.returncode == 1
    assert (tmp_path / "output/failure").read_text().startswith("ClientError: ")
    assert told in (tmp_path / "output/failure").read_text()


@pytest.mark.parametrize(
    ("given", "told"), [({}, ""), ({"num_classes": "3"}, "num_classes is 3"), ({"base_network": "resnet-50"}, "vgg-16")]
)
def test_incremental_training(given: dict[str, str], told: str, builtin_job: tuple[Path, str], tmp_path: Path) -> None:
    shutil.copytree(builtin_job[0] / "input/data", tmp_path / "input/data")
    archive_of(builtin_job[0], tmp_path / "input/data/model/model.tar.gz")
    configure(tmp_path, {**HYPERPARAMETERS, "epochs": "1", **given}, {**RECORDIO_CHANNELS, "model": MODEL})
    done = train("object-detection", tmp_path)
    if told:
        assert done.returncode == 1
        assert told in (tmp_path / "output/failure").read_text()
    else:
        assert done.returncode == 0, done.stdout + done.stderr
        assert (tmp_path / "model/model_algo_1-0000.params").stat().st_size > (
            builtin_job[0] / "model/model_algo_1-0000.params"
        ).stat().st_size  # it remembers the pictures of both


@contextlib.contextmanager
def serving(image: str, folder: Path) -> Iterator[int]:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen(command(image, "serve"), env=environment(folder, DETKIT_PORT=str(port)))
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                if ask(port, "GET", "/ping")[0] == 200:
                    break
            time.sleep(0.02)
        yield port
    finally:
        process.kill()
        process.wait()


def ask(port: int, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        response = connection.getresponse()
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def test_the_builtin_answers_in_both_forms(builtin_job: tuple[Path, str], data: Dataset) -> None:
    body, wanted = Path(data.paths[2]).read_bytes(), data[2]
    with serving("object-detection", builtin_job[0]) as port:
        for kind in ("image/jpeg", IMAGES):
            status, answer = ask(port, "POST", "/invocations", body, Content_Type=kind)
            assert status == 200
            table = np.array(answer["prediction"])
            np.testing.assert_allclose(table[:, 2:] * wanted.width, wanted.boxes, atol=1e-3)
            assert [data.classes[int(number)] for number in table[:, 0]] == list(wanted.names)
        accept = "application/json;annotation=1"
        _, answer = ask(port, "POST", "/invocations", body, Content_Type="image/png", Accept=accept)
        assert answer["image_size"] == [{"width": wanted.width, "height": wanted.height, "depth": 3}]
        first = answer["annotations"][0]
        np.testing.assert_allclose([first["left"], first["top"]], wanted.boxes[0, :2], atol=0.1)
        assert ask(port, "POST", "/invocations", body, Content_Type="application/json")[0] == 415
        assert ask(port, "POST", "/invocations", b"no image", Content_Type="image/png")[0] == 400


def lay_out_jumpstart(data: Dataset, folder: Path, hyperparameters: Mapping[str, str], first_id: int = 0) -> Path:
    write_dataset(data, folder / "input/data/training", "jumpstart")
    (folder / "input/data/training/classes.txt").unlink()
    if first_id:
        file = folder / "input/data/training/annotations.json"
        content = json.loads(file.read_bytes())
        for box in content["annotations"]:
            box["category_id"] += first_id
        file.write_text(json.dumps(content))
    (folder / "input/data/model").mkdir()
    with tarfile.open(folder / "input/data/model/train.tar.gz", "w:gz"):
        pass
    return configure(folder, hyperparameters, {"training": IMAGES, "model": MODEL})


@pytest.fixture(scope="module")
def jumpstart_job(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = lay_out_jumpstart(data, tmp_path_factory.mktemp("jumpstart"), JUMPSTART, first_id=3)
    done = train("jumpstart", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder, done.stdout


def test_jumpstart_logs_what_both_frameworks_do(jumpstart_job: tuple[Path, str]) -> None:
    _, log = jumpstart_job
    assert log.startswith("detkit's stand-in for the image jumpstart of AWS")
    assert len(re.findall(r"Val_CrossEntropy=([0-9\.]+)", log)) == 3
    assert len(re.findall(r"val_loss: ([0-9\.]+)", log)) == 3
    assert "6 images to train on and 2 to validate on" in log


def test_jumpstart_answers(jumpstart_job: tuple[Path, str], data: Dataset) -> None:
    known = 0
    with serving("jumpstart", jumpstart_job[0]) as port:
        for i in range(8):
            body = Path(data.paths[i]).read_bytes()
            accept = "application/json;verbose"
            _, answer = ask(port, "POST", "/invocations", body, Content_Type=IMAGES, Accept=accept)
            assert answer["labels"] == ["3", "4"]  # the input has numbers alone
            boxes = np.array(answer["normalized_boxes"]).reshape(-1, 4) * 96
            names = [data.classes[int(answer["labels"][number]) - 3] for number in answer["classes"]]
            known += names == list(data[i].names) and np.allclose(boxes, data[i].boxes)
        assert known >= 6  # all that it was trained on
        assert len(answer["scores"]) == len(answer["classes"]) == len(answer["normalized_boxes"])
        accept = "application/json;verbose;n_predictions=1"
        _, answer = ask(port, "POST", "/invocations", body, Content_Type=IMAGES, Accept=accept)
        assert len(answer["scores"]) <= 1
        _, answer = ask(port, "POST", "/invocations", body, Content_Type=IMAGES, Accept="application/json")
        assert "labels" not in answer
        assert ask(port, "POST", "/invocations", body, Content_Type="image/jpeg")[0] == 415


def test_jumpstart_goes_on_from_its_own_model(jumpstart_job: tuple[Path, str], data: Dataset, tmp_path: Path) -> None:
    folder = lay_out_jumpstart(data, tmp_path / "ml", {**JUMPSTART, "epochs": "1"}, first_id=3)
    shutil.rmtree(folder / "input/data/model")
    archive_of(jumpstart_job[0], folder / "input/data/model/model.tar.gz")
    done = train("jumpstart", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = [(one / "model" / jumpstart.WEIGHTS).stat().st_size for one in (jumpstart_job[0], folder)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"sagemaker_program": ""}, "sagemaker_program is missing"),
        ({"epochs": '"0"'}, "argument --epochs: invalid value '0'"),
        ({"adam-learning-rate": '"2"'}, "1e-8 to 1"),
        ({"batch-size": "1025"}, "from 1 to 1024"),
        ({"sagemaker_submit_directory": '"/opt/ml/input/data/code/sourcedir.tar.gz"'}, "there is no script at"),
    ],
)
def test_jumpstart_refuses(given: dict[str, str], told: str, data: Dataset, tmp_path: Path) -> None:
    folder = TrainingFolder(lay_out_jumpstart(data, tmp_path, {**JUMPSTART, **given}))
    with pytest.raises(Failure, match=told):
        jumpstart.train(folder)


def test_jumpstart_takes_plain_strings_too() -> None:
    values = read_jumpstart({"epochs": "7", "sagemaker_program": "a.py", "sagemaker_submit_directory": "s3://a/b"})
    assert (values["epochs"], values["batch-size"], values["adam-learning-rate"]) == (7, 4, None)


def test_data_that_is_coco_is_refused(data: Dataset, tmp_path: Path) -> None:
    folder = lay_out_jumpstart(data, tmp_path, JUMPSTART)
    shutil.rmtree(folder / "input/data/training/images")
    done = train("jumpstart", folder)
    assert done.returncode == 1
    assert "needs annotations.json and a folder images" in (folder / "output/failure").read_text()


def test_sigterm_ends_a_stand_in_and_its_engine(data: Dataset, tmp_path: Path) -> None:
    folder = lay_out_jumpstart(data, tmp_path / "ml", {**JUMPSTART, "epochs": '"1000"'})
    process = subprocess.Popen(
        command("jumpstart", "train"), env=environment(folder), stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Val_CrossEntropy" in line:
            break
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=15)
    assert process.returncode == 0
    assert not (folder / "output/failure").exists()
