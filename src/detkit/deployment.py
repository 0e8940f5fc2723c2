"""Models that answer somewhere else, and are paid for as long as they do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from detkit import plugins
from detkit.backends import Backend, Endpoint
from detkit.errors import UnknownName, Unsupported
from detkit.job import Model
from detkit.params import Options, set_fields
from detkit.plans import Plan
from detkit.predictor import find_model
from detkit.runs import Run
from detkit.settings import Settings


def deploy(model: Run | Model | str | Path, *, backend: str = "sagemaker", **options: Any) -> Endpoint:
    """Let a finished model, wherever it was trained, answer at a place.

    ``options`` are those of the place; they may also come from ``DETKIT_<NAME>`` or a ``detkit.yaml``.

    What is paid by the hour ends by itself: ``ttl="2h"``, or ``keep=True`` where it is to stay. Use it as a context
    manager, or call `Endpoint.delete`, to end it before. Raises `Unsupported` where the backend has no such place.
    """
    place, found, chosen = _chosen(model, backend, options)
    return place.deploy(found, chosen)


def plan_deployment(model: Run | Model | str | Path, *, backend: str = "sagemaker", **options: Any) -> Plan:
    """Return what `deploy` would do with the same: what it asks for, until when, and for how much. Creates nothing.

    Raises as `deploy` does, but for what costs money unsaid.
    """
    place, found, chosen = _chosen(model, backend, options)
    return place.plan_deployment(found, chosen)


def _chosen(model: Run | Model | str | Path, backend: str, options: dict[str, Any]) -> tuple[Backend, Model, Options]:
    place = plugins.backend(backend)
    if place.deploy_options is None:
        raise Unsupported(f"backend {place.name!r} deploys nothing; these do: {', '.join(_places()) or 'none'}")
    known = place.deploy_options.__struct_fields__
    for name in options:
        if name not in known:
            raise UnknownName(f"option of {place.name} for deploying", name, known)
    chosen = Settings(options, {}).choose(known, {})
    values = {name: setting.value for name, setting in chosen.items()}
    origins = {name: setting.origin for name, setting in chosen.items()}
    return place, find_model(model), set_fields(place.deploy_options(), values, kind="option", origins=origins)


def list_endpoints(backend: str | None = None, **options: Any) -> list[Endpoint]:
    """Return the endpoints of one place, else of every place that has some."""
    names = [backend] if backend is not None else _places()
    return [endpoint for name in names for endpoint in plugins.backend(name).endpoints(options)]


def _places() -> list[str]:
    return [name for name, backend in plugins.backends().items() if backend.deploy_options is not None]
