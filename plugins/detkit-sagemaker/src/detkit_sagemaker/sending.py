"""Images on their way into a batch transform: from files, packs or S3, to objects named by their content."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from detkit import images, remote
from detkit.errors import ImageError, UsageError
from detkit.files import file_sha256
from detkit.progress import track
from detkit.recordio import packed
from detkit_sagemaker import uploads
from detkit_sagemaker.answers import Kind, file_to_send, look
from detkit_sagemaker.aws import Aws, explained

_HEADER_BYTES = 1 << 18
"""Of an image in S3; where its header is longer, it is read whole."""


@dataclass(frozen=True)
class Sent:
    """One image, and the object that stands for it."""

    path: str
    """As it was asked for."""
    name: str
    """The object's, below the prefix of all."""
    width: int
    """Pixels as displayed; 0 where only the container needs to know."""
    height: int
    bytes: int
    digest: str = ""
    """sha256 of the image file as it is here; empty for one that lies in S3 only."""


def stage(aws: Aws, sources: Iterable[str | Path], kind: Kind, folder: Path) -> tuple[list[Sent], uploads.Bundle]:
    """Look at all images and return what each is sent as; in S3, nothing is changed.

    What is no file of its own yet is written into ``folder``. Raises `ImageError` for what is no image, and
    `UsageError` where there is none.
    """
    paths = [str(source) for source in sources]
    if not paths:
        raise UsageError("there is no image to predict")
    sent, files = [], {}
    for path in track(paths, "looking at images", total=len(paths)):
        url = remote.origin(path)
        one, file = _in_s3(aws, url, path, kind, folder) if url.startswith("s3://") else _here(path, kind, folder)
        sent.append(one)
        files[file.name] = file
    return sent, uploads.Bundle(tuple(files[name] for name in sorted(files)))


def _here(path: str, kind: Kind, folder: Path) -> tuple[Sent, uploads.File]:
    source = Path(path)
    if packed(path) is not None or remote.is_remote(path):
        return _staged(path, images.read_bytes(path), kind, folder)
    width, height, as_it_is = look(kind, source, path)
    if not as_it_is:
        return _staged(path, source.read_bytes(), kind, folder)
    digest, size = file_sha256(source), source.stat().st_size
    name = digest + source.suffix.lower()
    return Sent(path, name, width, height, size, digest), uploads.File(name, source, digest, size)


def _staged(path: str, content: bytes, kind: Kind, folder: Path) -> tuple[Sent, uploads.File]:
    to_send, width, height = file_to_send(kind, content, path)
    digest = hashlib.sha256(to_send).hexdigest()
    target = folder / digest
    target.write_bytes(to_send)
    original = hashlib.sha256(content).hexdigest()
    return Sent(path, digest, width, height, len(to_send), original), uploads.File(digest, target, digest, len(to_send))


def _in_s3(aws: Aws, url: str, path: str, kind: Kind, folder: Path) -> tuple[Sent, uploads.File]:
    bucket, key = uploads.split(url)
    client = aws.client("s3")
    with explained(f"reading {url} (s3:GetObject)"):
        size = 0 if kind == "detkit" else _HEADER_BYTES
        head = client.head_object(Bucket=bucket, Key=key)
        begin = client.get_object(Bucket=bucket, Key=key, Range=f"bytes=0-{size - 1}")["Body"].read() if size else b""
    digest = hashlib.sha256(f"{url}\n{head['ETag']}\n{head['ContentLength']}".encode()).hexdigest()
    name = digest + PurePosixPath(key).suffix.lower()
    file = uploads.File(name, url, digest, head["ContentLength"], etag=head["ETag"])
    here = Path(path)
    known = file_sha256(here) if here.is_file() else ""
    if kind == "detkit":
        return Sent(path, name, 0, 0, file.bytes, known), file
    with contextlib.suppress(ImageError):  # its header is longer, or it is broken
        width, height, as_it_is = look(kind, begin, url)
        if as_it_is:
            return Sent(path, name, width, height, file.bytes, known), file
    with explained(f"reading {url} (s3:GetObject)"):
        content = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    return _staged(path, content, kind, folder)


def refuse_large(sent: Sequence[Sent], limit: int, hint: str) -> None:
    """Raise `UsageError` for images of more bytes than one request takes."""
    large = [one for one in sent if one.bytes > limit]
    if large:
        shown = ", ".join(f"{one.path} ({one.bytes / 1e6:.1f} MB)" for one in large[:3])
        raise UsageError(f"{len(large)} of {len(sent)} images are larger than {limit / 1e6:.0f} MB: {shown}. {hint}")
