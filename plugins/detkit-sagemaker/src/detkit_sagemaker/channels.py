"""What a training job reads: a run's data in the form that each kind of model wants, ready to travel to S3."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from detkit.curation import merge
from detkit.data import Dataset
from detkit.errors import DetkitWarning, UsageError
from detkit.files import file_sha256, write_json
from detkit.io import write_dataset
from detkit.job import Job, Workspace
from detkit_sagemaker import uploads
from detkit_sagemaker.container.training import IMAGES, LINKS, WEIGHTS
from detkit_sagemaker.requests import Channel
from detkit_sagemaker.uploads import Bundle, File

DataFormat = Literal["recordio", "json", "manifest"]

_IMAGE_TYPE = "application/x-image"
_RECORDIO = "application/x-recordio"
_LABEL = "bounding-box"
_LINES = "output.manifest"
_NAMED = "images.manifest"


@dataclass(frozen=True, kw_only=True)
class Staged:
    """One channel, whose files lie here and will lie below one prefix of S3."""

    name: str
    bundle: Bundle
    content_type: str | None = None
    file: str = ""
    """Where the channel is one file of the bundle and not its folder."""
    images: Bundle | None = None
    """What that file names and does not lie in S3 yet."""
    data_type: Literal["S3Prefix", "ManifestFile", "AugmentedManifestFile"] = "S3Prefix"
    input_mode: Literal["File"] | None = None
    """The job's own where None. FastFile takes prefixes alone, and nothing can be linked into it."""
    attribute_names: tuple[str, ...] = ()
    """Of an augmented manifest."""

    @property
    def bundles(self) -> list[Bundle]:
        """All that has to lie in S3."""
        return [bundle for bundle in (self.images, self.bundle) if bundle is not None]

    def channel(self, root: str) -> Channel:
        """Return the request's entry, with the place below an S3 folder."""
        at = f"{self.bundle.url(root)}{self.file}"
        if self.attribute_names:
            return Channel(
                name=self.name,
                s3_uri=at,
                content_type=_RECORDIO,
                input_mode="Pipe",
                data_type="AugmentedManifestFile",
                compression="None",
                record_wrapper="RecordIO",
                attribute_names=self.attribute_names,
            )
        return Channel(
            name=self.name,
            s3_uri=at,
            content_type=self.content_type,
            data_type=self.data_type,
            input_mode=self.input_mode,
        )


def for_our_container(workspace: Workspace, job: Job, folder: Path, but: Collection[str] = ()) -> list[Staged]:
    """Return a run's channels as they lie, ``but`` some; ``job`` is what the container's worker is to do.

    Images that were read from S3 stay where they are: a channel of its own names them.
    """
    write_json(folder / "job" / "job.json", job)
    staged = [Staged(name="job", bundle=Bundle.of(folder / "job"))]
    for channel in sorted(path for path in (workspace.path / "input/data").iterdir() if path.is_dir()):
        if channel.name == "job" or channel.name in but:
            continue
        there = _origins(workspace, channel.name)
        files = Bundle.of(channel, digests=_digests(workspace, channel.name), origins=there).files
        here = tuple(file for file in files if file.name not in there)
        if there and len({uploads.split(url)[0] for url in there.values()}) == 1:
            images, links = _left_in_s3(channel.name, there, folder)
            staged += [images, Staged(name=channel.name, bundle=Bundle((*here, links)), input_mode="File")]
        elif files:
            staged.append(Staged(name=channel.name, bundle=Bundle(files)))
    return staged


def weights(file: Path) -> Staged:
    """Return the channel of a file that our container's training starts from."""
    bundle = Bundle((File(file.name, file, file_sha256(file), file.stat().st_size),))
    return Staged(name=WEIGHTS, bundle=bundle, input_mode="File")


def _left_in_s3(name: str, there: Mapping[str, str], folder: Path) -> tuple[Staged, File]:
    """Return a channel that names images where they lie, and the file that says what each is to a run."""
    bucket = uploads.split(next(iter(there.values())))[0]
    keys = {image: uploads.split(url)[1] for image, url in there.items()}
    target = folder / f"{name}{IMAGES}"
    write_json(target / _NAMED, [{"prefix": f"s3://{bucket}/"}, *sorted(set(keys.values()))])
    write_json(target / LINKS, keys)
    images, links = Bundle.of(target).files
    if images.name != _NAMED:
        images, links = links, images
    named = Staged(name=target.name, bundle=Bundle((images,)), file=_NAMED, data_type="ManifestFile", input_mode="File")
    return named, links


def for_builtin(
    workspace: Workspace, folder: Path, data_format: DataFormat, root: str
) -> tuple[list[Staged], list[str]]:
    """Write training and validation data for the built-in algorithm; returns what to tell, too.

    Images without boxes cannot be in RecordIO files and are left out of these, which is told.
    """
    staged, told = [], []
    for name, data in _parts(workspace, needs_validation=True).items():
        target = folder / name
        if data_format == "recordio":
            full = np.flatnonzero(data.boxes_per_image())
            if len(full) < len(data):
                left = len(data) - len(full)
                told.append(f"{name}: {left} images without boxes are left out, as RecordIO files cannot hold them")
            _write(data.take(full), target, "recordio")
            (target / "train.idx").unlink()
            (target / "classes.txt").unlink()
            staged.append(Staged(name=name, bundle=Bundle.of(target), content_type=_RECORDIO))
        elif data_format == "json":
            _write(data, target, "sagemaker-json")
            staged.append(Staged(name=name, bundle=Bundle.of(target / "train"), content_type=_IMAGE_TYPE))
            annotations = Bundle.of(target / "train_annotation")
            staged.append(Staged(name=f"{name}_annotation", bundle=annotations, content_type=_IMAGE_TYPE))
        else:
            staged.append(_manifest(workspace, name, data, target, root))
    return staged, told


def for_jumpstart(workspace: Workspace, folder: Path, but: Collection[str] = ()) -> list[Staged]:
    """Write training and validation images as one: JumpStart divides what it is given, 80 to 20, by itself.

    Channels that are in ``but`` are left out.
    """
    parts = _parts(workspace, needs_validation=False)
    train, validation = parts["train"], None if "validation" in but else parts.get("validation")
    data = train if validation is None else merge([train, validation], prefixes=["train", "validation"])
    target = folder / "training"
    _write(data, target, "jumpstart")
    (target / "classes.txt").unlink()  # it would be one more file for a script that is not ours
    return [Staged(name="training", bundle=Bundle.of(target))]


def _write(data: Dataset, target: Path, format: str, **options: Any) -> None:
    """Write a data set for a job. What the form does not carry, such as flags, the job has no use for."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DetkitWarning)
        write_dataset(data, target, format, **options)


def _parts(workspace: Workspace, *, needs_validation: bool) -> dict[str, Dataset]:
    found = {name: workspace.dataset(name) for name in ("train", "validation")}
    parts = {name: _plain(data) for name, data in found.items() if data is not None}
    if needs_validation and "validation" not in parts:
        raise UsageError(
            "the built-in algorithm wants validation images; give some (val=, in the command line a second data set)"
        )
    return parts


def _plain(data: Dataset) -> Dataset:
    """Leave out what the data's own files said beside the boxes: ids of classes, keys of other formats."""
    return replace(data, split_indices={}, extra=None, class_extra=None, file_extra={})


def _manifest(workspace: Workspace, name: str, data: Dataset, target: Path, root: str) -> Staged:
    """Write an augmented manifest that names the images where they will lie, or lie already, in S3."""
    there = _origins(workspace, name)
    names = [f"images/{image_id}" for image_id in data.image_ids]
    paths = tuple(there.get(name, path) for name, path in zip(names, data.paths, strict=True))
    data = replace(data, paths=paths)
    # The images' place comes of their contents, and the lines name it, so they are written first.
    _write(data, target / "images-first", "manifest", label=_LABEL)
    written = Bundle.of(target / "images-first", digests=_digests(workspace, name)).files
    images = Bundle(tuple(file for file in written if file.name.startswith("images/")))
    prefix = images.url(root).rstrip("/")
    _write(data, target / "lines", "manifest", label=_LABEL, prefix=prefix)
    lines = Bundle(tuple(file for file in Bundle.of(target / "lines").files if file.name == _LINES))
    return Staged(name=name, bundle=lines, file=_LINES, images=images, attribute_names=("source-ref", _LABEL))


def _digests(workspace: Workspace, channel: str) -> Mapping[str, str]:
    """Return the known sha256 of a channel's image files, by their names in it."""
    data = workspace.dataset(channel)
    if data is None:
        return {}
    known = zip(data.image_ids, workspace.image_digests(channel), strict=True)
    return {f"images/{image_id}": digest for image_id, digest in known}


def _origins(workspace: Workspace, channel: str) -> Mapping[str, str]:
    return {name: url for name, url in workspace.image_origins(channel).items() if url.startswith("s3://")}
