"""Files on their way to S3: only what is missing travels, encrypted as asked, to a bucket of one's own."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from detkit.errors import StorageError
from detkit_sagemaker import preflight, uploads
from detkit_sagemaker.aws import Aws, AwsError, explained
from detkit_sagemaker.options import SagemakerOptions
from detkit_sagemaker.testing import Simulator


def bundle(folder: Path) -> uploads.Bundle:
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    (folder / "deep/b.txt").write_text("bb")
    return uploads.Bundle.of(folder)


def test_only_what_is_missing_travels_and_is_encrypted(simulator: Simulator, tmp_path: Path) -> None:
    aws, files = Aws(), bundle(tmp_path / "files")
    root = f"s3://{simulator.bucket}/detkit"
    key = "arn:aws:kms:us-east-1:123456789012:key/mine"
    assert len(files.missing(aws, root)) == 2
    url = files.upload(aws, root, key)
    assert dict(uploads.objects(aws, url)) == {"a.txt": 1, "deep/b.txt": 2}
    assert not files.missing(aws, root)
    bucket, prefix = uploads.split(url)
    head = aws.client("s3").head_object(Bucket=bucket, Key=f"{prefix}a.txt")
    assert (head["ServerSideEncryption"], head["SSEKMSKeyId"]) == ("aws:kms", key)
    aws.client("s3").delete_object(Bucket=bucket, Key=f"{prefix}a.txt")
    assert [file.name for file in files.missing(aws, root)] == ["a.txt"]
    uploads.get(aws, f"{url}deep/b.txt", tmp_path / "back")
    assert (tmp_path / "back").read_text() == "bb"


def test_files_in_s3_are_copied_there(simulator: Simulator) -> None:
    aws, root = Aws(), f"s3://{simulator.bucket}/detkit"
    uploads.put(aws, f"s3://{simulator.bucket}/theirs/x.jpg", b"pixels")
    files = uploads.Bundle((uploads.File("x.jpg", f"s3://{simulator.bucket}/theirs/x.jpg", "0" * 64, 6),))
    assert uploads.total([(files, files.missing(aws, root))])["bytes"] == 0
    assert dict(uploads.objects(aws, files.upload(aws, root))) == {"x.jpg": 6}


def test_trouble_of_this_machine_is_told_as_such(simulator: Simulator, tmp_path: Path) -> None:
    aws = Aws()
    uploads.put(aws, f"s3://{simulator.bucket}/x", b"1")
    (tmp_path / "blocked").write_text("a file where a folder should be")
    with pytest.raises((StorageError, OSError)) as caught:
        uploads.get(aws, f"s3://{simulator.bucket}/x", tmp_path / "blocked/x")
    assert "network" not in str(caught.value)
    with pytest.raises(StorageError), explained("reading x"):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(AwsError, match="network"), explained("reading x"):
        raise ConnectionResetError("reset by peer")


def test_data_has_to_fit_on_the_disk() -> None:
    assert not preflight.volume(SagemakerOptions(), 30, 10**9)
    assert preflight.volume(SagemakerOptions(), 30, 40 * 10**9)[0].level == "error"
    assert not preflight.volume(SagemakerOptions(input_mode="fastfile"), 30, 40 * 10**9)


def test_the_built_in_algorithm_takes_no_fastfile() -> None:
    found = preflight.machine("builtin", SagemakerOptions(input_mode="fastfile"), "ml.g4dn.xlarge")
    assert [concern.level for concern in found] == ["error"]
