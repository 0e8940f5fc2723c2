"""``detkit train`` and ``detkit explain``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from detkit import write_dataset
from detkit.testing import tiny_dataset

ECHO = ("--model", "echo/memory")


def test_summary_says_what_to_type_next(cli: Any, data: Path, tmp_path: Path) -> None:
    done = cli("train", data, *ECHO, "--name", "mine", "--device", "cpu", "epochs=1", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "model  echo/memory, 2 classes" in done.out
    assert "val/AP50" in done.out and "test/AP50" in done.out
    assert "detkit evaluate runs/mine\n" in done.out
    assert "detkit predict runs/mine images/ --save out/" in done.out
    assert "val/AP" in done.err, "progress goes to standard error"


def test_json_is_all_there_is_on_standard_output(cli: Any, data: Path, tmp_path: Path) -> None:
    done = cli("train", data, data, "--test", data, *ECHO, "--quiet", "--json", "epochs=1", cwd=tmp_path)
    assert done.code == 0, done.err
    assert set(done.json) == {
        *("run", "status", "model", "created", "step", "metrics", "classes", "seconds", "score_threshold")
    }
    assert done.json["status"] == "finished"
    assert done.json["model"] == "echo/memory"
    assert {"val/AP", "test/AP50"} <= set(done.json["metrics"])
    assert Path(done.json["run"]).parent == tmp_path / "runs"
    leaks = [line for line in done.err.splitlines() if not line.startswith("warning: ")]
    assert not leaks, "--quiet shows no progress"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epoks=3"], "did you mean 'epochs'"),
        (["--devise", "cpu"], "did you mean 'device'"),
        (["model=echo/memory"], "write `--model echo/memory`"),
        (["epochs=many"], "epochs='many'"),
        (["--on-invalid", "ignore"], "one of raise, drop"),
        (["--format", "cocoa"], "did you mean 'coco'"),
        (["more", "and/more"], "3 data sets"),
        (["--resume", "x"], "leave out"),
        (["--like", "sagemaker"], "no dialect of backend 'echo' 'sagemaker'"),
        (["like=sagemaker"], "write `--like sagemaker`"),
    ],
)
def test_wrong_use(words: list[str], message: str, cli: Any, data: Path, tmp_path: Path) -> None:
    done = cli("train", data, *ECHO, "--json", *words, cwd=tmp_path)
    assert done.code == 2
    assert message in done.err
    assert done.err.startswith("error: ") and "Traceback" not in done.err
    assert done.json["code"] == 2 and message in done.json["error"]
    assert not (tmp_path / "runs").exists()


def test_failed_training_is_3(cli: Any, data: Path, tmp_path: Path) -> None:
    done = cli("train", data, *ECHO, "--device", "cuda:9", cwd=tmp_path)
    assert done.code == 3
    assert "cuda:9" in done.err and "Traceback" not in done.err


def test_missing_data_is_told_with_an_example(cli: Any, tmp_path: Path) -> None:
    done = cli("train", *ECHO, cwd=tmp_path)
    assert done.code == 2
    assert "train: for example" in done.err


def test_settings_file_and_environment(cli: Any, data: Path, tmp_path: Path) -> None:
    (tmp_path / "detkit.yaml").write_text(f"model: echo/memory\ntrain: {data}\nseed: 7\n")
    done = cli("train", "--quiet", "--json", cwd=tmp_path, DETKIT_EPOCHS="1")
    assert done.code == 0, done.err
    shown = cli("runs", "show", "last", "--json", cwd=tmp_path).json
    assert (shown["params"]["epochs"], shown["params"]["seed"]) == (1, 7)


def test_ctrl_c_keeps_the_checkpoint_and_resume_continues(cli: Any, data: Path, tmp_path: Path) -> None:
    words = ["train", str(data), *ECHO, "--name", "mine", "--seconds-per-step", "0.02", "epochs=8"]
    process = subprocess.Popen(
        [sys.executable, "-m", "detkit.cli", *words],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    _wait_for(tmp_path / "runs/mine/checkpoints", "step-*")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert not out
    assert "stopped at step " in err.splitlines()[-1]
    assert "continue with `detkit train --resume runs/mine`" in err
    assert "Traceback" not in err
    done = cli("train", "--resume", "mine", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert done.json["status"] == "finished"


def test_detached_run_goes_on_and_can_be_stopped(cli: Any, data: Path, tmp_path: Path) -> None:
    started = cli("train", data, *ECHO, "--detach", "--seconds-per-step", "0.05", "epochs=500", cwd=tmp_path)
    assert started.code == 0, started.err
    assert "detkit runs attach runs/" in started.out
    running = cli("runs", "show", "last", "--json", cwd=tmp_path).json
    assert running["status"] == "running"
    refused = cli("runs", "rm", "last", "--yes", cwd=tmp_path)
    assert (refused.code, "is running" in refused.err) == (2, True)
    stopped = cli("runs", "stop", "last", "--json", cwd=tmp_path).json
    assert stopped["status"] == "stopped"
    attached = cli("runs", "attach", "last", "--quiet", cwd=tmp_path)
    assert (attached.code, "detkit train --resume" in attached.out) == (130, True)


def test_ctrl_c_leaves_an_attached_run_alone(cli: Any, data: Path, tmp_path: Path) -> None:
    cli("train", data, *ECHO, "--detach", "--name", "on", "--seconds-per-step", "0.05", "epochs=500", cwd=tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-m", "detkit.cli", "runs", "attach", "on"],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
    )
    assert process.stderr is not None
    first = process.stderr.readline()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    try:
        assert process.returncode == 130, first + err
        assert "detkit runs stop runs/on" in err
        assert cli("runs", "show", "on", "--json", cwd=tmp_path).json["status"] == "running"
    finally:
        cli("runs", "stop", "on", cwd=tmp_path)


def test_explain_shows_where_values_come_from(cli: Any, tmp_path: Path) -> None:
    words = ("explain", *ECHO, "--device", "cpu", "learning_rate=0.1")
    found = cli(*words, "--json", cwd=tmp_path, DETKIT_SEED="3").json
    assert set(found) == {"backend", "model", "reason", "like", "hyperparameters", "settings"}
    assert (found["backend"], found["model"], found["like"], found["hyperparameters"]) == ("echo", "memory", "", [])
    rows = {row["name"]: row for row in found["settings"]}
    assert set(rows["seed"]) == {"name", "value", "origin", "kind", "native", "description"}
    assert (rows["seed"]["value"], rows["seed"]["origin"]) == (3, "DETKIT_SEED")
    assert (rows["learning_rate"]["value"], rows["learning_rate"]["kind"]) == (0.1, "parameter")
    assert (rows["device"]["value"], rows["device"]["kind"]) == ("cpu", "option")
    assert rows["epochs"]["origin"] == "default"
    table = cli(*words, cwd=tmp_path).out
    assert "learning_rate" in table and "peak learning rate" in table
    assert cli("explain", *ECHO, "some/data", cwd=tmp_path).code == 2


def _wait_for(folder: Path, pattern: str) -> None:
    deadline = time.monotonic() + 60
    while not any(folder.glob(pattern)):
        assert time.monotonic() < deadline, f"{folder}/{pattern} did not appear"
        time.sleep(0.02)


def test_finished_run_is_made_longer(cli: Any, trained: Path, tmp_path: Path) -> None:
    done = cli(
        "train", "--resume", trained / "runs/first", "epochs=9", "--name", "longer", "--num-workers", "1", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "run    runs/longer" in done.out
    assert "goes on from" in done.err
    shown = cli("runs", "show", "longer", cwd=tmp_path)
    assert "goes on    from step " in shown.out
    assert " of first\n" in shown.out
    refused = cli("train", "--resume", trained / "runs/first", "learning_rate=1", cwd=tmp_path)
    assert refused.code == 2
    assert "learning_rate is a parameter" in refused.err


def test_incremental_training_tells_what_is_forgotten(cli: Any, data: Path, tmp_path: Path) -> None:
    """In the summary, in `runs show` and in JSON."""
    more = write_dataset(tiny_dataset(tmp_path / "more", num_images=20, seed=5), tmp_path / "parent-data")
    parent = cli("train", more, *ECHO, "--name", "parent", "--quiet", "epochs=1", cwd=tmp_path)
    assert parent.code == 0, parent.err
    words = ("train", data, data, *ECHO, "epochs=1", "weights=parent", "--replay", "parent", "--replay-share", "0.2")
    done = cli(*words, "--name", "child", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "replay: 5 of 13 images of parent join the 20 new ones" in done.err
    assert "forgetting on 4 test images of parent: AP " in done.out
    shown = cli("runs", "show", "child", cwd=tmp_path)
    assert "forgetting on 4 test images of parent: AP " in shown.out
    assert "replay     5 images of parent" in shown.out
    found = cli("runs", "show", "child", "--json", cwd=tmp_path).json["forgetting"]
    assert set(found) == {"data", "images", "overall", "classes"}
    assert set(found["classes"]) == {"disc", "square"}
    assert set(found["overall"]) == {"objects", "before", "after", "difference"}
