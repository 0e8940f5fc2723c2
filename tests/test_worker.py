"""The worker in an interpreter of its own, with versions of its own, and a framework that crashes, prints and hangs."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from pathlib import Path

import hotcoco
import msgspec
import msgspec.json
import numpy as np
import PIL
import pluggy
import psutil
import pytest

import detkit
import detkit_echo
from detkit import Dataset, Model, Predictor, Trainer, environments, plugins
from detkit.backends import LocalBackend, PredictOptions
from detkit.errors import PluginError, RunFailed, UsageError, WorkerDied
from detkit.files import write_json
from detkit.job import Workspace
from detkit.processes import Caller, WorkerDetector, export_in_worker, for_speed, last_lines, worker_environment

pytestmark = pytest.mark.usefixtures("clean")

ECHO = importlib.metadata.version("detkit-echo")

STRANGE = """
import ctypes, os, signal, subprocess, sys, time
from detkit.detections import Detections
from detkit_echo.engine import EchoEngine

segfault = lambda: ctypes.string_at(0)
def leave_child(): open("child", "w").write(str(subprocess.Popen(["sleep", "1000"]).pid))
def fail(): raise RuntimeError("no luck")

{imported}

class Detector:
    def detect(self, images):
        print("about to predict", file=sys.stderr, flush=True)
        {detect}
        return [Detections.from_dict(dict(path="", width=1, height=1, detections=[]), ["a"]) for _ in images]

class Engine(EchoEngine):
    def train(self, job, workspace):
        {train}
        return super().train(job, workspace)
    def load(self, model, options):
        {load}
        return Detector()
    def export(self, model, format, to):
        {export}
"""
"""A stranger's engine, with a hole for each moment at which something may go wrong."""

CRASHES = [
    ("segfault()", "was ended by SIGSEGV{when}; it crashed in native code"),
    ("os._exit(255)", "crashed in native code{when} (exit code 255)"),
    ("os.kill(os.getpid(), signal.SIGKILL)", "was ended by SIGKILL{when}; the system kills processes so"),
]

Strange = Callable[..., str]


@pytest.fixture
def strange(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Strange:
    """Write the stranger's engine, with code for some of its moments; returns how a job names it."""

    def write(**moments: str) -> str:
        code = {"imported": "", "detect": "pass", "train": "pass", "load": "pass", "export": "pass", **moments}
        (tmp_path / "site").mkdir()
        (tmp_path / "site/strange.py").write_text(STRANGE.format(**code))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
        monkeypatch.setattr(plugins, "backend", lambda name: strange_backend("strange:Engine"))
        return "strange:Engine"

    return write


@pytest.fixture(scope="module")
def trained(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("worker")
    return Trainer(model="echo/memory", epochs=6).fit(tiny, tiny, name=str(folder / "run"), quiet=True).model


def opened_by(engine: str, model: Model, folder: Path) -> Model:
    """Copy a model that another engine opens."""
    moved = shutil.copytree(model.path, folder / "model")
    write_json(moved / "detkit.json", msgspec.structs.replace(model.manifest, engine=engine))
    return Model(moved)


def bare(folder: Path) -> Path:
    """Make a virtual environment without any package; returns its folder of packages."""
    venv.create(folder, symlinks=True)
    return next(folder.glob("lib/python3*/site-packages"))


def lean(folder: Path, **versions: str) -> str:
    """Make a virtual environment that has what echo's worker needs, and distributions that say these versions."""
    site = bare(folder)
    for package in (np, PIL, msgspec, pluggy, hotcoco, detkit, detkit_echo):
        source = Path(package.__file__ or "").parent
        (site / source.name).symlink_to(source)
        for libraries in source.parent.glob(f"{'pillow' if package is PIL else source.name}.libs"):
            (site / libraries.name).symlink_to(libraries)
    for name, version in versions.items():
        (site / f"{name}-{version}.dist-info").mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n"
        (site / f"{name}-{version}.dist-info/METADATA").write_text(metadata)
    return str(folder / "bin/python")


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


# ------------------------------------------------------------------------------------------------ versions


def test_versions_name_detkit_and_the_plugin() -> None:
    assert plugins.versions("echo") == {"detkit-sdk": detkit.__version__, "detkit-echo": ECHO}
    assert plugins.versions("unknown") == {"detkit-sdk": detkit.__version__}


def test_plugin_without_metadata(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    (site / "bare-1.dist-info").mkdir(parents=True)
    (site / "bare-1.dist-info/entry_points.txt").write_text("[detkit]\nbare = bare\n")
    (site / "bare.py").write_text(
        "from detkit.backends import LocalBackend\nfrom detkit.hookspecs import hookimpl\n@hookimpl\n"
        "def detkit_backends(): return [LocalBackend(name='bare', engine='bare:E', models={}, install='')]"
    )
    monkeypatch.syspath_prepend(site)
    plugins.registry.cache_clear()
    try:
        assert plugins.versions("bare") == {"detkit-sdk": detkit.__version__}
    finally:
        plugins.registry.cache_clear()


def test_lean_environment_trains_and_predicts(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_PYTHON_ECHO", lean(tmp_path / "venv", detkit_echo=ECHO))
    run = Trainer(model="echo/memory", epochs=1).fit(tiny, tiny, quiet=True)
    assert run.job.versions == plugins.versions("echo")
    assert run.model.manifest.versions["detkit"] == detkit.__version__
    with Predictor(run) as predictor:
        assert len(list(predictor.predict(tiny))) == len(tiny)


@pytest.mark.parametrize("there", ["9.9.9", None])
def test_plugin_of_another_version(
    there: str | None, tiny: Dataset, trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = lean(tmp_path / "venv", **({"detkit_echo": there} if there else {}))
    monkeypatch.setenv("DETKIT_PYTHON_ECHO", python)
    has = f"detkit-echo {there}" if there else "no detkit-echo"
    expected = re.escape(
        f"expected detkit-sdk {detkit.__version__} and detkit-echo {ECHO} in {python}, which has {has}: "
        f"type `{python} -m pip install detkit-sdk=={detkit.__version__} detkit-echo=={ECHO}`"
    )
    run = Trainer(model="echo/memory", epochs=1).start(tiny, tiny, leash=True)
    with pytest.raises(RunFailed, match=f"^{expected}$"):
        run.wait()
    before = children()
    with pytest.raises(RunFailed, match=f"^{expected}$"):
        Predictor(trained)
    assert children() == before


def test_detkit_of_another_version_comes_first(trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = detkit.__version__
    monkeypatch.setattr(detkit, "__version__", "9.9.9")
    monkeypatch.setenv("DETKIT_ENVIRONMENTS", str(tmp_path))
    expected = rf"expected detkit-sdk 9\.9\.9 and .* which has detkit-sdk {here}: type `detkit backends upgrade echo`$"
    with pytest.raises(RunFailed, match=expected):
        WorkerDetector(lean(tmp_path / "venv"), trained, PredictOptions())
    with pytest.raises(RunFailed, match="installed anew since; restart the Python that asked"):
        Predictor(trained, isolate=True)


def test_container_has_no_caller(tiny: Dataset) -> None:
    """Nobody there has versions to compare with."""
    run = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.05).start(tiny, tiny, leash=True)
    run.stop()
    job = msgspec.json.decode(run.workspace.job_file.read_bytes())
    del job["versions"]
    write_json(run.workspace.job_file, job)
    worker = subprocess.run([sys.executable, "-m", "detkit.worker", run.path], capture_output=True, text=True)
    assert worker.returncode == 0, worker.stderr
    assert run.model.classes == tiny.classes


def test_run_goes_on_after_an_upgrade_of_both_sides(tiny: Dataset) -> None:
    """What counts is who asks now; the versions of the first day are history."""
    run = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.05).start(tiny, tiny, leash=True)
    run.stop()
    before = msgspec.structs.replace(run.job, versions={"detkit-sdk": "0.0.1", "detkit-echo": "0.0.1"})
    write_json(run.workspace.job_file, before)
    assert run.resume(leash=True).wait().status == "finished"


def test_version_is_looked_at_again_when_a_run_goes_on(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.05).start(tiny, tiny, leash=True)
    run.stop()
    monkeypatch.setattr(detkit, "__version__", "9.9.9")
    with pytest.raises(RunFailed, match=r"expected detkit-sdk 9\.9\.9 .*; restart the Python that asked$"):
        run.resume(leash=True).wait()


# --------------------------------------------------------------------------------------------- interpreters


def test_interpreter_without_detkit(tiny: Dataset, trained: Model, tmp_path: Path) -> None:
    bare(tmp_path / "venv")
    python = str(tmp_path / "venv/bin/python")
    expected = re.escape(
        f"the worker ended with exit code 1 while it started and left no reason; expected detkit-sdk "
        f"{detkit.__version__} and detkit-echo {ECHO} in {python}: type `{python} -m pip install detkit-sdk=="
    )
    run = Trainer(model="echo/memory", epochs=1, python=python).start(tiny, tiny, leash=True)
    with pytest.raises(WorkerDied, match=rf"{expected}(.|\n)*No module named 'detkit'"):
        run.wait()
    with pytest.raises(
        WorkerDied, match=r"expected detkit-sdk (.|\n)*last lines of its output:\n(.|\n)*No module named"
    ):
        WorkerDetector(python, trained, PredictOptions())


@pytest.mark.parametrize("content", ["#!/nowhere/python\n", "no program", None])
def test_interpreter_that_cannot_be_run(content: str | None, tiny: Dataset, trained: Model, tmp_path: Path) -> None:
    python = tmp_path / "python"
    expected = f"cannot run '{python}': .*; expected the path of a Python that has detkit. name another with python="
    if content is not None:
        python.write_text(content)
        python.chmod(0o755)
        with pytest.raises(UsageError, match=expected):
            Trainer(model="echo/memory", epochs=1, python=str(python), name="r").start(tiny, tiny)
        assert not (tmp_path / "runs/r").exists()
    with pytest.raises(UsageError, match=expected):
        WorkerDetector(str(python), trained, PredictOptions())


def test_modules_beside_the_data_are_not_imported(tiny: Dataset, trained: Model, tmp_path: Path) -> None:
    """``python -m`` and ``python -c`` would look in the current folder first."""
    for name in ("numpy", "msgspec", "json", "platform", "detkit_echo"):
        Path(f"{name}.py").write_text(f"open('{name}-was-here', 'w')\nraise SystemExit(7)")
    assert Trainer(model="echo/memory", epochs=1).fit(tiny, tiny, quiet=True).status == "finished"
    foreign = lean(tmp_path / "venv", detkit_echo=ECHO)
    environments.prove(foreign, plugins.backend("echo"))  # type: ignore[arg-type]
    for python in (sys.executable, foreign):
        detector = WorkerDetector(python, trained, PredictOptions())
        assert len(detector.detect([tiny[0].image()])) == 1
        detector.close()
    assert not list(tmp_path.glob("*-was-here"))


def spy(python: Path) -> Path:
    """A Python that leaves a word when it is run."""
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f'#!/bin/sh\ntouch "$0-was-run"\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def was_run(python: Path) -> bool:
    return python.with_name(f"{python.name}-was-run").exists()


def trained_by(python: str, model: Model, folder: Path) -> Model:
    """Copy a model that says which interpreter trained it."""
    moved = shutil.copytree(model.path, folder)
    write_json(moved / "detkit.json", msgspec.structs.replace(model.manifest, options={"python": python}))
    return Model(moved)


def homeless(model: Model) -> LocalBackend:
    """A backend whose engine cannot run here."""
    return LocalBackend(name="echo", engine=model.manifest.engine, models={}, install="x", requires=("no_such_module",))


@pytest.mark.parametrize("way", ["{run}/bin/trap", "{run}/../run/bin/trap", "link/trap", "{link}/trap", "trap"])
def test_a_model_does_not_bring_the_program_that_opens_it(
    way: str, trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    trap = spy(run / "bin/trap")
    (tmp_path / "link").symlink_to(trap.parent)
    monkeypatch.setenv("PATH", str(trap.parent), prepend=os.pathsep)
    model = trained_by(way.format(run=run, link=tmp_path / "link"), trained, run / "model")
    plugins.backend("echo").open(model, PredictOptions()).close()
    with pytest.raises(PluginError, match="needs no_such_module"):
        homeless(model).open(model, PredictOptions())
    assert not was_run(trap)


def test_the_interpreter_that_trained_is_the_last_choice(
    trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs, mine = spy(tmp_path / "elsewhere/theirs"), spy(tmp_path / "elsewhere/mine")
    model = trained_by(str(theirs), trained, tmp_path / "run/model")
    plugins.backend("echo").open(model, PredictOptions()).close()
    assert not was_run(theirs)
    with monkeypatch.context() as context:
        context.setenv("DETKIT_PYTHON_ECHO", str(mine))
        homeless(model).open(model, PredictOptions()).close()
    assert was_run(mine)
    assert not was_run(theirs)
    homeless(model).open(model, PredictOptions()).close()
    assert was_run(theirs)


def test_advice_depends_on_who_made_the_interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    caller = Caller(backend="echo", python="/here/python", versions={"detkit-sdk": "2", "detkit-echo": "1"})
    monkeypatch.setenv("DETKIT_ENVIRONMENTS", "/environments")
    expected = "expected detkit-sdk 2 and detkit-echo 1 in"
    assert caller.expects("/environments/echo-1/bin/python", "detkit-sdk 1") == (
        f"{expected} /environments/echo-1/bin/python, which has detkit-sdk 1: type `detkit backends upgrade echo`"
    )
    assert caller.expects("/mine/python") == (
        f"{expected} /mine/python: type `/mine/python -m pip install detkit-sdk==2 detkit-echo==1`"
    )
    assert caller.expects("/here/python", "detkit-sdk 1").endswith("restart the Python that asked")


# -------------------------------------------------------------------------------------------------- crashes


def strange_backend(engine: str) -> LocalBackend:
    return LocalBackend(name="echo", engine=engine, models=plugins.backends()["echo"].models, install="")


@pytest.mark.parametrize(("crash", "expected"), CRASHES)
def test_training_that_crashes(  # noqa: PLR0917 - pytest gives them by name
    crash: str, expected: str, strange: Strange, tiny: Dataset, trained: Model, tmp_path: Path
) -> None:
    engine = strange(train=f"print('about to crash', flush=True); leave_child(); {crash}")
    source = Workspace(trained.path.parent)
    workspace = Workspace(tmp_path / "run")
    workspace.create(msgspec.structs.replace(source.job(), engine=engine))
    run = strange_backend(engine).start(workspace.job(), workspace, leash=True)
    with pytest.raises(WorkerDied, match=re.escape(expected.format(when=""))) as caught:
        run.wait()
    assert "about to crash" in str(caught.value)
    assert gone(int(Path("child").read_text()))


def test_framework_that_crashes_at_its_end(strange: Strange, trained: Model, tiny: Dataset, tmp_path: Path) -> None:
    engine = strange(imported="import atexit; atexit.register(segfault)")
    workspace = Workspace(tmp_path / "run")
    workspace.create(msgspec.structs.replace(Workspace(trained.path.parent).job(), engine=engine))
    for channel in ("train", "validation"):
        workspace.write_dataset(channel, tiny, [""] * len(tiny))
    done = subprocess.run([sys.executable, "-m", "detkit.worker", workspace.path], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert Model(workspace.model).classes == tiny.classes


@pytest.mark.parametrize("moment", ["imported", "load", "detect"])
@pytest.mark.parametrize(("crash", "expected"), CRASHES)
def test_prediction_that_crashes(  # noqa: PLR0917 - pytest gives them by name
    crash: str, expected: str, moment: str, strange: Strange, trained: Model, tiny: Dataset, tmp_path: Path
) -> None:
    model = opened_by(
        strange(**{moment: f"print('about to crash', flush=True); leave_child(); {crash}"}), trained, tmp_path
    )
    when = " while it predicted" if moment == "detect" else " while it opened the model"
    before = children()
    message = re.escape(expected.format(when=when))
    with pytest.raises(WorkerDied, match=message) as caught, Predictor(model, isolate=True) as predictor:
        predictor(tiny.paths[0])
    assert "about to crash" in str(caught.value)
    assert children() == before
    assert gone(int(Path("child").read_text()))


@pytest.mark.parametrize(("crash", "expected"), CRASHES)
def test_export_that_crashes(crash: str, expected: str, strange: Strange, trained: Model, tmp_path: Path) -> None:
    model = opened_by(strange(export=f"leave_child(); {crash}"), trained, tmp_path)
    with pytest.raises(WorkerDied, match=re.escape(expected.format(when=" while it wrote the model as onnx"))):
        export_in_worker(sys.executable, model, "onnx", tmp_path / "out")
    assert gone(int(Path("child").read_text()))


def test_engine_that_fails_tells_where(strange: Strange, trained: Model, tiny: Dataset, tmp_path: Path) -> None:
    model = opened_by(strange(load="fail()"), trained, tmp_path)
    with pytest.raises(RunFailed, match=r"^RuntimeError: no luck\nTraceback(.|\n)*in fail"):
        Predictor(model, isolate=True)


# ---------------------------------------------------------------------------------------------------- prints


def test_prints_are_no_answer(
    strange: Strange, trained: Model, tiny: Dataset, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rubbish = """os.write(1, b'{"error": ""}\\n{"error": "x"}\\n'); print("hello")"""
    model = opened_by(strange(imported=rubbish, load=rubbish, detect=rubbish), trained, tmp_path)
    with Predictor(model, isolate=True) as predictor:
        assert len(predictor(tiny.paths[0])) == 0
    told = capfd.readouterr()
    assert (told.out, told.err) == ("", "")


def test_chatty_framework_neither_blocks_nor_fills_the_disk(
    strange: Strange, trained: Model, tiny: Dataset, tmp_path: Path
) -> None:
    much = "sys.stderr.write('x' * 99 + '\\n' + ('y' * 99 + '\\n') * 50_000)"
    model = opened_by(strange(load=much, detect=f"{much}; print('the last line')"), trained, tmp_path)
    with Predictor(model, isolate=True) as predictor:
        for _ in range(4):
            predictor(tiny.paths[0])
        output = predictor._detector._output  # type: ignore[attr-defined]
        assert os.fstat(output.fileno()).st_size < 6_000_000
        assert last_lines(output).endswith("the last line")  # type: ignore[attr-defined]


@pytest.mark.parametrize("all_threads", [True, False])
def test_crash_deep_in_the_code_is_quoted_from_where_it_happened(tmp_path: Path, all_threads: bool) -> None:
    enable = f"import faulthandler, numpy\nfaulthandler.enable(all_threads={all_threads})\n"
    dig = "import os, signal\ndef dig(n):\n    dig(n - 1) if n else os.kill(os.getpid(), signal.SIGSEGV)\n"
    crash = [sys.executable, "-c", f"{enable}{dig}dig(60)"]
    with (tmp_path / "log.txt").open("w+b") as output:
        subprocess.run(crash, stderr=output)
        told = last_lines(output).splitlines()
        assert "most recent call first" in told[0]
        assert all("in dig" in line for line in told[1:])
        output.write(b"and after a resume, another reason\n")
        output.flush()
        assert last_lines(output).endswith("another reason")


# ----------------------------------------------------------------------------------------------------- ends


def test_worker_goes_with_everything_it_started(strange: Strange, trained: Model, tmp_path: Path) -> None:
    model = opened_by(strange(load="leave_child()"), trained, tmp_path)
    predictor = Predictor(model, isolate=True)
    child = int(Path("child").read_text())
    assert not gone(child, 0.1)
    predictor.close()
    predictor.close()  # once more does no harm
    assert gone(child)


def test_worker_goes_with_a_forgotten_predictor(trained: Model) -> None:
    before = children()
    predictor = Predictor(trained, isolate=True)
    (worker,) = children() - before
    del predictor
    assert gone(worker.pid)


@pytest.mark.parametrize("ending", ["", "raise SystemExit(3)", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_worker_goes_with_its_interpreter(ending: str, trained: Model) -> None:
    script = (
        "import os, signal, sys, psutil; from detkit import Predictor\n"
        "predictor = Predictor(sys.argv[1], isolate=True)\n"
        f"print(psutil.Process().children()[0].pid, flush=True)\n{ending}"
    )
    done = subprocess.run([sys.executable, "-c", script, trained.path], capture_output=True, text=True)
    assert gone(int(done.stdout)), done.stderr


def test_fork_leaves_the_worker_alone(trained: Model, tiny: Dataset) -> None:
    script = (
        "import os, sys; from detkit import Predictor; predictor = Predictor(sys.argv[1], isolate=True)\n"
        "if os.fork() == 0: sys.exit()\n"
        "os.wait(); print(len(predictor(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, trained.path, tiny.paths[0]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_fork_cannot_use_the_worker(trained: Model, tiny: Dataset) -> None:
    """Two who ask on one socket would get each other's answers."""
    script = (
        "import os, sys; from detkit import Predictor; from detkit.errors import UsageError\n"
        "predictor = Predictor(sys.argv[1], isolate=True)\n"
        "if os.fork() == 0:\n"
        "    try: predictor(sys.argv[2])\n"
        "    except UsageError as error: print(error, flush=True)\n"
        "    predictor.close(); os._exit(0)\n"
        "os.wait(); print(len(predictor(sys.argv[2])))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, trained.path, tiny.paths[0]], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    told, found = done.stdout.splitlines()
    assert told == "this model was opened in another process; open it in the one that uses it"
    assert found.isdigit()


def test_fork_does_not_hold_the_leash(trained: Model) -> None:
    script = (
        "import os, sys, time, psutil; from detkit import Predictor\n"
        "predictor = Predictor(sys.argv[1], isolate=True); worker = psutil.Process().children()[0].pid\n"
        "child = os.fork()\n"
        "if child == 0: time.sleep(100)\n"
        "print(worker, child, flush=True); time.sleep(100)"
    )
    command = [sys.executable, "-W", "ignore", "-c", script, str(trained.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as controller:
        assert controller.stdout is not None
        worker, child = map(int, controller.stdout.readline().split())
        controller.kill()
        controller.wait()
        try:
            assert gone(worker)
            assert not gone(child, 0)
        finally:
            os.kill(child, signal.SIGKILL)


def test_threads_share_a_worker(trained: Model, tiny: Dataset) -> None:
    with Predictor(trained, isolate=True) as predictor:
        expected = [predictor(path).to_dict() for path in tiny.paths]
        wrong: list[object] = []

        def predict(i: int) -> None:
            for _ in range(20):
                try:
                    found = predictor(tiny.paths[i]).to_dict()
                except Exception as error:
                    wrong.append(error)
                else:
                    wrong.extend([] if found == expected[i] else [found])

        threads = [threading.Thread(target=predict, args=(i,)) for i in range(len(tiny))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_leash_of_somebody_else(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller that is itself on a leash starts a run that is not."""
    monkeypatch.setenv("DETKIT_LEASH", "1")
    run = Trainer(model="echo/memory", epochs=2, seconds_per_step=0.02).start(tiny, tiny)
    assert run.wait().status == "finished"


def test_interrupts_that_a_shell_turned_off(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=4, seconds_per_step=0.05).start(tiny, tiny, leash=True)
    run.stop()
    ignoring = f"trap '' INT; exec '{sys.executable}' -m detkit.worker '{run.path}'"
    since = run.position
    with subprocess.Popen(["sh", "-c", ignoring]) as worker:
        states: list[object] = []
        while "running" not in states:
            time.sleep(0.02)
            states = [event.values.get("state") for event in run.events(follow=False, since=since)]
        worker.send_signal(signal.SIGINT)
        assert worker.wait(timeout=60) == 0
    assert run.status == "finished"


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Interrupt this process as soon as the stranger's engine has started a child."""

    def interrupt(*_: object) -> None:
        if Path("child").exists() and Path("child").read_text():
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    earlier = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.05, 0.05)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, earlier)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_model_is_opened(strange: Strange, trained: Model, tmp_path: Path) -> None:
    model = opened_by(strange(load="leave_child(); time.sleep(1000)"), trained, tmp_path)
    before = children()
    with pytest.raises(KeyboardInterrupt):
        Predictor(model, isolate=True)
    assert children() == before
    assert gone(int(Path("child").read_text()))


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_it_predicts(strange: Strange, trained: Model, tiny: Dataset, tmp_path: Path) -> None:
    model = opened_by(strange(detect="leave_child(); time.sleep(1000)"), trained, tmp_path)
    predictor = Predictor(model, isolate=True)
    with pytest.raises(KeyboardInterrupt):
        predictor(tiny.paths[0])
    assert gone(int(Path("child").read_text()))
    with pytest.raises(UsageError, match="or interrupted while it predicted; open it anew"):
        predictor(tiny.paths[0])


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "GOMP_SPINCOUNT": "20000"}),
        (
            {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1"},
            {"A": "b", "GLIBC_TUNABLES": "glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1", "GOMP_SPINCOUNT": "20000"},
        ),
        (
            {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "OMP_WAIT_POLICY": "active"},
            {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0", "OMP_WAIT_POLICY": "active"},
        ),
        (
            {"GOMP_SPINCOUNT": "7"},
            {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1", "GOMP_SPINCOUNT": "7"},
        ),
    ],
)
def test_what_c_libraries_read_is_set_unless_the_user_did(given: dict[str, str], expected: dict[str, str]) -> None:
    assert for_speed(given) == expected


def test_a_worker_has_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    offered = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    library, version = platform.libc_ver()
    if library != "glibc" or [int(part) for part in version.split(".")] < [2, 35]:
        pytest.skip("it is glibc 2.35 that asks for them")
    if not offered.is_file() or "[never]" in offered.read_text():
        pytest.skip("this Linux gives none")
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    script = (
        "held = bytearray(64 << 20); held[::4096] = bytes(len(held[::4096]))\n"
        "import re; print(re.search(r'AnonHugePages: +([0-9]+) kB', open('/proc/self/smaps_rollup').read())[1])"
    )
    kilobytes = [
        int(subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, check=True, text=True).stdout)
        for env in (worker_environment(sys.executable), {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"})
    ]
    assert kilobytes[0] > 32 << 10
    if "[madvise]" in offered.read_text():
        assert kilobytes[1] == 0, "only who asks has them"
