"""What a training job reads: a run's data in the form that each kind of model wants, ready to travel to S3."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
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
from detkit.plans import MEGABYTE
from detkit_sagemaker import uploads
from detkit_sagemaker.container.training import IMAGES, LINKS, WEIGHTS
from detkit_sagemaker.requests import Channel
from detkit_sagemaker.uploads import Bundle, File

DataFormat = Literal["recordio", "json", "manifest"]

_IMAGE_TYPE = "application/x-image"
_RECORDIO = "application/x-recordio"
_FOLDER = "images/"
"""Of a channel's images that are files of their own."""
_LABEL = "bounding-box"
_LINES = "output.manifest"
_NAMED = "images.manifest"
_SHUFFLE_SEED = 0
"""Streamed training images come in another order in each epoch; without, in that of the data's files."""


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
    left: tuple[File, ...] = ()
    """Images that the file names where they lie in S3."""

    @property
    def bundles(self) -> list[Bundle]:
        """All that has to lie in S3."""
        return [bundle for bundle in (self.images, self.bundle) if bundle is not None]

    @property
    def bytes_on_disk(self) -> int:
        """What each machine has of it on its disk where data is copied first; what is streamed, it has not."""
        files = [*self.left, *(file for bundle in self.bundles for file in bundle.files)]
        return 0 if self.attribute_names else sum(file.bytes for file in files)

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
                shuffle_seed=_SHUFFLE_SEED if self.name == "train" else None,
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
        there = _in_s3(workspace, channel.name)
        urls = {name: str(file.source) for name, file in there.items()}
        left = there if len({uploads.split(url)[0] for url in urls.values()}) == 1 else {}
        copied = {} if left else urls
        files = Bundle.of(channel, digests=_digests(workspace, channel.name), origins=copied).files
        if left:
            images, links = _left_in_s3(channel.name, left, folder)
            here = tuple(file for file in files if file.name not in left)
            staged += [images, Staged(name=channel.name, bundle=Bundle((*here, links)), input_mode="File")]
        elif files:
            staged.append(Staged(name=channel.name, bundle=Bundle(files)))
    return staged


def weights(file: Path) -> Staged:
    """Return the channel of a file that our container's training starts from."""
    bundle = Bundle((File(file.name, file, file_sha256(file), file.stat().st_size),))
    return Staged(name=WEIGHTS, bundle=bundle, input_mode="File")


def _left_in_s3(name: str, there: Mapping[str, File], folder: Path) -> tuple[Staged, File]:
    """Return a channel that names images where they lie, and the file that says what each is to a run."""
    places = {image: uploads.split(str(file.source)) for image, file in there.items()}
    ((bucket, _), *_) = places.values()
    keys = {image: key for image, (_, key) in places.items()}
    named = _named(f"{name}{IMAGES}", f"s3://{bucket}/", sorted(set(keys.values())), folder)
    write_json(folder / f"{name}-links" / LINKS, keys)
    (links,) = Bundle.of(folder / f"{name}-links").files
    return replace(named, left=tuple(there.values())), links


def _named(name: str, prefix: str, objects: Sequence[str], folder: Path) -> Staged:
    """Return a channel of objects that lie in S3, in which each has its name below the prefix."""
    write_json(folder / f"{name}-named" / _NAMED, [{"prefix": prefix}, *objects])
    bundle = Bundle.of(folder / f"{name}-named")
    return Staged(name=name, bundle=bundle, file=_NAMED, data_type="ManifestFile", input_mode="File")


def are_in_s3(workspace: Workspace) -> bool:
    """Return whether all images of a run lie in S3 already."""
    parts = _parts(workspace, needs_validation=False)
    return all(len(_in_s3(workspace, name)) == len(data) for name, data in parts.items())


def for_builtin(
    workspace: Workspace, folder: Path, data_format: DataFormat, root: str, *, full_only: bool = False
) -> tuple[list[Staged], list[str]]:
    """Write training and validation data for the built-in algorithm; returns what to tell, too.

    Images without boxes cannot be in RecordIO files and are left out of these, and with ``full_only`` of a manifest,
    which is told.
    """
    staged, told = [], []
    for name, whole in _parts(workspace, needs_validation=True).items():
        target, data = folder / name, whole
        if full_only or data_format == "recordio":
            data = whole.take(np.flatnonzero(whole.boxes_per_image()))
            if left := len(whole) - len(data):
                why = "RecordIO files cannot hold them" if data_format == "recordio" else "jobs have failed on such"
                told.append(f"{name}: {left} images without boxes are left out, as {why}")
        if data_format == "recordio":
            there = _in_s3(workspace, name)
            again = [file for image_id in data.image_ids if (file := there.get(_FOLDER + image_id)) is not None]
            if again:
                told.append(
                    f"{name}: {_counted(again)} in S3 are packed anew and uploaded, as RecordIO files hold the images; "
                    "data_format=manifest leaves them where they lie"
                )
            _write(data, target, "recordio")
            (target / "train.idx").unlink()
            (target / "classes.txt").unlink()
            staged.append(Staged(name=name, bundle=Bundle.of(target), content_type=_RECORDIO))
        elif data_format == "json":
            _write(data, target, "sagemaker-json")
            staged.append(_json_images(workspace, name, data, target))
            annotations = Bundle.of(target / "train_annotation")
            staged.append(Staged(name=f"{name}_annotation", bundle=annotations, content_type=_IMAGE_TYPE))
        else:
            staged.append(_manifest(workspace, name, data, target, root))
    return staged, told


def _json_images(workspace: Workspace, name: str, data: Dataset, written: Path) -> Staged:
    """Return the channel of the images that JSON files are about, which call each by its id.

    Where all of them lie below one folder of S3, by their ids, they stay there; else those in S3 are copied over there.
    """
    there = {place.removeprefix(_FOLDER): file for place, file in _in_s3(workspace, name).items()}
    urls = {image_id: str(file.source) for image_id, file in there.items()}
    folders = {url.removesuffix(image_id) if url.endswith(f"/{image_id}") else "" for image_id, url in urls.items()}
    if len(there) == len(data) and len(folders) == 1 and all(folders):
        named = _named(name, folders.pop(), list(there), written)
        return replace(named, content_type=_IMAGE_TYPE, left=tuple(there.values()))
    digests = {place.removeprefix(_FOLDER): digest for place, digest in _digests(workspace, name).items()}
    bundle = Bundle.of(written / "train", digests=digests, origins=urls)
    return Staged(name=name, bundle=bundle, content_type=_IMAGE_TYPE)


def for_jumpstart(
    workspace: Workspace, folder: Path, but: Collection[str] = ()
) -> tuple[list[Staged], tuple[str, ...]]:
    """Write training and validation images as one: JumpStart divides what it is given, 80 to 20, by itself.

    Returns the classes, too, in the order of their numbers: those that occur, as the form has no place for others, and
    nothing says whether its scripts count them. Channels that are in ``but`` are left out. As it takes one folder,
    images that lie in S3 are copied over there.
    """
    parts = _parts(workspace, needs_validation=False)
    train, validation = parts["train"], None if "validation" in but else parts.get("validation")
    if validation is None:
        data, folders = train, {"train": _FOLDER}
    else:
        data = merge([train, validation], prefixes=["train", "validation"])
        folders = {name: f"{_FOLDER}{name}/" for name in ("train", "validation")}
    data = data.with_classes([name for name, count in data.boxes_per_class().items() if count])
    urls, digests = dict[str, str](), dict[str, str]()
    for name, new in folders.items():
        files = _in_s3(workspace, name)
        urls |= {new + place.removeprefix(_FOLDER): str(file.source) for place, file in files.items()}
        known = _digests(workspace, name)
        digests |= {new + place.removeprefix(_FOLDER): digest for place, digest in known.items()}
    target = folder / "training"
    _write(data, target, "jumpstart")
    (target / "classes.txt").unlink()  # it would be one more file for a script that is not ours
    return [Staged(name="training", bundle=Bundle.of(target, digests=digests, origins=urls))], data.classes


def of_images_in_s3(staged: Sequence[Staged]) -> list[str]:
    """Return what happens to images that lie in S3 already and do not travel, to be told; nothing where none does."""
    left = [file for one in staged for file in one.left]
    copied = [file for one in staged for bundle in one.bundles for file in bundle.files if isinstance(file.source, str)]
    told = [f"{_counted(left)} stay where they lie in S3: 0 bytes of them are uploaded"] if left else []
    if copied:
        told.append(f"{_counted(copied)} are copied within S3, once: 0 bytes of them are uploaded")
    return told


def _counted(images: Sequence[File]) -> str:
    return f"{len(images)} images ({sum(file.bytes for file in images) / MEGABYTE:.1f} MB)"


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
    there = _in_s3(workspace, name)
    found = [there.get(_FOLDER + image_id) for image_id in data.image_ids]
    paths = tuple(path if file is None else str(file.source) for file, path in zip(found, data.paths, strict=True))
    data = replace(data, paths=paths)
    # The images' place comes of their contents, and the lines name it, so they are written first.
    _write(data, target / "images-first", "manifest", label=_LABEL)
    written = Bundle.of(target / "images-first", digests=_digests(workspace, name)).files
    images = Bundle(tuple(file for file in written if file.name.startswith(_FOLDER)))
    prefix = images.url(root).rstrip("/")
    _write(data, target / "lines", "manifest", label=_LABEL, prefix=prefix)
    lines = Bundle(tuple(file for file in Bundle.of(target / "lines").files if file.name == _LINES))
    return Staged(
        name=name,
        bundle=lines,
        file=_LINES,
        images=images,
        attribute_names=("source-ref", _LABEL),
        left=tuple(file for file in found if file is not None),
    )


def _digests(workspace: Workspace, channel: str) -> Mapping[str, str]:
    """Return the known sha256 of a channel's image files, by their names in it."""
    data = workspace.dataset(channel)
    if data is None:
        return {}
    known = zip(data.image_ids, workspace.image_digests(channel), strict=True)
    return {_FOLDER + image_id: digest for image_id, digest in known}


def _in_s3(workspace: Workspace, channel: str) -> dict[str, File]:
    """Return a channel's images that were read from S3, by their names in it."""
    urls = {name: url for name, url in workspace.image_origins(channel).items() if url.startswith("s3://")}
    folder, digests = workspace.channel(channel), _digests(workspace, channel)
    return {name: File(name, url, digests[name], (folder / name).stat().st_size) for name, url in urls.items()}
