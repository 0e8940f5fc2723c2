"""Environments of their own, really made, by pip and by uv, for plugins that are really installed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy
import PIL
import pluggy
import psutil
import pytest

from detkit import Dataset, Predictor, Trainer, distributions, environments, installers, plugins
from detkit.backends import LocalBackend
from detkit.environments import Code, Environment, Installed, worker_variables
from detkit.errors import PluginError, StorageError, UnknownName, Unsupported, UsageError
from detkit.files import write_json

STRANGER = Path(__file__).parent / "stranger/detkit-elder"
MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"
HAS_UV = shutil.which("uv") is not None

LODGER = """
import os
from detkit.backends import LocalBackend, ModelSpec
from detkit.environments import Environment
from detkit.hookspecs import hookimpl
from detkit.params import Params

@hookimpl
def detkit_backends():
    wanted = (os.environ.get("LODGER_REQUIRES") or {borrowed!r},)
    return [
        LocalBackend(
            name="lodger", summary="lives elsewhere", engine="detkit_lodger.engine:Lodger", requires=("lodging",),
            models={{"small": ModelSpec(params=Params(), summary="")}}, install="pip install detkit-lodger",
            environment=Environment(requirements=wanted, pythons=({minor!r},)),
        )
    ]
"""

ENGINE = """
import os, time
from detkit.backends import Engine

mood = os.environ.get("LODGER_MOOD")
if mood == "sleeps":
    time.sleep(100)
if mood == "crashes":
    os.abort()
if mood == "lacks":
    import module_that_is_not_there
if mood == "rambles":
    raise AttributeError("what is wrong\\nand a page about it")

class Lodger(Engine):
    def train(self, job, workspace): ...
    def load(self, model, options): ...
"""


def write_wheel(folder: Path, name: str, files: dict[str, str]) -> Path:
    """Write a wheel by hand, as somebody's build tool would."""
    info = f"{name}-1.0.dist-info"
    files = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    wheel = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return wheel


def pip_install(site: Path, *what: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--disable-pip-version-check", "--target", site, *what],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


class House:
    """A folder of environments, a folder with the lodger's plugin, and the command line that sees both."""

    def __init__(self, folder: Path, site: Path) -> None:
        self.folder, self.site = folder, site

    def variables(self, **more: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("DETKIT_")}
        path = os.pathsep.join([str(self.site), *filter(None, [os.environ.get("PYTHONPATH")])])
        return {**kept, "DETKIT_ENVIRONMENTS": str(self.folder), "PYTHONPATH": path, "PATH": without_uv(), **more}

    def start(self, *words: str, **more: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "detkit.cli", "backends", *words],
            env=self.variables(**more), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def run(self, *words: str, code: int = 0, **more: str) -> str:
        process = self.start(*words, **more)
        out, err = process.communicate(timeout=120)
        assert process.returncode == code, out + err
        return out + err

    def directories(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir() if path.is_dir())

    @property
    def record(self) -> Installed:
        return msgspec.json.decode((self.folder / "lodger.json").read_bytes(), type=Installed)


def without_uv() -> str:
    return os.pathsep.join(folder for folder in os.get_exec_path() if not Path(folder, "uv").exists())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lodger's plugin, installed in a folder of its own; it requires a local wheel that borrows what is here."""
    folder = tmp_path_factory.mktemp("lodger")
    packages = {str(Path(str(module.__file__)).parents[1]) for module in (numpy, PIL, msgspec, pluggy)}
    borrowed = {"borrowed.pth": "\n".join(sorted(packages)) + "\n", "lodging.py": "__version__ = '7.0'\n"}
    requirement = f"borrowed @ {write_wheel(folder, 'borrowed', borrowed).as_uri()}"
    files = {
        "detkit_lodger/__init__.py": LODGER.format(borrowed=requirement, minor=MINOR),
        "detkit_lodger/engine.py": ENGINE,
        "detkit_lodger-1.0.dist-info/entry_points.txt": "[detkit]\nlodger = detkit_lodger\n",
    }
    pip_install(folder / "site", write_wheel(folder, "detkit_lodger", files))
    return folder / "site"


@pytest.fixture(scope="module")
def house(site: Path, tmp_path_factory: pytest.TempPathFactory) -> House:
    """One with the lodger's environment in it, made by pip without the network."""
    house = House(tmp_path_factory.mktemp("environments"), site)
    told = house.run("install", "lodger")
    assert "made in" in told
    assert "detkit train DATA --model lodger/small" in told
    return house


@pytest.fixture
def empty(clean: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of environments of this process, with nothing in it."""
    monkeypatch.setenv("DETKIT_ENVIRONMENTS", str(clean / "environments"))
    return clean / "environments"


@pytest.fixture
def fresh_plugins() -> Iterator[None]:
    plugins.registry.cache_clear()
    yield
    plugins.registry.cache_clear()


def backend(**more: object) -> LocalBackend:
    return LocalBackend(
        **{
            **{"name": "tenant", "engine": "detkit_echo.engine:EchoEngine", "models": {}, "install": "pip install it"},
            **more,
        }  # type: ignore[arg-type]
    )


def record_of(name: str, **more: object) -> Installed:
    echo = distributions.find("detkit-echo", ["detkit_echo"])
    usual = {
        "backend": name, "folder": f"{name}-1", "python": sys.executable, "python_version": "3.11.7", "base": "/base",
        "made": 0.0, "installer": "pip 24.0", "requirements": [],
        "distributions": {"detkit-echo": Code(version=echo.version, digest=echo.digest)},
    }  # fmt: skip
    return Installed(**{**usual, **more})  # type: ignore[arg-type]


class TestMade:
    """By pip, in the house."""

    def test_it_holds_this_very_code(self, house: House) -> None:
        record = house.record
        assert record.installer.startswith("pip ")
        assert record.python == str(house.folder / record.folder / "bin/python")
        assert set(record.distributions) == {"detkit-sdk", "detkit-lodger"}
        script = "import detkit.boxes, detkit_lodger; print(detkit.boxes.__file__, detkit_lodger.__file__)"
        found = subprocess.run([record.python, "-c", script], capture_output=True, text=True, check=True).stdout
        assert found.count(str(house.folder / record.folder)) == 2

    def test_it_is_found_and_left_alone(self, house: House) -> None:
        before = house.record
        assert "already" in house.run("install", "lodger")
        out, _ = house.start("install", "lodger", "--json").communicate(timeout=120)
        assert json.loads(out)["python"] == before.python
        assert house.record == before

    def test_list_and_doctor(self, house: House) -> None:
        listed = json.loads(house.run("ls", "--json"))["backends"]
        (lodger,) = [one for one in listed if one["name"] == "lodger"]
        assert (lodger["python"], lodger["missing"]) == (house.record.python, [])
        assert lodger["environment"]["base"] == house.record.base
        assert f"its own, {house.record.python_version}" in house.run("list")
        told = json.loads(house.run("doctor", "--json"))
        said = "1.0" if sys.version_info >= (3, 11) else "7.0"  # before, only of those with a top_level.txt is it known
        assert [one["versions"]["lodging"] for one in told["backends"]] == [said]
        assert "lodger: ready" in house.run("doctor", "lodger")
        broken = json.loads(house.run("doctor", "--json", code=1, LODGER_MOOD="lacks"))
        assert "No module named 'module_that_is_not_there'" in broken["problems"][0]

    @pytest.mark.parametrize(
        ("variables", "message"),
        [
            ({"LODGER_REQUIRES": "no-such-dist==1", "PIP_NO_INDEX": "1"}, "No matching distribution found for no-such"),
            ({"LODGER_MOOD": "crashes"}, "ended by SIGABRT"),
            ({"LODGER_MOOD": "lacks"}, "No module named 'module_that_is_not_there'"),
            ({"LODGER_MOOD": "rambles"}, "what is wrong\n"),
        ],
        ids=["a requirement that is not there", "a crash", "a module that is not there", "an error of many lines"],
    )
    def test_a_failure_leaves_what_was_there(
        self, variables: dict[str, str], message: str, house: House, tmp_path: Path
    ) -> None:
        before = (house.record, house.directories())
        told = house.run("upgrade", "lodger", code=3, **variables)
        assert message in told
        assert f"the whole log is {house.folder / 'lodger.log'}" in told
        assert "the environment from before is still there" in told
        assert (house.record, house.directories()) == before

    def test_an_interrupted_one_leaves_nothing(self, house: House) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            before = (house.record, house.directories())
            process = house.start("upgrade", "lodger", LODGER_MOOD="sleeps")
            assert process.stderr is not None
            while "proving" not in process.stderr.readline():
                assert process.poll() is None
            assert len(house.directories()) == 1 + len(before[1])
            process.send_signal(number)
            process.communicate(timeout=30)
            assert process.returncode in {130, 1, 128 + number, -number}
            assert (house.record, house.directories()) == before

    def test_a_killed_one_leaves_no_process(self, house: House) -> None:
        """Nothing can be done at the time; the next one sweeps up."""
        before = (house.record, house.directories())
        process = house.start("upgrade", "lodger", LODGER_MOOD="sleeps")
        proof = proof_of(process)
        process.kill()
        process.communicate()
        psutil.wait_procs([proof], timeout=10)
        assert not proof.is_running()
        assert len(house.directories()) == 1 + len(before[1])
        house.run("upgrade", "lodger")
        assert house.directories() == [house.record.folder]

    def test_nohup(self, house: House) -> None:
        process = subprocess.Popen(
            ["sh", "-c", f"trap '' HUP; exec '{sys.executable}' -m detkit.cli backends upgrade lodger"],
            env=house.variables(LODGER_MOOD="sleeps"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        proof_of(process)
        process.send_signal(signal.SIGHUP)
        time.sleep(0.5)
        assert process.poll() is None
        process.terminate()
        process.communicate(timeout=30)

    def test_an_upgrade_lets_runs_go_on(self, house: House) -> None:
        before = house.record
        worker = subprocess.Popen([before.python, "-c", "import time; time.sleep(100)"])
        try:
            told = house.run("upgrade", "lodger")
            assert f"{before.folder} is in use by process {worker.pid}" in told
            assert house.directories() == sorted([before.folder, house.record.folder])
            assert house.record.base == before.base
        finally:
            worker.kill()
            worker.wait()
        house.run("upgrade", "lodger")
        assert house.directories() == [house.record.folder]


def proof_of(process: subprocess.Popen[str]) -> psutil.Process:
    """Wait for an installation to run the engine, and return that process."""
    assert process.stderr is not None
    while "proving" not in process.stderr.readline():
        assert process.poll() is None
    deadline = time.monotonic() + 30
    while not (found := psutil.Process(process.pid).children()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found[0]


def test_broken_uv_and_gutted_environment(site: Path, tmp_path: Path) -> None:
    house = House(tmp_path / "environments", site)
    shim = program(tmp_path / "shims/uv", "echo 'pyenv: uv: command not found' >&2; exit 127")
    path = os.pathsep.join([str(shim.parent), without_uv()])
    house.run("install", "lodger", PATH=path)
    assert house.record.installer.startswith("pip ")
    before = house.record
    shutil.rmtree(next((house.folder / before.folder).glob("lib/python3*/site-packages/detkit_lodger")))
    assert "made in" in house.run("install", "lodger")
    assert house.record != before
    assert house.directories() == [house.record.folder]


def test_two_at_once(site: Path, tmp_path: Path) -> None:
    house = House(tmp_path / "environments", site)
    both = [house.start("install", "lodger", "--json") for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [0, 0], answers
    assert json.loads(answers[0][0]) == json.loads(answers[1][0])
    assert sum("another process is at work" in err for _, err in answers) == 1
    assert house.directories() == [house.record.folder]
    house.run("remove", "lodger")
    assert sorted(path.name for path in house.folder.iterdir()) == ["lodger.lock"]
    assert "no environment 'lodger'" in house.run("remove", "lodger", code=2)
    assert "backends install lodger" in house.run("upgrade", "lodger", code=2)


@pytest.mark.skipif(not HAS_UV, reason="uv is not on the PATH")
def test_made_by_uv(site: Path, tmp_path: Path) -> None:
    house = House(tmp_path / "environments", site)
    path = os.environ["PATH"]
    broken = house.run("install", "lodger", code=3, PATH=path, LODGER_REQUIRES="no-such-dist==1", PIP_NO_INDEX="1")
    assert "no-such-dist was not found" in broken
    assert house.directories() == []
    house.run("install", "lodger", PATH=path, UV_SYSTEM_PYTHON="1")
    assert house.record.installer.startswith("uv ")
    assert list((house.folder / house.record.folder).rglob("detkit/__pycache__/worker.*.pyc"))
    house.run("doctor", "lodger", PATH=path)


class TestRefused:
    def test_platform(self, empty: Path) -> None:
        elsewhere = backend(environment=Environment(requirements=(), platforms=("plan9-vax",)))
        with pytest.raises(Unsupported, match=r"does not run on .*, only on plan9-vax"):
            environments.install(elsewhere, "detkit-echo")
        assert not empty.exists()

    def test_no_environment_declared(self, empty: Path) -> None:
        with pytest.raises(Unsupported, match=r"declares no environment.*`pip install it`"):
            environments.install(backend(), "detkit-echo")
        assert not empty.exists()

    def test_folder_that_cannot_be_written(self, clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (clean / "file").touch()
        monkeypatch.setenv("DETKIT_ENVIRONMENTS", str(clean / "file"))
        with pytest.raises(StorageError, match=r"tenant\.lock"):
            environments.install(backend(environment=Environment(requirements=())), "detkit-echo")

    @pytest.mark.parametrize("name", ["../precious", "/tmp/precious", "..", "a/b", "", "-x"])
    def test_names_that_lead_elsewhere(self, name: str, empty: Path) -> None:
        empty.mkdir()
        precious = empty.parent / "precious.json"
        precious.write_text("{}")
        precious.with_suffix(".log").write_text("mine")
        for act in (environments.remove, environments.find):
            with pytest.raises(UnknownName, match="no environment"):
                act(name)
        with pytest.raises(UnknownName):
            environments.install(backend(name=name, environment=Environment(requirements=())), "detkit-echo")
        assert precious.with_suffix(".log").read_text() == "mine"
        assert list(empty.iterdir()) == []

    def test_program_that_prints_no_text(self, tmp_path: Path) -> None:
        loud = program(tmp_path / "loud", r"printf '\377\376'")
        with pytest.raises(UsageError, match="which is no Python"):
            installers.choose_python(str(loud), (MINOR,))
        reader = program(tmp_path / "reader", "cat; echo; exit 3")
        with pytest.raises(UsageError, match="does not run"):
            installers.choose_python(str(reader), (MINOR,))

    def test_version_of_python(self, empty: Path) -> None:
        with pytest.raises(UsageError, match=rf"is Python {MINOR}; expected 3\.98 or 3\.99"):
            installers.choose_python(sys.executable, ("3.98", "3.99"))

    def test_no_python(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A shim of pyenv is there for versions that are not."""
        shim = program(tmp_path / "shims/python3.99", "echo 'pyenv: python3.99: command not found' >&2; exit 127")
        liar = program(tmp_path / "pyenv/versions/3.99.1/bin/python", "echo hello")
        monkeypatch.setenv("PATH", str(shim.parent))
        monkeypatch.setenv("PYENV_ROOT", str(tmp_path / "pyenv"))
        with pytest.raises(UsageError) as caught:
            installers.choose_python(None, ("3.99",), first="/no/such/python")
        assert str(caught.value).splitlines() == [
            "no Python 3.99 is found here. tried:",
            "  /no/such/python is no executable",
            f"  {sys.executable} is Python {MINOR}",
            f"  {shim} does not run (pyenv: python3.99: command not found)",
            f"  {liar} is no Python",
            "install one of these versions, or name it with --python PATH",
        ]
        with pytest.raises(UsageError, match=r"--python names python3\.99, which does not run"):
            installers.choose_python("python3.99", ("3.99",))


def program(path: Path, script: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_the_real_interpreter_is_found_behind_a_shim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = json.dumps({"path": "/real/python3.99", "minor": "3.99", "venv": True})
    program(tmp_path / "python3.99", f"echo '{answer}'")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installers.choose_python(None, ("3.99",)) == ("/real/python3.99", "3.99")
    chosen = installers.choose_python(sys.executable, (MINOR,))
    assert Path(chosen.path).samefile(sys.executable)


class TestUsed:
    """What a declared environment means to `LocalBackend.interpreter`."""

    def test_order(self, empty: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        tenant = backend(environment=Environment(requirements=()), requires=("no_such_module",))
        with pytest.raises(PluginError, match=r"needs no_such_module.*`detkit backends install tenant`"):
            tenant.interpreter(None)
        python = program(empty / "tenant-1/bin/python", "exit 0")
        write_json(empty / "tenant.json", record_of("tenant", python=str(python)))
        assert tenant.interpreter(None) == str(python)
        monkeypatch.setenv("DETKIT_PYTHON_TENANT", "/bin/sh")
        assert tenant.interpreter(None) == "/bin/sh"
        assert tenant.interpreter(sys.executable) == sys.executable
        monkeypatch.delenv("DETKIT_PYTHON_TENANT")
        assert backend().interpreter(None) == sys.executable, "one that declares none has none"

    def test_interpreter_that_is_gone(self, empty: Path) -> None:
        write_json(empty / "tenant.json", record_of("tenant", python="/no/such/python"))
        with pytest.raises(PluginError, match=r"/no/such/python is gone.*`detkit backends install tenant`"):
            backend(environment=Environment(requirements=())).interpreter(None)

    def test_records_that_cannot_be_read(self, empty: Path) -> None:
        write_json(empty / "tenant.json", record_of("tenant", schema=99))
        with pytest.raises(PluginError, match="written by a newer detkit"):
            environments.find("tenant")
        write_json(empty / "tenant.json", {"schema": 99, "folder": ["of", "another", "kind"]})
        with pytest.raises(PluginError, match="written by a newer detkit"):
            environments.find("tenant")
        (empty / "tenant.json").write_text("{")
        with pytest.raises(PluginError, match=r"is damaged.*`detkit backends install tenant`"):
            environments.find("tenant")
        environments.remove("tenant")
        assert environments.names() == []
        with pytest.raises(UnknownName):
            environments.remove("tenant")

    def test_other_version(self, empty: Path) -> None:
        record = record_of("tenant", distributions={"detkit-echo": Code(version="0.0.9", digest="")})
        with pytest.raises(PluginError, match=r"has detkit-echo 0\.0\.9, this Python has .*backends upgrade tenant"):
            record.check("detkit_echo.engine:EchoEngine")

    def test_same_version_but_other_code(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pip_install(tmp_path / "site", write_wheel(tmp_path, "detkit_edited", {"detkit_edited/__init__.py": "a = 1\n"}))
        monkeypatch.syspath_prepend(tmp_path / "site")
        here = distributions.find("detkit-edited")
        record = record_of("tenant", distributions={"detkit-edited": Code(version="1.0", digest=here.digest)})
        record.check("detkit_edited:Engine")
        (tmp_path / "site/detkit_edited/__init__.py").write_text("a = 2\n")
        with pytest.raises(PluginError, match=r"detkit-edited 1\.0, this Python the same version but other code"):
            record.check("detkit_edited:Engine")
        listed = distributions.find("detkit-edited")
        (tmp_path / "site/detkit_edited/__init__.py").unlink()
        with pytest.raises(PluginError, match=r"detkit-edited 1\.0 is damaged"):
            assert listed.digest

    def test_where_they_lie(self, clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/me")
        monkeypatch.delenv("XDG_DATA_HOME", raising=False)
        assert environments.environments_folder() == Path("/home/me/.local/share/detkit/environments")
        monkeypatch.setenv("XDG_DATA_HOME", "/data")
        assert environments.environments_folder() == Path("/data/detkit/environments")
        monkeypatch.setenv("DETKIT_ENVIRONMENTS", "here")
        assert environments.environments_folder() == Path.cwd() / "here"

    def test_variables_of_workers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        misleading = [
            *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "LD_PRELOAD"),
            *("PYTHONSTARTUP", "PYTHONSAFEPATH", "PYTHONWARNINGS", "PYTHONPYCACHEPREFIX", "PYTHON_OF_TOMORROW"),
        ]
        harmless = ["PYTHONHASHSEED", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"]
        for name in (*misleading, *harmless):
            monkeypatch.setenv(name, "x")
        assert worker_variables(sys.executable) == dict(os.environ)
        cleaned = worker_variables("/another/python")
        assert not set(misleading) & set(cleaned)
        assert set(harmless) < set(cleaned)
        assert (cleaned["PYTHONNOUSERSITE"], cleaned["PATH"]) == ("1", os.environ["PATH"])


class TestTold:
    """What the command line says of a backend that cannot run."""

    def test_variable_that_names_no_python(self, site: Path, tmp_path: Path) -> None:
        house = House(tmp_path / "environments", site)
        assert "lodging: detkit backends install lodger" in house.run("ls", COLUMNS="400")
        wrong = {"DETKIT_PYTHON_LODGER": "/no/such/python", "COLUMNS": "400"}
        listed = house.run("ls", **wrong)
        assert "detkit backends install lodger" not in listed
        assert "problem: DETKIT_PYTHON_LODGER names '/no/such/python', which is no executable" in listed
        told = house.run("doctor", "lodger", code=1, **wrong)
        assert told.splitlines()[0] == "lodger: not ready"
        assert "problem: DETKIT_PYTHON_LODGER names" in told

    def test_environment_of_another_day(self, site: Path, tmp_path: Path) -> None:
        """detkit as a whole speaks of it, too, and names its interpreter."""
        house = House(tmp_path / "environments", site)
        house.folder.mkdir()
        write_json(house.folder / "lodger.json", record_of("lodger", python="/no/such/python"))
        done = subprocess.run(
            [sys.executable, "-m", "detkit.cli", "doctor"], env=house.variables(), capture_output=True, text=True
        )
        assert "lodger: not ready in an environment of its own, /no/such/python\n" in done.stdout
        assert "None" not in done.stdout


class TestWheels:
    def test_same_code_however_it_is_installed(self, tmp_path: Path) -> None:
        """Packed from what is here, installed, and packed again from there."""
        here = [distributions.find("detkit-sdk"), distributions.find("detkit-echo", ["detkit_echo"])]
        wheels = [one.write_wheel(tmp_path) for one in here]
        pip_install(tmp_path / "site", *wheels)
        (tmp_path / "again").mkdir()
        script = (
            "import pathlib, detkit; from detkit import distributions\n"
            f"assert detkit.__file__.startswith({str(tmp_path)!r}), detkit.__file__\n"
            "for name in ('detkit-sdk', 'detkit-echo'):\n"
            f"    print(distributions.find(name).write_wheel(pathlib.Path({str(tmp_path / 'again')!r})))\n"
        )
        variables = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
        done = subprocess.run(
            [sys.executable, "-c", script], env=variables, cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        for wheel, again in zip(wheels, map(Path, done.stdout.split()), strict=True):
            assert wheel.read_bytes() == again.read_bytes()

    def test_compiled_modules_are_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        wheel = write_wheel(tmp_path, "quick", {"quick/__init__.py": "", "quick/fast.abi3.so": ""})
        pip_install(tmp_path / "site", wheel)
        monkeypatch.syspath_prepend(tmp_path / "site")
        with pytest.raises(Unsupported, match=r"quick has compiled modules \(quick/fast\.abi3\.so\)"):
            distributions.find("quick").write_wheel(tmp_path)

    def test_source_tree(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As a development install leaves it: no list of files, the package elsewhere."""
        package, info = tmp_path / "src/detkit_tree", tmp_path / "site/detkit_tree-2.0.dist-info"
        for name in ("__init__.py", "data/words.txt", ".hidden", "__pycache__/x.pyc"):
            (package / name).parent.mkdir(parents=True, exist_ok=True)
            (package / name).write_text("")
        (tmp_path / "src/detkit_tree_engine.py").write_text("")
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: detkit-tree\nVersion: 2.0\n")
        (info / "entry_points.txt").write_text("[detkit]\ntree = detkit_tree.plugin\n")
        (info / "direct_url.json").write_text('{"url": "file:///x", "dir_info": {"editable": true}}')
        (info / "RECORD").write_text("detkit_tree-2.0.dist-info/METADATA,,\n__editable___tree_finder.py,,\n")
        monkeypatch.syspath_prepend(tmp_path / "src")
        monkeypatch.syspath_prepend(tmp_path / "site")
        found = distributions.find("detkit-tree", ["detkit_tree_engine"])
        assert sorted(found.files) == ["detkit_tree/__init__.py", "detkit_tree/data/words.txt", "detkit_tree_engine.py"]
        with zipfile.ZipFile(found.write_wheel(tmp_path)) as archive:
            assert archive.read("detkit_tree-2.0.dist-info/entry_points.txt").startswith(b"[detkit]")
        with pytest.raises(PluginError, match="module 'no_such_module' of an installed plugin is not there"):
            distributions.find("detkit-tree", ["no_such_module"])

    @pytest.mark.parametrize("path", ["leaky/../../secret.txt", "leaky-1.0.dist-info/../../secret.txt"])
    def test_files_outside_of_the_package_are_refused(
        self, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        info = tmp_path / "site/leaky-1.0.dist-info"
        info.mkdir(parents=True)
        (tmp_path / "site/leaky").mkdir()  # from Python 3.12 on, files that are not there are not listed
        (tmp_path / "secret.txt").write_text("secret")
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leaky\nVersion: 1.0\n")
        (info / "RECORD").write_text(f"../../bin/leaky,,\n{path},,\n")
        monkeypatch.syspath_prepend(tmp_path / "site")
        with pytest.raises(PluginError, match="leaky is damaged: its RECORD names leaky.*secret"):
            distributions.find("leaky")

    def test_egg_info_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Its list of files, if any, tells of the source tree."""
        info = tmp_path / "site/elderly-1.0.egg-info"
        info.mkdir(parents=True)
        (info / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: elderly\nVersion: 1.0\n")
        (info / "SOURCES.txt").write_text("setup.py\nsrc/elderly/__init__.py\n")
        (tmp_path / "site/setup.py").touch()
        monkeypatch.syspath_prepend(tmp_path / "site")
        with pytest.raises(PluginError, match="elderly was installed in an old way, as an .egg-info folder"):
            distributions.find("elderly")

    def test_not_installed(self) -> None:
        with pytest.raises(PluginError, match="no distribution 'no-such-thing'"):
            distributions.find("no-such-thing")


def test_uv_looks_where_pip_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*os.environ]:
        if name.startswith(("PIP_", "UV_", "SSL_", "ALL_")):
            monkeypatch.delenv(name)
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://one.example/simple\nextra-index-url =\n  https://two.example/simple\n"
        "  https://three.example/simple\ncert = /etc/cert.pem\nclient-cert = /etc/me.pem\n"
        "proxy = http://p:1\n[install]\nfind-links = /a /b\nno-index = true\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("PIP_INDEX_URL", "https://zero.example/simple")
    flags, settings = installers.uv_settings(os.environ)
    assert flags == ["--no-index"]
    assert settings == {
        "UV_INDEX_URL": "https://zero.example/simple",
        "UV_EXTRA_INDEX_URL": "https://two.example/simple https://three.example/simple",
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_FIND_LINKS": "/a,/b",
        "SSL_CERT_FILE": "/etc/cert.pem",
        "SSL_CLIENT_CERT": "/etc/me.pem",
        "ALL_PROXY": "http://p:1",
        "UV_NO_PROGRESS": "1",
        "NO_COLOR": "1",
    }
    own = {"UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
    assert installers.uv_settings({**os.environ, "UV_INDEX": "https://mine.example"}) == ([], own)
    (tmp_path / "config/uv").mkdir(parents=True)
    (tmp_path / "config/uv/uv.toml").touch()
    assert installers.uv_settings(os.environ) == ([], own)


@pytest.fixture(scope="module")
def elder(tmp_path_factory: pytest.TempPathFactory) -> House:
    """The stranger's plugin, and its environment: another numpy, and another Python where there is one."""
    pytest.importorskip("hatchling", reason="builds the wheel; nothing is fetched for that")
    folder = tmp_path_factory.mktemp("elder")
    reach = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--timeout", "5", "--retries", "0"]
    done = subprocess.run([*reach, "--dest", folder / "reach", "pluggy==1.5.0"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index cannot be reached: {done.stderr[-200:]}")
    pip_install(folder / "site", shutil.copytree(STRANGER, folder / "source"))
    house = House(folder / "environments", folder / "site")
    other = other_python()
    house.run("install", "elder", *(["--python", other] if other else []), PATH=os.environ["PATH"])
    return house


def other_python() -> str | None:
    for minor in {"3.12", "3.10"} - {MINOR}:
        try:
            return installers.choose_python(None, (minor,)).path
        except UsageError:
            continue
    return None


@pytest.mark.usefixtures("fresh_plugins")
def test_a_stranger_trains_and_predicts_in_an_environment_of_its_own(
    elder: House, clean: Path, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine refuses any numpy but 1.26, which this interpreter does not have."""
    monkeypatch.syspath_prepend(elder.site)
    monkeypatch.setenv("DETKIT_ENVIRONMENTS", str(elder.folder))
    monkeypatch.setenv("PYTHONPATH", str(Path(numpy.__file__).parents[1]))  # leads astray
    run = Trainer(model="elder/boxes").fit(tiny, quiet=True)
    versions = run.model.manifest.versions
    assert versions["numpy"].startswith("1.26.")
    if other_python():
        assert not versions["python"].startswith(f"{MINOR}.")
    with Predictor(run) as predictor:
        found = predictor(tiny[0].path)
    assert len(found) == len(tiny.classes)
    told = json.loads(elder.run("doctor", "elder", "--json"))
    assert told["problems"] == []


def test_plugin_of_no_distribution(fresh_plugins: None) -> None:
    plugins.backends()
    plugins.registry().providers["backend", "made-up"] = "nowhere"
    with pytest.raises(PluginError, match="belongs to no distribution"):
        plugins.distribution_of("made-up")
    assert plugins.distribution_of("echo") == "detkit-echo"


LANDLORD = """
from detkit.backends import LocalBackend, ModelSpec
from detkit.distributions import Distribution
from detkit.environments import Environment
from detkit.errors import UsageError
from detkit.hookspecs import hookimpl
from detkit.params import Params

def pack(path):
    file = path / "manor.py"
    if not file.is_file():
        raise UsageError(f"--source names {{path}}, which is no checkout of the manor")
    metadata = b"Metadata-Version: 2.1\\nName: manor\\nVersion: 3.0\\n"
    return Distribution(name="manor", version="3.0", files={{"manor.py": file}}, metadata={{"METADATA": metadata}})

@hookimpl
def detkit_backends():
    return [
        LocalBackend(
            name="landlord", summary="", engine="detkit_landlord.engine:Landlord", requires=("manor", "detkit_porter"),
            models={{"small": ModelSpec(params=Params(), summary="")}}, install="nothing",
            environment=Environment(requirements=({borrowed!r},), pythons=({minor!r},), checkout=pack),
        )
    ]
"""


@pytest.fixture
def manor(tmp_path: Path) -> House:
    """A plugin that builds on another one, and whose framework no registry has."""
    packages = {str(Path(str(module.__file__)).parents[1]) for module in (numpy, PIL, msgspec, pluggy)}
    borrowed = write_wheel(tmp_path, "borrowed", {"borrowed.pth": "\n".join(sorted(packages)) + "\n"})
    text = LANDLORD.format(borrowed=f"borrowed @ {borrowed.as_uri()}", minor=MINOR)
    engine = "import detkit_porter, manor\n" + ENGINE.replace("Lodger", "Landlord")
    info = "detkit_landlord-1.0.dist-info"
    wheels = [
        write_wheel(
            tmp_path,
            "detkit_landlord",
            {
                "detkit_landlord/__init__.py": text,
                "detkit_landlord/engine.py": engine,
                f"{info}/entry_points.txt": "[detkit]\nlandlord = detkit_landlord\n",
            },
        ),
        write_wheel(
            tmp_path,
            "detkit_porter",
            {
                "detkit_porter/__init__.py": "__version__ = '1.0'\n",
                "detkit_porter-1.0.dist-info/entry_points.txt": "[detkit]\nporter = detkit_porter\n",
            },
        ),
    ]
    pip_install(tmp_path / "site", *wheels)
    requires = "Requires-Dist: detkit-porter\nRequires-Dist: numpy\nRequires-Dist: detkit-nowhere; extra == 'x'\n"
    with (tmp_path / "site" / info / "METADATA").open("a") as metadata:
        metadata.write(requires)
    return House(tmp_path / "environments", tmp_path / "site")


def test_a_framework_from_a_checkout(manor: House, tmp_path: Path) -> None:
    """It is copied, with the plugin that the backend's own builds on; other code of it makes another environment."""

    def record() -> Installed:
        return msgspec.json.decode((manor.folder / "landlord.json").read_bytes(), type=Installed)

    told = manor.run("install", "landlord", code=2)
    assert "get a checkout of its source and name it: `detkit backends install landlord --source PATH`" in told
    assert "is no checkout of the manor" in manor.run("install", "landlord", "--source", str(tmp_path), code=2)
    assert "manor: detkit backends install landlord --source PATH" in manor.run("ls", COLUMNS="400")
    source = tmp_path / "checkout"
    source.mkdir()
    (source / "manor.py").write_text("rooms = 3\n")
    assert f"taking manor 3.0 from {source}: 1 files" in manor.run("install", "landlord", "--source", str(source))
    first = record()
    assert set(first.distributions) == {"detkit-sdk", "detkit-landlord", "detkit-porter"}
    assert first.checkout is not None
    assert (first.checkout.name, first.checkout.version, first.checkout.path) == ("manor", "3.0", str(source))
    shutil.move(source, tmp_path / "elsewhere")
    assert "already" in manor.run("install", "landlord"), "it needs the checkout no longer"
    assert "already" in manor.run("install", "landlord", "--source", str(tmp_path / "elsewhere"))
    assert "is no checkout of the manor" in manor.run("upgrade", "landlord", code=2), "it was taken from there"
    assert record() == first
    (tmp_path / "elsewhere/manor.py").write_text("rooms = 4\n")
    assert "made in" in manor.run("install", "landlord", "--source", str(tmp_path / "elsewhere"))
    script = "import manor; print(manor.rooms)"
    found = subprocess.run([record().python, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found == "4\n"


def test_a_source_that_nobody_asked_for(house: House, tmp_path: Path) -> None:
    told = house.run("install", "lodger", "--source", str(tmp_path), code=2)
    assert "takes no --source" in told


def test_modules_of_another_source_tree_are_not_brought() -> None:
    """Of two plugins in editable source trees, each brings its own."""
    pytest.importorskip("detkit_torchvision")
    found = distributions.find("detkit-echo", ["detkit_echo", "detkit_torchvision"])
    assert {name.partition("/")[0] for name in found.files} == {"detkit_echo"}
