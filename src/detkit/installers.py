"""What makes a Python environment: an interpreter to base it on, and uv or pip to fill it.

Both are programs of the user's, of any version, so each step is a process whose output goes to a log, and each
interpreter is run before it is believed in.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from detkit.errors import UsageError

_ASK_S = 60.0
_MAX_WORDS = 800
_WHO_ARE_YOU = """
import importlib.util, json, os, sys
base = getattr(sys, "_base_executable", None)
print(json.dumps({
    "path": base if base and os.path.exists(base) else sys.executable,
    "minor": "%d.%d" % sys.version_info[:2],
    "venv": bool(importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")),
}))
"""
"""The base of a virtual environment is asked for, so that what is made outlives the one it was made from."""

_ELSEWHERE = {
    *("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_PYTHON"),
    *("UV_PYTHON", "UV_SYSTEM_PYTHON", "UV_MANAGED_PYTHON", "UV_PYTHON_PREFERENCE"),
}
"""Settings of the user's installers that would choose another interpreter, or put packages somewhere else."""

_UV_INDEX_SETTINGS = {
    *("UV_INDEX", "UV_DEFAULT_INDEX", "UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_FIND_LINKS", "UV_CONFIG_FILE"),
}
_UV_OF_PIP = {
    "index-url": "UV_INDEX_URL",
    "extra-index-url": "UV_EXTRA_INDEX_URL",
    "find-links": "UV_FIND_LINKS",
    "cert": "SSL_CERT_FILE",
    "client-cert": "SSL_CLIENT_CERT",
    "proxy": "ALL_PROXY",
    "trusted-host": "UV_INSECURE_HOST",
}


class StepFailed(Exception):
    """A step ended badly; the text is what its program said of it."""


@dataclass(frozen=True)
class Steps:
    """Runs the programs that make an environment, each to its end or, with all it has started, not at all."""

    folder: Path
    """Where the programs run; no project's settings are found from there."""
    log: IO[bytes]
    variables: Mapping[str, str]
    lock: int
    """A descriptor that stays open as long as any of the programs, so that nobody else begins before they end."""

    def run(self, *command: str | Path, **variables: str) -> str:
        """Run a program and return what it printed, which also goes to the log. Raises `StepFailed`."""
        self.log.write(f"$ {shlex.join(map(str, command))}\n".encode())
        self.log.flush()
        begin = self.log.seek(0, os.SEEK_END)
        code = self._wait_for(command, {**self.variables, **variables})
        self.log.seek(begin)
        printed = self.log.read().decode(errors="replace")
        if code:
            raise StepFailed(complaint(printed, code))
        return printed

    def _wait_for(self, command: Sequence[str | Path], variables: Mapping[str, str]) -> int:
        try:
            process = subprocess.Popen(
                command,
                cwd=self.folder,
                env={name: value for name, value in variables.items() if name not in _ELSEWHERE},
                stdin=subprocess.DEVNULL,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(self.lock,),
            )
        except OSError as error:
            raise StepFailed(f"cannot run {command[0]}: {error.strerror}") from error
        try:
            return process.wait()
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise


def complaint(printed: str, code: int) -> str:
    """Return the lines in which a program says why it failed: pip's or uv's errors, else the last one."""
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    if not errors:
        first = next((i for i, line in enumerate(lines) if line.startswith("error:")), len(lines) - 1)
        errors = lines[max(first, 0) :]
    if code < 0:
        errors = [f"ended by {signal.Signals(-code).name}", *errors[-1:]]
    text = " ".join(errors) or f"it ended with exit code {code} and said nothing"
    return text if len(text) <= _MAX_WORDS else f"{text[:_MAX_WORDS]} ..."


class Python(NamedTuple):
    """An interpreter that was run and told of itself."""

    path: str
    minor: str
    """Such as ``3.11``."""


def choose_python(chosen: str | None, minors: Sequence[str], *, first: str | None = None) -> Python:
    """Return the interpreter to base an environment on: the chosen one, else the first that is found and fits.

    ``minors`` are the versions that fit, the best first; ``first`` is tried before all others. Raises `UsageError`
    that lists what was tried.
    """
    if chosen is not None:
        answer = _ask(chosen)
        if isinstance(answer, str):
            raise UsageError(f"--python names {chosen}, which {answer}; expected a Python {_either(minors)}")
        if answer.minor not in minors:
            raise UsageError(f"--python names {chosen}, which is Python {answer.minor}; expected {_either(minors)}")
        return answer
    tried: dict[str, str] = {}
    for candidate in _candidates(minors, first):
        if candidate in tried:
            continue
        answer = _ask(candidate)
        if isinstance(answer, Python) and answer.minor in minors:
            return answer
        tried[candidate] = answer if isinstance(answer, str) else f"is Python {answer.minor}"
    listed = "".join(f"\n  {candidate} {why}" for candidate, why in tried.items())
    raise UsageError(
        f"no Python {_either(minors)} is found here. tried:{listed}\n"
        "install one of these versions, or name it with --python PATH"
    )


def _candidates(minors: Sequence[str], first: str | None) -> Iterator[str]:
    if first is not None:
        yield first
    yield sys.executable
    for minor in minors:
        for folder in os.get_exec_path():
            path = Path(folder, f"python{minor}")
            if os.access(path, os.X_OK):
                yield str(path)
    versions = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
    for minor in minors:
        yield from sorted(map(str, versions.glob(f"{minor}.*/bin/python")), reverse=True)


def _ask(candidate: str) -> Python | str:
    """Run an interpreter; returns what it is, or what is wrong with it."""
    found = shutil.which(candidate)
    if found is None:
        return "is no executable"
    command = [os.path.abspath(found), "-I", "-c", _WHO_ARE_YOU]
    try:
        done = _run(command)
    except (OSError, subprocess.SubprocessError) as error:
        return f"cannot be run ({error})"
    if done.returncode:
        said = "".join(done.stderr.splitlines()[:1])
        return f"does not run ({complaint(said, done.returncode)})"
    try:
        answer = json.loads(done.stdout.splitlines()[-1])
        python, has_venv = Python(answer["path"], answer["minor"]), answer["venv"]
    except (ValueError, LookupError, TypeError):
        return "is no Python"
    if not has_venv and _find_uv() is None:
        return "lacks venv and ensurepip (a package python3-venv of the system has them; uv does without)"
    return python


def _run(command: Sequence[str], **more: Any) -> subprocess.CompletedProcess[str]:
    """Ask a program of the user's, which may be anything, for a short answer."""
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_ASK_S,
        check=False, **more
    )  # fmt: skip


def _find_uv() -> tuple[str, str] | None:
    """Return uv's path and what it calls itself, with its version; None where there is none, or only a broken one."""
    found = shutil.which("uv")
    if found is None:
        return None
    path = os.path.abspath(found)
    try:
        done = _run([path, "--version"], cwd=os.sep)  # a shim may take the one that is meant for the current folder
    except (OSError, subprocess.SubprocessError):
        return None
    return (path, " ".join(done.stdout.split()[:2])) if not done.returncode else None


def _either(minors: Sequence[str]) -> str:
    return " or ".join(minors)


def make(folder: Path, base: Python, requirements: Path, wheels: Sequence[Path], steps: Steps) -> str:
    """Make an environment of exactly these requirements and wheels; returns what made it. Raises `StepFailed`."""
    python = str(folder / "bin" / "python")
    found = _find_uv()
    if found is not None:
        uv, name = found
        flags, variables = uv_settings(steps.variables)
        steps.run(uv, "venv", "--no-project", "--python", base.path, folder, **variables)
        fill = (uv, "pip", "install", "--python", python, "--no-deps", "--compile-bytecode", *flags)
        steps.run(*fill, "-r", requirements, *wheels, **variables)
        return name
    steps.run(base.path, "-m", "venv", folder)
    pip = (python, "-m", "pip", "--disable-pip-version-check", "--no-input")
    steps.run(*pip, "install", "--no-deps", "-r", requirements, *wheels)
    return " ".join(steps.run(*pip, "--version").split()[:2])


def uv_settings(variables: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Return the flags and variables that make uv look where the user's pip looks, unless uv is told where to look."""
    settings = {"UV_NO_PROGRESS": "1", "NO_COLOR": "1"}
    home = Path(variables.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    told = any(path.is_file() for path in (home / "uv/uv.toml", Path("/etc/uv/uv.toml")))
    if told or any(variables.get(name) for name in _UV_INDEX_SETTINGS):
        return [], settings
    of_pip = _pip_settings(variables)
    for name, variable in _UV_OF_PIP.items():
        if name in of_pip and not variables.get(variable):
            settings[variable] = of_pip[name]
    if "UV_FIND_LINKS" in settings:
        settings["UV_FIND_LINKS"] = settings["UV_FIND_LINKS"].replace(" ", ",")
    if "UV_EXTRA_INDEX_URL" in settings:  # pip takes the best of all indexes, uv the first that has the name
        settings["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return ["--no-index"] if of_pip.get("no-index", "0").lower() in {"1", "true", "yes", "on"} else [], settings


def _pip_settings(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the settings of pip, from files and variables, as ``pip config list`` tells them."""
    pip = [sys.executable, "-m", "pip"] if importlib.util.find_spec("pip") else [shutil.which("pip") or ""]
    try:
        done = _run([*pip, "config", "list"], env=dict(variables))
    except (OSError, subprocess.SubprocessError):
        return {}
    by_section: dict[str, dict[str, str]] = {}
    for line in done.stdout.splitlines():
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        with contextlib.suppress(ValueError, SyntaxError):
            by_section.setdefault(section, {})[key] = " ".join(str(ast.literal_eval(value)).split())
    return {**by_section.get("global", {}), **by_section.get("install", {}), **by_section.get(":env:", {})}
