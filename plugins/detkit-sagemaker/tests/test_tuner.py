"""`detkit.Tuner` with SageMaker's own search, on the simulated account: to the study and an endpoint of its best."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from typer.testing import CliRunner

import detkit
from detkit import Choice, Dataset, Float, Trainer, Tuner, tuning_there
from detkit.cli.tuning import app as study_verbs
from detkit.errors import DetkitWarning, InvalidValue, RunFailed, UsageError
from detkit.shapes import write_shapes
from detkit.studies import Study, open_study
from detkit.testing import tiny_dataset
from detkit.tuner import rescore, retrain
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.backend import SagemakerBackend
from detkit_sagemaker.endpoints import remove
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.rescoring import transform
from detkit_sagemaker.runs import SagemakerRun
from detkit_sagemaker.testing import Simulator

JUMPSTART = "jumpstart/mxnet-od-ssd-512-resnet50-v1-coco"
DEAF = """
import json, os, pathlib
from detkit_sagemaker.container.__main__ import run
file = pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"], "input/config/hyperparameters.json")
file.write_text(json.dumps({**json.loads(file.read_text()), "learning_rate": "0.123"}))
run()
"""
"""Our container, which trains with another learning rate than it was told."""

SLOWLY = """
import time, types
from detkit_echo import engine
from detkit_sagemaker.container.__main__ import run
engine.time = types.SimpleNamespace(sleep=lambda seconds: time.sleep(0.05))
run()
"""
"""Our container, where a step of echo takes a while."""

LONG = 777
CUT = f"""
import json, os, pathlib, runpy, signal, sys, time
base = pathlib.Path(os.environ["SAGEMAKER_BASE_DIR"])
if json.loads((base / "input/config/hyperparameters.json").read_text())["epochs"] != "{LONG}":
    sys.argv[1:1] = ["object-detection"]
    runpy.run_module("detkit_sagemaker.container.stand_ins", run_name="__main__")
def end(*_):
    (base / "model/model_algo_1-0000.params").write_bytes(b"weights")
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
print("#quality_metric: host=algo-1, epoch=0, validation mAP <score>=(0.5)", flush=True)
time.sleep(60)
"""
"""AWS's built-in algorithm; with so many epochs it has not ended when its time is over, and keeps its model."""

SPACE = {"learning_rate": Float(0.005, 0.9, log=True)}


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    images = {
        "detkit:latest": [sys.executable, "-m", "detkit_sagemaker.container"],
        "object-detection:1": [sys.executable, "-c", CUT],
        "deaf:latest": [sys.executable, "-c", DEAF],
        "slow:latest": [sys.executable, "-c", SLOWLY],
        "broken:latest": [sys.executable, "-c", "import sys; sys.exit('no such file: weights.pth')"],
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
    """The account; runs, cache and ledger are the test's own."""
    for name, place in {"RUNS": "runs", "CACHE": "cache", "LEDGER": "ledger.jsonl"}.items():
        monkeypatch.setenv(f"DETKIT_{name}", str(tmp_path / place))
    monkeypatch.setenv("DETKIT_SCHEDULER_ROLE", account.role)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))
    yield account
    account.faults.clear()
    assert account.live() == []


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return tiny_dataset(tmp_path / "data")


def trainer(aws: Simulator, model: str = "echo/memory", image: str = "detkit:latest", **settings: Any) -> Trainer:
    if model.startswith("echo"):
        settings = {"image_uri": aws.image(image), **settings}
    return Trainer(backend="sagemaker", model=model, role=aws.role, **{"yes": True, **settings})


def wait_until(true: Callable[[], Any], seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.05)


def at_once(study: Study) -> int:
    """Return how many training jobs of a study ran at the same time."""
    client = boto3.client("sagemaker")
    jobs = [client.describe_training_job(TrainingJobName=trial.facts.job) for trial in study.trials]
    times = [(job["TrainingStartTime"], job["TrainingEndTime"]) for job in jobs]
    return max(sum(start <= moment < end for start, end in times) for moment, _ in times)


@pytest.mark.slow
def test_twenty_trials_ten_at_once_and_the_best_is_deployed(aws: Simulator, data: Dataset) -> None:
    aws.faults.throttle(every=12)
    aws.faults.slow(5.0)  # long enough for ten to begin before the first has ended
    tuner = Tuner(trainer(aws, epochs=1, max_cost=20, yes=False), SPACE, metric="val/AP50", trials=20, parallel=10)
    plan = tuner.plan(data, data, data)
    assert "amt" in str(plan) and plan.worst_case_cost is not None and plan.worst_case_cost <= 20
    study = tuner.fit(data, data, data, name="study", quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 20
    assert at_once(study) == 10
    assert len({trial.values["learning_rate"] for trial in study.trials}) == 20
    for trial in study.trials:
        trained = trial.run.model.manifest.params["learning_rate"]
        assert trained == pytest.approx(trial.values["learning_rate"], rel=1e-12)
    best = study.best_trial
    assert best.value == max(trial.value or 0.0 for trial in study.trials) > 0
    assert detkit.evaluate(study, data, allow_seen=True)["AP50"] == pytest.approx(best.value, rel=1e-6)
    aws.faults.slow(0.0)
    with detkit.deploy(study, ttl="1h", role=aws.role, image_uri=aws.image("detkit:latest"), max_cost=5) as endpoint:
        found = detkit.Predictor(endpoint)(data.paths[0])
        here = detkit.Predictor(study)(data.paths[0])
        assert found.names == here.names and found.scores == pytest.approx(here.scores)


@pytest.mark.parametrize("model", ["object-detection", JUMPSTART])
def test_aws_own_models(model: str, aws: Simulator, data: Dataset) -> None:
    settings = {"mini_batch_size": 4} if model == "object-detection" else {}
    space = {"learning_rate": Float(0.05, 0.9, log=True)}
    study = Tuner(trainer(aws, model, epochs=1, **settings), space, trials=2, parallel=2).fit(
        data, data, data, name="study", quiet=True
    )
    assert study.search.sampler == "amt"
    assert study.search.metric == ("aws/validation:mAP" if settings else "aws/val_cross_entropy")
    assert [trial.state for trial in study.trials] == ["finished"] * 2
    assert [trial.facts.reason for trial in study.trials] == ["", ""]
    assert study.best.metrics[study.search.metric] == pytest.approx(study.best_trial.value)


def test_rescored_by_detkit_on_what_jumpstart_was_not_given(aws: Simulator, tmp_path: Path) -> None:
    """AWS's own loss chooses nothing: its models look at the validation images in a batch transform, and are scored."""
    train, val, test = (
        detkit.read_dataset(write_shapes(tmp_path / str(seed), num_images=12, size=64, seed=seed)) for seed in range(3)
    )
    space = {"learning_rate": Float(0.05, 0.9, log=True)}
    study = Tuner(trainer(aws, JUMPSTART, epochs=1), space, trials=2, parallel=2).fit(train, val, test, quiet=True)
    with pytest.raises(UsageError, match="detkit sagemaker transform"):
        rescore(study)
    for trial in study.trials:
        transform(trial.run.model, val, TransformOptions(role=aws.role, yes=True))
    rescore(study)
    assert [trial.rescored for trial in study.trials] == [
        detkit.evaluate(trial.run, val)["AP"] for trial in study.trials
    ]
    assert study.best_trial.rescored == max(trial.rescored or 0.0 for trial in study.trials)


def test_ctrl_c_leaves_the_search_and_resume_follows_it(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    detkit.write_dataset(data, tmp_path / "coco")
    command = [sys.executable, "-m", "detkit.cli", "tune", str(tmp_path / "coco"), str(tmp_path / "coco")]
    command += ["--backend", "sagemaker", "--model", "echo/memory", "--role", aws.role, "--yes", "--name", "left"]
    command += ["--image-uri", aws.image("detkit:latest"), "--trials", "2", "--parallel", "2"]
    command += ["epochs=1", "learning_rate=0.1..0.9:log"]
    aws.faults.slow(2.0)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "searches at sagemaker" in line:
                break
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and "detkit tune --resume" in told
    assert any(name.startswith("detkit-left-") for name in aws.live()), "it goes on at AWS"
    with pytest.warns(DetkitWarning, match="tuning jobs that were begun here go on: detkit-left-"):
        remove(Aws())
    aws.faults.clear()
    done = subprocess.run(
        [*command[:4], "--resume", "left", "--json"], capture_output=True, text=True, check=False, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert [trial["state"] for trial in shown["trials"]] == ["finished"] * 2
    begun = [request["HyperParameterTuningJobName"] for name, request in aws.created if "Tuning" in name]
    assert len([name for name in begun if name.startswith("detkit-left-")]) == 1
    assert open_study("left").best.status == "finished"


def test_what_is_refused_leaves_nothing(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="this costs money(.|\n)*20 trials(.|\n)*--max-cost"):
        Tuner(trainer(aws, yes=False), SPACE).fit(data, data, data, name="unsaid", quiet=True)
    assert not (tmp_path / "runs/unsaid").exists()


def test_a_search_in_which_all_fails_says_why(aws: Simulator, data: Dataset) -> None:
    tuner = Tuner(trainer(aws, image="broken:latest"), SPACE, trials=2, parallel=2)
    with pytest.raises(RunFailed, match="No training job succeeded"):
        tuner.fit(data, data, data, name="broken", quiet=True)
    study = open_study("broken")
    assert [trial.state for trial in study.trials] == ["failed"] * 2
    assert all("AlgorithmError" in trial.facts.reason for trial in study.trials)


def test_a_search_is_stopped_by_its_study(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    def stop_it() -> None:
        wait_until(lambda: (tmp_path / "runs/stopped/tuning.json").is_file() and aws.live())
        done = CliRunner().invoke(study_verbs, ["stop", "stopped"])
        assert done.exit_code == 0, done.output

    aws.faults.slow(2.0)
    with ThreadPoolExecutor(1) as pool:
        stopping = pool.submit(stop_it)
        study = Tuner(trainer(aws), SPACE, trials=4, parallel=2).fit(data, data, data, name="stopped", quiet=True)
        stopping.result()
    assert {trial.state for trial in study.trials} <= {"failed"} and len(study.trials) < 4
    here = Tuner(Trainer(model="echo/memory"), SPACE, trials=1).fit(data, data, data, name="here", quiet=True)
    assert CliRunner().invoke(study_verbs, ["stop", here.name]).exit_code != 0


def test_a_trial_that_had_other_values_is_not_ranked(aws: Simulator, data: Dataset) -> None:
    with pytest.raises(RunFailed, match="no trial of .* finished; the last: .*and 0.123 used"):
        Tuner(trainer(aws, image="deaf:latest", epochs=1), SPACE, trials=1).fit(data, data, name="deaf", quiet=True)
    study = open_study("deaf")
    (trial,) = study.trials
    assert trial.state == "failed" and "and 0.123 used" in trial.facts.reason and trial.path is not None
    with pytest.raises(UsageError, match="and 0.123 used"):
        print(study.best)


def test_a_trial_that_cannot_be_brought_is_brought_later(
    aws: Simulator, data: Dataset, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning_there, "_PAUSE_S", 0.1)
    aws.faults.refuse("DescribeTrainingJob", times=10_000)
    with pytest.raises(RunFailed, match=r"2 trial.s. of .*DescribeTrainingJob is refused.*(.|\n)*--resume .*later"):
        Tuner(trainer(aws, epochs=1), SPACE, trials=2, parallel=2).fit(data, data, name="later")
    told = capsys.readouterr().err
    assert told.count("tried again soon") == 2 and told.count(" begins: learning_rate=") == 2
    assert open_study("later").trials == []
    aws.faults.clear()
    study = Tuner().resume("later", quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 2
    for trial in study.trials:
        assert trial.run.metrics["val/AP"] == pytest.approx(trial.value, rel=1e-6)


def test_what_another_trial_left_is_not_taken_for_a_trials_run(aws: Simulator, data: Dataset) -> None:
    study = Tuner(trainer(aws, epochs=1), SPACE, trials=2, parallel=2).fit(data, data, name="half", quiet=True)
    job = SagemakerBackend().attach_tuning(study.workspace)
    first, second = job.trials()
    place = study.path / "trials/0002"
    assert job.bring(first, place).remote.name == first.name
    brought = job.bring(second, place)
    assert brought.remote.name == second.name and brought.job.params["learning_rate"] == second.values["learning_rate"]


def test_a_grid_with_steps_and_values_that_are_nearly_its_own(aws: Simulator, data: Dataset) -> None:
    space = {"learning_rate": Float(0.1, 0.3, step=0.1)}
    tuner = Tuner(trainer(aws, epochs=1), space, sampler="amt-grid", trials=3, parallel=3)
    study = tuner.fit(data, data, name="steps", quiet=True)
    assert sorted(trial.values["learning_rate"] for trial in study.trials) == [0.1, 0.2, 0.3]
    assert {trial.state for trial in study.trials} == {"finished"}
    for odd, near in ((0.31, 0.3), (0.1999, 0.2), (-1.0, 0.1)):
        assert tuning_there._nearest(study, "learning_rate", odd) == near
    with pytest.raises(InvalidValue):
        tuning_there._nearest(study, "learning_rate", "much")


def test_a_trial_whose_time_is_over(aws: Simulator, data: Dataset) -> None:
    """Our container leaves no model then, so that nothing can be opened; its last value is kept."""
    tuner = Tuner(trainer(aws, image="slow:latest", epochs=10_000, max_runtime="4s"), SPACE, trials=1)
    study = tuner.fit(data, data, name="over", quiet=True)
    assert [one.state for one in SagemakerBackend().attach_tuning(study.workspace).trials()] == ["finished"]
    (trial,) = study.trials
    assert trial.state == "pruned" and trial.intermediate and trial.run.status == "stopped"
    assert "its time limit ended it" in trial.facts.reason


def test_a_trial_of_aws_own_whose_time_is_over_counts(aws: Simulator, data: Dataset) -> None:
    settings = {"mini_batch_size": 4, "epochs": LONG, "max_runtime": "2s"}
    study = Tuner(trainer(aws, "object-detection", **settings), SPACE, trials=1).fit(data, data, name="cut", quiet=True)
    assert [(trial.state, trial.value) for trial in study.trials] == [("finished", 0.5)]
    assert (study.best.workspace.model / "model.tar.gz").is_file()


@pytest.mark.parametrize("sampler", ["amt-random", "amt-hyperband"])
def test_the_other_strategies(sampler: str, aws: Simulator, data: Dataset) -> None:
    expected = {"amt-random": ("Random", "Auto", "median"), "amt-hyperband": ("Hyperband", "Off", "hyperband")}
    *sent, pruner = expected[sampler]
    tuner = Tuner(trainer(aws, epochs=4), SPACE, sampler=sampler, trials=3, parallel=3, budget="2h")
    assert f"chosen by {sampler}; {pruner} ends those that are behind" in str(tuner.plan(data, data))
    study = tuner.fit(data, data, name=sampler, quiet=True)
    assert {trial.state for trial in study.trials} <= {"finished", "pruned"} and study.best.status == "finished"
    (request,) = (
        one for _, one in aws.created if one.get("HyperParameterTuningJobName", "").startswith(f"detkit-{sampler}-")
    )
    config = request["HyperParameterTuningJobConfig"]
    assert [config["Strategy"], config["TrainingJobEarlyStoppingType"]] == sent
    assert config["ResourceLimits"]["MaxRuntimeInSeconds"] == 7200
    for trial in study.trials:
        if trial.state == "finished":
            assert list(trial.intermediate) == [25, 50, 75, 100]


def test_equal_values_that_aws_chose_are_told(
    aws: Simulator, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    space = {"learning_rate": Choice((0.1, 0.3))}
    study = Tuner(trainer(aws, epochs=1), space, sampler="amt-random", trials=4, parallel=2).fit(data, data, name="two")
    again = [trial for trial in study.trials if trial.facts.repeats is not None]
    assert len(again) >= 2
    for trial in again:
        first = study.trials[trial.facts.repeats or 0]
        assert (first.values, first.value) == (trial.values, trial.value) and first.path != trial.path
    assert capsys.readouterr().err.count("have the same values; the place trained both") == len(again)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"pruner": "asha"}, "one of median, none, which is what amt can have at sagemaker; or auto"),
        ({"sampler": "amt-hyperband", "pruner": "median"}, "one of hyperband, which is what amt-hyperband can have"),
        ({"devices": ["cuda:0"]}, "sagemaker searches by itself (sampler amt), not on this machine's; leave it out"),
        ({"sampler": "tpe", "devices": ["cuda:0"]}, "devices=cuda:0: sagemaker has no option device"),
        ({"storage": "postgresql+pg8000://me@localhost/studies"}, "sagemaker searches by itself (sampler amt)"),
        ({"sampler": "tpe", "parent": "steel"}, "learns from no earlier search; choose one of amt, amt-random"),
    ],
)
def test_what_would_have_no_effect_is_refused(
    settings: dict[str, Any], told: str, aws: Simulator, data: Dataset
) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        Tuner(trainer(aws), SPACE, **settings).fit(data, data, name="vain", quiet=True)


def test_detkits_own_search_keeps_to_the_money(aws: Simulator, tmp_path: Path) -> None:
    """Of every trial the worst case, of those that have ended the estimate: together no more than was said."""
    data = write_shapes(tmp_path / "shapes", num_images=15, size=48)
    paid = trainer(aws, epochs=1, max_cost=2, yes=False)
    tuner = Tuner(paid, SPACE, sampler="random", trials=2, parallel=2, pruner="none")
    plan = tuner.plan(data)
    assert plan.worst_case_cost is not None and 1 < plan.worst_case_cost <= 2
    study = tuner.fit(data, name="mine", quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 2
    assert [trial.facts.max_cost for trial in study.trials] == [1, 1]
    spent = sum(trial.facts.cost or 0.0 for trial in study.trials)
    assert 0 < spent < 0.1
    study.enqueue(learning_rate=0.25)
    study = tuner.resume(study, trials=4, quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 4
    later = [trial.facts.max_cost or 0.0 for trial in study.trials[2:]]
    assert sum(later) == pytest.approx(2 - spent, abs=0.05)
    limits = {
        request["TrainingJobName"]: request["StoppingCondition"]["MaxRuntimeInSeconds"]
        for operation, request in aws.created
        if operation == "CreateTrainingJob"
    }
    for trial in study.trials:
        run = trial.run
        assert isinstance(run, SagemakerRun) and run.remote.price_per_hour is not None
        seconds = limits[run.remote.name]
        assert run.remote.price_per_hour * seconds / 3600 <= (trial.facts.max_cost or 0.0) + 1e-6
    with pytest.raises(UsageError, match="this costs money, so it is not started without a word"):
        retrain(study, name="unsaid", quiet=True)
    run = retrain(study, name="best", max_cost=0.5, quiet=True)
    assert run.status == "finished" and run.job.options["max_cost"] == 0.5
    assert run.model.manifest.params["learning_rate"] == study.best_trial.values["learning_rate"]


def test_money_that_is_spent_ends_detkits_own_search(
    aws: Simulator, data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    tuner = Tuner(trainer(aws, epochs=1, max_cost=2, yes=False), SPACE, sampler="random", trials=1, pruner="none")
    study = tuner.fit(data, data, name="poor", quiet=True)
    study = tuner.resume(study, trials=3, max_cost=study.trials[0].facts.cost)
    assert len(study.trials) == 1
    assert "--max-cost N` goes on" in capsys.readouterr().err
    study = tuner.resume(study, max_cost=1, quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 3


def test_money_for_too_few_trials(aws: Simulator, data: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    """A trial that cannot be paid has not failed: it is done when there is more."""
    tuner = Tuner(trainer(aws, epochs=1, max_cost=2, yes=False), SPACE, sampler="random", trials=1, pruner="none")
    study = tuner.fit(data, data, name="short", quiet=True)
    for wrong in (math.nan, math.inf, 0.0, -1.0):
        with pytest.raises(InvalidValue, match="US dollars above 0"):
            tuner.resume(study, max_cost=wrong)
    study = tuner.resume(study, trials=4, max_cost=(study.trials[0].facts.cost or 0.0) + 0.05)
    assert [trial.state for trial in study.trials] == ["finished", "running"]
    assert re.search(r"is not valid: at least 0\.\d\d.*--max-cost N` goes on", capsys.readouterr().err)
    study = tuner.resume(study, max_cost=2, quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 4


def test_what_could_not_begin_has_cost_nothing(aws: Simulator, data: Dataset) -> None:
    aws.faults.refuse("CreateTrainingJob", times=2)
    tuner = Tuner(trainer(aws, epochs=1, max_cost=2, yes=False), SPACE, sampler="random", trials=3, pruner="none")
    study = tuner.fit(data, data, name="refused", quiet=True)
    assert [trial.state for trial in study.trials] == ["failed", "failed", "finished"]
    assert [trial.facts.max_cost for trial in study.trials] == [None, None, 2]
    with pytest.raises(UsageError, match="devices=cuda:0: sagemaker has no option device"):
        Tuner(devices=["cuda:0"]).resume(study, trials=4)


def test_a_search_that_was_killed_goes_on_with_its_jobs(aws: Simulator, data: Dataset, tmp_path: Path) -> None:
    """They have gone on at AWS, and none of them is begun a second time."""
    detkit.write_dataset(data, tmp_path / "coco")
    command = [sys.executable, "-m", "detkit.cli", "tune", str(tmp_path / "coco"), str(tmp_path / "coco")]
    command += ["--backend", "sagemaker", "--model", "echo/memory", "--role", aws.role, "--yes", "--name", "killed"]
    command += ["--image-uri", aws.image("slow:latest"), "--sampler", "random", "--pruner", "none", "--trials", "2"]
    command += ["epochs=12", "learning_rate=0.1..0.9:log"]

    def jobs() -> list[str]:
        named = [request.get("TrainingJobName", "") for name, request in aws.created if name == "CreateTrainingJob"]
        return [name for name in named if "0000" in name or "0001" in name]

    before = len(jobs())
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        wait_until(lambda: len(jobs()) > before and (tmp_path / "runs/killed/trials/0000/run.json").is_file())
        process.kill()
    study = Tuner().resume("killed", quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 2
    assert len(jobs()) == before + 2


def test_what_was_stopped_halfway_at_aws_does_not_count_as_finished(aws: Simulator, data: Dataset) -> None:
    """AWS's own image leaves a model when it is stopped; the trial is done anew, and both are paid."""
    settings = {"mini_batch_size": 4, "epochs": LONG, "max_cost": 2, "yes": False}
    tuner = Tuner(trainer(aws, "object-detection", **settings), SPACE, sampler="random", trials=1, budget=5)
    study = tuner.fit(data, data, name="half-done", quiet=True)
    (trial,) = study.trials
    assert (trial.state, trial.facts.cut, trial.run.status) == ("running", True, "finished")
    (trial,) = tuner.resume(study, budget=5, quiet=True).trials
    assert trial.state == "running" and 0 < trial.facts.given_up < 0.1
    assert (trial.facts.max_cost or 0.0) == pytest.approx(2 - trial.facts.given_up, abs=0.01)
