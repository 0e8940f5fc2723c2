"""Environments of their own, for backends whose framework cannot live in the controller's interpreter.

A plugin declares one, ``LocalBackend(environment=Environment(...))``, and ``detkit backends install NAME`` makes it::

    environments/            $DETKIT_ENVIRONMENTS, else detkit/environments in the user's data folder
      NAME.json              the `Installed` record; it appears last, so what it points to is complete and was proven
      NAME-1/                the environment: what the plugin requires, and the very detkit and plugin of the controller
      NAME.log               what the last installation printed
      NAME.lock              held while somebody installs, upgrades or removes it

A new environment is built beside the old one and takes its place in one step; the old one goes when nobody uses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import msgspec

from detkit.errors import PluginError, StorageError, UnknownName, Unsupported, UsageError
from detkit.files import write_json

if TYPE_CHECKING:
    import psutil

    from detkit.backends import LocalBackend
    from detkit.distributions import Distribution
    from detkit.installers import Python, Steps

SCHEMA = 1
"""Version of the record; readers refuse a newer one."""

Tell = Callable[[str], object]
"""Takes one line about what goes on."""

_MISLEADING = {"VIRTUAL_ENV", "__PYVENV_LAUNCHER__", "LD_PRELOAD"}
"""Variables that lead another interpreter to the packages and libraries of this one, beside those of Python itself."""

_HARMLESS = {"PYTHONHASHSEED", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE"}
"""The variables of Python that mean the same to every interpreter."""

_NOT_THE_CURRENT_FOLDER = "import sys; sys.path[:1] == [''] and sys.path.pop(0); "
"""Modules that lie beside the user's data are not the worker's. (``-P`` does that from Python 3.11 on.)"""

_OURS = "detkit-sdk"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

_PROOF_S = 600.0
_PROOF = """
import contextlib, importlib, importlib.metadata, json, platform
import detkit
from detkit.backends import load_engine
from detkit.worker import end_at_once, hold_leash
hold_leash(end_at_once)
modules, engine = json.loads(sys.argv[1])
load_engine(engine)  # first: it may have to prepare what it imports
owners = {}
with contextlib.suppress(Exception):  # the metadata of some distribution is not whole
    owners = importlib.metadata.packages_distributions()
def version(module):
    said = str(getattr(importlib.import_module(module), "__version__", ""))
    found = {importlib.metadata.version(name) for name in owners.get(module, ())}
    return found.pop() if len(found) == 1 else said  # what a module says of itself may be out of date
versions = {module: version(module) for module in modules}
print()
print(json.dumps({"python": platform.python_version(), "detkit": detkit.__version__, "versions": versions}), flush=True)
"""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What a backend's own environment has to hold, and where it can be made. Declared by a plugin."""

    requirements: tuple[str, ...]
    """Pinned and complete, as they are installed without their dependencies: the framework with all it imports, and
    what detkit's worker needs: numpy, pillow, msgspec, pluggy, and hotcoco where the engine scores. Not detkit itself
    and not the plugin, which are brought along."""
    pythons: tuple[str, ...] = ("3.11",)
    """Minor versions of Python that it works with, the best first."""
    checkout: Callable[[Path], Distribution] | None = None
    """Packs a framework that no package registry has, from a checkout of its source that the user names with
    ``--source PATH``; raises `UsageError` for another folder. None where `requirements` hold everything."""
    platforms: tuple[str, ...] = ()
    """Where it works, as ``sys.platform`` and ``platform.machine()``: ``linux-x86_64``. Anywhere if empty."""


class Code(msgspec.Struct, frozen=True, kw_only=True):
    """Which code of a distribution was brought into an environment."""

    version: str
    digest: str
    """See `detkit.distributions.Distribution.digest`."""


class Checkout(Code, frozen=True, kw_only=True):
    """The source that a framework was taken from."""

    name: str
    path: str


class Installed(msgspec.Struct, frozen=True, kw_only=True):
    """``NAME.json``: an environment that was made and proven."""

    backend: str
    folder: str
    """Name of the directory beside the record."""
    python: str
    """The environment's interpreter."""
    python_version: str
    base: str
    """The interpreter that the environment was made from, and needs."""
    made: float
    """Seconds since the epoch (POSIX)."""
    installer: str
    """What filled it, with its version: ``uv 0.9.3`` or ``pip 24.0``."""
    distributions: dict[str, Code]
    """What was brought along from the controller: detkit and the plugin, with the plugins that it builds on."""
    requirements: list[str]
    checkout: Checkout | None = None
    schema: int = SCHEMA

    def check(self, engine: str) -> None:
        """Raise `PluginError` unless the environment is there and holds the code that this interpreter has.

        Takes some milliseconds and runs nothing; `prove` looks deeper. ``engine`` is the backend's.
        """
        if not os.access(self.python, os.X_OK):
            raise PluginError(
                f"the environment of backend {self.backend!r} is broken: {self.python} is gone, or the Python that it "
                f"was made from, {self.base}; make it anew with `detkit backends install {self.backend}`"
            )
        for name, recorded in self.distributions.items():
            here = _brought(name, engine)
            if (here.version, here.digest) != (recorded.version, recorded.digest):
                has = f"has {here.version}" if here.version != recorded.version else "the same version but other code"
                raise PluginError(
                    f"the environment of backend {self.backend!r} has {name} {recorded.version}, this Python {has}; "
                    f"bring both together with `detkit backends upgrade {self.backend}`"
                )


class Proof(msgspec.Struct, frozen=True, kw_only=True):
    """What an interpreter answered that can run a backend's engine."""

    python: str
    detkit: str
    versions: dict[str, str]
    """Of the modules that the backend requires."""


class _Framework(NamedTuple):
    """What a backend runs on, packed."""

    path: Path
    """The checkout."""
    packed: Distribution


class _Schema(msgspec.Struct):
    """What every version of the record has."""

    schema: int = SCHEMA


class _Damaged(PluginError):
    """A record that nobody can read."""


def environments_folder() -> Path:
    """Return ``DETKIT_ENVIRONMENTS``, else ``detkit/environments`` in the user's data folder."""
    data = os.environ.get("XDG_DATA_HOME") or "~/.local/share"
    chosen = os.environ.get("DETKIT_ENVIRONMENTS") or f"{data}/detkit/environments"
    return Path(chosen).expanduser().absolute()


def find(backend: str) -> Installed | None:
    """Return the record of a backend's environment, or None. Raises `PluginError` for one that cannot be read."""
    file = _file(backend, "json")
    try:
        content = file.read_bytes()
        schema = msgspec.json.decode(content, type=_Schema).schema
        if schema > SCHEMA:
            raise PluginError(f"{file} was written by a newer detkit (schema {schema}, this one reads {SCHEMA})")
        return msgspec.json.decode(content, type=Installed)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError as error:
        raise _Damaged(
            f"{file} is damaged ({error}); make the environment anew with `detkit backends install {backend}`"
        ) from None


def _file(backend: str, ending: str) -> Path:
    """Return a file about a backend's environment. Raises `UnknownName` for a name that would lead elsewhere."""
    if not _NAME.fullmatch(backend):
        raise UnknownName("environment", backend, names())
    return environments_folder() / f"{backend}.{ending}"


def names() -> list[str]:
    """Return the backends that have an environment, also those whose plugin is not here any more."""
    return sorted(file.stem for file in environments_folder().glob("*.json"))


def worker_variables(python: str) -> dict[str, str]:
    """Return the environment variables of a worker: those of this process, cleaned for a foreign interpreter."""
    return dict(os.environ) if python == sys.executable else _foreign_variables()


def _foreign_variables() -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _MISLEADING and (name in _HARMLESS or not name.startswith("PYTHON"))
    }
    return {**kept, "PYTHONNOUSERSITE": "1"}


def python_command(python: str, code: str, *arguments: str) -> list[str]:
    """Return the command that runs code in an interpreter, which looks for modules only where it has them installed.

    What it prints is not held back, so that a crash loses nothing of it.
    """
    own = [] if python == sys.executable else ["-s"]
    return [python, "-u", *own, "-c", _NOT_THE_CURRENT_FOLDER + code, *arguments]


def made_here(python: str) -> bool:
    """Tell whether an interpreter is that of an environment that detkit made."""
    return Path(python).is_relative_to(environments_folder())


def prove(python: str, backend: LocalBackend, log: IO[bytes] | None = None) -> Proof:
    """Run an interpreter: it imports detkit, what the backend requires, and its engine. Raises `PluginError` if not."""
    from detkit import installers

    held, leash = os.pipe()
    try:
        done = subprocess.run(
            python_command(python, _PROOF, json.dumps([backend.requires, backend.engine])),
            env={**worker_variables(python), "DETKIT_LEASH": "1"},
            stdin=held,
            capture_output=True,
            timeout=_PROOF_S,
            check=False,
            start_new_session=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise PluginError(f"{python} cannot be run: {error}") from error
    finally:
        os.close(held)
        os.close(leash)
    if log is not None:
        log.write(b"$ engine\n" + done.stdout + done.stderr)
    last = (done.stdout.splitlines() or [b""])[-1]
    if not done.returncode:
        with contextlib.suppress(msgspec.DecodeError):
            return msgspec.json.decode(last, type=Proof)
    said = (done.stderr.strip() or done.stdout).decode(errors="replace").splitlines()
    raised = [line for line in said if re.match(r"[\w.]+(Error|Exception)\b", line)]  # some go on for several lines
    why = installers.complaint("".join((raised or said)[-1:]), done.returncode)
    why = why.removeprefix("detkit.errors.PluginError: ")
    raise PluginError(f"{python} cannot run the engine of backend {backend.name!r}: {why}")


def install(
    backend: LocalBackend,
    plugin: str,
    *,
    python: str | None = None,
    source: Path | None = None,
    rebuild: bool = False,
    tell: Tell = lambda line: None,
) -> Installed:
    """Make a backend's environment and return its record; one that is there and in order is left as it is.

    ``plugin`` is the distribution that offers the backend, ``python`` the interpreter to make the environment from, and
    ``source`` the checkout of a framework that has to be brought; where it is None, that of the time before. Whatever
    goes wrong, what was there before stays as it was. Raises `Unsupported`, `UsageError` where no interpreter fits or a
    checkout is missing, and `PluginError` with what the installer or the engine said.
    """
    from detkit import installers

    name = backend.name
    environment = _declared(backend)
    record_file, log_file = _file(name, "json"), _file(name, "log")
    with _locked(name, tell) as lock:
        previous = _find_readable(name)
        framework = _framework(backend, source) if source else None
        base = installers.choose_python(python, environment.pythons, first=previous.base if previous else None)
        same = previous and previous.base == base.path and _holds(previous, framework)
        if previous and same and not rebuild and _works(previous, backend, tell):
            return previous
        if framework is None:
            framework = _framework(backend, Path(previous.checkout.path) if previous and previous.checkout else None)
        numbers = [int(path.name.rpartition("-")[2]) for path in _directories(name)]
        directory = environments_folder() / f"{name}-{max(numbers, default=0) + 1}"
        try:
            with log_file.open("w+b") as log, tempfile.TemporaryDirectory(prefix="detkit-") as temporary:
                steps = installers.Steps(Path(temporary), log, _foreign_variables(), lock.fileno())
                record = _build(directory, base, backend, plugin, framework=framework, steps=steps, tell=tell)
            write_json(record_file, record)
        except BaseException as error:
            _end_users(directory)  # started just when this process was interrupted
            if isinstance(error, OSError):
                raise StorageError(directory, error) from error
            if isinstance(error, (installers.StepFailed, PluginError)):
                kept = "the environment from before is still there" if previous else "nothing was left behind"
                raise PluginError(
                    f"cannot make the environment of backend {name!r}: {error}\n{kept}; the whole log is {log_file}"
                ) from error
            raise
        finally:
            _sweep(name, tell)
    return record


def pack_framework(backend: LocalBackend, source: Path | None, command: str) -> Distribution | None:
    """Pack what a backend runs on from a checkout of its source; None where a package registry has all that it needs.

    ``command`` is what to type, with ``--source PATH``. Raises `UsageError` where the checkout is missing, is none, or
    is not needed.
    """
    pack = backend.environment.checkout if backend.environment else None
    if pack is None and source is None:
        return None
    if pack is None:
        raise UsageError(f"backend {backend.name!r} takes no --source: a package registry has all that it needs")
    if source is None:
        raise UsageError(
            f"no package registry has what backend {backend.name!r} runs on; get a checkout of its source and name it: "
            f"`{command}`"
        )
    return pack(source)


def _framework(backend: LocalBackend, source: Path | None) -> _Framework | None:
    packed = pack_framework(backend, source, backend.installation)
    return _Framework(source.absolute(), packed) if source and packed else None


def _holds(record: Installed, framework: _Framework | None) -> bool:
    """Return whether an environment has the framework that was named, if one was."""
    return framework is None or (record.checkout is not None and record.checkout.digest == framework.packed.digest)


def _build(
    directory: Path,
    base: Python,
    backend: LocalBackend,
    plugin: str,
    *,
    framework: _Framework | None,
    steps: Steps,
    tell: Tell,
) -> Installed:
    """Fill a directory and prove that the engine runs there."""
    from detkit import distributions, installers

    environment = _declared(backend)
    ours = dict.fromkeys((_OURS, plugin, *distributions.required_plugins(plugin)))
    brought = [_brought(name, backend.engine) for name in ours]
    wheels = [distribution.write_wheel(steps.folder) for distribution in brought]
    checkout = None
    if framework is not None:
        path, packed = framework
        tell(f"taking {packed.name} {packed.version} from {path}: {len(packed.files)} files, none that is compiled")
        wheels.append(packed.write_wheel(steps.folder))
        checkout = Checkout(name=packed.name, version=packed.version, digest=packed.digest, path=str(path))
    listed = steps.folder / "requirements.txt"
    listed.write_text("".join(f"{line}\n" for line in environment.requirements))
    tell(f"installing {len(environment.requirements)} packages for Python {base.minor} ({base.path})")
    installer = installers.make(directory, base, listed, wheels, steps)
    tell("proving that the engine runs there")
    python = str(directory / "bin" / "python")
    proof = prove(python, backend, steps.log)
    return Installed(
        backend=backend.name,
        folder=directory.name,
        python=python,
        python_version=proof.python,
        base=base.path,
        made=time.time(),
        installer=installer,
        distributions={one.name: Code(version=one.version, digest=one.digest) for one in brought},
        requirements=list(environment.requirements),
        checkout=checkout,
    )


def remove(backend: str, *, tell: Tell = lambda line: None) -> None:
    """Remove a backend's environment, once no process uses it. Raises `UnknownName` where there is none."""
    record = _file(backend, "json")
    if not record.exists() and not _directories(backend):
        raise UnknownName("environment", backend, names())
    with _locked(backend, tell):
        record.unlink(missing_ok=True)
        _file(backend, "log").unlink(missing_ok=True)
        _sweep(backend, tell)


def _declared(backend: LocalBackend) -> Environment:
    """Return what a backend declares. Raises `Unsupported` where it declares nothing, or not for this machine."""
    environment: Environment | None = getattr(backend, "environment", None)
    if environment is None:
        install = getattr(backend, "install", "")
        raise Unsupported(
            f"backend {backend.name!r} declares no environment of its own; it runs in this Python"
            + (f", and `{install}` installs what it needs" if install else "")
            + ". name another interpreter with python="
        )
    here = f"{sys.platform}-{platform.machine()}"
    if environment.platforms and here not in environment.platforms:
        raise Unsupported(
            f"backend {backend.name!r} does not run on {here}, only on {', '.join(environment.platforms)}; "
            "train on such a machine"
        )
    return environment


@contextlib.contextmanager
def _locked(backend: str, tell: Tell) -> Iterator[IO[bytes]]:
    """Let one process at a time change a backend's environment; others wait and say so."""
    file = _file(backend, "lock")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = file.open("ab")
    except OSError as error:
        raise StorageError(file, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"another process is at work on the environment of {backend!r}; waiting until it is done")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock


def _find_readable(backend: str) -> Installed | None:
    """Return the record, None also for a damaged one, which an installation replaces."""
    try:
        return find(backend)
    except _Damaged:
        return None


def _works(record: Installed, backend: LocalBackend, tell: Tell) -> bool:
    try:
        record.check(backend.engine)
        tell("proving that the engine runs there")
        prove(record.python, backend)
    except PluginError:
        return False
    return True


def _brought(distribution: str, engine: str) -> Distribution:
    """Return what this interpreter has of detkit, or of the plugin that brings an engine."""
    from detkit import distributions

    package = engine.partition(":")[0].partition(".")[0]
    return distributions.find(distribution, [] if distribution == _OURS else [package])


def _sweep(backend: str, tell: Tell) -> None:
    """Remove the directories that the record does not point to, except those that a process still runs in."""
    record = _find_readable(backend)
    for directory in _directories(backend):
        if record is not None and directory.name == record.folder:
            continue
        users = _users(directory)
        if users:
            tell(
                f"{directory} is in use by process {', '.join(str(process.pid) for process in users)} and stays; "
                "the next install, upgrade or remove takes it away"
            )
        else:
            shutil.rmtree(directory, ignore_errors=True)


def _directories(backend: str) -> list[Path]:
    pattern = re.compile(re.escape(backend) + r"-\d+")
    return [path for path in environments_folder().glob("*") if pattern.fullmatch(path.name) and path.is_dir()]


def _end_users(directory: Path) -> None:
    import psutil

    for process in _users(directory):
        with contextlib.suppress(psutil.Error):  # gone by itself, or somebody else's
            process.kill()
            process.wait()


def _users(directory: Path) -> list[psutil.Process]:
    """Return the processes that run an interpreter of a directory."""
    import psutil

    inside = tuple(f"{folder}{os.sep}" for folder in {directory, directory.resolve()})
    return [
        process
        for process in psutil.process_iter(["exe", "cmdline"])
        if any((word or "").startswith(inside) for word in [process.info["exe"], *(process.info["cmdline"] or [])[:1]])
    ]
