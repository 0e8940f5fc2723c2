"""Going on: after `kill -9` at any moment, with damaged checkpoints, on a full disk, and beyond the end of a run."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import detkit
from detkit import Dataset, Model, Trainer, evaluate, open_run, plugins, resuming
from detkit.backends import LocalBackend
from detkit.checkpoints import Checkpoints
from detkit.errors import RunFailed, UnknownName, Unsupported, UsageError, WorkerDied
from detkit.files import file_sha256
from detkit.hookspecs import hookimpl
from detkit.job import Continued
from detkit.runs import LocalRun, Run
from detkit.testing import tiny_dataset

pytestmark = pytest.mark.usefixtures("clean")

ECHO = Trainer(model="echo/memory", epochs=8)


def memory(run: Run) -> list[Any]:
    with np.load(run.model.path / "memory.npz") as arrays:
        return [arrays[name].tolist() for name in sorted(arrays.files)]


def losses(run: Run) -> list[tuple[float, float]]:
    return [(row["step"], row["train/loss"]) for row in run.history if "train/loss" in row]


def messages(run: Run) -> str:
    return "\n".join(str(event.values["message"]) for event in run.events(follow=False) if event.kind == "log")


def kill(run: Run) -> None:
    assert isinstance(run, LocalRun)
    os.kill(run.record.pid, signal.SIGKILL)
    with pytest.raises(WorkerDied):
        run.wait()
    assert run.status == "interrupted"


@pytest.fixture(scope="module")
def whole(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Eight epochs that nobody disturbed."""
    return ECHO.fit(tiny, tiny, name=str(tmp_path_factory.mktemp("whole") / "whole"), quiet=True)


@pytest.fixture(scope="module")
def cut_off(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, killed when two checkpoints were there."""
    name = str(tmp_path_factory.mktemp("cut") / "run")
    run = ECHO.start(tiny, tiny, name=name, seconds_per_step=0.05, leash=True)
    while len(list(run.workspace.checkpoints.glob("step-*"))) < 2:
        time.sleep(0.01)
    kill(run)
    for older in sorted(run.workspace.checkpoints.glob("step-*"))[:-2]:  # saved, and the oldest not yet removed
        older.unlink()
    return run.path


@pytest.fixture
def interrupted(cut_off: Path, tmp_path: Path) -> Run:
    """A copy of the interrupted run; the checkpoints are files of its own."""
    return open_run(shutil.copytree(cut_off, tmp_path / "runs/interrupted"))


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_kill_9_at_any_moment(seed: int, tiny: Dataset, whole: Run) -> None:
    rng = np.random.default_rng(seed)
    run = ECHO.start(tiny, tiny, seconds_per_step=0.03, leash=True)
    kills = 0
    while kills < 4:
        next((e for e in run.events(since=run.position) if e.kind in {"progress", "state"}), None)
        time.sleep(rng.uniform(0, 0.3))
        os.kill(run.record.pid, signal.SIGKILL)  # a process that nobody has waited for keeps its number
        with contextlib.suppress(WorkerDied):
            run.wait()
        if run.status == "finished":
            break
        kills += 1
        run = run.resume(leash=True, options={"seconds_per_step": 0.0} if kills == 4 else None)
    assert kills >= 2, "it was over before it could be killed"
    run.wait()
    assert memory(run) == memory(whole)
    assert losses(run) == losses(whole)
    assert run.metrics == whole.metrics


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize("damage", [flip, cut])
def test_damaged_checkpoint(damage: Any, interrupted: Run, whole: Run) -> None:
    first, last = sorted(interrupted.workspace.checkpoints.glob("step-*"))
    damage(last)
    run = Trainer().resume(interrupted, quiet=True)
    step = int(last.name.split("-")[1])
    assert f"the checkpoint of step {step} is damaged" in messages(run)
    resumed = next(event for event in run.events(follow=False) if event.values.get("state") == "resumed")
    assert resumed.step == int(first.name.split("-")[1])
    assert memory(run) == memory(whole)
    assert losses(run) == losses(whole)


def test_no_checkpoint_is_whole(interrupted: Run) -> None:
    for file in interrupted.workspace.checkpoints.glob("step-*"):
        flip(file)
    for _ in range(2):  # the second finds nothing but what the first has set aside
        with pytest.raises(RunFailed, match=r"no checkpoint in .* is whole, so this run cannot go on; train anew"):
            Trainer().resume(interrupted, quiet=True)
        assert interrupted.status == "failed"


def test_a_resume_that_cannot_start_changes_nothing(interrupted: Run, tiny: Dataset, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.write_text("#!/nowhere/python\n")
    broken.chmod(0o755)
    with pytest.raises(RunFailed, match="cuda:9"):
        ECHO.fit(tiny, tiny, name="failed", device="cuda:9", quiet=True)
    stopped = ECHO.start(tiny, tiny, name="stopped", seconds_per_step=0.05)
    next(event for event in stopped.events() if event.kind == "state" and event.values["state"] == "running")
    stopped.stop()
    for run, status in ((interrupted, "interrupted"), (open_run("failed"), "failed"), (stopped, "stopped")):
        job = run.workspace.job_file.read_bytes()
        files = sorted(path for path in run.path.rglob("*") if path.name != ".lock")
        for python, message in (("/nope", "names '/nope', which is no executable"), (broken, "cannot run .*broken")):
            with pytest.raises(UsageError, match=message):
                Trainer().resume(run, python=str(python), quiet=True)
            assert run.status == status
            assert run.workspace.job_file.read_bytes() == job
            assert sorted(path for path in run.path.rglob("*") if path.name != ".lock") == files
    with pytest.raises(RunFailed, match="cuda:9"):
        Trainer().resume("failed", quiet=True)


def test_settings_of_the_constructor(interrupted: Run, whole: Run) -> None:
    """They are refused where the run has others, as a resumed run goes on with its own."""
    other = Trainer(model="echo/memory", epochs=4, seconds_per_step=0)
    with pytest.raises(UsageError, match=r"Trainer\(epochs=4, seconds_per_step=0\) has other settings; leave them out"):
        other.resume(interrupted)
    with pytest.raises(UsageError, match=r"Trainer\(model='once/memory', on_invalid='drop'\) has other settings"):
        Trainer(model="once/memory", on_invalid="drop").resume(interrupted)
    assert interrupted.status == "interrupted"
    assert memory(ECHO.resume(interrupted, seconds_per_step=0, quiet=True)) == memory(whole)


def test_disk_full_at_a_later_checkpoint(interrupted: Run, whole: Run, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the system refuses the checkpoint in the middle of writing it."""
    python = tmp_path / "limited"
    python.write_text(f'#!/bin/sh\nulimit -f 12\nexec "{sys.executable}" "$@"\n')  # a checkpoint has 9 KB
    python.chmod(python.stat().st_mode | stat.S_IXUSR)
    before = sorted(interrupted.workspace.checkpoints.glob("step-*"))
    step = Checkpoints(interrupted.workspace.checkpoints).newest(print).step  # type: ignore[union-attr]
    with pytest.raises(RunFailed, match=f"cannot write .*: File too large; the checkpoint of step {step} is still"):
        Trainer().resume(interrupted, python=str(python), quiet=True)
    assert sorted(interrupted.workspace.checkpoints.iterdir()) == before
    run = Trainer().resume(interrupted, python=sys.executable, quiet=True)
    assert memory(run) == memory(whole)


def test_other_options(interrupted: Run, whole: Run) -> None:
    run = Trainer().resume(interrupted, num_workers="2", seconds_per_step=0, quiet=True)
    assert run.job.options == {**whole.job.options, "num_workers": 2, "seconds_per_step": 0.0}
    assert run.model.manifest.options["num_workers"] == 2
    assert memory(run) == memory(whole)


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"learning_rate": 1}, UsageError, "learning_rate is a parameter, and a run goes on with those it was started"),
        ({"num_wokers": 1}, UnknownName, "no option of echo 'num_wokers'; did you mean 'num_workers'"),
        (
            {"device": "cpu", "epochs": 20},
            UsageError,
            r"is interrupted, and epochs=20 .*resume it first: `detkit train",
        ),
        ({"name": "other"}, UsageError, "goes on under its own name"),
    ],
)
def test_settings_that_an_unfinished_run_refuses(
    settings: dict[str, Any], kind: type[Exception], message: str, interrupted: Run, tmp_path: Path
) -> None:
    before = interrupted.job
    with pytest.raises(kind, match=message):
        Trainer().resume(interrupted, **settings)
    assert interrupted.status == "interrupted"
    assert interrupted.job == before
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["interrupted"]


@pytest.mark.parametrize(
    ("first", "then", "all_at_once"),
    [
        ({"epochs": 3}, {"epochs": 8}, {"epochs": 8}),
        ({"iterations": 13}, {"iterations": "21"}, {"iterations": 21}),
        ({"epochs": 2}, {"iterations": 21}, {"iterations": 21}),
    ],
)
def test_longer_than_it_was(
    first: dict[str, Any], then: dict[str, Any], all_at_once: dict[str, Any], tiny: Dataset
) -> None:
    trainer = Trainer(model="echo/memory")
    short = trainer.fit(tiny, tiny, name="short", quiet=True, **first)
    files = [*short.workspace.checkpoints.iterdir(), *short.model.path.iterdir(), short.workspace.metrics_file]
    before = {file: file_sha256(file) for file in files}
    longer = Trainer().resume("short", name="longer", quiet=True, **then)
    once = trainer.fit(tiny, tiny, name="once", quiet=True, **all_at_once)
    assert longer.path.name == "longer"
    assert memory(longer) == memory(once)
    assert longer.metrics == once.metrics
    assert [row for row in losses(once) if row[0] > losses(short)[-1][0]] == losses(longer)
    assert {file: file_sha256(file) for file in files} == before, "the earlier run stays as it was"
    step = int(short.history[-1]["step"])
    origin = Continued(run="short", manifest=file_sha256(short.model.path / "detkit.json"), step=step)
    assert longer.job.continued_from == longer.model.manifest.continued_from == origin
    assert f"run runs/longer goes on from runs/short, {step / 8:g} epochs in {step} steps done" in messages(longer)
    assert longer.model.manifest.data == short.model.manifest.data
    assert longer.model.seen() == short.model.seen()


def test_longer_once_more_and_without_the_first(tmp_path: Path) -> None:
    """What goes on is whole in itself: the run that it came from, and the one before, may go."""
    data = tiny_dataset(tmp_path / "images", num_images=20)
    trainer = Trainer(model="echo/memory", epochs=1)
    run = trainer.fit(data, name="1", quiet=True)
    for epochs in (2, 3):
        longer = trainer.resume(run, epochs=epochs, name=str(epochs), quiet=True)
        shutil.rmtree(run.path)
        run = longer
    once = trainer.fit(data, epochs=3, quiet=True)
    assert memory(run) == memory(once)
    assert run.metrics == once.metrics
    assert evaluate(run)["AP"] == evaluate(once)["AP"], "the test images came along"


def test_longer_is_interrupted_and_resumed(tiny: Dataset, whole: Run) -> None:
    short = ECHO.fit(tiny, tiny, epochs=2, name="short", quiet=True)
    longer, since = resuming.go_on(short, {"epochs": 8, "seconds_per_step": 0.05}, leash=True)
    assert since == 0
    next(event for event in longer.events() if event.kind == "metric")
    kill(longer)
    assert memory(Trainer().resume(longer, quiet=True)) == memory(whole)


def test_longer_where_nothing_can_be_hard_linked(
    tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on another file system: what lies in the first run is copied, links to the user's images stay links."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    parent = ECHO.fit(tiny, tiny, epochs=1, name="parent", quiet=True)
    short = ECHO.fit(tiny, tiny, epochs=1, weights=parent, name="short", quiet=True)
    longer = Trainer().resume(short, epochs=2, name="longer", quiet=True)
    for run in (parent, short):
        shutil.rmtree(run.path)
    links = [path for path in longer.path.rglob("*") if path.is_symlink()]
    assert {path.parent.name for path in links} == {"images"}
    assert all(path.is_file() for path in links)
    assert Model(longer.workspace.parent_model).classes == tiny.classes
    assert any(longer.workspace.checkpoints.glob("step-*"))


def test_parent_comes_along(tiny: Dataset, tmp_path: Path) -> None:
    other = tiny_dataset(tmp_path / "other", seed=4)
    parent = ECHO.fit(tiny, other, epochs=2, name="parent", quiet=True)
    new = tiny_dataset(tmp_path / "new", num_images=6, seed=3)
    short = ECHO.fit(new, tiny, epochs=1, weights=parent, name="short", quiet=True)
    shutil.rmtree(parent.path)
    longer = ECHO.resume(short, epochs=2, quiet=True)
    assert longer.model.manifest.parent == short.model.manifest.parent
    assert Model(longer.workspace.parent_model).classes == tiny.classes
    assert longer.forgetting is not None
    assert longer.forgetting.data == "validation images of parent"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 2}, r"epochs=2 is not longer than what .*short did, 2 epochs in 16 steps; give more"),
        ({"iterations": 16}, r"iterations=16 is not longer than what"),
        ({"epochs": 3, "iterations": 100}, "give epochs or iterations, not both"),
        ({"epochs": 0}, "epochs=0"),
        ({"epochs": 3, "name": "short"}, "runs/short already holds a finished run"),
        ({"device": "cpu"}, "is finished; only an interrupted.*a larger epochs= makes a new run"),
    ],
)
def test_not_longer(settings: dict[str, Any], message: str, tiny: Dataset, tmp_path: Path) -> None:
    short = ECHO.fit(tiny, tiny, epochs=2, name="short", quiet=True)
    with pytest.raises(detkit.DetkitError, match=message):
        Trainer().resume(short, **settings)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["short"]


def test_checkpoints_are_gone(tiny: Dataset, tmp_path: Path) -> None:
    short = ECHO.fit(tiny, tiny, epochs=2, name="short", quiet=True)
    for file in short.workspace.checkpoints.iterdir():
        file.unlink()
    (short.workspace.checkpoints / "batch_size.json").write_text("4")
    (short.workspace.checkpoints / "damaged-step-000000016-0123456789abcdef").write_bytes(b"?")
    with pytest.raises(UsageError, match=r"the checkpoints of .*short are gone.*with weights=runs/short"):
        Trainer().resume(short, epochs=3)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["short"]


class Guest:
    """A plugin whose backend does what echo does, but goes on with nothing."""

    @hookimpl
    def detkit_backends(self) -> Iterable[LocalBackend]:
        (original,) = plugins.registry().manager.get_plugin("echo").detkit_backends()
        yield replace(original, name="once", resume=None)


def test_backend_that_cannot_resume(tiny: Dataset, request: pytest.FixtureRequest) -> None:
    request.addfinalizer(plugins.registry.cache_clear)
    plugins.registry.cache_clear()
    plugins.registry().manager.register(Guest(), name="guest")
    short = Trainer(model="once/memory", epochs=1).fit(tiny, tiny, name="short", quiet=True)
    with pytest.raises(Unsupported, match="backend 'once' cannot go on with a run; start a new one with weights="):
        Trainer().resume(short, epochs=3)
