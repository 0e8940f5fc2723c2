"""Finished models in other formats, verified against the originals."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec

from detkit import plugins, trust
from detkit.backends import Backend
from detkit.data import Dataset
from detkit.errors import InvalidValue, StorageError, Unsupported, UsageError, did_you_mean
from detkit.files import file_sha256, write_json
from detkit.graphs import CALIBRATION
from detkit.images import place_image
from detkit.io import read_dataset
from detkit.job import Model, Workspace
from detkit.predictor import find_model
from detkit.progress import shown
from detkit.runs import Run
from detkit.verification import AP_DROP, spread, verify

MAX_IMAGES = 200
"""Images of each data set that are looked at where nobody says otherwise."""


def export(
    model: Run | Model | str | Path,
    format: str,
    to: str | Path | None = None,
    *,
    verify: Dataset | str | Path | None = None,
    calibrate: Dataset | str | Path | None = None,
    max_ap_drop: float | None = None,
    max_images: int = MAX_IMAGES,
    code: str | Path | None = None,
    progress: bool = False,
) -> Path:
    """Write a finished model in another format into the folder ``to`` and return the main file.

    ``model`` is a `Run`, a `Model`, the folder of either, or a run's name such as ``last``. Without ``to`` the folder
    is ``export/FORMAT`` in the run. Files of an earlier export are replaced, others stay. What `Predictor` can open,
    such as ``onnx``, is a model itself: the folder's manifest is the original's.

    ``verify`` names images on which original and export have to find the same, see `detkit.verification`; otherwise
    nothing is left of the export, an earlier one stays, and `detkit.errors.ExportDiffers` says how they differ. A
    format that loses precision, such as ``onnx-int8``, needs that, with boxes, and ``calibrate``, images to measure
    activations on; it may lose ``max_ap_drop`` of AP, .01 where None. Of each data set ``max_images`` are used, evenly
    spread; no image may be in both. ``code`` is as for `detkit.predictor.Predictor`. Raises
    `detkit.errors.Unsupported` for a format that the model's backend does not write.
    """
    found = find_model(model, code)
    steps = _steps(plugins.backend(found.manifest.backend), format)
    last = steps[-1]
    lossy = format in last.quantized
    folder = Path(to) if to is not None else _in_run(found) / "export" / format
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; an export goes into a folder")
    _refuse_arguments(format, lossy=lossy, verify=verify, calibrate=calibrate, max_ap_drop=max_ap_drop)
    images = None if verify is None else _read(verify, max_images)
    if lossy and images is not None and not len(images.boxes):
        raise UsageError(f"{format} is kept only if AP stays, and these images have no boxes; verify with some that do")
    drop = (AP_DROP if max_ap_drop is None else max_ap_drop) if lossy else None
    with _beside(folder) as passing, shown(progress):
        opened = found
        for backend in steps[:-1]:  # what the last one reads is called by its name
            opened = Model(backend.export(opened, last.name, passing / last.name).parent)
        if calibrate is not None:
            _place_images(_read(calibrate, max_images), passing / format / CALIBRATION)
            if images is not None:
                _refuse_overlap(passing / format / CALIBRATION, images, passing / "verify")
        main = last.export(opened, format, passing / format)
        shutil.rmtree(passing / format / CALIBRATION, ignore_errors=True)
        _trust(main)
        if images is not None:
            _verify(found, main.parent, images, format, drop)
        return _move(passing / format, folder) / main.relative_to(passing / format)


def _steps(backend: Backend, format: str) -> list[Backend]:
    """Return the backends that write a format one after the other. Raises `Unsupported`.

    A format that a backend opens is called by that backend's name, so that it can go on from there.
    """
    if format in backend.formats:
        return [backend]
    further = [one for name, one in plugins.backends().items() if name in backend.formats and format in one.formats]
    if further:
        return [backend, further[0]]
    formats = [*backend.formats, *(f for n, o in plugins.backends().items() if n in backend.formats for f in o.formats)]
    known = f"it writes {', '.join(formats)}" if formats else "it exports nothing"
    hint = did_you_mean(format, formats)
    raise Unsupported(f"backend {backend.name!r} does not write {format!r};{hint} {known}")


def _refuse_arguments(
    format: str, *, lossy: bool, verify: object, calibrate: object, max_ap_drop: float | None
) -> None:
    if lossy and (verify is None or calibrate is None):
        raise UsageError(
            f"{format} loses precision, so it needs images to calibrate on, and others, with boxes, on which its AP "
            f"is compared: `detkit export RUN {format} --calibrate DATA:train --verify DATA:val`"
        )
    if not lossy and calibrate is not None:
        raise UsageError(f"{format} keeps the model's precision and needs no calibration; leave out calibrate")
    if max_ap_drop is not None and not (math.isfinite(max_ap_drop) and 0 <= max_ap_drop <= 1):
        raise InvalidValue("max_ap_drop", max_ap_drop, "an AP from 0 to 1, such as 0.01")
    if not lossy and max_ap_drop is not None:
        raise UsageError(f"{format} keeps the model's precision: nothing may drop; leave out max_ap_drop")


def _read(data: Dataset | str | Path, most: int) -> Dataset:
    loaded = data if isinstance(data, Dataset) else read_dataset(data)
    if most < 1 or not len(loaded):
        raise UsageError(f"{most} of {len(loaded)} images are nothing to look at; expected one at least")
    return spread(loaded, most)


def _place_images(data: Dataset, folder: Path) -> None:
    folder.mkdir(parents=True)
    for i, path in enumerate(data.paths):
        place_image(path, folder / f"{i:06}{Path(path.partition('#')[0]).suffix}")


def _refuse_overlap(calibration: Path, verify: Dataset, folder: Path) -> None:
    """Raise `UsageError` where images to calibrate on are to verify on, too: the same bytes, whatever their names."""
    _place_images(verify, folder)
    known = {file_sha256(path) for path in calibration.iterdir()}
    both = [one for one, file in zip(verify.image_ids, sorted(folder.iterdir()), strict=True)
            if file_sha256(file) in known]  # fmt: skip
    shutil.rmtree(folder)
    if both:
        raise UsageError(
            f"{len(both)} of {len(verify)} images to verify on are also those to calibrate on, for example "
            f"{', '.join(both[:3])}; the AP there says nothing about new images: name others"
        )


def _trust(main: Path) -> None:
    """Keep in mind that an export which is a program was written here, see `detkit.trust`."""
    program = trust.program_of(Model(main.parent)) if (main.parent / "detkit.json").is_file() else None
    if program is not None:
        trust.remember(file_sha256(program))


def _verify(original: Model, folder: Path, data: Dataset, format: str, max_ap_drop: float | None) -> None:
    """Verify an export and note in its manifest to what."""
    if not (folder / "detkit.json").is_file():
        raise Unsupported(f"detkit does not open {format!r} itself, so it cannot be verified; leave out verify")
    exported = Model(folder)
    agreement = verify(original, exported, data, max_ap_drop=max_ap_drop)
    native = {**exported.manifest.native, "verified": msgspec.to_builtins(agreement)}
    write_json(folder / "detkit.json", msgspec.structs.replace(exported.manifest, native=native))


@contextlib.contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """Give a folder on the same disk that is gone afterwards; so are folders above that were made for it in vain."""
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        passing = tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent)
    except OSError as error:
        raise StorageError(folder, error) from error
    try:
        with passing as path:
            yield Path(path)
    finally:
        with contextlib.suppress(OSError):  # the export is in it
            for parent in made:
                parent.rmdir()


def _move(source: Path, target: Path) -> Path:
    """Move the files of a folder into another one, the manifest last."""
    files = sorted((path for path in source.rglob("*") if path.is_file()), key=lambda path: path.name == "detkit.json")
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)
    return target


def _in_run(model: Model) -> Path:
    """Return the run that a model, or an export of it, is in. Raises `UsageError`."""
    path = model.path.absolute()
    run = Workspace(path.parent.parent if path.parent.name == "export" else path.parent)
    if (path != run.model and path.parent != run.path / "export") or not run.job_file.is_file():
        raise UsageError(f"{model.path} belongs to no run; name the folder for its export with --to (to=)")
    return run.path
