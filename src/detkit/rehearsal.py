"""A training asked for in the words of another tool: hyperparameters read, translated, held against the rest."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from detkit import plugins
from detkit.backends import Backend
from detkit.dialects import Dialect, Note, becomes, refuse, text, typed
from detkit.errors import UnknownName, UsageError
from detkit.formats.checks import Prepared
from detkit.job import Model
from detkit.params import CANONICAL, INSTEAD, Params, coerce, set_fields
from detkit.predictor import find_model
from detkit.runs import Run
from detkit.settings import Setting, Settings


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """The hyperparameters of another tool, and what becomes of them here."""

    dialect: Dialect
    backend: Backend
    params: Params
    notes: tuple[Note, ...]

    @property
    def model(self) -> str:
        return str(becomes(self.notes)["model"])

    @property
    def said(self) -> dict[str, Any]:
        """What the notes say of the backend's parameters."""
        return {name: value for name, value in becomes(self.notes).items() if name != "model"}

    def notes_on(self, name: str) -> list[Note]:
        return [note for note in self.notes if name in note.becomes]


def rehearse(layers: Settings) -> Rehearsal | None:
    """Read the hyperparameters of another tool and translate them; None where ``like`` is not given."""
    like = layers.get("like")
    if like is None:
        return None
    backend, dialect = _find_dialect(str(like.value), layers.get("model"), layers.get("backend"))
    names = dialect.params.__struct_fields__
    given = layers.choose(names, {})
    origins = {name: setting.origin for name, setting in given.items()}
    values = {name: setting.value for name, setting in given.items()}
    params = set_fields(dialect.params, values, kind="hyperparameter", origins=origins)
    beside = layers.choose([name for name in CANONICAL if name not in names], {}, ["weights"])
    if "weights" in beside:
        beside["weights"] = weights_by_path(beside["weights"])
    canonical = {name: coerce(name, s.value, CANONICAL[name] | None, s.origin) for name, s in beside.items()}
    notes = (
        msgspec.structs.replace(n, origin=origins.get(n.name, "default")) for n in dialect.translate(params, canonical)
    )
    return Rehearsal(dialect=dialect, backend=backend, params=params, notes=tuple(notes))


def _find_dialect(like: str, model: Setting | None, backend: Setting | None) -> tuple[Backend, Dialect]:
    engine, slash, _ = str(model.value).partition("/") if model else ("", "", "")
    wanted = str(backend.value) if backend else engine if slash else None
    candidates = [plugins.backend(wanted)] if wanted else list(plugins.backends().values())
    found = [(one, dialect) for one in candidates for dialect in one.dialects if dialect.name == like]
    if len(found) == 1:
        return found[0]
    if found:
        names = ", ".join(one.name for one, _ in found)
        raise UsageError(f"like={like!r} is offered by {names}; name one of these with backend=")
    offers = [(dialect.name, one.name) for one in plugins.backends().values() for dialect in one.dialects]
    hint = "; ".join(f"{name} is offered by backend {one!r}" for name, one in offers)
    kind = f"dialect of backend {wanted!r}" if wanted else "dialect"
    raise UnknownName(kind, like, [d.name for one in candidates for d in one.dialects], hint)


def refuse_contradictions(
    given: Mapping[str, Setting], params: Params, model: Setting | None, translated: Params, rehearsal: Rehearsal
) -> None:
    """Raise where something given under its own name is not what the hyperparameters make of it."""
    instead = {**INSTEAD, **{other: one for one, other in INSTEAD.items()}}
    said = rehearsal.said
    found = []
    for name, setting in given.items():
        value, other = getattr(params, name), instead.get(name, "")
        if name in said and getattr(translated, name) != value:
            found.append(_contradiction(name, setting, name, rehearsal))
        elif value is not None and said.get(other) is not None:
            found.append(_contradiction(name, setting, other, rehearsal))
    same = ("auto", rehearsal.model, f"{rehearsal.backend.name}/{rehearsal.model}")
    if model is not None and str(model.value) not in same:
        found.append(_contradiction("model", model, "model", rehearsal))
    if found:
        raise UsageError("\n".join(found))


def _contradiction(name: str, setting: Setting, said_of: str, rehearsal: Rehearsal) -> str:
    notes = rehearsal.notes_on(said_of)
    here = typed({said_of: notes[-1].becomes[said_of]})
    theirs = " and ".join(note.hyperparameter for note in notes if note.name) or "what is always so"
    change = " or ".join(note.name for note in notes if note.name)
    return (
        f"{name}={text(setting.value)} (from {setting.origin}) contradicts {theirs} in {rehearsal.dialect.name}"
        + (f", which is {here} here" if here != theirs else "")
        + f"; leave {name} out"
        + (f", or change {change}" if change else "")
    )


def tell(rehearsal: Rehearsal, prepared: Mapping[str, Prepared]) -> list[str]:
    """Compare the hyperparameters with the data; return what is not the same here, and what the data has to say."""
    dialect, notes = rehearsal.dialect, rehearsal.notes
    channels = {name: ready.data for name, ready in prepared.items()}
    found = dialect.check(rehearsal.params, channels) if dialect.check else ()
    refuse(dialect, found)
    without_effect = [note for note in notes if note.fidelity == "unused" and note.origin != "default"]
    approximate = [note for note in notes if note.fidelity == "approximate"]
    return [str(note) for note in (*approximate, *without_effect, *found)]


def request_of(rehearsal: Rehearsal) -> dict[str, float | str]:
    """Return the event that keeps what was asked for: the given hyperparameters to read, all of them to compare."""
    given = typed({note.name: note.value for note in rehearsal.notes if note.origin != "default"})
    return {
        "message": f"like {rehearsal.dialect.name}, given {given or 'nothing'}; its defaults for the rest",
        "like": rehearsal.dialect.name,
        "hyperparameters": msgspec.json.encode(rehearsal.params).decode(),
    }


def weights_by_path(setting: Setting) -> Setting:
    """Return weights that were given as an object by their path."""
    value = find_model(setting.value).path if isinstance(setting.value, (Run, Model)) else setting.value
    return Setting(str(value) if isinstance(value, Path) else value, setting.origin)
