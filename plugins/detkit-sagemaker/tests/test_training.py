"""Training jobs from the trainer's call to the model that comes back, on the simulated account."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

import detkit
from detkit import Dataset, Trainer, open_run, plugins
from detkit.backends import LocalBackend, Suggestion
from detkit.errors import MissingSettings, RunFailed, Unsupported, UsageError
from detkit.hookspecs import hookimpl
from detkit.runs import Run
from detkit.testing import tiny_dataset
from detkit_sagemaker.aws import Aws, NoCapacity, QuotaExceeded
from detkit_sagemaker.backend import SagemakerBackend
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.rescoring import transform
from detkit_sagemaker.testing import Simulator, hub

IMAGE = "123456789012.dkr.ecr.us-east-1.amazonaws.com/detkit:latest"


@pytest.fixture
def simulator_images() -> Mapping[str, Sequence[str]]:
    """Our container, as a process."""
    return {"detkit:latest": [sys.executable, "-m", "detkit_sagemaker.container"]}


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs, cache, ledger and the SDK's defaults are the test's own."""
    monkeypatch.setenv("DETKIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DETKIT_LEDGER", str(tmp_path / "ledger.jsonl"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return tiny_dataset(tmp_path / "data")


def trainer(aws: Simulator, model: str = "echo/memory", **settings: object) -> Trainer:
    if model.startswith("echo"):
        settings = {"image_uri": IMAGE, **settings}
    return Trainer(backend="sagemaker", model=model, role=aws.role, **settings)  # type: ignore[arg-type]


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.history if "train/loss" in row]


def test_our_container_is_trained_and_opened_here(simulator: Simulator, data: Dataset) -> None:
    run = trainer(simulator, max_cost=5).fit(data, data, name="first")
    assert run.status == "finished"
    assert run.model.name == "echo/memory"
    assert run.model.classes == data.classes
    assert detkit.evaluate(run, data, allow_seen=True)["AP50"] > 0.85
    local = Trainer(model="echo/memory").fit(data, data, name="local")
    assert losses(run) == losses(local)
    assert open_run("first").status == "finished"
    assert not simulator.live()


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("object-detection", {"mini_batch_size": 4, "learning_rate": 0.3}),
        ("object-detection", {"mini_batch_size": 4, "learning_rate": 0.3, "data_format": "json"}),
        ("jumpstart/mxnet-od-ssd-512-resnet50-v1-coco", {"learning_rate": 0.3, "epochs": 4}),
    ],
)
def test_aws_own_models_are_scored_like_any(
    model: str, settings: dict[str, object], simulator: Simulator, data: Dataset
) -> None:
    run = trainer(simulator, model, max_cost=5, **settings).fit(data, data, data, name="aws")
    assert run.model.name == f"sagemaker/{model}"
    assert any(name.startswith("aws/") for name in run.metrics)
    with pytest.raises(Unsupported, match="detkit sagemaker transform"):
        detkit.evaluate(run, data, allow_seen=True)
    with pytest.raises(detkit.DetkitError, match="SEEN|seen"):
        detkit.evaluate(run, data)
    options = TransformOptions(role=simulator.role, yes=True)
    assert transform(run.model, None, options) == (len(data), len(data)), "the test images that were kept aside"
    assert transform(run.model, data, options) == (0, len(data)), "which are known now"
    local = Trainer(model="echo/memory").fit(data, data, name="local")
    compared = detkit.compare({"aws": run, "local": local}, data, allow_seen=True)
    assert compared["aws"]["AP50"] > 0.5
    assert not simulator.live()


def test_nothing_paid_starts_unsaid(simulator: Simulator, data: Dataset) -> None:
    """The plan is what would be sent; without a word about money nothing is created, uploaded, or left behind."""
    plan = trainer(simulator).plan(data, data)
    with pytest.raises(UsageError, match=r"max_cost=2\.95"):
        trainer(simulator).fit(data, data, name="unsaid")
    assert not simulator.created
    assert not Path(os.environ["DETKIT_RUNS"], "unsaid").exists()
    ((operation, request),) = plan.requests
    assert operation == "CreateTrainingJob"
    assert plan.uploads is not None
    assert plan.uploads["bytes"] > 0
    trainer(simulator, yes=True).fit(data, data, name="said")
    sent = next(sent for operation, sent in simulator.created if operation == "CreateTrainingJob")
    unique = {"TrainingJobName", "CheckpointConfig", "Tags"}
    assert {k: v for k, v in sent.items() if k not in unique} == {k: v for k, v in request.items() if k not in unique}
    again = trainer(simulator).plan(data, data)
    assert again.uploads is not None
    assert again.uploads["bytes"] == 0


@pytest.fixture
def many_losses() -> Iterator[list[str]]:
    """The parts of the loss of `many/memory`, a model of a plugin of this test."""
    names = [f"head{number}" for number in range(20)]

    class Guest:
        @hookimpl
        def detkit_backends(self) -> list[LocalBackend]:
            (original,) = plugins.registry().manager.get_plugin("echo").detkit_backends()
            spec = replace(original.models["memory"], losses=tuple(names))
            return [replace(original, name="many", models={"memory": spec})]

    plugins.registry.cache_clear()
    plugins.registry().manager.register(Guest(), name="guest")
    yield names
    plugins.registry.cache_clear()


def test_of_too_many_metrics_those_that_judge_come_first(
    simulator: Simulator, data: Dataset, many_losses: list[str]
) -> None:
    plan = trainer(simulator, "many/memory", image_uri=IMAGE).plan(data, data)
    sent = [one["Name"] for one in plan.requests[0][1]["AlgorithmSpecification"]["MetricDefinitions"]]
    scores = [f"{of}/{name}" for of in ("val", "test") for name in ("AP", "AP50", "AP75", "mask_AP", "mask_AP50")]
    of_validation = [f"val/loss_{name}" for name in many_losses]
    assert sent[:32] == [*scores, "val/loss", "train/loss", *of_validation]
    assert len(sent) == 40
    (note,) = (note for note in plan.notes if "metric definitions" in note)
    left = [*(f"train/{name}" for name in many_losses), "train/learning_rate"][8:]
    told = f"CloudWatch does not get {', '.join(left)}; the run has them"
    assert note == f"AWS takes 40 metric definitions, and there are 53: {told}"
    assert not plan.errors
    assert not any("metric definitions" in note for note in trainer(simulator).plan(data, data).notes)


def test_a_hub_that_lists_too_many_metrics_is_no_obstacle(
    simulator: Simulator, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "mxnet-od-ssd-512-resnet50-v1-coco"
    document = json.loads(hub.documents()[name])
    document["TrainingMetrics"] += [{"Name": f"m{number}", "Regex": f"m{number}=(.*)"} for number in range(40)]
    monkeypatch.setitem(hub.documents(), name, json.dumps(document))
    plan = trainer(simulator, f"jumpstart/{name}").plan(data, data)
    assert len(plan.requests[0][1]["AlgorithmSpecification"]["MetricDefinitions"]) == 40
    assert any("there are 41: CloudWatch does not get m39; the run has them" in note for note in plan.notes)
    assert not plan.errors


def test_it_is_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names no backend trains here, also where SageMaker has a model to suggest."""
    monkeypatch.setattr(SagemakerBackend, "suggest", lambda _: Suggestion("object-detection", "at AWS"))
    assert Trainer(backend="sagemaker").explain().backend == "sagemaker"
    chosen = ""
    with contextlib.suppress(UsageError):  # nothing that is installed beside it suggests a model
        chosen = Trainer().explain().backend
    assert chosen != "sagemaker"


def test_cost_ends_the_job(simulator: Simulator, data: Dataset) -> None:
    plan = trainer(simulator, max_cost=0.368).plan(data, data)
    assert plan.worst_case_s == pytest.approx(1800, abs=2)
    assert plan.requests[0][1]["StoppingCondition"]["MaxRuntimeInSeconds"] == plan.worst_case_s


def test_missing_settings_come_at_once() -> None:
    with pytest.raises(MissingSettings) as caught:
        Trainer(backend="sagemaker", model="echo/memory").fit("nowhere")
    assert "role" in str(caught.value)
    assert "image_uri" in str(caught.value)


def test_two_runs_of_one_name(
    simulator: Simulator, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer(simulator, yes=True).fit(data, data, name="same")
    monkeypatch.setenv("DETKIT_RUNS", str(tmp_path / "elsewhere"))
    second = trainer(simulator, yes=True).fit(data, data, name="same")
    names = [sent["TrainingJobName"] for operation, sent in simulator.created if operation == "CreateTrainingJob"]
    assert len(set(names)) == 2
    assert first.status == second.status == "finished"


def test_failure_text_arrives(simulator: Simulator, data: Dataset) -> None:
    with pytest.raises(RunFailed, match="not finite"):
        trainer(simulator, yes=True, learning_rate=1e30, epochs=40).fit(data, data, name="diverges")
    assert open_run("diverges").status == "failed"
    assert not simulator.live()


def test_followed_from_another_machine(
    simulator: Simulator, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulator.faults.slow(0.3)
    run = trainer(simulator, yes=True).start(data, data, name="there")
    name = json.loads((run.path / "sagemaker.json").read_bytes())["name"]
    monkeypatch.setenv("DETKIT_RUNS", str(tmp_path / "here"))
    with pytest.raises(UsageError, match="no training job"):
        SagemakerBackend().recover("detkit-nothing-0000", {})
    done = subprocess.run(
        [sys.executable, "-m", "detkit.cli", "runs", "attach", name, "--backend", "sagemaker", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["status"] == "finished"
    here = open_run(name)
    assert here.path.parent == tmp_path / "here"
    assert detkit.evaluate(here, data, allow_seen=True)["AP50"] > 0.85


def test_stop_and_resume_go_on_from_checkpoints(simulator: Simulator, data: Dataset) -> None:
    settings = {"epochs": 30, "yes": True}
    whole = Trainer(model="echo/memory", epochs=30).fit(data, data, name="whole")
    simulator.faults.slow(0.2)
    run = trainer(simulator, **settings).start(data, data, name="stopped")
    deadline = time.monotonic() + 60
    while not any(event.kind == "metric" for event in run.events(follow=False)):
        run.goes_on()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    run.stop()
    status = run.status
    assert status in {"stopped", "finished"}
    if status == "stopped":
        run = run.resume()
        run.wait()
    assert run.status == "finished"
    assert detkit.evaluate(run, data, allow_seen=True)["AP"] == detkit.evaluate(whole, data, allow_seen=True)["AP"]


STRANGER = Path(__file__).parents[3] / "tests/stranger/detkit-mean/src/detkit_mean"


def test_a_strangers_engine_trains_in_our_container(
    simulator: Simulator, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is installed where the command runs and in the image, which needs to know nothing else of it."""
    site = tmp_path / "site"
    shutil.copytree(STRANGER, site / "detkit_mean")
    about = site / "detkit_mean-0.1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: detkit-mean\nVersion: 0.1.0\n")
    (about / "entry_points.txt").write_text("[detkit]\nmean = detkit_mean\n")
    monkeypatch.setenv("PYTHONPATH", f"{site}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    detkit.write_dataset(data, tmp_path / "coco")
    words = [str(tmp_path / "coco"), str(tmp_path / "coco"), "--model", "mean/boxes"]
    there = ["--backend", "sagemaker", "--role", simulator.role, "--image-uri", IMAGE, "--yes"]
    runs = {"here": [], "there": there}
    for name, more in runs.items():
        command = [sys.executable, "-m", "detkit.cli", "train", *words, *more, "--name", name]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    found = {name: open_run(name).model for name in runs}
    assert found["there"].name == found["here"].name == "mean/boxes"
    assert found["there"].manifest.artifacts == found["here"].manifest.artifacts


def test_ctrl_c_leaves_the_job(simulator: Simulator, data: Dataset, tmp_path: Path) -> None:
    detkit.write_dataset(data, tmp_path / "coco")
    simulator.faults.slow(1.0)
    command = [sys.executable, "-m", "detkit.cli", "train", str(tmp_path / "coco"), str(tmp_path / "coco")]
    command += ["--backend", "sagemaker", "--model", "echo/memory", "--role", simulator.role, "--image-uri", IMAGE]
    process = subprocess.Popen([*command, "--yes", "--name", "left"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("training job"):
            break
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert "detkit runs attach" in told and "detkit runs stop" in told
    run = open_run("left")
    assert run.status == "running"
    run.wait()
    assert run.status == "finished"


@pytest.mark.parametrize(("code", "kind"), [("ResourceLimitExceeded", QuotaExceeded), ("CapacityError", NoCapacity)])
def test_refused_by_the_account(code: str, kind: type[Exception], simulator: Simulator, data: Dataset) -> None:
    simulator.faults.refuse("CreateTrainingJob", code=code)
    with pytest.raises(kind):
        trainer(simulator, yes=True).fit(data, data, name="refused")
    assert not Path(os.environ["DETKIT_RUNS"], "refused").exists()
    assert not simulator.live()


@pytest.mark.slow
def test_throttling_is_waited_out(simulator: Simulator, data: Dataset) -> None:
    simulator.faults.throttle(every=3)
    few = data.take([0, 1, 2])
    assert trainer(simulator, yes=True, epochs=1).fit(few, few).status == "finished"
    assert not simulator.live()


def test_account_of_others_is_refused(simulator: Simulator, data: Dataset) -> None:
    run = trainer(simulator, yes=True).fit(data, data, name="mine")
    record = json.loads((run.path / "sagemaker.json").read_bytes())
    (run.path / "sagemaker.json").write_text(json.dumps({**record, "account": "999999999999", "fetched": False}))
    with pytest.raises(UsageError, match="AWS_PROFILE"):
        open_run("mine").wait()


def test_aws_needs_a_region(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_REGION", "AWS_DEFAULT_REGION", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(UsageError, match="AWS_REGION"):
        Aws()


def test_several_machines_are_refused(simulator: Simulator, data: Dataset) -> None:
    with pytest.raises(Unsupported, match="instance_count=2"):
        trainer(simulator, instance_count=2).plan(data, data)
