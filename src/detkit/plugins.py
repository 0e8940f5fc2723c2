"""Finding plugins, and looking up what they offer by name.

One bad plugin warns and is remembered; asking for something it might have provided raises with the original cause.
Two providers of one name are an error that names both.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pluggy

import detkit
from detkit import hookspecs
from detkit.errors import PluginError, UnknownName

if TYPE_CHECKING:
    from detkit.backends import Backend
    from detkit.events import Event
    from detkit.formats import Format
    from detkit.metrics import Metric
    from detkit.runs import Run

GROUP = "detkit"
"""The entry-point group."""

BUILTIN = ("detkit.formats.builtin",)
"""detkit's own plugins; they come through the same hooks as a stranger's."""


class PluginWarning(UserWarning):
    """A plugin was left out because it is broken."""


@dataclass
class Registry:
    """Everything that installed plugins offer. `registry` returns the one of this process."""

    manager: pluggy.PluginManager
    broken: dict[str, Exception] = field(default_factory=dict)
    """Plugins that failed, by entry-point name, with the original exception."""
    providers: dict[tuple[str, str], str] = field(default_factory=dict)
    """Which plugin offers what: ``("backend", "echo") -> "echo"``."""

    def collect(self, hook: str, kind: str) -> dict[str, Any]:
        """Call a hook plugin by plugin and return what came, by name."""
        found: dict[str, Any] = {}
        for implementation in getattr(self.manager.hook, hook).get_hookimpls():
            plugin = implementation.plugin_name
            try:
                offered = list(implementation.function())
            except Exception as error:
                self.remember(plugin, error)
                continue
            for item in offered:
                other = self.providers.get((kind, item.name))
                if item.name in found and other != plugin:
                    raise PluginError(
                        f"two plugins offer the {kind} {item.name!r}: {other} and {plugin}; uninstall one of them"
                    )
                found[item.name] = item
                self.providers[kind, item.name] = plugin
        return found

    def remember(self, plugin: str, error: Exception) -> None:
        """Note a broken plugin and warn once."""
        if plugin not in self.broken:
            self.broken[plugin] = error
            message = f"plugin {plugin!r} is left out: {type(error).__name__}: {error}"
            warnings.warn(message, PluginWarning, stacklevel=3)

    def look_up(self, kind: str, name: str, known: Mapping[str, Any], hint: str = "") -> Any:
        """Return one item by name. Raises `UnknownName`, or `PluginError` when a broken plugin goes by that name."""
        if name in known:
            return known[name]
        if name in self.broken:
            cause = self.broken[name]
            why = f"{type(cause).__name__}: {cause}"
            raise PluginError(f"{kind} {name!r} is not available: its plugin failed: {why}") from cause
        raise UnknownName(kind, name, known, hint)


@functools.cache
def registry() -> Registry:
    """Discover plugins once for this process."""
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hookspecs)
    found = Registry(manager)
    for module in BUILTIN:
        manager.register(importlib.import_module(module), name=module)
    for entry in sorted(set(importlib.metadata.entry_points(group=GROUP)), key=lambda e: (e.name, e.value)):
        try:
            if manager.has_plugin(entry.name):
                if manager.get_plugin(entry.name) is not entry.load():
                    owners = _owners(entry.name)
                    raise PluginError(f"two plugins are called {entry.name!r}: {owners}; uninstall one of them")
                continue
            manager.register(entry.load(), name=entry.name)
            manager.check_pending()
        except Exception as error:
            if manager.has_plugin(entry.name):
                manager.unregister(name=entry.name)
            found.remember(entry.name, error)
    return found


def _owners(name: str) -> str:
    """Name every distribution that has an entry point of this name."""
    entries = importlib.metadata.entry_points(group=GROUP, name=name)
    return " and ".join(sorted({f"{entry.value} of {entry.dist.name if entry.dist else '?'}" for entry in entries}))


def backends() -> Mapping[str, Backend]:
    """Return the installed backends by name."""
    return registry().collect("detkit_backends", "backend")


def backend(name: str) -> Backend:
    """Return one backend. Raises `UnknownName` with a did-you-mean."""
    found: Backend = registry().look_up(
        "backend", name, backends(), "others come as plugins, e.g. pip install detkit-torchvision"
    )
    return found


def versions(backend: str) -> dict[str, str]:
    """Return the version of detkit-sdk, and that of the distribution that offers a backend, where it is known."""
    backends()
    found = {"detkit-sdk": detkit.__version__}
    plugin = registry().providers.get(("backend", backend))
    for entry in importlib.metadata.entry_points(group=GROUP, name=plugin) if plugin else ():
        with contextlib.suppress(Exception):  # its metadata is not there, or not whole
            if entry.dist is not None and entry.dist.version:
                found[entry.dist.name] = entry.dist.version
    return found


def distribution_of(backend: str) -> str:
    """Return the name of the distribution whose plugin offers a backend. Raises `PluginError` where there is none."""
    plugin = registry().providers["backend", backend]
    found = {entry.dist.name for entry in importlib.metadata.entry_points(group=GROUP, name=plugin) if entry.dist}
    if len(found) != 1:
        raise PluginError(f"plugin {plugin!r} of backend {backend!r} belongs to no distribution; install it with pip")
    return found.pop()


def formats() -> Mapping[str, Format]:
    """Return the known data set formats by name."""
    return registry().collect("detkit_formats", "format")


def metrics() -> Mapping[str, Metric]:
    """Return the metrics that plugins add, by name."""
    return registry().collect("detkit_metrics", "metric")


def notify(event: Event, run: Run) -> None:
    """Hand an event to every tracker; a failing one is reported once and left out from then on."""
    found = registry()
    for implementation in found.manager.hook.detkit_on_event.get_hookimpls():
        if implementation.plugin_name in found.broken:
            continue
        arguments = {"event": event, "run": run}
        try:
            implementation.function(*(arguments[name] for name in implementation.argnames))
        except Exception as error:
            found.remember(implementation.plugin_name, error)
