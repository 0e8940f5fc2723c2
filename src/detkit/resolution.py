"""What a trainer's settings mean: which backend and model, and which of their parameters and options each one is."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from detkit import natives, plugins
from detkit.backends import Backend, LocalBackend, ModelSpec
from detkit.errors import InvalidValue, UnknownName, UsageError, did_you_mean
from detkit.params import INSTEAD, Options, Params, coerce, nullable, set_fields
from detkit.rehearsal import Rehearsal, refuse_contradictions, rehearse, weights_by_path
from detkit.settings import Setting, Settings

OWN_SETTINGS = (
    *("model", "backend", "like", "train", "val", "test", "name", "on_invalid", "replay", "replay_share"),
    *("code", "imports"),
)
"""Settings that the trainer itself understands; all others are parameters and options of the backend."""


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A backend, one of its models, and the values of all of their settings."""

    backend: Backend
    model: str
    spec: ModelSpec
    params: Params
    options: Options
    origins: Mapping[str, str]
    reason: str
    rehearsal: Rehearsal | None = None


def resolve(layers: Settings) -> Resolved:
    """Find backend and model, route every other setting to parameters or options, and check them."""
    rehearsal = rehearse(layers)
    if rehearsal is None:
        model, backend, reason = _choose(layers.get("model"), layers.get("backend"))
    else:
        model, backend, reason = rehearsal.model, rehearsal.backend, ""
    spec = backend.spec(model)
    theirs = rehearsal.params.__struct_fields__ if rehearsal else ()
    param_names = [name for name in spec.params.__struct_fields__ if name not in theirs]
    option_names = backend.options.__struct_fields__
    known = [*theirs, *param_names, *option_names, *OWN_SETTINGS]
    takes_natives = natives.FIELD in param_names
    for name, setting in layers.written().items():
        if name not in known and not (takes_natives and natives.KEY.fullmatch(name)):
            like = f" like {rehearsal.dialect.name}" if rehearsal else ""
            hint = rehearsal.dialect.hints.get(name, "") if rehearsal else ""
            raise UnknownName(f"setting of {backend.name}/{model}{like} (given in {setting.origin})", name, known, hint)
    given_params = layers.choose(param_names, INSTEAD, nullable(type(spec.params)))
    given_options = layers.choose(option_names, {})
    if "weights" in given_params:
        given_params["weights"] = weights_by_path(given_params["weights"])
    if takes_natives:
        keys = _native_keys(layers.written(), given_params.pop(natives.FIELD, None))
        texts = {key: str(setting.value) for key, setting in keys.items()}
        adopted = backend.adopt(model, texts, {name: setting.value for name, setting in given_params.items()})
        _adopt(given_params, keys, adopted, typing.get_type_hints(type(spec.params), include_extras=True))
    origins = {name: setting.origin for name, setting in {**given_params, **given_options}.items()}
    values = {name: setting.value for name, setting in given_params.items()}
    params = set_fields(spec.params, values, kind="parameter", origins=origins)
    if rehearsal is not None:
        said = rehearsal.said
        origins |= {name: rehearsal.notes_on(name)[-1].name or rehearsal.dialect.name for name in said}
        translated = set_fields(spec.params, said, kind="parameter", origins=origins)
        refuse_contradictions(given_params, params, layers.get("model"), translated, rehearsal)
        params = set_fields(spec.params, {**values, **said}, kind="parameter", origins=origins)
    options = set_fields(
        backend.options(), {n: s.value for n, s in given_options.items()}, kind="option", origins=origins
    )
    return Resolved(
        backend=backend,
        model=model,
        spec=spec,
        params=params,
        options=options,
        origins=origins,
        reason=reason,
        rehearsal=rehearsal,
    )


def _choose(model: Setting | None, backend: Setting | None) -> tuple[str, Backend, str]:
    wanted = "auto" if model is None else str(model.value)
    if wanted == "auto":
        # What is elsewhere, and paid for, is never chosen unless it is named.
        here = [found for found in plugins.backends().values() if isinstance(found, LocalBackend)]
        candidates: list[Backend] = [plugins.backend(str(backend.value))] if backend else [*here]
        for candidate in candidates:
            suggestion = candidate.suggest()
            if suggestion is not None:
                return suggestion.model, candidate, suggestion.reason
        raise UsageError(
            "no installed backend suggests a model; install one (pip install detkit-torchvision) or name a model, "
            "see `detkit models`"
        )
    engine, slash, name = wanted.partition("/")
    if backend is not None:
        chosen = plugins.backend(str(backend.value))
        return (name if slash and engine == chosen.name else wanted), chosen, ""
    if slash and (engine in plugins.backends() or not any(wanted in b.models for b in plugins.backends().values())):
        return name, plugins.backend(engine), ""
    having = [candidate for candidate in plugins.backends().values() if wanted in candidate.models]
    if len(having) == 1:
        return wanted, having[0], ""
    every = [f"{b.name}/{m}" for b in plugins.backends().values() for m in b.models]
    if having:
        raise UsageError(f"model {wanted!r} is offered by {', '.join(b.name for b in having)}; write backend/model")
    bare = {name.partition("/")[2] for name in every}
    raise UnknownName("model", wanted, every, did_you_mean(wanted, bare).strip())


def _native_keys(layers: Mapping[str, Setting], mapping: Setting | None) -> dict[str, Setting]:
    """Return the native keys that somebody wrote down, by themselves or in ``overrides``, as text."""
    found: dict[str, Setting] = {}
    if mapping is not None:
        values = _native_mapping(mapping)
        found = {key: Setting(natives.written(value), mapping.origin) for key, value in values.items()}
    for key, setting in layers.items():
        if natives.KEY.fullmatch(key):
            if key in found and found[key].value != natives.written(setting.value):
                both = f"{found[key].value} in {natives.FIELD} and {natives.written(setting.value)} by itself"
                raise UsageError(f"{key} is given twice: {both}")
            found[key] = Setting(natives.written(setting.value), setting.origin)
    return found


def _native_mapping(setting: Setting) -> Mapping[str, Any]:
    if isinstance(setting.value, Mapping) and all(isinstance(key, str) for key in setting.value):
        return setting.value
    try:
        return natives.read(str(setting.value))
    except ValueError as error:
        raise InvalidValue(natives.FIELD, setting.value, f"expected {error}", setting.origin) from None


def _adopt(
    params: dict[str, Setting], keys: Mapping[str, Setting], adopted: natives.Adopted, hints: Mapping[str, Any]
) -> None:
    """Put native keys and their meanings among the parameters that were given.

    Raises `UsageError` for a key that contradicts a parameter which was given too, or another key.
    """
    instead = {**INSTEAD, **{other: one for one, other in INSTEAD.items()}}
    own = dict(params)
    said: dict[str, natives.Meaning] = {}
    for meaning in adopted.meanings:
        rivals = [name for name in (meaning.name, instead.get(meaning.name, "")) if name in own]
        if meaning.origin and rivals:
            continue
        value = coerce(meaning.key, meaning.value, hints[meaning.name])
        for name in rivals:
            theirs = coerce(name, own[name].value, hints[name], own[name].origin)
            if theirs != (value if name == meaning.name else None):
                raise UsageError(
                    f"{meaning.key} (from {keys[meaning.key].origin}) and {name} (from {own[name].origin}) contradict "
                    f"each other: {meaning.key} is {meaning.name}={natives.written(meaning.value)} here, and {name} is "
                    f"{natives.written(own[name].value)}; give one of them"
                )
        if (before := said.get(meaning.name)) is not None and coerce(
            before.key, before.value, hints[meaning.name]
        ) != value:
            raise UsageError(
                f"{before.key} and {meaning.key} are both {meaning.name} here, and have different values; give one"
            )
        said[meaning.name] = meaning
        origin = meaning.origin or f"{meaning.key}, {keys[meaning.key].origin}"
        params[meaning.name] = Setting(meaning.value, origin)
    if adopted.overrides:
        origins = sorted({keys[key].origin for key in adopted.overrides if key in keys}) or ["the configuration"]
        params[natives.FIELD] = Setting(dict(adopted.overrides), ", ".join(origins))
