"""Searches with the echo backend: real runs, a real database, and processes that are really killed."""

from __future__ import annotations

import itertools
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from detkit import Choice, Dataset, Float, Int, Predictor, Study, Trainer, Tuner, compare, evaluate, open_study
from detkit.errors import InvalidValue, PluginError, RunFailed, SeenImages, UnknownName, UsageError
from detkit.params import Params
from detkit.proofs import prove
from detkit.searching import grid, share_of_money
from detkit.shapes import write_shapes
from detkit.studies import Facts, list_studies
from detkit.tuner import rescore, retrain

pytest.importorskip("optuna", reason="pip install 'detkit-sdk[tune]'")
pytestmark = pytest.mark.usefixtures("clean")

ECHO = Trainer(model="echo/memory", epochs=2)
SPACE = {"learning_rate": Float(0.05, 0.9, log=True)}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty pictures without splits of their own."""
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", num_images=30, size=48)


def values(study: Study) -> list[dict[str, Any]]:
    return [trial.values for trial in study.trials]


def test_a_search(shapes: Path) -> None:
    study = Tuner(ECHO, SPACE, trials=5, pruner="none").fit(shapes, name="first", quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 5
    assert study.trials[0].facts.default and study.trials[0].values == {"learning_rate": 0.3}
    assert len({trial.values["learning_rate"] for trial in study.trials}) == 5
    best = study.best
    assert best.model.manifest.metrics["val/AP"] == study.best_trial.value
    assert study.best_trial.value == max(trial.value or 0 for trial in study.trials)
    for trial in study.trials:
        assert trial.run.model.manifest.params["learning_rate"] == trial.values["learning_rate"]
        assert trial.run.model.manifest.params["epochs"] == 2
        assert "test/AP" not in trial.run.metrics  # no trial was scored on the test images
    assert open_study("last").path == study.path == Path("runs/first")
    assert [one.name for one in list_studies()] == ["first"]


def test_the_test_images_are_for_the_end(shapes: Path) -> None:
    study = Tuner(ECHO, SPACE, trials=3, pruner="none").fit(shapes, quiet=True)
    seen = {digest for trial in study.trials for part in trial.run.model.seen().values() for digest in part}
    kept = set(study.workspace.image_digests("test"))
    assert len(kept) == 6 and not seen & kept
    comparison = compare(study.contenders())
    assert next(iter(study.contenders())).startswith("best")
    assert len(comparison) in {2, 3} and len(comparison.data) == 6 and comparison.differences
    assert evaluate(study)["AP"] == comparison[next(iter(study.contenders()))]["AP"]
    with Predictor(study) as predictor:
        assert predictor.model.path == study.best.model.path


def test_the_same_seed_tries_the_same(shapes: Path) -> None:
    tuner = Tuner(ECHO, SPACE, trials=6)
    one, other = (tuner.fit(shapes, quiet=True) for _ in range(2))
    assert values(one) == values(other)
    assert [trial.value for trial in one.trials] == [trial.value for trial in other.trials]
    another = Tuner(ECHO, SPACE, trials=6, seed=1).fit(shapes, quiet=True)
    assert values(another)[1:] != values(one)[1:]


def test_goes_on_as_if_it_had_not_been_interrupted(shapes: Path) -> None:
    whole = Tuner(ECHO, SPACE, trials=6).fit(shapes, quiet=True)
    half = Tuner(ECHO, SPACE, trials=3).fit(shapes, name="half", quiet=True)
    first = values(half)
    study = Tuner().resume("half", trials=6, quiet=True)
    assert values(study)[:3] == first
    # TPE counts a quarter of the trials as its start; six and three have the same least number of them.
    assert values(study) == values(whole)
    with pytest.raises(InvalidValue, match="at least 6"):
        Tuner().resume("half", trials=4)


def test_conditional_parameters_and_choices(shapes: Path) -> None:
    space = {
        "max_detections": Choice((10, 20)),
        "learning_rate": Float(0.1, 0.9, when={"max_detections": 20}),
        "epochs": Int(1, 3),
    }
    study = Tuner(ECHO.__class__(model="echo/memory"), space, trials=8, pruner="none").fit(shapes, quiet=True)
    for trial in study.trials[1:]:
        assert ("learning_rate" in trial.values) == (trial.values["max_detections"] == 20)
    assert study.trials[0].facts.default and study.trials[0].values == {}  # 100 detections are not in the space
    assert study.trials[0].run.model.manifest.params["max_detections"] == 100


def test_grid(shapes: Path) -> None:
    space = {"learning_rate": Choice((0.1, 0.3)), "epochs": Int(1, 3, step=2)}
    study = Tuner(ECHO.__class__(model="echo/memory"), space, sampler="grid", pruner="none").fit(shapes, quiet=True)
    tried = [tuple(one.items()) for one in values(study) if one]
    assert sorted(tried) == sorted(tuple(one.items()) for one in grid(space))
    assert len(study.trials) == study.search.trials == 5  # the defaults are not in the grid
    with pytest.raises(InvalidValue, match="5: all combinations of the grid are among them"):
        Tuner().resume(study, trials=6)
    with pytest.raises(InvalidValue, match="5, all combinations and the defaults, or leave it out"):
        Tuner(Trainer(model="echo/memory"), space, sampler="grid", trials=3).fit(shapes, quiet=True)
    with pytest.raises(UsageError, match=r"trial \d has these values; it is finished"):
        study.enqueue(learning_rate=0.1, epochs=3)
    with pytest.raises(UsageError, match="has no steps; write its values one by one"):
        list(grid(SPACE))


def test_what_was_tried_before_is_not_trained_again(shapes: Path) -> None:
    space = {"learning_rate": Choice((0.1, 0.3))}
    study = Tuner(ECHO, space, trials=6, sampler="random", pruner="none").fit(shapes, quiet=True)
    again = [trial for trial in study.trials if trial.facts.same_as is not None]
    assert len(again) == 4 and all(trial.path is None for trial in again)
    for trial in again:
        first = study.trials[trial.facts.same_as or 0]
        assert (trial.values, trial.value) == (first.values, first.value)
    assert len(study.ranking()) == 2


def test_enqueued_values_come_first(shapes: Path) -> None:
    study = Tuner(ECHO, SPACE, trials=2, pruner="none").fit(shapes, quiet=True)
    study.enqueue(learning_rate="0.5")
    study = Tuner().resume(study, trials=4, quiet=True)
    assert study.trials[2].values == {"learning_rate": 0.5}
    assert len(study.trials) == 4
    with pytest.raises(InvalidValue, match=r"one of the space: 0.05..0.9:log"):
        study.enqueue(learning_rate=2.0)
    with pytest.raises(UnknownName, match="the others are the same in all trials"):
        study.enqueue(epochs=3)


@pytest.mark.parametrize("pruner", ["median", "asha", "hyperband"])
def test_trials_that_are_behind_end_early(tiny: Dataset, pruner: str) -> None:
    space = {"learning_rate": Choice((0.9, 0.5, 0.7, 0.6, 0.8, 1e-6, 2e-6, 3e-6, 4e-6))}
    trainer = Trainer(model="echo/memory", epochs=20, seconds_per_step=0.004)
    study = Tuner(trainer, space, sampler="grid", pruner=pruner).fit(tiny, tiny, quiet=True)
    pruned = [trial for trial in study.trials if trial.state == "pruned"]
    assert {trial.values["learning_rate"] for trial in pruned} & {1e-6, 2e-6, 3e-6, 4e-6}
    assert study.best_trial.value == max(trial.value or 0 for trial in study.trials) > 0.9
    for trial in pruned:
        assert trial.run.status == "stopped" and max(trial.intermediate) < 100


def test_two_at_once(shapes: Path) -> None:
    trainer = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.01)
    study = Tuner(trainer, SPACE, trials=6, parallel=2, pruner="none").fit(shapes, quiet=True)
    spans = [(run.model.manifest.started, run.model.manifest.seconds) for run in (t.run for t in study.trials)]
    starts = sorted(spans)
    assert any(later < start + took for (start, took), (later, _) in itertools.pairwise(starts))
    assert len(study.trials) == 6 and len({one.path for one in study.trials}) == 6


def test_each_at_once_has_a_device(shapes: Path) -> None:
    trainer = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.01)
    tuner = Tuner(trainer, SPACE, trials=4, parallel=2, pruner="none", devices=["cpu", "cuda:7"])
    study = tuner.fit(shapes, quiet=True)
    given = {trial.run.job.options["device"]: trial.state for trial in study.trials}
    assert given == {"cpu": "finished", "cuda:7": "failed"}, "echo runs on the CPU only"


def test_failed_trials_are_told_and_the_others_go_on(shapes: Path) -> None:
    space = {"learning_rate": Choice((0.1, 1e200, 0.2))}
    study = Tuner(ECHO, space, sampler="grid", pruner="none").fit(shapes, quiet=True)
    failed = [trial for trial in study.trials if trial.state == "failed"]
    assert [trial.values for trial in failed] == [{"learning_rate": 1e200}]
    assert "loss" in failed[0].facts.reason and study.best_trial.state == "finished"


def test_a_search_without_any_success_ends_and_can_go_on(shapes: Path) -> None:
    """Three failures end it; when their cause is gone it goes on."""
    trainer = Trainer(model="echo/memory", epochs=3, learning_rate=1e200)
    tuner = Tuner(trainer, {"max_detections": Choice((10, 20, 30, 40, 50, 60, 70, 80))}, trials=6, seed=1)
    with pytest.raises(RunFailed, match=r"3 trials of runs/hopeless failed and none finished; the last: .*loss"):
        tuner.fit(shapes, name="hopeless", quiet=True)
    job = Path("runs/hopeless/input/data/job/job.json")
    job.write_text(job.read_text().replace("1e200", "0.3").replace("1e+200", "0.3"))
    study = Tuner().resume("hopeless", quiet=True)
    assert [trial.state for trial in study.trials][:3] == ["failed"] * 3
    assert study.best_trial.number == 3


def test_nothing_finished(shapes: Path) -> None:
    with pytest.raises(RunFailed, match=r"no trial of runs/two finished; the last: .*loss"):
        Tuner(Trainer(model="echo/memory", learning_rate=1e200, epochs=3), {"seed": Int(0, 9)}, trials=2).fit(
            shapes, name="two", quiet=True
        )
    assert [trial.state for trial in open_study("two").trials] == ["failed"] * 2


def test_a_metric_that_never_appears(shapes: Path) -> None:
    with pytest.raises(RunFailed, match=r"val/mask_AP never appeared; what it told of validation: val/AP, val/AP50"):
        Tuner(ECHO, SPACE, metric="val/mask_AP", trials=1).fit(shapes, quiet=True)


def test_values_that_run_already_are_waited_for(shapes: Path) -> None:
    trainer = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.02)
    space = {"learning_rate": Choice((0.1, 0.3))}
    study = Tuner(trainer, space, trials=8, parallel=3, sampler="random", pruner="none").fit(shapes, quiet=True)
    assert len([trial for trial in study.trials if trial.path is not None]) == len(study.ranking()) == 2
    told = [trial for trial in study.to_dict()["trials"] if "same_as" in trial]
    assert len(told) == 6 and {trial["same_as"] for trial in told} == {0, study.ranking()[1].number}
    for trial in study.trials:
        first = study.trials[trial.number if trial.facts.same_as is None else trial.facts.same_as]
        assert (trial.state, trial.values, trial.value) == ("finished", first.values, first.value)


def test_all_that_fails_is_not_tried_for_ever_by_who_waited(shapes: Path) -> None:
    trainer = Trainer(model="echo/memory", epochs=3, learning_rate=1e200)
    tuner = Tuner(trainer, {"max_detections": Choice((10, 20))}, trials=20, parallel=3, sampler="random", pruner="none")
    with pytest.raises(RunFailed, match="trials of .* failed and none finished"):
        tuner.fit(shapes, name="vain", quiet=True)
    study = open_study("vain")
    assert 3 <= len([trial for trial in study.trials if trial.state == "failed"]) <= 5


def test_values_whose_run_fails_are_tried_by_who_waited(shapes: Path) -> None:
    """Nothing is known of them then."""
    trainer = Trainer(model="echo/memory", epochs=8, seconds_per_step=0.02)
    tuner = Tuner(trainer, {"learning_rate": Choice((0.3, 0.1))}, trials=2, parallel=2, sampler="random", seed=3)
    command = [sys.executable, "-c", _KILLER, "runs/waits/trials/0000"]
    with subprocess.Popen(command) as killer:
        study = tuner.fit(shapes, name="waits", quiet=True)
    assert killer.returncode == 0
    assert [trial.state for trial in study.trials] == ["failed", "finished"]
    assert study.trials[1].path is not None and study.trials[1].facts.same_as is None


_KILLER = """
import json, os, pathlib, signal, sys, time
run = pathlib.Path(sys.argv[1])
events = run / "output/data/metrics.jsonl"
while not (run / "run.json").is_file() or not events.is_file() or "train/loss" not in events.read_text():
    time.sleep(0.05)
os.kill(json.loads((run / "run.json").read_text())["pid"], signal.SIGKILL)
"""


def test_cmaes(shapes: Path) -> None:
    pytest.importorskip("cmaes", reason="pip install 'detkit-sdk[tune-cmaes]'")
    space = {**SPACE, "max_detections": Int(20, 200)}
    study = Tuner(ECHO, space, trials=12, sampler="cmaes", pruner="none").fit(shapes, quiet=True)
    assert len(study.trials) == 12 and {trial.state for trial in study.trials} == {"finished"}
    told = {name.partition(":")[0] for one in study.frozen_trials() for name in one.system_attrs}
    assert "cma" in told, "CMA-ES has chosen, and not what it falls back to"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"parent": "steel"}, "parent=steel: sampler tpe learns from no earlier search"),
        ({"pruner": "asah"}, "one of median, hyperband, asha, none; or auto"),
    ],
)
def test_what_would_have_no_effect_is_refused(shapes: Path, settings: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        Tuner(ECHO, SPACE, trials=1, **settings).fit(shapes, quiet=True)


def test_equal_results_are_told(shapes: Path, capfd: pytest.CaptureFixture[str]) -> None:
    study = Tuner(ECHO, {"max_detections": Choice((100, 200))}, trials=2).fit(shapes)
    # The memory is the same whatever number of boxes is asked of it.
    assert [trial.facts.equals for trial in study.trials].count(0) == 1
    assert "came out with the very same weights" in capfd.readouterr().err


def test_time_is_up(shapes: Path) -> None:
    trainer = Trainer(model="echo/memory", epochs=40, seconds_per_step=0.02)
    study = Tuner(trainer, SPACE, trials=4, budget=3, pruner="none").fit(shapes, quiet=True)
    assert [trial.state for trial in study.trials if trial.state == "running"] == ["running"]
    trial = next(trial for trial in study.trials if trial.state == "running")
    assert trial.run.status == "stopped" and trial.run.last_step > 0


def test_what_the_manifest_says_is_believed(shapes: Path) -> None:
    run = ECHO.fit(shapes, quiet=True)
    params = msgspec.convert(run.job.params, type(_params()))
    prove(run, {"learning_rate": 0.3}, params, 7)
    with pytest.raises(PluginError, match=r"trial 7 was to be trained with learning_rate=0.2, and the run had 0.3"):
        prove(run, {"learning_rate": 0.2}, params, 7)
    manifest = json.loads((run.workspace.model / "detkit.json").read_text())
    manifest["native"]["learning_rate"] = 0.25
    (run.workspace.model / "detkit.json").write_text(json.dumps(manifest))
    with pytest.raises(PluginError, match="and the framework had 0.25"):
        prove(run, {"learning_rate": 0.3}, params, 7)


def test_shares_of_the_money() -> None:
    """All together never cost more, whatever is added; what one did not need falls to those after it."""

    def paid(max_cost: float, cost: float | None = None) -> Facts:
        return Facts(max_cost=max_cost, cost=cost)

    assert share_of_money(None, [paid(2)], 3) is None
    assert share_of_money(8, [], 4) == 2
    assert share_of_money(8, [paid(2)], 3) == 2
    assert share_of_money(8, [paid(2, 0.5)], 3) == 2.5
    assert share_of_money(8, [Facts(same_as=9), Facts(reason="it could not begin")], 2) == 4
    assert share_of_money(8, [paid(2)], 6) == 1  # some were queued
    assert share_of_money(8, [paid(2), paid(2), paid(2), paid(2)], 1) == 0
    assert share_of_money(8, [paid(8, 7.995)], 1) == 0  # less than a cent
    assert share_of_money(8, [Facts(max_cost=3, given_up=1)], 2) == 2


def _params() -> Params:
    from detkit import plugins

    return plugins.backend("echo").spec("memory").params


def test_retrain_on_all_but_the_test_images(shapes: Path) -> None:
    study = Tuner(ECHO, SPACE, trials=2).fit(shapes, quiet=True)
    run = retrain(study, quiet=True)
    manifest = run.model.manifest
    assert manifest.params["learning_rate"] == study.best_trial.values["learning_rate"]
    assert manifest.data["train"]["images"] == 24 and manifest.data["test"]["images"] == 6
    assert "validation" not in manifest.data and "test/AP" in manifest.metrics


def test_retrain_with_what_is_to_differ(shapes: Path) -> None:
    study = Tuner(ECHO, SPACE, trials=2).fit(shapes, quiet=True)
    run = retrain(study, iterations=5, quiet=True)
    assert (run.job.params["iterations"], run.job.params["epochs"], run.last_step) == (5, None, 5)


def test_retrain_brings_the_modules_of_the_study(shapes: Path) -> None:
    Path("mine").mkdir()
    Path("mine/own_part.py").write_text("print('own_part is here')\n")
    trainer = Trainer(model="echo/memory", epochs=1, code="mine", imports=["own_part"])
    study = Tuner(trainer, SPACE, trials=1).fit(shapes, quiet=True)
    run = retrain(study, quiet=True)
    assert run.job.code == study.best.job.code and run.job.code is not None
    assert "own_part is here" in run.workspace.log_file.read_text()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Tuner(ECHO, SPACE, metric="val/ap"), InvalidValue, "what echo/memory reports: val/AP, "),
        (lambda: Tuner(ECHO, SPACE, mode="more"), InvalidValue, "max or min"),  # type: ignore[arg-type]
        (lambda: Tuner(ECHO, SPACE, sampler="amt"), InvalidValue, "one of tpe, random, grid, cmaes, or auto"),
        (lambda: Tuner(ECHO, SPACE, pruner="mean"), InvalidValue, "one of median, hyperband, asha, none"),
        (lambda: Tuner(ECHO, {"learning_rate": "0.1"}), InvalidValue, "a range, such as"),
        (lambda: Tuner(ECHO, {"epochs": Int(1, 3)}), UsageError, "epochs: given a value and searched"),
        (lambda: Tuner(ECHO, SPACE, trials=0), InvalidValue, "a whole number from 1"),
        (lambda: Tuner(ECHO, SPACE, budget="soon"), InvalidValue, "a duration such as 4h"),
        (lambda: Tuner(ECHO, SPACE, storage="sqlite:///x.db"), UsageError, "needs a name"),
    ],
)
def test_refused_before_anything_starts(shapes: Path, make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make().fit(shapes, quiet=True)
    assert not Path("runs").exists()


def test_without_validation_images(tiny: Dataset) -> None:
    with pytest.raises(UsageError, match="there are no validation images"):
        Tuner(ECHO, SPACE).fit(tiny, test=tiny, quiet=True)


def test_plan(shapes: Path) -> None:
    plan = Tuner(ECHO, SPACE, trials=7, parallel=2).plan(shapes)
    assert plan.notes[0] == "search learning_rate 0.05..0.9:log"
    assert "7 trials, 2 at once, chosen by tpe; median ends" in plan.notes[1]
    assert not Path("runs").exists()


def test_auto_space_leaves_out_what_was_given(shapes: Path) -> None:
    study = Tuner(Trainer(model="echo/memory", epochs=1), trials=2).fit(shapes, quiet=True)
    assert set(study.search.space) == {"learning_rate"}
    with pytest.raises(UsageError, match="the space is empty"):
        Tuner(Trainer(model="echo/memory", epochs=1, learning_rate=0.2), trials=2).fit(shapes, quiet=True)


SCRIPT = """
import sys
from detkit import Float, Trainer, Tuner
trainer = Trainer(model="echo/memory", epochs=6, seconds_per_step=0.01)
tuner = Tuner(trainer, {"learning_rate": Float(0.05, 0.9, log=True)}, trials=5, pruner="none", **STORAGE)
if __name__ == "__main__":
    tuner.fit(sys.argv[1], name="killed", quiet=True)
"""


def begin(shapes: Path, storage: str = "") -> subprocess.Popen[bytes]:
    script = SCRIPT.replace("STORAGE", repr({"storage": storage} if storage else {}))
    return subprocess.Popen([sys.executable, "-c", script, str(shapes)])


def wait_for(folder: Path, timeout_s: float = 60) -> None:
    """Wait until there is something in a folder."""
    deadline = time.monotonic() + timeout_s
    while not (folder.is_dir() and any(folder.iterdir())):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT])
def test_killed_and_resumed(shapes: Path, sent: signal.Signals) -> None:
    """Finished trials are neither lost nor done again; the one that ran goes on from its checkpoint."""
    process = begin(shapes)
    wait_for(Path("runs/killed/trials/0002/checkpoints"))
    process.send_signal(sent)
    assert process.wait(timeout=60) != 0
    study = Study("runs/killed")
    finished = {trial.number: trial.value for trial in study.trials if trial.state == "finished"}
    assert set(finished) == {0, 1}
    made = {number: (study.path / f"trials/{number:04d}/model/detkit.json").stat().st_mtime_ns for number in finished}
    study = Tuner().resume("killed", quiet=True)
    assert [trial.state for trial in study.trials] == ["finished"] * 5
    assert {number: study.trials[number].value for number in finished} == finished
    for number, time_ns in made.items():
        assert (study.path / f"trials/{number:04d}/model/detkit.json").stat().st_mtime_ns == time_ns
    states = [event.values.get("state") for event in study.trials[2].run.events(follow=False) if event.kind == "state"]
    assert states.count("starting") == 2  # the same run, resumed


def test_one_process_at_a_time(shapes: Path) -> None:
    process = begin(shapes)
    try:
        wait_for(Path("runs/killed/trials/0000/checkpoints"))
        assert len(Study("runs/killed").trials) >= 1  # which anybody may read
        with pytest.raises(UsageError, match="another process works on"):
            Tuner().resume("killed", quiet=True)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=60)


def test_a_study_that_is_there_is_not_begun_again(shapes: Path) -> None:
    tuner = Tuner(ECHO, SPACE, trials=1)
    tuner.fit(shapes, name="once", quiet=True)
    with pytest.raises(UsageError, match="once"):
        tuner.fit(shapes, name="once", quiet=True)
    assert len(Study("runs/once").trials) == 1


def test_no_study() -> None:
    with pytest.raises(UnknownName, match="study"):
        open_study("nobody")
    with pytest.raises(UsageError, match="there is no study in runs"):
        open_study("last")
    Path("other").mkdir()
    with pytest.raises(UsageError, match=r"other holds no study: there is no study.json in it"):
        Study("other")


def test_a_server_that_is_not_there(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("pg8000", reason="pip install 'detkit-sdk[tune-postgresql]'")
    url = "postgresql+pg8000://somebody:$SECRET_OF_MINE@127.0.0.1:1/studies"
    tuner = Tuner(ECHO, SPACE, storage=url)
    with pytest.raises(UsageError, match=r"in \$SECRET_OF_MINE, which is not set here"):
        tuner.fit(shapes, name="far", quiet=True)
    monkeypatch.setenv("SECRET_OF_MINE", "p@ss/word")
    with pytest.raises(PluginError, match=r"cannot open the study's storage .*somebody@127.0.0.1:1") as error:
        tuner.fit(shapes, name="far", quiet=True)
    assert "p@ss" not in str(error.value) and not Path("runs/far").exists()


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+pg8000://somebody:secret@127.0.0.1:1/studies",
        "postgresql+pg8000://127.0.0.1:1/studies?user=u&password=secret",
    ],
)
def test_passwords_are_not_kept(shapes: Path, url: str) -> None:
    with pytest.raises(UsageError, match=r"put it into an environment variable .*:\$PASSWORD@") as error:
        Tuner(ECHO, SPACE, storage=url).fit(shapes, name="far", quiet=True)
    assert "secret" not in str(error.value) and not Path("runs/far").exists()


def test_a_damaged_study_does_not_hide_the_others(shapes: Path) -> None:
    Tuner(ECHO, SPACE, trials=1).fit(shapes, name="good", quiet=True)
    Path("runs/bad").mkdir()
    Path("runs/bad/study.json").write_text("{")
    with pytest.warns(UserWarning, match="study runs/bad is left out"):
        assert [study.name for study in list_studies()] == ["good"]


def test_rescored_on_images_that_no_trial_saw(shapes: Path, clean: Path) -> None:
    study = Tuner(Trainer(model="echo/memory", epochs=1), SPACE, trials=4, pruner="none").fit(shapes, quiet=True)
    by_value = [trial.number for trial in study.ranking()]
    with pytest.raises(SeenImages):
        rescore(study)
    test = study.workspace.dataset("test")
    assert test is not None
    with pytest.raises(UsageError, match="of the images are the study's test images"):
        rescore(study, test)
    fresh = write_shapes(clean / "fresh", num_images=10, size=48, seed=5)
    rescore(study, fresh, top=2)
    scores = {number: evaluate(study.trials[number].run, fresh)["AP"] for number in by_value[:2]}
    assert {trial.number: trial.rescored for trial in study.trials if trial.rescored is not None} == scores
    study.keep_rescored({by_value[2]: 0.5, by_value[1]: 0.25})
    assert [trial.number for trial in study.ranking()] == [by_value[2], by_value[1], by_value[0], by_value[3]]
    assert study.best.path.name == f"{by_value[2]:04d}"
    assert "AP 0.5 on images that no trial saw" in str(study.rows())
