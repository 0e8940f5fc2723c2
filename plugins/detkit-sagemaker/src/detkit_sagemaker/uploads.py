"""Files on their way to S3. They lie there by their content, so what is there already does not travel again."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from detkit.errors import DetkitWarning, UsageError
from detkit.files import file_sha256
from detkit.progress import track
from detkit_sagemaker import resources
from detkit_sagemaker.aws import Aws, AwsError, code_of, explained
from detkit_sagemaker.ledger import Entry, Ledger

_AT_ONCE = 8
_MISSING = {"404", "NoSuchBucket", "NotFound"}

_CALLED = "?uploadId="
"""In the ledger, before what S3 calls an upload."""

_IN_PARTS = 8 * 1024 * 1024
"""Bytes from which a file travels in parts (boto3's own default). S3 keeps, unseen, what was sent of one that was
killed, and bills it."""

_BEGUN_WITHIN_S = 120.0
"""So far from its line in the ledger an upload may have begun at S3 whose process was killed before S3 had named it."""


@dataclass(frozen=True)
class File:
    """A file that is to lie in S3."""

    name: str
    """Its path below the bundle's, with ``/``."""
    source: Path | str
    """A file here, or the ``s3://`` URL of one that is copied over there and does not travel."""
    sha256: str
    """Of its content; of whatever names that where ``etag`` does."""
    bytes: int
    etag: str = ""
    """What S3 says of a file that lies there."""


@dataclass(frozen=True)
class Bundle:
    """Files that are used together; they lie below one prefix, which their names and contents give."""

    files: tuple[File, ...]

    @classmethod
    def of(
        cls, folder: Path, *, digests: Mapping[str, str] | None = None, origins: Mapping[str, str] | None = None
    ) -> Bundle:
        """Take all files below a folder. ``digests`` are known sha256 by name, ``origins`` URLs of files in S3."""
        digests, origins = digests or {}, origins or {}
        found = []
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            digest, size = digests.get(name) or file_sha256(path), path.stat().st_size
            found.append(
                File(name, origins[name], digest, size, _etag(path))
                if name in origins
                else File(name, path, digest, size)
            )
        return cls(tuple(found))

    @cached_property
    def digest(self) -> str:
        """sha256 over all names and contents, shortened."""
        listed = [[file.name, file.sha256] for file in self.files]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:32]

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    def url(self, root: str) -> str:
        """Return the prefix below an S3 folder, with a slash at its end."""
        return f"{root.rstrip('/')}/data/{self.digest}/"

    def missing(self, aws: Aws, root: str) -> tuple[File, ...]:
        """Return the files that do not lie there yet; only looks."""
        there = dict(objects(aws, self.url(root)))
        return tuple(file for file in self.files if there.get(file.name) != file.bytes)

    def upload(self, aws: Aws, root: str, kms_key: str | None = None) -> str:
        """Bring there what is missing, and return the prefix. Killed half-way, it goes on where it was.

        The same files are there already; where one of them is another, all of the set travel once more.
        """
        url, missing = self.url(root), self.missing(aws, root)
        clear_abandoned(aws)

        def bring(file: File) -> None:
            if isinstance(file.source, str):
                _copy(aws, file, url + file.name, kms_key)
            else:
                _send(aws, url + file.name, file.source, kms_key)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            running = [pool.submit(bring, file) for file in missing]
            try:
                for done in track(running, "uploading", total=len(running)):
                    done.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        return url


def split(url: str) -> tuple[str, str]:
    """Return bucket and key of an ``s3://`` URL. Raises `UsageError` for anything else."""
    parts = urlsplit(url, allow_fragments=False)
    if parts.scheme != "s3" or not parts.netloc:
        raise UsageError(f"{url!r} is no place in S3; expected s3://BUCKET/FOLDER")
    return parts.netloc, url.removeprefix(f"s3://{parts.netloc}").removeprefix("/")


def objects(aws: Aws, url: str) -> Iterator[tuple[str, int]]:
    """Yield name below the prefix, and size in bytes, of every object there; none where there is no such bucket."""
    bucket, prefix = split(url)
    pages = aws.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    try:
        with explained(f"listing {url} (s3:ListBucket)"):
            for page in pages:
                for item in page.get("Contents", ()):
                    yield item["Key"][len(prefix) :], item["Size"]
    except Exception as error:
        if code_of(error) not in _MISSING:
            raise


def put(aws: Aws, url: str, body: bytes, kms_key: str | None = None) -> None:
    """Write one object."""
    bucket, key = split(url)
    with explained(f"writing {url} (s3:PutObject)"):
        aws.client("s3").put_object(Bucket=bucket, Key=key, Body=body, **_encrypted(kms_key))


def put_file(aws: Aws, url: str, source: Path, kms_key: str | None = None) -> None:
    """Write a file, in parts where it is large."""
    clear_abandoned(aws)
    _send(aws, url, source, kms_key)


def clear_abandoned(aws: Aws) -> None:
    """Remove what S3 keeps of files that processes of this machine, which are no more, were sending in parts.

    Warns where that is refused, and the ledger keeps it for later.
    """
    ledger = Ledger.of(aws)
    for entry in ledger.pending():
        if entry.kind == "upload" and entry.is_abandoned:
            try:
                _clear(aws, entry)
            except AwsError as error:
                told = f"{error}; parts of a file that was not sent whole stay there, and are billed"
                warnings.warn(told, DetkitWarning, stacklevel=2)
            else:
                ledger.gone("upload", entry.name)


def _send(aws: Aws, url: str, source: Path, kms_key: str | None) -> None:
    """Write a file. While it travels in parts, the ledger has lines, which an upload that fails leaves there."""
    from boto3.s3.transfer import TransferConfig

    s3, (bucket, key) = aws.client("s3"), split(url)
    how = TransferConfig(multipart_threshold=_IN_PARTS)
    with explained(f"writing {url} (s3:PutObject)"), _noted(aws, s3, url, in_parts=source.stat().st_size >= _IN_PARTS):
        s3.upload_file(str(source), bucket, key, ExtraArgs=_encrypted(kms_key), Config=how)


@contextlib.contextmanager
def _noted(aws: Aws, s3: Any, url: str, *, in_parts: bool) -> Iterator[None]:
    """Keep in the ledger what is sent in parts: that it begins, and what S3 has called it, until it is there."""
    if not in_parts:
        yield
        return
    ledger, names = Ledger.of(aws), [f"{url}#{secrets.token_hex(4)}"]
    ledger.creating("upload", names[0])

    def note(parsed: Mapping[str, Any], **_: object) -> None:
        if parsed.get("UploadId") and url == f"s3://{parsed['Bucket']}/{parsed['Key']}":
            names.append(f"{url}{_CALLED}{parsed['UploadId']}")
            ledger.creating("upload", names[-1])
            ledger.gone("upload", names[0])

    event = ("after-call.s3.CreateMultipartUpload", note, names[0])
    s3.meta.events.register(*event)
    try:
        yield
    finally:
        s3.meta.events.unregister(*event)
    for name in names:
        ledger.gone("upload", name)


def _copy(aws: Aws, file: File, url: str, kms_key: str | None) -> None:
    """Copy within S3 what is there still as it was looked at. Raises `UsageError` where it is another file by now."""
    bucket, key = split(url)
    origin = dict(zip(("Bucket", "Key"), split(str(file.source)), strict=True))
    s3 = aws.client("s3")

    def copy(etag: str) -> bool:
        try:
            s3.copy_object(
                CopySource=origin,
                CopySourceIfMatch=etag,
                Bucket=bucket,
                Key=key,
                TaggingDirective="REPLACE",  # tags would need permissions of their own
                **_encrypted(kms_key),
            )
        except s3.exceptions.ClientError as error:
            if code_of(error) != "PreconditionFailed":
                raise
            return False
        return True

    with explained(f"copying {file.source} to {url} (s3:GetObject, s3:PutObject)"):
        if copy(file.etag):
            return
        # Of what was sent in parts, or encrypted with a key of KMS, the ETag is no MD5: then its content says it.
        found = s3.get_object(**origin)
        is_same = hashlib.sha256(found["Body"].read()).hexdigest() == file.sha256
        if not (is_same and copy(found["ETag"])):
            raise UsageError(f"{file.source} is another image than when it was looked at; begin anew")


def _etag(path: Path) -> str:
    """Return what S3 says of a file that was sent whole and is not encrypted with a key of KMS."""
    with path.open("rb") as file:
        return f'"{hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()}"'


def _clear(aws: Aws, entry: Entry) -> None:
    """Abort an upload that S3 has named, or of which it is only known when it began. Raises `AwsError`."""
    url, _, upload_id = entry.name.partition(_CALLED)
    url = url if upload_id else entry.name.rpartition("#")[0]
    bucket, key = split(url)
    s3 = aws.client("s3")
    with explained(f"clearing what was left of {url} (s3:ListBucketMultipartUploads, s3:AbortMultipartUpload)"):
        ids = [upload_id] if upload_id else _begun_then(s3, bucket, key, entry.t)
        for one in ids:
            try:
                s3.abort_multipart_upload(Bucket=bucket, Key=key, UploadId=one)
            except s3.exceptions.ClientError as error:
                if code_of(error) not in {*_MISSING, "NoSuchUpload"}:
                    raise


def _begun_then(s3: Any, bucket: str, key: str, t: float) -> list[str]:
    try:
        pages = list(s3.get_paginator("list_multipart_uploads").paginate(Bucket=bucket, Prefix=key))
    except s3.exceptions.ClientError as error:
        if code_of(error) in _MISSING:
            return []
        raise
    found = [upload for page in pages for upload in page.get("Uploads", ()) if upload["Key"] == key]
    return [one["UploadId"] for one in found if abs(one["Initiated"].timestamp() - t) < _BEGUN_WITHIN_S]


def _encrypted(kms_key: str | None) -> dict[str, str]:
    return {} if kms_key is None else {"ServerSideEncryption": "aws:kms", "SSEKMSKeyId": kms_key}


def get(aws: Aws, url: str, target: Path) -> None:
    """Fetch one object into a file, beside and then renamed."""
    bucket, key = split(url)
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.part")
    try:
        with explained(f"reading {url} (s3:GetObject)"):
            aws.client("s3").download_file(bucket, key, str(beside))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


def ensure_bucket(aws: Aws, url: str) -> None:
    """Create the account's own default bucket where it is not there; any other one has to be."""
    bucket, _ = split(url)
    s3 = aws.client("s3")
    try:
        with explained(f"looking for the bucket {bucket} (s3:HeadBucket)"):
            # The default one's name can be guessed, so it may be somebody else's.
            s3.head_bucket(Bucket=bucket, **({"ExpectedBucketOwner": aws.account} if bucket == aws.bucket else {}))
    except Exception as error:
        if code_of(error) not in _MISSING:
            raise
        if bucket != aws.bucket:
            raise UsageError(
                f"there is no bucket {bucket}; create it, or leave output= out for {aws.bucket}"
            ) from error
        place = {} if aws.region == "us-east-1" else {"CreateBucketConfiguration": {"LocationConstraint": aws.region}}
        resources.ensure(aws, "bucket", {"Bucket": bucket, **place})


def total(bundles: Iterable[tuple[Bundle, tuple[File, ...]]]) -> dict[str, int]:
    """Add up what travels and what is there, as `detkit.plans.Plan.uploads` has it."""
    counts = {"bytes": 0, "files": 0, "bytes_there": 0, "files_there": 0}
    for bundle, missing in bundles:
        travels = [file for file in missing if isinstance(file.source, Path)]
        counts["bytes"] += sum(file.bytes for file in travels)
        counts["files"] += len(travels)
        counts["bytes_there"] += bundle.bytes - sum(file.bytes for file in travels)
        counts["files_there"] += len(bundle.files) - len(travels)
    return counts
