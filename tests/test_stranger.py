"""A plugin package as a stranger would write it, really installed, and what happens to broken and competing ones."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from detkit import plugins
from detkit.errors import PluginError, UnknownName

SOURCE = Path(__file__).parent / "stranger/detkit-mean"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the stranger's package and install it into a folder of its own; returns the folder."""
    pytest.importorskip("hatchling", reason="builds the wheel; nothing is fetched from the network")
    folder = tmp_path_factory.mktemp("stranger")
    copy = shutil.copytree(SOURCE, folder / "source")
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--disable-pip-version-check", "--target", folder / "site", copy],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def run_pytest(site: Path, cwd: Path, *arguments: str, returncode: int = 0, **environment: str) -> str:
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-rxs", "-p", "no:cacheprovider", f"--basetemp={cwd}/tmp", *arguments],
        cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == returncode, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(SOURCE, tmp_path / "detkit-mean", ignore=shutil.ignore_patterns("src"))
    told = run_pytest(installed, copy)
    assert "2 xfailed" in told
    assert "it looks at no pixel" in told


def test_verify_runs_the_suite(installed: Path, tmp_path: Path) -> None:
    """What ``detkit backends verify mean pause_s=0.02 ...`` does."""
    told = run_pytest(
        installed, tmp_path, "--pyargs", "detkit.testing.verify_backend",
        DETKIT_VERIFY_BACKEND="mean", DETKIT_VERIFY_SETTINGS='{"pause_s": 0.02}',
    )  # fmt: skip
    assert "2 xfailed" in told


def test_verify_needs_a_name(installed: Path, tmp_path: Path) -> None:
    told = run_pytest(installed, tmp_path, "--pyargs", "detkit.testing.verify_backend", DETKIT_VERIFY_BACKEND="")
    assert "DETKIT_VERIFY_BACKEND names no backend" in told


LIAR = """
import wave
from dataclasses import replace
from detkit.hookspecs import hookimpl
import detkit_echo

@hookimpl
def detkit_backends():
    gaps = {"test_learns": "it cannot learn", "test_of_the_past": "there was such a case"}
    return [replace(*detkit_echo.detkit_backends(), name="liar", requires=("wave",), gaps=gaps)]
"""


def test_the_suite_finds_what_is_wrong(tmp_path: Path) -> None:
    """A gap that is none, a gap of no case, and an entry point that imports what only its engine needs."""
    install(tmp_path / "site", "detkit-liar", "liar", LIAR)
    cases = "test_learns or test_declaration or test_importing or test_well_formed"
    told = run_pytest(
        tmp_path / "site", tmp_path, "--pyargs", "detkit.testing.verify_backend", "-k", cases,
        DETKIT_VERIFY_BACKEND="liar", returncode=1,
    )  # fmt: skip
    assert "[XPASS(strict)] it cannot learn" in told
    assert "gaps of cases that do not exist: ['test_of_the_past']" in told
    assert "importing detkit_liar loads ['wave']; import them in the engine's module" in told
    assert "3 failed" in told


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    plugins.registry.cache_clear()
    yield
    monkeypatch.undo()
    plugins.registry.cache_clear()


def install(site: Path, distribution: str, name: str, code: str) -> None:
    """Lay out a distribution with one module as an installer leaves it."""
    module = distribution.replace("-", "_")
    site.mkdir(exist_ok=True)
    (site / f"{module}.py").write_text(code)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[detkit]\n{name} = {module}\n")


OFFERS = """
from detkit.backends import LocalBackend
from detkit.hookspecs import hookimpl

@hookimpl
def detkit_backends():
    return [LocalBackend(name={name!r}, engine="nowhere:Engine", models={{}}, install="pip install it")]
"""


@pytest.mark.usefixtures("fresh")
class TestPlugins:
    def test_broken_at_import(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path / "site", "detkit-broken", "broken", "import module_that_is_not_there")
        monkeypatch.syspath_prepend(tmp_path / "site")
        with pytest.warns(plugins.PluginWarning, match="'broken' is left out.*module_that_is_not_there"):
            assert "echo" in plugins.backends()
        assert isinstance(plugins.registry().broken["broken"], ModuleNotFoundError)
        plugins.backends()  # does not warn again
        with pytest.raises(PluginError, match="module_that_is_not_there") as caught:
            plugins.backend("broken")
        assert caught.value.__cause__ is plugins.registry().broken["broken"]
        assert plugins.backend("echo").name == "echo"

    def test_broken_in_a_hook(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = OFFERS.format(name="late") + "\n    raise RuntimeError('no luck')"
        code = code.replace("    return", "    raise RuntimeError('no luck')\n    return")
        install(tmp_path / "site", "detkit-late", "late", code)
        monkeypatch.syspath_prepend(tmp_path / "site")
        with pytest.warns(plugins.PluginWarning, match="no luck"):
            assert "late" not in plugins.backends()
        with pytest.raises(PluginError, match="no luck"):
            plugins.backend("late")

    def test_unknown_hook(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "from detkit.hookspecs import hookimpl\n@hookimpl\ndef detkit_backend(): return []"
        install(tmp_path / "site", "detkit-typo", "typo", code)
        monkeypatch.syspath_prepend(tmp_path / "site")
        with pytest.warns(plugins.PluginWarning, match="detkit_backend"):
            assert "echo" in plugins.backends()
        assert "typo" in plugins.registry().broken

    def test_unknown_argument(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        code = "from detkit.hookspecs import hookimpl\n@hookimpl\ndef detkit_on_event(event, fun): pass"
        install(tmp_path / "site", "detkit-arg", "arg", code)
        monkeypatch.syspath_prepend(tmp_path / "site")
        with pytest.warns(plugins.PluginWarning, match="fun"):
            assert "echo" in plugins.backends()

    def test_two_providers_of_one_backend(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path / "site", "detkit-one", "one", OFFERS.format(name="same"))
        install(tmp_path / "site", "detkit-two", "two", OFFERS.format(name="same"))
        monkeypatch.syspath_prepend(tmp_path / "site")
        for _ in range(2):
            with pytest.raises(PluginError, match="two plugins offer the backend 'same': one and two"):
                plugins.backend("same")

    def test_two_plugins_of_one_name(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        install(tmp_path / "site", "detkit-one", "same", OFFERS.format(name="same"))
        install(tmp_path / "site", "detkit-two", "same", OFFERS.format(name="same"))
        monkeypatch.syspath_prepend(tmp_path / "site")
        with pytest.warns(plugins.PluginWarning, match="detkit_one of detkit-one and detkit_two of detkit-two"):
            plugins.backends()
        with pytest.raises(PluginError, match="detkit_one of detkit-one and detkit_two of detkit-two"):
            plugins.backend("same")

    def test_unknown_backend(self) -> None:
        with pytest.raises(UnknownName, match="no backend 'ecco'; did you mean 'echo'"):
            plugins.backend("ecco")
