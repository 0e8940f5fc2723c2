"""``detkit doctor``: what is here, and what is wrong with it."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

import detkit
from detkit.cli import backends, messages
from detkit.cli.runs import Json

if TYPE_CHECKING:
    from detkit.backends import Backend

_GB = 1e9
_ASK_S = 30


def doctor(as_json: Json = False) -> None:
    """Look at this machine and this installation. Leaves with 1 where something is broken, and says what to do."""
    plugins, problems = _plugins()
    examined = [_backend(one, problems) for one in plugins.pop("found").values()]
    if _foreign_detkit():
        problems.append(
            "the distribution 'detkit' is installed and it is not this project, which is 'detkit-sdk'; both write the "
            "package detkit: pip uninstall detkit detkit-sdk && pip install detkit-sdk"
        )
    record = {
        "detkit": detkit.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        **_machine(),
        **plugins,
        "backends": examined,
        "problems": problems,
    }
    if as_json:
        messages.print_json(record)
    else:
        _print(record)
    if problems:
        raise typer.Exit(messages.FINDINGS)


def _plugins() -> tuple[dict[str, Any], list[str]]:
    """Return the plugins and what they offer, and a sentence on each broken one."""
    import importlib.metadata
    import warnings

    from detkit import plugins
    from detkit.errors import PluginError

    problems: list[str] = []
    found: dict[str, Backend] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", plugins.PluginWarning)  # told below
        registry = plugins.registry()
        for collect in (plugins.backends, plugins.formats, plugins.metrics):
            try:
                offered = collect()
            except PluginError as error:
                problems.append(str(error))
                continue
            if collect is plugins.backends:
                found = dict(offered)  # type: ignore[arg-type]
    listed = [
        {
            "name": entry.name,
            "distribution": entry.dist.name if entry.dist else "",
            "version": entry.dist.version if entry.dist else "",
            "offers": sorted(f"{kind} {name}" for (kind, name), by in registry.providers.items() if by == entry.name),
        }
        for entry in sorted(set(importlib.metadata.entry_points(group=plugins.GROUP)), key=lambda entry: entry.name)
    ]
    problems += [f"plugin {name!r} is broken: {type(e).__name__}: {e}" for name, e in registry.broken.items()]
    return {"found": found, "plugins": listed}, problems


def _backend(backend: "Backend", problems: list[str]) -> dict[str, Any]:
    """Tell whether a backend could train here; what stands in the way joins the problems."""
    record = backends.examine(backend, deeply=True)
    if record["problem"]:
        problems.append(record["problem"])
    return {**record, "ready": not record["problem"]}


def _foreign_detkit() -> bool:
    import importlib.metadata

    try:
        importlib.metadata.distribution("detkit")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _machine() -> dict[str, Any]:
    import psutil

    from detkit import prediction_store, reading_cache
    from detkit.files import cache_folder

    memory = psutil.virtual_memory()
    cached = reading_cache.cache_size() + prediction_store.store_size()
    return {
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "memory": {"total": memory.total, "available": memory.available},
        "disk_free": shutil.disk_usage(Path.cwd()).free,
        "cache": {"path": str(cache_folder() or "off"), "size": cached},
        "gpus": _gpus(),
    }


def _gpus() -> list[dict[str, str]]:
    """Ask nvidia-smi; no framework is needed for that."""
    fields = ("name", "memory.total", "driver_version")
    if shutil.which("nvidia-smi") is None:
        return []
    asked = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=_ASK_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    keys = ("name", "memory", "driver")
    return [dict(zip(keys, (part.strip() for part in line.split(",")), strict=False)) for line in answer.splitlines()]


def _print(record: dict[str, Any]) -> None:
    memory, gpus = record["memory"], record["gpus"]
    print(f"detkit    {record['detkit']}")
    print(f"python    {record['python']}  {record['executable']}")
    print(f"platform  {record['platform']}")
    print(f"cores     {record['cores']}")
    print(f"memory    {memory['total'] / _GB:.1f} GB, {memory['available'] / _GB:.1f} GB available")
    print(f"disk      {record['disk_free'] / _GB:.1f} GB free in this folder")
    print(f"cache     {record['cache']['size'] / _GB:.1f} GB of data sets and predictions in {record['cache']['path']}")
    print(
        "GPUs      " + (", ".join(f"{gpu['name']} ({gpu['memory']}, driver {gpu['driver']})" for gpu in gpus) or "none")
    )
    for plugin in record["plugins"]:
        offers = ", ".join(plugin["offers"]) or "nothing"
        print(f"plugin    {plugin['name']} ({plugin['distribution']} {plugin['version']}): {offers}")
    for backend in record["backends"]:
        own = backend["environment"] is not None and backend["python"] in {backend["environment"].python, None}
        place = f" in an environment of its own, {backend['environment'].python}" if own else ""
        print(f"backend   {backend['name']}: {'ready' if backend['ready'] else 'not ready'}{place}")
    for problem in record["problems"]:
        print(f"problem   {problem}")
    print(f"{len(record['problems'])} problem(s)" if record["problems"] else "nothing is broken")
