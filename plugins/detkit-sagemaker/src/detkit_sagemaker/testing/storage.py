"""S3 as the platform uses it: objects under a prefix, folders down and up, archives of models and outputs."""

from __future__ import annotations

import json
import re
import shutil
import tarfile
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

from detkit_sagemaker.testing.refusals import Refused

_UPLOAD_ID = re.compile(rb"<UploadId>(?P<id>[^<]+)</UploadId>")
_UPLOAD = re.compile(rb"(?P<before>" + _UPLOAD_ID.pattern + rb".*?<Initiated>)(?P<time>[^<]*)", re.DOTALL)


class Item(NamedTuple):
    """One object of a data source: where it is, and its path relative to the source."""

    bucket: str
    key: str
    path: str
    size: int


class Storage:
    """The simulator's S3."""

    def __init__(self, s3: Any) -> None:
        self._s3 = s3

    def items(self, uri: str, kind: str = "S3Prefix") -> list[Item]:
        """Return the objects of an ``S3Prefix`` or of a ``ManifestFile``. Raises `Refused` where there are none."""
        if kind == "ManifestFile":
            return self._in_manifest(uri)
        bucket, prefix = split(uri)
        found = [
            Item(bucket, item["Key"], relative(item["Key"], prefix), item["Size"])
            for item in self._listed(bucket, prefix)
            if not item["Key"].endswith("/")
        ]
        if not found:
            raise Refused(
                f'No S3 objects found under S3 URL "{uri}" given in input data source. Please ensure that the bucket '
                "exists in the selected region, that objects exist under that S3 prefix, and that the role has "
                f'"s3:ListBucket" permissions on bucket "{bucket}".'
            )
        return found

    def _in_manifest(self, uri: str) -> list[Item]:
        try:
            first, *names = json.loads(self.read(uri))
            start = first["prefix"]
        except (ValueError, TypeError, KeyError) as error:
            raise Refused(f'{uri} is no manifest: expected [{{"prefix": "s3://..."}}, "name", ...]') from error
        items = []
        for name in names:
            bucket, key = split(start + name)
            items.append(Item(bucket, key, name, self.size(bucket, key)))
        return items

    def _listed(self, bucket: str, prefix: str) -> list[dict[str, Any]]:
        from botocore.exceptions import ClientError

        found: list[dict[str, Any]] = []
        try:
            for page in self._s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
                found += page.get("Contents", [])
        except ClientError as error:
            raise Refused(f'Could not access S3 bucket "{bucket}": {error.response["Error"]["Code"]}') from error
        return found

    def check_bucket(self, uri: str) -> None:
        """Raise `Refused` where the bucket of a URI does not exist."""
        from botocore.exceptions import ClientError

        bucket, _ = split(uri)
        try:
            self._s3.head_bucket(Bucket=bucket)
        except ClientError as error:
            raise Refused(f'S3 bucket "{bucket}" of {uri} does not exist, or access is denied') from error

    def size(self, bucket: str, key: str) -> int:
        """Return the size of an object in bytes. Raises `Refused` where it is missing."""
        from botocore.exceptions import ClientError

        try:
            return int(self._s3.head_object(Bucket=bucket, Key=key)["ContentLength"])
        except ClientError as error:
            raise Refused(f"No S3 object found at s3://{bucket}/{key}") from error

    def require_etag(self, source: str, etag: str) -> None:
        """Raise `Refused` where an object, ``bucket/key``, is another one by now; moto does not look."""
        from botocore.exceptions import ClientError

        bucket, _, key = source.lstrip("/").partition("/")
        try:
            there = self._s3.head_object(Bucket=bucket, Key=key)["ETag"]
        except ClientError:  # moto says so
            return
        if there != etag:
            raise Refused("At least one of the pre-conditions you specified did not hold", "PreconditionFailed", 412)

    def read(self, uri: str) -> bytes:
        """Return an object's bytes. Raises `Refused` where it is missing."""
        from botocore.exceptions import ClientError

        bucket, key = split(uri)
        try:
            with self._s3.get_object(Bucket=bucket, Key=key)["Body"] as body:
                content: bytes = body.read()
        except ClientError as error:
            raise Refused(f"No S3 object found at {uri}") from error
        return content

    def write(self, uri: str, content: bytes, content_type: str = "binary/octet-stream") -> None:
        """Write an object."""
        bucket, key = split(uri)
        self._s3.put_object(Bucket=bucket, Key=key, Body=content, ContentType=content_type)

    def download(self, items: list[Item], folder: Path) -> None:
        """Write the objects into a folder, by their relative paths."""
        for item in items:
            target = folder / item.path
            if not target.resolve().is_relative_to(folder.resolve()):
                raise Refused(f"s3://{item.bucket}/{item.key} would be written outside of its folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with self._s3.get_object(Bucket=item.bucket, Key=item.key)["Body"] as body, target.open("wb") as file:
                shutil.copyfileobj(body, file)

    def restore(self, uri: str, folder: Path) -> None:
        """Copy what is below a prefix, if anything, into a folder."""
        bucket, prefix = split(uri.rstrip("/") + "/")
        found = self._listed(bucket, prefix)
        items = [Item(bucket, item["Key"], item["Key"].removeprefix(prefix), item["Size"]) for item in found]
        self.download([item for item in items if item.path and not item.path.endswith("/")], folder)

    def upload(self, file: Path, uri: str) -> None:
        """Upload a file."""
        bucket, key = split(uri)
        with file.open("rb") as body:
            self._s3.put_object(Bucket=bucket, Key=key, Body=body)

    def upload_folder(self, folder: Path, uri: str) -> None:
        """Upload a folder's files below a prefix."""
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                self.upload(file, f"{uri.rstrip('/')}/{file.relative_to(folder).as_posix()}")


class Begun:
    """When each upload in parts began: moto names one day of 2010 for all of them."""

    TOLD_OF = ("CreateMultipartUpload", "ListMultipartUploads")

    def __init__(self) -> None:
        self._times: dict[bytes, bytes] = {}

    def heard(self, operation: str, answer: bytes) -> bytes:
        """Take moto's answer, and return what AWS would say."""
        if operation == "ListMultipartUploads":
            return _UPLOAD.sub(lambda found: found["before"] + self._times.get(found["id"], found["time"]), answer)
        if found := _UPLOAD_ID.search(answer):
            now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
            self._times[found["id"]] = now.replace("+00:00", "Z").encode()
        return answer


def split(uri: str) -> tuple[str, str]:
    """Return bucket and key of ``s3://bucket/key``. Raises `Refused` for anything else."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    if scheme != "s3" or not bucket:
        raise Refused(f"{uri} is no S3 URI, expected s3://bucket/key")
    return bucket, key


def relative(key: str, prefix: str) -> str:
    """Return where an object of a prefix lies in its channel.

    A prefix is any start of a key: ``data/train`` also covers ``data/train_annotation/a.json``. What is not below
    ``prefix/`` keeps the last part of the prefix in its path.
    """
    rest = key.removeprefix(prefix)
    if not prefix or prefix.endswith("/") or rest.startswith("/"):
        return rest.lstrip("/")
    return key[prefix.rfind("/") + 1 :]


def pack(folders: list[Path], archive: Path) -> None:
    """Write the content of folders into one ``.tar.gz``."""
    with tarfile.open(archive, "w:gz", compresslevel=1) as tar:
        for folder in folders:
            for path in sorted(folder.iterdir()):
                tar.add(path, arcname=path.name)


def unpack(archive: Path, folder: Path) -> None:
    """Unpack a ``.tar.gz`` into a folder. Raises `tarfile.TarError` or `OSError` where it is none, or unsafe."""
    with tarfile.open(archive, "r:gz") as tar:
        tar.extractall(folder, filter="data")


def is_empty(folder: Path) -> bool:
    """Whether a folder is missing or holds nothing."""
    return not folder.is_dir() or next(folder.iterdir(), None) is None


def protect(folder: Path) -> None:
    """Make a folder read-only, with all that is in it."""
    for path in [folder, *folder.rglob("*")]:
        path.chmod(0o555 if path.is_dir() else 0o444)
