"""`detkit tune` and `detkit studies`, typed."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from detkit.shapes import write_shapes

pytest.importorskip("optuna", reason="pip install 'detkit-sdk[tune]'")

ECHO = ("--model", "echo/memory", "epochs=2")
RANGE = "learning_rate=0.05..0.9:log"


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", num_images=30, size=48)


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory, cli: Any, shapes: Path) -> Path:
    """A folder with a study, ``first``, of three trials."""
    folder = tmp_path_factory.mktemp("tuned")
    done = cli("tune", shapes, *ECHO, RANGE, "--trials", "3", "--pruner", "none", "--name", "first", cwd=folder)
    assert done.code == 0, done.err
    assert "search learning_rate 0.05..0.9:log" in done.err and "judge  val/AP, more is better; 3 trials" in done.err
    assert "trial 0 begins: learning_rate=0.3" in done.err and "(best so far)  (default)" in done.err
    assert "on 6 test images that no trial saw" in done.out and "best" in done.out
    assert "next:  detkit plot runs/first\n       detkit studies retrain runs/first" in done.out
    return folder


def test_list_and_show(cli: Any, tuned: Path, tmp_path: Path) -> None:
    assert "echo/memory" in cli("studies", "ls", cwd=tuned).out
    (listed,) = cli("studies", "ls", "--json", cwd=tuned).json
    assert (listed["study"], listed["metric"]) == ("runs/first", "val/AP")
    shown = cli("studies", "show", "last", "--json", cwd=tuned).json
    assert {trial["state"] for trial in shown["trials"]} == {"finished"} and len(shown["trials"]) == shown["wanted"]
    assert shown["space"] == {"learning_rate": "0.05..0.9:log"}
    assert shown["best"]["value"] == max(trial["value"] for trial in shown["trials"])
    assert "*" in cli("studies", "show", "first", cwd=tuned).out
    missing = cli("studies", "show", "frist", cwd=tuned)
    assert (missing.code, "did you mean 'first'" in missing.err) == (2, True)
    assert cli("studies", "ls", "--json", cwd=tmp_path).json == []


def test_the_best_is_a_model(cli: Any, tuned: Path, shapes: Path) -> None:
    assert cli("evaluate", "first", "--json", cwd=tuned).code == 0
    compared = cli("studies", "compare", "first", "--json", cwd=tuned)
    assert compared.code == 0 and len(compared.json["entries"]) >= 2
    image = next((shapes / "JPEGImages").iterdir())
    assert cli("predict", "runs/first", image, "--json", cwd=tuned).code == 0


def test_go_on_with_values_of_ones_own(cli: Any, tuned: Path) -> None:
    assert cli("studies", "enqueue", "first", "learning_rate=0.5", cwd=tuned).code == 0
    wrong = cli("studies", "enqueue", "first", "learning_rate=5", cwd=tuned)
    assert (wrong.code, "one of the space: 0.05..0.9:log" in wrong.err) == (2, True)
    done = cli("tune", "--resume", "first", "--trials", "5", "--json", cwd=tuned)
    assert done.code == 0 and len(done.json["trials"]) == 5
    assert done.json["trials"][3]["values"] == {"learning_rate": 0.5}
    assert done.json["comparison"]["entries"]
    settings = cli("tune", "--resume", "first", "epochs=3", cwd=tuned)
    assert (settings.code, "--resume goes on with a study as it was begun" in settings.err) == (2, True)
    other = cli("tune", "--resume", "first", "--sampler", "random", "--metric", "val/AP50", cwd=tuned)
    assert other.code == 2 and "leave out --" in other.err and "--sampler" in other.err and "--metric" in other.err
    retrained = cli("studies", "retrain", "first", "--name", "all", "--json", cwd=tuned)
    assert retrained.code == 0 and (tuned / "runs/all/model/detkit.json").is_file()


def test_dry_run(cli: Any, shapes: Path, tmp_path: Path) -> None:
    done = cli("tune", shapes, *ECHO, RANGE, "--trials", "7", "--parallel", "2", "--dry-run", cwd=tmp_path)
    assert done.code == 0 and "7 trials, 2 at once, chosen by tpe" in done.out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("learning_rat=0.1..0.5",), "did you mean 'learning_rate'"),
        (("learning_rate=0.5..0.1",), "a first number below the second"),
        ((RANGE, "--metric", "AP"), "what echo/memory reports: val/AP"),
        ((RANGE, "--sampler", "tpa"), "one of tpe, random"),
        ((RANGE, "--pruner", "x"), "one of median"),
        ((RANGE, "--budget", "soon"), "a duration such as 4h"),
        (("seconds_per_step=0.1..0.2",), "options are not searched"),
    ],
)
def test_wrong_use(cli: Any, shapes: Path, tmp_path: Path, words: tuple[str, ...], message: str) -> None:
    done = cli("tune", shapes, *ECHO, *words, cwd=tmp_path)
    assert (done.code, message in done.err) == (2, True), done.err
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c(cli: Any, shapes: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "detkit.cli", "tune", str(shapes), *ECHO, RANGE, "--trials", "3"]
    process = subprocess.Popen(
        [*command, "--seconds-per-step", "0.05", "--name", "long"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True, env={**os.environ, "TERM": "dumb"},
    )  # fmt: skip
    deadline = time.monotonic() + 60
    checkpoints = tmp_path / "runs/long/trials/0000/checkpoints"
    while not (checkpoints.is_dir() and any(checkpoints.iterdir())):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "1 running trial(s) stop after their step" in said and "detkit tune --resume" in said
    done = cli("tune", "--resume", "runs/long", "--json", "--quiet", cwd=tmp_path)
    assert [trial["state"] for trial in done.json["trials"]] == ["finished"] * 3


def test_the_table_of_a_terminal(shapes: Path, tmp_path: Path) -> None:
    """It is drawn anew while the search goes on, with how far the running trial is."""
    controller, terminal = pty.openpty()
    words = [sys.executable, "-m", "detkit.cli", "tune", str(shapes), *ECHO, RANGE, "--trials", "3", "--name", "live"]
    words += ["--seconds-per-step", "0.02", "--json"]
    environment = {**os.environ, "COLUMNS": "160", "LINES": "40", "TERM": "xterm", "NO_COLOR": "1"}
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=terminal, env=environment, cwd=tmp_path) as process:
        os.close(terminal)
        shown = b""
        with contextlib.suppress(OSError):  # nobody has the other end any more
            while read := os.read(controller, 4096):
                shown += read
    os.close(controller)
    assert process.returncode == 0
    told = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())
    assert "live: 2 of 3 trials" in told and re.search(r"trial +state +val/AP +learning_rate +time", told)
    assert re.search(r"\b1 +\d+ % +0\.\d+", told), "the running trial has no score yet, and its share of the steps"
    assert re.search(r"\*0 +finished +[\d.]+ +0\.3 +\d+ s +default", told)
