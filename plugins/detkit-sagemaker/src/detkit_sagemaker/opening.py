"""What AWS's MXNet images trained, opened on this machine by the GluonCV backend's engine."""

from __future__ import annotations

import json
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from detkit import plugins, trust
from detkit.backends import Detector, LocalBackend, PredictOptions
from detkit.errors import DetkitWarning, InvalidData, PluginError, RunFailed, Unsupported
from detkit.files import write_json
from detkit.job import Model
from detkit_sagemaker.artifacts import ARCHIVE
from detkit_sagemaker.container.archives import unpack
from detkit_sagemaker.models import BUILTIN, JUMPSTART

ENGINE_OF, SYMBOL = "gluoncv", "symbol"
"""The backend, and its model that stands for any network in MXNet's own format."""

_ANSWERS_ELSEWHERE = """\
{name} was trained by an image of AWS's, which answers only there. It can answer
  for many images, in a job that ends by itself:   detkit sagemaker transform {path} DATA --yes
      (then `detkit evaluate` and `detkit compare` know what it found)
  for single images, from an endpoint that costs:  detkit deploy {path} --ttl 2h --yes
A model that our container trained, or this machine, answers here."""

_LEARNED_HOW = (
    "{name} is opened here as SSD is in MXNet's own examples: AWS does not say how its image prepares pictures, so its "
    "answers may differ. `detkit sagemaker transform {path} DATA --yes` asks AWS's image itself"
)

_SIDE = re.compile(r"-ssd-([0-9]{2,4})-")
"""JumpStart says the side of the input in the model's name."""
_SIDES = range(32, 2049)
_DEFAULT_SIDE = 300
_MOST_JSON_BYTES = 1_000_000


def open_here(model: Model, options: PredictOptions) -> Detector:
    """Open what AWS's image left, in a worker. Raises `Unsupported`, which names the ways that are left."""
    trust.of_model(model)
    elsewhere = _ANSWERS_ELSEWHERE.format(name=model.name, path=model.path.parent)
    archive = model.path / ARCHIVE
    if not (_is_mxnet(model.manifest.model) and archive.is_file()):
        raise Unsupported(elsewhere)
    backend = plugins.backends().get(ENGINE_OF)
    if not isinstance(backend, LocalBackend):
        how = "`pip install detkit-gluoncv`, then `detkit backends install gluoncv`"
        raise Unsupported(f"{elsewhere}\nTo open it here: {how}")
    try:
        backend.interpreter(None)
    except PluginError as error:
        raise Unsupported(f"{elsewhere}\nTo open it here: {error}") from None
    with tempfile.TemporaryDirectory(prefix="detkit-mxnet-") as folder:
        try:
            detector = backend.open(prepare(model, archive, backend, Path(folder)), options, isolate=True)
        except (InvalidData, RunFailed) as error:
            raise Unsupported(f"{archive} does not open here: {error}\n{elsewhere}") from error
    warnings.warn(_LEARNED_HOW.format(name=model.name, path=model.path.parent), DetkitWarning, stacklevel=4)
    return detector


def prepare(model: Model, archive: Path, backend: LocalBackend, folder: Path) -> Model:
    """Lay out, in an empty folder, the model that the engine opens. Raises `InvalidData` for what it cannot open."""
    came, made = folder / "came", folder / "model"
    for path in (came, made):
        path.mkdir()
    unpack(archive, came)
    symbol, weights = _pair(archive, came)
    known = {**model.manifest.native, **_hyperparameters(came)}
    native: dict[str, Any] = {"image_size": _side(model.manifest.model, known)}
    for name, kind in (("nms_threshold", float), ("nms_topk", int)):
        if name in known:
            native[name] = _number(name, known[name], kind)
    symbol.replace(made / "symbol.json")
    weights.replace(made / "weights.params")
    manifest = msgspec.structs.replace(
        model.manifest,
        backend=backend.name,
        engine=backend.engine,
        model=SYMBOL,
        native=native,
        options={},
        artifacts={},
    )
    write_json(made / "detkit.json", manifest)
    return Model(made)


def _is_mxnet(model: str) -> bool:
    return model == BUILTIN or model.startswith(f"{JUMPSTART}mxnet-")


def _pair(archive: Path, folder: Path) -> tuple[Path, Path]:
    """Return the symbol and the latest parameters of the same name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    pairs = []
    for symbol in (path for path in files if path.name.endswith("-symbol.json")):
        name = re.escape(symbol.name.removesuffix("-symbol.json")) + r"-[0-9]{4,}\.params"
        found = [path for path in files if path.parent == symbol.parent and re.fullmatch(name, path.name)]
        pairs += [(symbol, found[-1])] if found else []
    if len(pairs) != 1:
        held = ", ".join(str(path.relative_to(folder)) for path in files[:8]) or "nothing"
        raise InvalidData(
            f"expected one network in MXNet's format, NAME-symbol.json and NAME-0000.params, found {len(pairs)}; "
            f"{archive.name} holds {held}"
        )
    return pairs[0]


def _hyperparameters(folder: Path) -> Mapping[str, Any]:
    """Return what the built-in algorithm was trained with, as it wrote it down itself, defaults included."""
    file = folder / "hyperparams.json"
    if not file.is_file() or file.stat().st_size > _MOST_JSON_BYTES:
        return {}
    try:
        read = json.loads(file.read_bytes())
    except ValueError as error:
        raise InvalidData(f"{file.name} is no JSON: {error}") from None
    return read if isinstance(read, dict) else {}


def _side(model: str, known: Mapping[str, Any]) -> int:
    named = _SIDE.search(model)
    side = int(named[1]) if named else _number("image_shape", known.get("image_shape", _DEFAULT_SIDE), int)
    if side not in _SIDES:
        raise InvalidData(f"image_shape is {side}; expected {_SIDES.start} to {_SIDES.stop - 1} pixels")
    return side


def _number(name: str, value: Any, kind: type) -> Any:
    try:
        return kind(value)
    except (TypeError, ValueError):
        raise InvalidData(f"the hyperparameter {name} is {value!r:.80}; expected a number") from None
