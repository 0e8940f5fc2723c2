"""Several processes that work on one study, whose results a real database server keeps."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from detkit import Choice, Float, Study, Trainer, Tuner, study_storage
from detkit.errors import UsageError
from detkit.shapes import write_shapes

pytest.importorskip("optuna", reason="pip install 'detkit-sdk[tune]'")
pytestmark = [
    pytest.mark.usefixtures("clean"),
    # pg8000 leaves sockets of closed connections to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SCRIPT = """
import sys
from detkit import Float, Trainer, Tuner, study_storage
study_storage.HEARTBEAT_S, study_storage.GRACE_S = 1, int(sys.argv[5])
trainer = Trainer(model="echo/memory", epochs=4, seconds_per_step=0.01)
space = {"learning_rate": Float(0.05, 0.9, log=True)}
tuner = Tuner(trainer, space, trials=int(sys.argv[4]), pruner="none", storage=sys.argv[2])
if __name__ == "__main__":
    tuner.fit(sys.argv[1], name=sys.argv[3], quiet=True)
"""


@pytest.fixture(scope="module", params=["postgresql", "mysql"])
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A database server of our own on loopback; yields the URL of an empty database."""
    folder = Path(tempfile.mkdtemp(prefix="detkit-server-", dir="/tmp"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begin = begin_postgresql if request.param == "postgresql" else begin_mysql
    try:
        process, url = begin(folder, port)
        try:
            for _ in range(400):
                with socket.socket() as attempt:
                    if attempt.connect_ex(("127.0.0.1", port)) == 0:
                        break
                assert process.poll() is None, Path(folder, "log").read_text()
                time.sleep(0.05)
            time.sleep(0.5)
            yield url
        finally:
            process.send_signal(signal.SIGINT if request.param == "postgresql" else signal.SIGTERM)
            process.wait(timeout=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def begin_postgresql(folder: Path, port: int) -> tuple[subprocess.Popen[bytes], str]:
    pytest.importorskip("pg8000", reason="pip install 'detkit-sdk[tune-postgresql]'")
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin"), key=lambda path: float(path.split("/")[4]))
    if not found:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    other = as_account("postgres", folder)
    subprocess.run(
        [f"{found[-1]}/initdb", "-D", f"{folder}/data", "-A", "trust", "-U", "detkit", "--no-sync", "-E", "UTF8"],
        check=True, stdout=subprocess.DEVNULL, cwd=folder, **other,
    )  # fmt: skip
    options = ["-c", f"unix_socket_directories={folder}", "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"]
    with Path(folder, "log").open("wb") as log:
        command = [f"{found[-1]}/postgres", "-D", f"{folder}/data", "-p", str(port), *options]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **other)
    return process, f"postgresql+pg8000://detkit@127.0.0.1:{port}/postgres"


def begin_mysql(folder: Path, port: int) -> tuple[subprocess.Popen[bytes], str]:
    pytest.importorskip("pymysql", reason="pip install 'detkit-sdk[tune-mysql]'")
    places = f"{os.environ['PATH']}:/usr/sbin"
    program, install = (shutil.which(name, path=places) for name in ("mariadbd", "mariadb-install-db"))
    if program is None or install is None:
        pytest.skip("no MariaDB here: apt-get install mariadb-server")
    other = as_account("mysql", folder)
    data = f"--datadir={folder}/data"
    method = "--auth-root-authentication-method=normal"
    subprocess.run([install, "--no-defaults", data, method], check=True, stdout=subprocess.DEVNULL, cwd=folder, **other)
    Path(folder, "init.sql").write_text(
        "CREATE DATABASE studies;\nCREATE USER detkit@localhost;\nGRANT ALL ON studies.* TO detkit@localhost;\n"
    )
    options = [data, f"--socket={folder}/socket", f"--port={port}", "--bind-address=127.0.0.1"]
    with Path(folder, "log").open("wb") as log:
        command = [program, "--no-defaults", *options, f"--init-file={folder}/init.sql"]
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, **other)
    return process, f"mysql+pymysql://detkit@127.0.0.1:{port}/studies"


def as_account(name: str, folder: Path) -> dict[str, Any]:
    """Return how a server is started, which does not run as root: as the account that its package has made."""
    if os.geteuid() != 0:
        return {}
    try:
        account = pwd.getpwnam(name)
    except KeyError:
        pytest.skip(f"the server does not run as root, and there is no user {name}")
    os.chown(folder, account.pw_uid, account.pw_gid)
    return {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shapes(tmp_path_factory.mktemp("shapes") / "data", num_images=30, size=48)


def begin(
    shapes: Path, server: str, name: str, trials: int, *, grace_s: int = 60, before: str = ""
) -> subprocess.Popen[bytes]:
    script = before + SCRIPT
    return subprocess.Popen([sys.executable, "-c", script, str(shapes), server, name, str(trials), str(grace_s)])


def trains(process: subprocess.Popen[bytes]) -> bool:
    """Return whether a worker of a process is at work: a fork of its child."""
    return any(child.children() for child in psutil.Process(process.pid).children())


KILLED_AT_FIRST_BEAT = """
import os
from detkit import trials
trials._beat = lambda *_: os.kill(os.getpid(), 9)
"""


def running(study: Study) -> list[int]:
    return [trial.number for trial in study.trials if trial.state == "running"]


def test_one_of_two_processes_is_killed(shapes: Path, server: str) -> None:
    """Eight trials are done once each: what the killed one had begun is done again by the other."""
    first = begin(shapes, server, "shared", 8, grace_s=5)
    deadline = time.monotonic() + 60
    while not Path("runs/shared/study.json").is_file():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    study = Study("runs/shared")
    second = begin(shapes, server, "shared", 8, grace_s=5)
    # A process that trains has told which values, and has not told how it ended.
    while len(running(study)) < 2 or not trains(first):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    first.kill()
    first.wait()
    assert second.wait(timeout=120) == 0
    trials = study.trials
    assert [trial.state for trial in trials] == ["finished"] * 8
    assert max(Counter(str(trial.values) for trial in trials).values()) == 1
    everything = study.optuna_study.get_trials(deepcopy=False)
    lost = [one for one in everything if one.state.name == "FAIL" and not one.user_attrs.get("surplus")]
    assert len(lost) == 1  # what the killed process had begun; its values were done by another trial
    assert str(lost[0].params) in {str(trial.values) for trial in trials}


def test_a_process_is_killed_before_it_was_heard_of(shapes: Path, server: str) -> None:
    """It had asked for a trial, and lived no longer: the trial is missed by those who saw it."""
    first = begin(shapes, server, "unheard", 2, grace_s=2, before=KILLED_AT_FIRST_BEAT)
    assert first.wait(timeout=60) == -signal.SIGKILL
    assert running(Study("runs/unheard")) == [0]
    assert begin(shapes, server, "unheard", 2, grace_s=2).wait(timeout=60) == 0
    assert {trial.state for trial in Study("runs/unheard").trials} == {"finished"}


def test_the_last_trial_of_a_killed_process(shapes: Path, server: str) -> None:
    """Whoever has nothing left to begin waits for the others, and does anew what they were lost with."""
    first = begin(shapes, server, "last", 1, grace_s=5)
    deadline = time.monotonic() + 60
    while not Path("runs/last/trials/0000/run.json").is_file():
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    second = begin(shapes, server, "last", 1, grace_s=5)
    first.kill()
    first.wait()
    assert second.wait(timeout=120) == 0
    (trial,) = Study("runs/last").trials
    assert (trial.state, trial.number) == ("finished", 1)


def test_as_many_trials_as_wanted(shapes: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes that begin at once do five trials together, not one more."""
    processes = [begin(shapes, server, "five", 5) for _ in range(3)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0, 0]
    study = Study("runs/five")
    assert [trial.state for trial in study.trials] == ["finished"] * 5
    assert len({str(trial.values) for trial in study.trials}) == 5
    # Another machine, which does not see this directory, has its own.
    monkeypatch.setenv("DETKIT_RUNS", "elsewhere")
    monkeypatch.setattr(study_storage, "HEARTBEAT_S", 1)
    trainer = Trainer(model="echo/memory", epochs=4, seconds_per_step=0.01)
    space = {"learning_rate": Float(0.05, 0.9, log=True)}
    there = Tuner(trainer, space, trials=7, pruner="none", storage=server).fit(shapes, name="five", quiet=True)
    assert [trial.state for trial in there.trials if trial.path is not None] == ["finished"] * 2
    assert len(study.trials) == 7
    if there.best_trial.path is None:
        with pytest.raises(UsageError, match="the run of trial"):
            _ = there.best


def test_another_search_under_the_same_name(shapes: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(model="echo/memory", epochs=1)
    Tuner(trainer, {"learning_rate": Choice((0.1, 0.2))}, trials=1, storage=server).fit(shapes, name="a", quiet=True)
    other = Tuner(trainer, {"learning_rate": Choice((0.1, 0.3))}, trials=1, storage=server)
    longer = Tuner(
        Trainer(model="echo/memory", epochs=2), {"learning_rate": Choice((0.1, 0.2))}, trials=1, storage=server
    )
    for place in ("runs", "elsewhere"):
        monkeypatch.setenv("DETKIT_RUNS", place)
        with pytest.raises(UsageError, match="at that server was begun with another space"):
            other.fit(shapes, name="a", quiet=True)
        with pytest.raises(UsageError, match="at that server was begun with another parameters"):
            longer.fit(shapes, name="a", quiet=True)
