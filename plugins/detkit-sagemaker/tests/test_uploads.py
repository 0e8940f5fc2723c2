"""Files on their way to S3: only what is missing travels, encrypted as asked, to a bucket of one's own."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import boto3
import pytest

from detkit.errors import DetkitWarning, StorageError, UsageError
from detkit_sagemaker import preflight, uploads
from detkit_sagemaker.aws import Aws, AwsError, explained
from detkit_sagemaker.ledger import Ledger
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
    etag = aws.client("s3").head_object(Bucket=simulator.bucket, Key="theirs/x.jpg")["ETag"]
    file = uploads.File("x.jpg", f"s3://{simulator.bucket}/theirs/x.jpg", "any", 6, etag)
    files = uploads.Bundle((file,))
    assert uploads.total([(files, files.missing(aws, root))])["bytes"] == 0
    assert dict(uploads.objects(aws, files.upload(aws, root))) == {"x.jpg": 6}


def test_a_file_that_is_another_one_by_now_is_not_copied(simulator: Simulator, tmp_path: Path) -> None:
    aws, root, source = Aws(), f"s3://{simulator.bucket}/detkit", f"s3://{simulator.bucket}/theirs/x.jpg"
    (tmp_path / "files").mkdir()
    (tmp_path / "files/x.jpg").write_bytes(b"pixels")
    files = uploads.Bundle.of(tmp_path / "files", origins={"x.jpg": source})
    uploads.put(aws, source, b"pixelz")
    with pytest.raises(UsageError, match=r"theirs/x.jpg is another image than when it was looked at"):
        files.upload(aws, root)
    assert len(files.missing(aws, root)) == 1
    uploads.put(aws, source, b"pixels")
    calls = len(simulator.calls)
    url = files.upload(aws, root)
    assert "GetObject" not in simulator.calls[calls:]
    uploads.get(aws, f"{url}x.jpg", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"pixels"


def test_a_file_whose_etag_is_no_md5_is_copied_by_its_content(simulator: Simulator, tmp_path: Path) -> None:
    aws, root, source = Aws(), f"s3://{simulator.bucket}/detkit", f"s3://{simulator.bucket}/theirs/x.jpg"
    (tmp_path / "files").mkdir()
    (tmp_path / "files/x.jpg").write_bytes(bytes(6 << 20))
    files = uploads.Bundle.of(tmp_path / "files", origins={"x.jpg": source})
    s3 = boto3.client("s3")
    place = {"Bucket": simulator.bucket, "Key": "theirs/x.jpg"}
    upload = s3.create_multipart_upload(**place)["UploadId"]
    halves = [
        {"PartNumber": n, "ETag": s3.upload_part(**place, UploadId=upload, PartNumber=n, Body=bytes(size))["ETag"]}
        for n, size in ((1, 5 << 20), (2, 1 << 20))
    ]
    s3.complete_multipart_upload(**place, UploadId=upload, MultipartUpload={"Parts": halves})
    assert s3.head_object(**place)["ETag"].endswith('-2"')
    files.upload(aws, root)
    assert not files.missing(aws, root)


SEND = """
import sys
import time
from pathlib import Path
from detkit_sagemaker import uploads
from detkit_sagemaker.aws import Aws
uploads.Bundle.of(Path(sys.argv[1])).upload(Aws(), sys.argv[2])
"""


def parts_in(bucket: str) -> list[dict[str, Any]]:
    """Return the uploads in parts that S3 takes for being under way."""
    return list(boto3.client("s3").list_multipart_uploads(Bucket=bucket).get("Uploads", []))


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A folder with a file that travels in parts."""
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "pack.rec").write_bytes(bytes(17 * 1024 * 1024))
    return folder


def be_killed(simulator: Simulator, folder: Path, root: str, when: str, operation: str) -> None:
    """Let a process send a folder that is killed at a call."""
    with subprocess.Popen([sys.executable, "-c", SEND, str(folder), root], env=dict(os.environ)) as process:
        getattr(simulator.faults, f"crash_{when}")(operation, process.kill)
        assert process.wait(timeout=60) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("when", "operation"), [("after", "CreateMultipartUpload"), ("before", "UploadPart"), ("after", "UploadPart")]
)
def test_parts_of_a_file_whose_sender_was_killed_do_not_stay(
    simulator: Simulator, large: Path, when: str, operation: str
) -> None:
    aws, root = Aws(), f"s3://{simulator.bucket}/detkit"
    be_killed(simulator, large, root, when, operation)
    assert len(parts_in(simulator.bucket)) == 1
    (begun,) = Ledger.of(aws).pending()
    assert (begun.kind, begun.is_abandoned) == ("upload", True)
    files = uploads.Bundle.of(large)
    assert dict(uploads.objects(aws, files.upload(aws, root))) == {"pack.rec": 17 * 1024 * 1024}
    assert parts_in(simulator.bucket) == []
    assert Ledger.of(aws).pending() == []


@pytest.mark.parametrize("operation", ["CreateMultipartUpload", "UploadPart"])
def test_what_others_are_sending_goes_on(simulator: Simulator, large: Path, operation: str) -> None:
    """Also the same file, from another machine; what may not be cleared now is kept in mind."""
    aws, root = Aws(), f"s3://{simulator.bucket}/detkit"
    be_killed(simulator, large, root, "after", operation)
    (left,) = parts_in(simulator.bucket)
    ledger, s3 = Ledger.of(aws), boto3.client("s3")
    (begun,) = ledger.pending()
    is_named = operation == "UploadPart"
    assert begun.name.endswith(left["UploadId"]) == is_named
    others = [left["Key"] + "-and-more", *([left["Key"]] if is_named else [])]
    theirs = {s3.create_multipart_upload(Bucket=simulator.bucket, Key=key)["UploadId"] for key in others}
    refused = "AbortMultipartUpload" if is_named else "ListMultipartUploads"
    simulator.faults.refuse(refused, "AccessDenied", status=403)
    with pytest.warns(DetkitWarning, match=r"s3:ListBucketMultipartUploads(.|\n)*parts of a file .* stay there"):
        uploads.clear_abandoned(aws)
    assert ledger.pending() == [begun]
    uploads.clear_abandoned(aws)
    assert {one["UploadId"] for one in parts_in(simulator.bucket)} == theirs
    assert ledger.pending() == []


def test_an_upload_of_another_time_is_another_ones(simulator: Simulator, large: Path) -> None:
    """Where its process was killed before S3 had named it, when it began says which it is."""
    aws, root = Aws(), f"s3://{simulator.bucket}/detkit"
    be_killed(simulator, large, root, "after", "CreateMultipartUpload")
    place = Ledger.of(aws).path
    line = json.loads(place.read_text().split("\n\n")[-1])
    place.write_text(json.dumps({**line, "t": time.time() - 3600}))
    uploads.clear_abandoned(aws)
    assert len(parts_in(simulator.bucket)) == 1


def test_a_file_that_is_not_sent_whole_is_cleared_when_its_process_is_over(simulator: Simulator, large: Path) -> None:
    aws, root = Aws(), f"s3://{simulator.bucket}/detkit"
    simulator.faults.refuse("UploadPart", "AccessDenied", times=9, status=403)
    with pytest.raises(AwsError):
        uploads.Bundle.of(large).upload(aws, root)
    assert parts_in(simulator.bucket) == [], "boto3 has cleared it"
    assert [one.kind for one in Ledger.of(aws).pending()] == ["upload"]


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
