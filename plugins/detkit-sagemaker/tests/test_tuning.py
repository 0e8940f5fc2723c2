"""Searches by AWS's automatic model tuning, from the backend's call to the trials' models, on the simulated account."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import boto3
import pytest

from detkit import Choice, Dataset, Float, Int, Trainer, plugins
from detkit.errors import DetkitError, RunFailed, UsageError
from detkit.job import Workspace
from detkit.spaces import Range
from detkit.testing import tiny_dataset
from detkit.tuning import PlaceTrial, Search, TuningJob
from detkit_sagemaker import runs, tuning
from detkit_sagemaker.aws import Aws, NoCapacity, QuotaExceeded
from detkit_sagemaker.backend import SagemakerBackend
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.requests import check_request
from detkit_sagemaker.testing import Simulator, hub
from detkit_sagemaker.tunable import HubMetrics

MUTE = """
import sys
from detkit_echo import engine
from detkit_sagemaker.container.__main__ import run
engine.headlines = lambda *_: {}
run()
"""
"""Our container, where echo never says how good it is."""

SLOWLY = """
import time, types
from detkit_echo import engine
from detkit_sagemaker.container.__main__ import run
engine.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(0.05))
run()
"""
"""Our container, where a step of echo takes a while."""

JUMPSTART = "jumpstart/mxnet-od-ssd-512-resnet50-v1-coco"
RATES = Float(0.01, 0.9, log=True)
BUILTIN = {"model": "object-detection", "mini_batch_size": 4, "epochs": 1}
MIN = {"metric": "aws/val_cross_entropy", "mode": "min"}


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    images = {
        "detkit:latest": [sys.executable, "-m", "detkit_sagemaker.container"],
        "mute:latest": [sys.executable, "-c", MUTE],
        "slow:latest": [sys.executable, "-c", SLOWLY],
    }
    with (
        Simulator(images=images, folder=tmp_path_factory.mktemp("aws")) as aws,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("boto3.DEFAULT_SESSION", None)
        for name, value in aws.environment.items():
            patch.setenv(name, value)
        yield aws


@pytest.fixture(autouse=True)
def aws(account: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulator]:
    """The account, in which nothing may live on after a test; runs, cache and ledger are the test's own."""
    for name, place in {"RUNS": "runs", "CACHE": "cache", "LEDGER": "ledger.jsonl"}.items():
        monkeypatch.setenv(f"DETKIT_{name}", str(tmp_path / place))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))
    monkeypatch.setattr(runs, "_SETTLED_S", 0.0)
    yield account
    account.faults.clear()
    assert account.live() == []


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def laid_out(
    aws: Simulator, data: Dataset, folder: Path, model: str = "echo/memory", image: str = "detkit:latest", **more: Any
) -> Workspace:
    """A study's directory, as the tuner makes it: the job and the data, of which the test images are for later."""
    given = {"model": model, "role": aws.role, "yes": True, **more}
    if model.startswith("echo"):
        given["image_uri"] = aws.image(image)
    return Trainer(backend="sagemaker", **given).prepare(data, data, data).lay_out(folder / "study")


def search(space: Mapping[str, Range] | None = None, **more: Any) -> Search:
    given = {"metric": "val/AP50", "mode": "max", "trials": 3, "parallel": 3, "sampler": "amt", **more}
    return Search(space=dict(space or {"learning_rate": RATES}), **given)


def backend() -> SagemakerBackend:
    found = plugins.backend("sagemaker")
    assert isinstance(found, SagemakerBackend)
    return found


def ended(job: TuningJob, seconds: float = 90) -> str:
    deadline = time.monotonic() + seconds
    while (status := job.status) == "running":
        assert time.monotonic() < deadline, "it still goes on"
        time.sleep(0.1)
    return status


def wait_until(true: Callable[[], Any], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def reported(described: Mapping[str, Any]) -> set[str]:
    return {one["MetricName"] for one in described.get("FinalMetricDataList", [])}


def best_of(trials: list[PlaceTrial]) -> PlaceTrial:
    return max((one for one in trials if one.value is not None), key=lambda one: one.value or 0.0)


def plan(aws: Simulator, data: Dataset, folder: Path, wanted: Search, **more: Any) -> Any:
    workspace = laid_out(aws, data, folder, **more)
    return backend().plan_tuning(workspace.job(), workspace, wanted)


def test_our_container_is_searched_and_every_trial_is_a_run(
    aws: Simulator, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = laid_out(aws, data, tmp_path, epochs=2)
    aws.faults.throttle(every=12)
    job = backend().tune(workspace.job(), workspace, search({"learning_rate": RATES, "seed": Choice((3, 5))}))
    assert ended(job) == "finished" and job.reason == ""
    trials = backend().attach_tuning(workspace).trials()
    assert len(trials) == 3 and {one.state for one in trials} == {"finished"}
    for number, trial in enumerate(trials):
        run = job.bring(trial, tmp_path / "study/trials" / f"{number:04d}")
        assert run.status == "finished"
        trained = run.model.manifest.params
        assert {name: trained[name] for name in trial.values} == trial.values
        assert run.job.params["learning_rate"] == trial.values["learning_rate"]
        assert trial.values["seed"] in (3, 5) and 0.01 <= float(trial.values["learning_rate"]) <= 0.9
        assert run.metrics["val/AP50"] == pytest.approx(trial.value, rel=1e-8)
        assert run.workspace.dataset("validation") is not None and run.workspace.dataset("test") is None
        assert "test/AP" not in run.metrics, "no trial sees the test images"
        assert run.cost and run.cost > 0 and trial.seconds and trial.seconds > 0
    best = best_of(trials)
    monkeypatch.setenv("DETKIT_RUNS", str(tmp_path / "another machine"))
    elsewhere = backend().recover(best.name, {})
    assert elsewhere.job.params["learning_rate"] == best.values["learning_rate"]
    assert elsewhere.wait().metrics["val/AP50"] == pytest.approx(best.value, rel=1e-8)
    assert not (elsewhere.path / tuning.RECORD).exists() and elsewhere.workspace.dataset("test") is None
    local = Trainer(model="echo/memory", epochs=2, **best_of(trials).values).fit(data, data, name="same")
    assert local.metrics["val/AP50"] == pytest.approx(best_of(trials).value, rel=1e-8)
    assert job.cost and job.cost > 0
    assert Ledger.of(Aws()).pending() == []
    with pytest.raises(UsageError, match="already"):
        backend().tune(workspace.job(), workspace, search())


@pytest.mark.parametrize("model", ["object-detection", JUMPSTART])
def test_aws_own_models_are_searched(model: str, aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    builtin = model == "object-detection"
    settings = {"mini_batch_size": 4} if builtin else {}
    workspace = laid_out(aws, data, tmp_path, model, epochs=2, **settings)
    (metric, mode), *_ = backend().tuning_metrics(model).items()
    assert (metric, mode) == (("aws/validation:mAP", "max") if builtin else ("aws/val_cross_entropy", "min"))
    wanted = search({"learning_rate": RATES}, metric=metric, mode=mode, trials=2, parallel=2)
    job = backend().tune(workspace.job(), workspace, wanted)
    request = aws.created[-1][1] if aws.created[-1][0] == "CreateHyperParameterTuningJob" else {}
    definition = request["TrainingJobDefinition"]
    assert ended(job) == "finished"
    for number, trial in enumerate(job.trials()):
        run = job.bring(trial, tmp_path / "study/trials" / f"{number:04d}")
        assert run.status == "finished" and run.model.manifest.backend == "sagemaker"
        native = run.model.manifest.native
        assert float(native["learning_rate" if builtin else "adam-learning-rate"]) == trial.values["learning_rate"]
        assert run.metrics[metric] == pytest.approx(trial.value)
        seen = run.model.seen()
        assert ("validation" in seen) is builtin, "JumpStart was not given them"
    kinds = {one["ChannelName"]: one.get("ContentType") for one in definition["InputDataConfig"]}
    if builtin:
        assert set(kinds.values()) == {"application/x-recordio"}
        assert "MetricDefinitions" not in definition["AlgorithmSpecification"]
    else:
        assert kinds["model"] == "application/x-sagemaker-model"
        assert any("kept from it" in str(event) for event in run_events(workspace))


def run_events(workspace: Workspace) -> list[Any]:
    return [json.loads(line) for line in workspace.metrics_file.read_text().splitlines()]


def test_the_request_is_as_aws_wants_it(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    space = {
        "learning_rate": Float(1e-4, 0.5, log=True),
        "mini_batch_size": Int(4, 7),
        "momentum": Float(0.5, 0.9),
        "optimizer": Choice(("sgd", "adam")),
        "epochs": Int(2, 8, step=2),
    }
    wanted = search(space, metric="aws/validation:mAP", trials=7, parallel=3, seed=11)
    given = plan(aws, data, tmp_path, wanted, model="object-detection", max_runtime="1h", tags="team=a", yes=False)
    ((operation, request),) = given.requests
    assert operation == "CreateHyperParameterTuningJob" and check_request(operation, request) == []
    assert request["HyperParameterTuningJobConfig"] == {
        "Strategy": "Bayesian",
        "HyperParameterTuningJobObjective": {"Type": "Maximize", "MetricName": "validation:mAP"},
        "ResourceLimits": {"MaxNumberOfTrainingJobs": 7, "MaxParallelTrainingJobs": 3},
        "ParameterRanges": {
            "ContinuousParameterRanges": [
                {"Name": "learning_rate", "MinValue": "0.0001", "MaxValue": "0.5", "ScalingType": "Logarithmic"},
                {"Name": "momentum", "MinValue": "0.5", "MaxValue": "0.9", "ScalingType": "Linear"},
            ],
            "IntegerParameterRanges": [
                {"Name": "mini_batch_size", "MinValue": "4", "MaxValue": "7", "ScalingType": "Linear"}
            ],
            "CategoricalParameterRanges": [
                {"Name": "optimizer", "Values": ["sgd", "adam"]},
                {"Name": "epochs", "Values": ["2", "4", "6", "8"]},
            ],
        },
        "TrainingJobEarlyStoppingType": "Auto",
        "RandomSeed": 11,
    }
    definition = request["TrainingJobDefinition"]
    assert definition["StoppingCondition"] == {"MaxRuntimeInSeconds": 3600}
    fixed = definition["StaticHyperParameters"]
    assert not fixed.keys() & space.keys() and fixed["num_training_samples"] == "7"
    assert {"Key": "team", "Value": "a"} in request["Tags"]
    assert "detkit:owner" in {tag["Key"] for tag in request["Tags"]}
    assert {one["ChannelName"] for one in definition["InputDataConfig"]} == {"train", "validation"}
    # Seven trials, three at once: three rounds of an hour, and seven hours that are paid.
    assert given.worst_case_s == 3 * 3600
    one_hour = Trainer(backend="sagemaker", role=aws.role, max_runtime="1h", **BUILTIN).plan(data, data)
    assert given.worst_case_cost == pytest.approx(7 * one_hour.worst_case_cost)
    told = str(given)
    for said in ("7 trials, at most 3 at once", "validation:mAP, more is better", "epochs=2..8:step=2 is sent as 4"):
        assert said in told
    assert not aws.live()


def test_strategies(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    def config(number: int, **more: Any) -> dict[str, Any]:
        made = plan(aws, data, tmp_path / str(number), search(**more), epochs=4)
        request = made.requests[0][1]
        assert check_request(*made.requests[0]) == [] and not made.errors
        return dict(request["HyperParameterTuningJobConfig"])

    hyperband = config(0, sampler="amt-hyperband")
    assert hyperband["StrategyConfig"] == {"HyperbandStrategyConfig": {"MinResource": 1, "MaxResource": 4}}
    assert hyperband["TrainingJobEarlyStoppingType"] == "Off"
    assert config(1, sampler="amt-random", pruner="none")["TrainingJobEarlyStoppingType"] == "Off"
    grid = config(
        2, sampler="amt-grid", space={"seed": Int(0, 2), "learning_rate": Float(0.1, 0.3, step=0.1)}, trials=9
    )
    assert grid["Strategy"] == "Grid" and "MaxNumberOfTrainingJobs" not in grid["ResourceLimits"]
    words = {one["Name"]: one["Values"] for one in grid["ParameterRanges"]["CategoricalParameterRanges"]}
    assert words["seed"] == ["0", "1", "2"] and [float(word) for word in words["learning_rate"]] == [
        0.1,
        0.2,
        0.3,
    ]


@pytest.mark.parametrize(
    "case",
    [
        ({"space": {"seed": Int(1, 3), "learning_rate": Float(0.1, 0.5, when={"seed": 3})}}, {}, "no conditions"),
        ({"space": {f"p{i}": RATES for i in range(31)}}, {}, "at most 30"),
        ({"space": {"seed": Int(0, 1000, step=2)}}, {}, "501 values"),
        ({"sampler": "amt-grid"}, {}, "a grid has no end"),
        ({"sampler": "amt-grid", "space": {"seed": Int(0, 9)}}, {}, "trials=10"),
        ({"sampler": "amt-hyperband"}, {"iterations": 5}, "epochs=N"),
        ({"sampler": "tpe"}, {}, "amt-random"),
        ({"metric": "validation:mAP"}, {}, "val/AP .max."),
        ({"space": {"learning_rate": Float(-1.0, 1.0)}}, {}, "learning_rate=-1.0 .from the space."),
        ({"trials": 20}, {"max_cost": 0.5, "yes": False}, "at least 1.23 for 20 trials of 5m.*trials=8"),
        ({"trials": 20}, {"yes": False}, "20 trials.*--max-cost"),
        ({"parent": "nobody"}, {}, "no tuning job nobody"),
        ({"space": {"mini_batch_size": Int(4, 64)}, "metric": "aws/validation:mAP"}, BUILTIN, "64 is more than the 7"),
        ({"space": {"mini_batch_size": Choice((64, 4))}, "metric": "aws/validation:mAP"}, BUILTIN, "64 is more than"),
        ({"space": {"mini_batch_size": Choice(("64", "4"))}, "metric": "aws/validation:mAP"}, BUILTIN, "64 is more"),
        ({"space": {"learning_rate": Float(0.1, 5.0)}, **MIN}, {"model": JUMPSTART}, "as the hub says"),
        ({"metric": "val/AP"}, {"model": JUMPSTART}, "aws/val_cross_entropy .min."),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    case: tuple[dict[str, Any], dict[str, Any], str], aws: Simulator, data: Dataset, tmp_path: Path
) -> None:
    wanted, settings, said = case
    workspace, before = laid_out(aws, data, tmp_path, **settings), list(aws.created)
    with pytest.raises(DetkitError, match=f"(?s){said}"):
        backend().tune(workspace.job(), workspace, search(**wanted))
    assert aws.created == before and not (workspace.path / tuning.RECORD).exists()


def test_money_is_a_limit_for_each_trial(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    made = plan(aws, data, tmp_path, search(trials=4, parallel=3), max_cost=2, yes=False)
    seconds = made.requests[0][1]["TrainingJobDefinition"]["StoppingCondition"]["MaxRuntimeInSeconds"]
    assert made.worst_case_cost <= 2 and made.worst_case_cost > 1.99
    assert made.worst_case_s == 2 * seconds
    assert any("max_cost=2 ends each trial after" in note for note in made.notes)


def test_a_search_that_has_spent_its_money_is_stopped(
    aws: Simulator, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = laid_out(aws, data, tmp_path, max_cost=5)
    aws.faults.slow(1.5)
    job = backend().tune(workspace.job(), workspace, search(trials=6, parallel=2))
    record = workspace.path / tuning.RECORD
    wait_until(lambda: any(one.state == "running" for one in job.trials()))
    record.write_text(json.dumps({**json.loads(record.read_text()), "max_cost": 1e-6}))
    assert ended(job) == "stopped"
    assert "max_cost=1e-06" in job.reason
    assert len(job.trials()) < 6
    assert {one.state for one in job.trials()} <= {"failed", "pruned", "finished"}


def test_a_metric_that_never_appears_fails_loudly(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    workspace = laid_out(aws, data, tmp_path, image="mute:latest", epochs=1)
    job = backend().tune(workspace.job(), workspace, search(trials=12, parallel=2))
    assert ended(job) == "failed"
    assert "none reported val/AP50" in job.reason and "look at the log of detkit-study" in job.reason
    trials = job.trials()
    assert 3 <= len(trials) < 12, "the rest was not paid for"
    assert all(one.state == "failed" and one.value is None for one in trials)
    assert any("never reported val/AP50" in one.reason for one in trials)
    assert backend().attach_tuning(workspace).status == "failed"


def test_a_metric_that_aws_has_not_read_yet_is_waited_for(
    aws: Simulator, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_PENDING_S", 600.0)
    workspace = laid_out(aws, data, tmp_path, epochs=1)
    aws.faults.late_objectives(3600)
    job = backend().tune(workspace.job(), workspace, search(trials=1))
    client = boto3.client("sagemaker")

    def is_over() -> bool:
        answer = client.describe_hyper_parameter_tuning_job(HyperParameterTuningJobName=job.name)
        return bool(answer["HyperParameterTuningJobStatus"] == "Completed")

    wait_until(is_over)
    late = backend().attach_tuning(workspace)
    assert late.status == "running" and [one.state for one in late.trials()] == ["running"]
    aws.faults.clear()
    assert ended(late) == "finished" and late.reason == ""
    (trial,) = late.trials()
    assert trial.state == "finished" and trial.value is not None


def test_a_metric_of_the_hub_that_does_not_tell_its_better_way(
    aws: Simulator, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = JUMPSTART.removeprefix("jumpstart/")
    document = hub.documents()[model].replace("val_cross_entropy", "val_quality")
    monkeypatch.setitem(hub.documents(), model, document)
    known = backend().tuning_metrics(JUMPSTART)
    assert list(known) == ["aws/val_quality"]
    with pytest.raises(UsageError, match="which way aws/val_quality of .*--metric, --mode"):
        known["aws/val_quality"]
    made = plan(aws, data, tmp_path, search(metric="aws/val_quality"), model=JUMPSTART)
    objective = made.requests[0][1]["HyperParameterTuningJobConfig"]["HyperParameterTuningJobObjective"]
    assert objective == {"Type": "Maximize", "MetricName": "val_quality"}
    several = HubMetrics(JUMPSTART, ["val_quality", "train_loss", "val_mAP"])
    assert list(several) == ["aws/val_mAP", "aws/train_loss", "aws/val_quality"]
    assert several["aws/val_mAP"] == "max" and several["aws/train_loss"] == "min" and "val_mAP" not in several


def test_trials_that_fail_say_why(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    workspace = laid_out(aws, data, tmp_path)
    space = {"learning_rate": Choice((0.5, 1e30))}
    job = backend().tune(workspace.job(), workspace, search(space, sampler="amt-grid", trials=2, parallel=2))
    assert ended(job) == "finished"
    states = {one.values["learning_rate"]: one for one in job.trials()}
    assert states[0.5].state == "finished"
    assert states[1e30].state == "failed" and "AlgorithmError" in states[1e30].reason
    run = job.bring(states[1e30], tmp_path / "study/trials/0001")
    assert run.status == "failed"
    with pytest.raises(RunFailed, match="non-finite|not finite|NaN|inf"):
        run.resume().wait()
    again = [request for name, request in aws.created if name == "CreateTrainingJob"][-1]["HyperParameters"]
    assert again["learning_rate"] == "1e+30" and "_tuning_objective_metric" not in again, "it goes on with its values"


def test_a_search_is_left_and_found_again(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    workspace = laid_out(aws, data, tmp_path, epochs=1)
    aws.faults.slow(0.3)
    name = backend().tune(workspace.job(), workspace, search(trials=2)).name
    assert name.startswith("detkit-study-") and len(name) <= 32
    assert [one.kind for one in Ledger.of(Aws()).pending()] == ["tuning-job"]
    found = backend().attach_tuning(workspace)
    assert found.name == name and found.status == "running"
    aws.faults.clear()
    assert ended(found) == "finished"
    aws.faults.refuse("DescribeHyperParameterTuningJob", code="ThrottlingException")
    again = backend().attach_tuning(workspace)
    assert again.status == "finished" and len(again.trials()) == 2, "an ended one is known here"


def test_a_trial_that_aws_ends_early_is_pruned(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    workspace = laid_out(aws, data, tmp_path, image="slow:latest", epochs=100)
    job = backend().tune(workspace.job(), workspace, search(trials=1))
    wait_until(job.trials)
    (trial,) = job.trials()
    client = boto3.client("sagemaker")
    wait_until(lambda: "val/AP50" in reported(client.describe_training_job(TrainingJobName=trial.name)))
    assert job.trials()[0].state == "running"
    client.stop_training_job(TrainingJobName=trial.name)
    assert ended(job) == "finished"
    (trial,) = job.trials()
    assert trial.state == "pruned" and trial.value is not None
    run = job.bring(trial, tmp_path / "study/trials/0000")
    assert run.status == "stopped" and run.metrics["val/AP50"] == pytest.approx(trial.value, rel=1e-8)


def test_a_stopped_search_stops_its_trials(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    workspace = laid_out(aws, data, tmp_path)
    aws.faults.slow(1.0)
    job = backend().tune(workspace.job(), workspace, search(trials=4, parallel=2))
    wait_until(job.trials)
    job.stop()
    assert ended(job) == "stopped"
    assert {one.state for one in job.trials()} == {"failed"}
    assert all("stopped before it reported" in one.reason for one in job.trials())


@pytest.mark.parametrize(("code", "kind"), [("ResourceLimitExceeded", QuotaExceeded), ("CapacityError", NoCapacity)])
def test_refused_by_the_account(
    code: str, kind: type[Exception], aws: Simulator, data: Dataset, tmp_path: Path
) -> None:
    workspace = laid_out(aws, data, tmp_path)
    aws.faults.refuse("CreateHyperParameterTuningJob", code=code)
    with pytest.raises(kind):
        backend().tune(workspace.job(), workspace, search())
    assert not (workspace.path / tuning.RECORD).exists() and Ledger.of(Aws()).pending() == []


def test_a_search_learns_from_an_earlier_one(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    first = laid_out(aws, data, tmp_path / "first", epochs=1)
    parent = backend().tune(first.job(), first, search(trials=1))
    assert ended(parent) == "finished"

    def config(folder: str, trained_on: Dataset = data, **wanted: Any) -> Any:
        made = plan(aws, trained_on, tmp_path / folder, search(parent=parent.name, **wanted), epochs=1)
        return made.requests[0][1]["WarmStartConfig"]

    # What is searched may change: all hyperparameters are named, searched or not.
    same = config("same", space={"learning_rate": RATES, "seed": Int(0, 3)})
    assert same["WarmStartType"] == "IdenticalDataAndAlgorithm"
    assert same["ParentHyperParameterTuningJobs"] == [{"HyperParameterTuningJobName": parent.name}]
    assert config("less", data.take(range(5)))["WarmStartType"] == "TransferLearning"
    with pytest.raises(UsageError, match="judged by"):
        config("metric", metric="val/AP")
    by_study = search(parent=str(first.path))
    assert plan(aws, data, tmp_path / "by study", by_study, epochs=1).requests[0][1]["WarmStartConfig"] == same
    later = laid_out(aws, data, tmp_path / "later", epochs=2)
    job = backend().tune(later.job(), later, search({"seed": Int(0, 3)}, trials=1, parent=parent.name))
    assert ended(job) == "finished"


def test_hyperparameters_that_differ_are_refused_before_aws_does(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    wanted = {"metric": "aws/validation:mAP", "trials": 1}
    first = laid_out(aws, data, tmp_path / "first", **BUILTIN)
    parent = backend().tune(first.job(), first, search(**wanted))
    assert ended(parent) == "finished"
    with pytest.raises(UsageError, match="lacks freeze_layer_pattern"):
        plan(aws, data, tmp_path, search(parent=parent.name, **wanted), freeze_layer_pattern="conv1", **BUILTIN)


def test_spaces_that_are_usual(aws: Simulator) -> None:
    builtin, jumpstart, ours = (backend().space(model) for model in ("object-detection", JUMPSTART, "echo/memory"))
    assert builtin["mini_batch_size"] == Int(8, 64) and builtin["learning_rate"] == Float(1e-6, 0.5, log=True)
    assert builtin["optimizer"] == Choice(("sgd", "adam", "rmsprop", "adadelta"))
    assert jumpstart == {"learning_rate": Float(1e-5, 1e-3, log=True), "batch_size": Int(2, 8)}
    assert ours == plugins.backend("echo").space("memory")
    assert next(iter(backend().tuning_metrics("echo/memory"))) == "val/AP"


def test_values_that_did_not_arrive_are_found_out(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    workspace = laid_out(aws, data, tmp_path, epochs=1)
    job = backend().tune(workspace.job(), workspace, search(trials=1))
    assert ended(job) == "finished"
    (trial,) = job.trials()
    values = {"learning_rate": 0.123}
    other = PlaceTrial(name=trial.name, values=values, state=trial.state, value=trial.value)
    with pytest.raises(RunFailed, match="learning_rate=0.123 was chosen"):
        job.bring(other, tmp_path / "study/trials/0000")
