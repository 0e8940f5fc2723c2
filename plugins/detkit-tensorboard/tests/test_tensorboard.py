"""What TensorBoard's own reader finds in the files of real runs of the echo backend."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tensorboard", reason="reads and writes with TensorBoard's own code")
pytest.importorskip("detkit_echo")

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, metadata

import detkit
import detkit_tensorboard
from detkit import Dataset, Trainer, plugins
from detkit.errors import RunFailed
from detkit.live import follow
from detkit.testing import tiny_dataset

SOURCE = Path(__file__).parents[1]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Dataset]:
    """Some pictures, in a process where the tracker is installed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))
    plugins.registry.cache_clear()
    plugins.registry().manager.register(detkit_tensorboard, name="tensorboard")
    yield tiny_dataset(tmp_path / "images")
    assert not plugins.registry().broken
    plugins.registry.cache_clear()


def read(run: detkit.Run) -> EventAccumulator:
    found = EventAccumulator(str(run.path / "output/tensorboard"))
    found.Reload()
    return found


def scalars(run: detkit.Run) -> dict[str, list[tuple[int, float]]]:
    found = read(run)
    return {tag: [(event.step, event.value) for event in found.Scalars(tag)] for tag in found.Tags()["scalars"]}


def logged(run: detkit.Run) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for row in run.history:
        for name, value in row.items():
            if "/" in name:
                series.setdefault(name, []).append((int(row["step"]), pytest.approx(value, rel=1e-6)))
    return series


def session(run: detkit.Run, tag: str) -> Any:
    content = read(run).summary_metadata[tag].plugin_data.content
    parsed = metadata.parse_session_start_info_plugin_data
    return (parsed if tag == metadata.SESSION_START_INFO_TAG else metadata.parse_session_end_info_plugin_data)(content)


def test_numbers_steps_and_hyperparameters(data: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=2, learning_rate=0.25).fit(data, data, data, quiet=True)
    assert set(scalars(run)) == {"train/loss", "val/AP", "val/AP50", "test/AP", "test/AP50"}
    assert scalars(run) == logged(run)
    told = session(run, metadata.SESSION_START_INFO_TAG).hparams
    assert told["learning_rate"].number_value == 0.25
    assert (told["weights"].string_value, told["model"].string_value) == ("null", "echo/memory")
    assert session(run, metadata.SESSION_END_INFO_TAG).status == api_pb2.STATUS_SUCCESS


def test_steps_done_again_stand_once(data: Dataset) -> None:
    """The checkpoint of the first epoch is taken up, after some steps of the second."""
    run = Trainer(model="echo/memory", epochs=3, seconds_per_step=0.1).start(data, data, leash=True)

    def stop_in_the_second_epoch() -> None:
        while not any((event.epoch or 0) > 1 for event in run.events(follow=False)):
            time.sleep(0.01)
        run.stop()

    stopper = threading.Thread(target=stop_in_the_second_epoch)
    stopper.start()
    follow(run, quiet=True)
    stopper.join()
    before = scalars(run)
    assert run.status == "stopped"
    resumed = Trainer().resume(run, quiet=True)
    repeated = [event.step for event in resumed.events(follow=False) if "train/loss" in event.values]
    assert len(set(repeated)) < len(repeated), "the run did no step twice, so nothing is shown here"
    assert scalars(resumed) == logged(resumed)
    assert len(scalars(resumed)["train/loss"]) > len(before["train/loss"])


def test_following_once_more_adds_nothing(data: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=2).start(data, data, leash=True)
    run.wait()
    assert not (run.path / "output/tensorboard").exists(), "nobody followed it"
    follow(run, quiet=True)
    once = scalars(run)
    follow(run, quiet=True)
    assert scalars(run) == once == logged(run)


ATTACH = """
import sys
import detkit_tensorboard
from detkit import open_run, plugins
plugins.registry().manager.unregister(name="tensorboard")
plugins.registry().manager.register(detkit_tensorboard, name="tensorboard")
run = open_run(sys.argv[1])
for event in run.events():
    plugins.notify(event, run)
    if event.kind == "metric":
        break
"""


def test_one_of_two_who_follow_writes(data: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.05).start(data, data, leash=True)
    follower = threading.Thread(target=follow, args=(run,), kwargs={"quiet": True})
    follower.start()
    while not any((run.path / "output/tensorboard").glob("events.*")):
        time.sleep(0.01)
    path = os.pathsep.join([str(SOURCE / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    subprocess.run([sys.executable, "-c", ATTACH, run.path], check=True, env={**os.environ, "PYTHONPATH": path})
    assert run.status == "running"
    run.stop()
    follower.join()
    assert len(list((run.path / "output/tensorboard").glob("events.*"))) == 1
    assert scalars(run) == logged(run)


def test_failed_run_is_closed(data: Dataset) -> None:
    from detkit_tensorboard import writer

    with pytest.raises(RunFailed):
        Trainer(model="echo/memory", epochs=1, device="cuda:9", name="bad").fit(data, data, quiet=True)
    assert session(detkit.open_run("bad"), metadata.SESSION_END_INFO_TAG).status == api_pb2.STATUS_FAILURE
    assert writer._open == {}


def test_importing_it_is_cheap() -> None:
    code = "import sys, detkit_tensorboard; print({'tensorboard', 'numpy'} & set(sys.modules))"
    path = os.pathsep.join([str(SOURCE / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.stdout.strip() == "set()"


def test_installed_it_follows_the_command_line(data: Dataset, tmp_path: Path) -> None:
    """The wheel, as an installer would put it."""
    pytest.importorskip("hatchling", reason="builds the wheel; nothing is fetched from the network")
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--disable-pip-version-check", "--target", site, SOURCE],
        check=True,
    )  # fmt: skip
    detkit.write_dataset(data, tmp_path / "shapes", "coco")
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-m", "detkit.cli", "train", "shapes", "shapes", "--model", "echo/memory", "--name", "r"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    run = detkit.open_run("r")
    assert scalars(run) == logged(run) != {}
