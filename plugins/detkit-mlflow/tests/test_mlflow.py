"""Real runs of the echo backend, logged by MLflow into a store on disk or over HTTP, and read back with its client."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("mlflow", reason="logs to, and reads from, MLflow")
pytest.importorskip("detkit_echo")

import mlflow
from mlflow import MlflowClient

import detkit
import detkit_mlflow
from detkit import Dataset, Trainer, plugins
from detkit.errors import RunFailed
from detkit.live import follow
from detkit.testing import tiny_dataset

SOURCE = Path(__file__).parents[1]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    """Some pictures, in a process where the tracker is installed and logs into a folder."""
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "DETKIT_"))]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # the only store on disk that mlflow-skinny alone has
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "store").as_uri())
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "1")
    plugins.registry.cache_clear()
    plugins.registry().manager.register(detkit_mlflow, name="mlflow")
    yield tiny_dataset(tmp_path / "images")
    plugins.registry.cache_clear()


def tracked(run: detkit.Run) -> Any:
    """Return what MLflow has of a run."""
    assert not plugins.registry().broken
    written = json.loads((run.path / "output/data/mlflow.json").read_text())
    assert written["tracking_uri"] == os.environ["MLFLOW_TRACKING_URI"]
    return MlflowClient().get_run(written["run_id"])


def history(run: detkit.Run) -> dict[str, list[tuple[int, float]]]:
    found = tracked(run)
    return {
        name: [(metric.step, metric.value) for metric in MlflowClient().get_metric_history(found.info.run_id, name)]
        for name in found.data.metrics
    }


def logged(run: detkit.Run) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in run.history:
        for name, value in row.items():
            if "/" in name:
                series.setdefault(name, []).append((int(row["step"]), value))
    return series


def test_numbers_parameters_tags_and_manifest(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "shapes")
    run = Trainer(model="echo/memory", epochs=2, name="mine").fit(data, data, data, quiet=True)
    found = tracked(run)
    assert (found.info.status, found.info.run_name) == ("FINISHED", "mine")
    assert MlflowClient().get_experiment(found.info.experiment_id).name == "shapes"
    assert history(run) == logged(run)
    assert set(found.data.metrics) == {"train/loss", "val/AP", "val/AP50", "test/AP", "test/AP50"}
    assert set(found.data.params) == set(run.job.params)
    assert (found.data.params["epochs"], found.data.params["weights"]) == ("2", "null")
    tags = {name.removeprefix("detkit."): tag for name, tag in found.data.tags.items() if name.startswith("detkit.")}
    digests = {f"data.{name}": counts["digest"] for name, counts in run.model.manifest.data.items()}
    about = {"run": str(run.path), "backend": "echo", "model": "echo/memory", "version": detkit.__version__}
    assert tags == {**about, **digests}
    assert len(digests) == 3
    assert [file.path for file in MlflowClient().list_artifacts(found.info.run_id, "model")] == ["model/detkit.json"]


def test_experiment_by_its_id(data: Dataset, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The id alone asks for the tracker, too, where the server was named in Python."""
    request.addfinalizer(lambda: mlflow.set_tracking_uri(None))
    mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
    number = MlflowClient().create_experiment("by id")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", number)
    with monkeypatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI")
        run = Trainer(model="echo/memory", epochs=1).fit(data, data, quiet=True)
    assert tracked(run).info.experiment_id == number
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    with pytest.warns(plugins.PluginWarning, match="is the experiment 'by id', and MLFLOW_EXPERIMENT_NAME='another'"):
        Trainer(model="echo/memory", epochs=1).fit(data, data, quiet=True)


def test_weights_where_they_are_asked_for(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_MLFLOW_LOG_MODEL", "1")
    run = Trainer(model="echo/memory", epochs=1).fit(data, data, quiet=True)
    files = MlflowClient().list_artifacts(tracked(run).info.run_id, "model")
    assert {file.path for file in files} == {f"model/{file.name}" for file in run.workspace.model.iterdir()}


def test_resumed_run_goes_on_in_the_same_one(data: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=3, seconds_per_step=0.1).start(data, data, leash=True)

    def stop_in_the_second_epoch() -> None:
        while not any((event.epoch or 0) > 1 for event in run.events(follow=False)):
            time.sleep(0.01)
        run.stop()

    stopper = threading.Thread(target=stop_in_the_second_epoch)
    stopper.start()
    follow(run, quiet=True)
    stopper.join()
    stopped = tracked(run)
    assert stopped.info.status == "KILLED"
    resumed = Trainer().resume(run, quiet=True)
    assert tracked(resumed).info.run_id == stopped.info.run_id
    assert tracked(resumed).info.status == "FINISHED"
    repeated = [event.step for event in resumed.events(follow=False) if "train/loss" in event.values]
    assert len(set(repeated)) < len(repeated), "the run did no step twice, so nothing is shown here"
    assert history(resumed) == logged(resumed)
    follow(resumed, quiet=True)
    assert history(resumed) == logged(resumed), "following once more adds nothing"


def test_failed_run(data: Dataset) -> None:
    with pytest.raises(RunFailed):
        Trainer(model="echo/memory", epochs=1, device="cuda:9", name="bad").fit(data, data, quiet=True)
    assert tracked(detkit.open_run("bad")).info.status == "FAILED"


def test_nothing_happens_unless_asked(data: Dataset, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    run = Trainer(model="echo/memory", epochs=1).fit(data, data, quiet=True)
    assert not (run.path / "output/data/mlflow.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"cache", "images", "runs"}


def test_server_that_is_not_there_is_reported_once(data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens there
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.warns(plugins.PluginWarning, match="'mlflow' is left out: MlflowException: .*refused") as warned:
            run = Trainer(model="echo/memory", epochs=2).fit(data, data, quiet=True)
    assert (run.status, len(warned)) == ("finished", 1)


def test_importing_it_is_cheap() -> None:
    code = "import sys, detkit_mlflow; print({'mlflow', 'numpy'} & set(sys.modules))"
    path = os.pathsep.join([str(SOURCE / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.strip() == "set()"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """MLflow's own server; returns its address. ``mlflow server`` would ask for pandas and a queue, too."""
    pytest.importorskip("sqlalchemy")
    pytest.importorskip("flask")
    pytest.importorskip("flask_cors")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "_MLFLOW_SERVER_FILE_STORE": str(tmp_path / "served"),
        "_MLFLOW_SERVER_ARTIFACT_ROOT": str(tmp_path / "artifacts"),
    }
    command = [sys.executable, "-m", "flask", "--app", "mlflow.server:app", "run", "--port", str(port)]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                time.sleep(0.1)
        else:
            pytest.fail(f"the server did not come up:\n{(tmp_path / 'server.log').read_text()}")
        yield address
    finally:
        process.terminate()
        process.wait()


@pytest.mark.slow
def test_installed_and_over_http(data: Dataset, server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel, as an installer would put it; what is printed as JSON stays JSON."""
    pytest.importorskip("hatchling", reason="builds the wheel; nothing is fetched from the network")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.delenv("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--disable-pip-version-check", "--target", site, SOURCE],
        check=True,
    )  # fmt: skip
    detkit.write_dataset(data, tmp_path / "shapes", "coco")
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    words = ["train", "shapes", "shapes", "--model", "echo/memory", "--name", "r", "--json", "epochs=2"]
    done = subprocess.run(
        [sys.executable, "-m", "detkit.cli", *words],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    run = detkit.open_run("r")
    assert tracked(run).info.status == "FINISHED"
    assert history(run) == logged(run) != {}
