"""Images that lie in S3 already are not uploaded, whichever way trains; where they have to be, the plan says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import boto3
import pytest
from PIL import Image

import detkit
from detkit import Dataset, Run, Trainer
from detkit.errors import DetkitError, RunFailed
from detkit.testing import tiny_dataset
from detkit_sagemaker import preflight
from detkit_sagemaker.testing import Simulator

pytest.importorskip("s3fs", reason="s3fs is not installed")

OURS: Mapping[str, Any] = {"model": "echo/memory", "epochs": 2}
BUILTIN: Mapping[str, Any] = {"model": "object-detection", "mini_batch_size": 4, "learning_rate": 0.3, "epochs": 2}
JUMPSTART: Mapping[str, Any] = {"model": "jumpstart/mxnet-od-ssd-512-resnet50-v1-coco", "epochs": 2}


@pytest.fixture(scope="module")
def account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Simulator]:
    from s3fs import S3FileSystem

    images = {"detkit:latest": [sys.executable, "-m", "detkit_sagemaker.container"]}
    with (
        Simulator(images=images, folder=tmp_path_factory.mktemp("aws")) as aws,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr("boto3.DEFAULT_SESSION", None)
        for name, value in aws.environment.items():
            patch.setenv(name, value)
        S3FileSystem.clear_instance_cache()  # it remembers another account's address
        yield aws
        S3FileSystem.clear_instance_cache()


@pytest.fixture
def aws(account: Simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Simulator:
    """The account; runs, cache and ledger are the test's own."""
    for name, place in {"RUNS": "runs", "CACHE": "cache", "LEDGER": "ledger.jsonl"}.items():
        monkeypatch.setenv(f"DETKIT_{name}", str(tmp_path / place))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "etc"))
    return account


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return tiny_dataset(tmp_path / "data")


@pytest.fixture
def place(aws: Simulator, data: Dataset, request: pytest.FixtureRequest) -> str:
    """The same data in S3, in a folder of the test's own."""
    place = f"s3://{aws.bucket}/{request.node.name}/shelves"
    detkit.write_dataset(data, place)
    return place


@pytest.fixture
def output(aws: Simulator, request: pytest.FixtureRequest) -> str:
    return f"s3://{aws.bucket}/{request.node.name}/output"


def trainer(aws: Simulator, output: str, settings: Mapping[str, Any]) -> Trainer:
    image = {"image_uri": aws.image("detkit:latest")} if settings["model"] == "echo/memory" else {}
    return Trainer(backend="sagemaker", role=aws.role, output=output, max_cost=5, **image, **settings)


def told(notes: Sequence[str]) -> list[str]:
    """Return what a plan says of images in S3."""
    return [note for note in notes if "S3" in note]


def images_below(url: str) -> list[str]:
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/")
    names = [item["Key"] for page in pages for item in page.get("Contents", ())]
    return [name for name in names if name.endswith((".jpg", ".png"))]


def reported(run: Run) -> list[float]:
    """Return what the training said of its losses or scores, the same for the same data."""
    return [value for row in run.history for name, value in sorted(row.items()) if name.split("/")[-1] in REPORTED]


REPORTED = ("loss", "train:cross_entropy", "validation:mAP")


@pytest.mark.parametrize(
    "settings",
    [OURS, {**BUILTIN, "data_format": "manifest"}, {**BUILTIN, "data_format": "json"}],
    ids=["ours", "manifest", "json"],
)
def test_images_stay_where_they_lie(
    settings: Mapping[str, Any], aws: Simulator, data: Dataset, place: str, output: str
) -> None:
    trained = trainer(aws, output, settings)
    plan = trained.plan(place, place)
    assert told(plan.notes) == ["16 images (0.2 MB) stay where they lie in S3: 0 bytes of them are uploaded"]
    before = len(aws.calls)
    run = trained.fit(place, place, name="there", quiet=True)
    assert "CopyObject" not in aws.calls[before:]
    assert images_below(output) == []
    same = trained.fit(data, data, name="here", quiet=True)
    assert reported(run) == reported(same) != []
    assert len(images_below(output)) == len(data), "as those of this machine travel, once"


def test_the_built_in_reads_a_manifest_where_all_images_lie_in_s3(
    aws: Simulator, data: Dataset, place: str, output: str
) -> None:
    trained = trainer(aws, output, BUILTIN)
    notes = trained.plan(place, place).notes
    assert told(notes) == ["14 images (0.1 MB) stay where they lie in S3: 0 bytes of them are uploaded"]
    assert "train: 1 images without boxes are left out, as jobs have failed on such" in notes
    run = trained.fit(place, place, name="there", quiet=True)
    assert images_below(output) == []
    (_, request) = aws.created[-1]
    assert request["HyperParameters"]["num_training_samples"] == "7"
    channels = {one["ChannelName"]: one for one in request["InputDataConfig"]}
    kinds = {one["DataSource"]["S3DataSource"]["S3DataType"] for one in channels.values()}
    assert kinds == {"AugmentedManifestFile"}
    assert {name: one.get("ShuffleConfig") for name, one in channels.items()} == {
        "train": {"Seed": 0},
        "validation": None,
    }
    (packed,) = told(trained.plan(place, data).notes)
    assert packed.startswith("train: 7 images (0.1 MB) in S3 are packed anew and uploaded")
    more = trainer(aws, output, {**BUILTIN, "weights": run}).plan(place, place)
    assert [note.partition(" ")[0] for note in told(more.notes)] == ["train:", "validation:"], "as AWS documents it"


@pytest.mark.parametrize("settings", [BUILTIN, {**BUILTIN, "data_format": "json"}, JUMPSTART])
def test_what_an_algorithm_of_aws_would_read_otherwise_is_refused(
    settings: Mapping[str, Any], aws: Simulator, data: Dataset, output: str, tmp_path: Path
) -> None:
    """Boxes of a picture that EXIF turns would lie elsewhere, and a format that is not read fails in a paid job."""
    train, val = data.take(range(6)), data.take(range(6, 8))
    for kind, words in {"turned": "auto-orient", "format": "JPEG and PNG|neither JPEG nor PNG"}.items():
        place = f"s3://{aws.bucket}/{kind}-{settings['model'][:4]}-{settings.get('data_format')}"
        detkit.write_dataset(train, place)
        (first, *_) = images_below(place)
        with Image.open(train.paths[0]) as image:
            exif = image.getexif()
            exif[0x0112] = 3
            file = tmp_path / kind
            image.save(file, "WEBP") if kind == "format" else image.save(file, "PNG", exif=exif)
        boto3.client("s3").upload_file(str(file), aws.bucket, first)
        before = list(aws.created)
        with pytest.raises(DetkitError, match=words):
            trainer(aws, output, settings).fit(place, val, name=f"no-{kind}", quiet=True)
        assert aws.created == before


@pytest.mark.parametrize("settings", [{**BUILTIN, "data_format": "json"}, JUMPSTART], ids=["json", "jumpstart"])
def test_images_are_copied_within_s3_where_another_folder_is_needed(
    settings: Mapping[str, Any], aws: Simulator, data: Dataset, place: str, output: str
) -> None:
    """JumpStart takes one folder; and what JSON files call the images may no longer be their names in S3."""
    there = detkit.read_dataset(place)
    train, val = (detkit.merge([there.take(part)], prefixes=["here"]) for part in (range(6), range(6, 8)))
    trained = trainer(aws, output, settings)
    plan = trained.plan(train, val)
    assert told(plan.notes) == ["8 images (0.1 MB) are copied within S3, once: 0 bytes of them are uploaded"]
    assert plan.uploads is not None
    assert plan.uploads["bytes_there"] == sum(Path(path).stat().st_size for path in data.paths)
    before = len(aws.calls)
    assert trained.fit(train, val, name="copied", quiet=True).status == "finished"
    trained.fit(train, val, name="again", quiet=True)
    own = aws.calls[before:]
    assert own.count("CopyObject") == len(images_below(output)) == len(data)
    assert own.count("PutObject") == plan.uploads["files"] + 2, "the annotations, and each run for other machines"


def test_what_is_packed_anew_is_told_with_what_would_leave_it_there(
    aws: Simulator, data: Dataset, place: str, output: str
) -> None:
    plan = trainer(aws, output, {**BUILTIN, "data_format": "recordio"}).plan(place, place)
    train, validation = told(plan.notes)
    assert train.startswith("train: 7 images (0.1 MB) in S3 are packed anew and uploaded")
    assert validation.startswith("validation: 7 images")
    assert "data_format=manifest leaves them where they lie" in train
    assert told(trainer(aws, output, BUILTIN).plan(data, data).notes) == []


def test_what_stays_in_s3_counts_for_the_disk(
    aws: Simulator, data: Dataset, place: str, output: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine copies it wherever it lies, and whatever the input mode; what is streamed takes no room."""
    monkeypatch.setattr(preflight, "_SHARE_OF_DISK", 100_000 / 30e9)  # the annotations fit, the images do not

    def errors(source: Any, settings: Mapping[str, Any], **more: Any) -> list[str]:
        plan = trainer(aws, output, {**settings, **more}).plan(source, source)
        return [str(error).partition("; ")[2] for error in plan.errors if "do not fit" in str(error)]

    assert errors(place, OURS) == errors(place, OURS, input_mode="fastfile") == ["give more"]
    assert errors(data, OURS) == ["give more, or input_mode=fastfile"]
    assert errors(data, OURS, input_mode="fastfile") == []
    assert errors(place, BUILTIN, data_format="json") == ["give more"]
    assert errors(place, BUILTIN, data_format="manifest") == errors(data, BUILTIN, data_format="manifest") == []


def test_images_in_another_bucket(aws: Simulator, data: Dataset, output: str) -> None:
    """The job's role has to be allowed to read it, and AWS reads none of another region."""
    s3 = boto3.client("s3")
    s3.create_bucket(Bucket="pictures")
    s3.create_bucket(Bucket="bilder", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
    detkit.write_dataset(data, "s3://pictures/shelves")
    detkit.write_dataset(data, "s3://bilder/shelves")
    trained = trainer(aws, output, OURS)
    (concern,) = trained.plan("s3://pictures/shelves", "s3://pictures/shelves").concerns
    assert concern.level == "warning" and "setup --data-bucket pictures --apply" in concern.message
    other = [one for one in trained.plan("s3://bilder/shelves", "s3://bilder/shelves").concerns if one.level == "error"]
    assert [one.message for one in other] == [
        "bucket bilder is in eu-central-1, and the job in us-east-1; both have to be in one region"
    ]
    assert trainer(aws, output, JUMPSTART).plan("s3://bilder/shelves").concerns == (), "it copies them"


def test_an_image_that_was_changed_in_s3(aws: Simulator, data: Dataset, place: str, output: str) -> None:
    """It would be other data than the run says, and than was looked at."""
    there = detkit.read_dataset(place)
    bucket, _, prefix = place.removeprefix("s3://").partition("/")
    s3 = boto3.client("s3")
    keys = [item["Key"] for item in s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]
    first, second = [key for key in keys if key.endswith((".jpg", ".png"))][:2]

    def change() -> None:
        s3.copy_object(Bucket=bucket, Key=first, CopySource={"Bucket": bucket, "Key": second})

    aws.faults.crash_before("CreateTrainingJob", change)
    try:
        with pytest.raises(RunFailed, match="it is another image than when the run was begun"):
            trainer(aws, output, OURS).fit(there, there, quiet=True)
    finally:
        aws.faults.clear()


def test_what_is_written_is_encrypted_with_the_key(aws: Simulator, data: Dataset, output: str) -> None:
    trainer(aws, output, OURS).fit(data, data, name="secret", kms_key="alias/detkit", quiet=True)
    bucket, _, prefix = output.removeprefix("s3://").partition("/")
    s3 = boto3.client("s3")
    written = [one["Key"] for one in s3.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]
    ours = [name for name in written if "/jobs/" not in name and "/checkpoints/" not in name]
    assert any("/runs/" in name for name in ours)
    for name in ours:
        assert s3.head_object(Bucket=bucket, Key=name).get("SSEKMSKeyId", "").endswith("alias/detkit"), name
