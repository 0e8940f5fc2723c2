"""Data on S3, served over HTTP by moto: read, written, converted and trained on."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detkit import Dataset, Predictor, Trainer, check, read_dataset, remote, write_dataset
from detkit.errors import InvalidData, StorageError, UsageError
from detkit.testing import tiny_dataset

server_module = pytest.importorskip("moto.server", reason="moto is not installed: no S3 to talk to")
pytest.importorskip("s3fs", reason="s3fs is not installed")


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of a server of S3's API on this machine, which the environment names for everybody else."""
    import boto3
    from s3fs import S3FileSystem

    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "testing")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        S3FileSystem.clear_instance_cache()
        yield boto3.client("s3")
        S3FileSystem.clear_instance_cache()
    server.stop()


@pytest.fixture
def bucket(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket, and an empty cache."""
    from s3fs import S3FileSystem

    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "_looked_up", {})
    name = f"b-{uuid.uuid4().hex[:12]}"
    s3.create_bucket(Bucket=name)
    S3FileSystem.clear_instance_cache()
    return name


@pytest.fixture
def data(tmp_path: Path) -> Dataset:
    return tiny_dataset(tmp_path / "drawn")


def put(s3: Any, bucket: str, folder: Path, prefix: str) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            s3.upload_file(str(file), bucket, f"{prefix}/{file.relative_to(folder)}")


def keys(s3: Any, bucket: str) -> list[str]:
    return sorted(item["Key"] for item in s3.list_objects_v2(Bucket=bucket).get("Contents", []))


def requests(s3: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect what is fetched from now on."""
    from s3fs import S3FileSystem

    fetched: list[str] = []
    for name in ("_get_file", "_cat_file"):
        original = getattr(S3FileSystem, name)

        async def noting(self: Any, path: str, *rest: Any, _original: Any = original, **more: Any) -> Any:
            fetched.append(path)
            return await _original(self, path, *rest, **more)

        monkeypatch.setattr(S3FileSystem, name, noting)
    return fetched


def assert_same(data: Dataset, back: Dataset) -> None:
    assert back.image_ids == data.image_ids
    for before, after in zip(data, back, strict=True):
        assert after.names == before.names
        assert np.array_equal(after.boxes, before.boxes)
        assert np.array_equal(after.image(), before.image())


@pytest.mark.parametrize("format", ["voc", "coco", "yolo", "manifest", "lst", "sku110k", "sagemaker-json"])
def test_every_layout_reads_as_it_does_here(format: str, s3: Any, bucket: str, data: Dataset, tmp_path: Path) -> None:
    data = data.take(range(7)) if format == "lst" else data
    put(s3, bucket, write_dataset(data, tmp_path / "out", format), "some/data")
    back = read_dataset(f"s3://{bucket}/some/data")
    assert_same(data, back)
    assert all(path.startswith(f"s3://{bucket}/some/data/") for path in back.paths)
    assert all(source.startswith(f"s3://{bucket}/some/data/") for source in back.sources if source)


def test_records_are_fetched_whole(s3: Any, bucket: str, data: Dataset, tmp_path: Path) -> None:
    data = data.take(range(7))
    with pytest.warns(UserWarning, match="file names"):
        folder = write_dataset(data, tmp_path / "out", "recordio")
    put(s3, bucket, folder, "packs")
    back = read_dataset(f"s3://{bucket}/packs")
    for before, after in zip(data, back, strict=True):
        assert np.array_equal(before.image(), after.image())


def test_images_stay_there_until_needed(
    s3: Any, bucket: str, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, bucket, write_dataset(data, tmp_path / "out", "coco"), "data")
    fetched = requests(s3, monkeypatch)
    back = read_dataset(f"s3://{bucket}/data")
    assert fetched == [f"{bucket}/data/annotations.json"]
    back[0].image()
    back[0].image()
    assert fetched[1:] == [f"{bucket}/data/images/{data.image_ids[0]}"]
    read_dataset(f"s3://{bucket}/data")
    assert len(fetched) == 2, "what has not changed is not fetched again"


def test_change_is_noticed(
    s3: Any, bucket: str, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3, bucket, write_dataset(data, tmp_path / "out", "coco"), "data")
    url = f"s3://{bucket}/data"
    before = read_dataset(url)
    before[0].image()
    content = json.loads((tmp_path / "out/annotations.json").read_text())
    content["annotations"][0]["bbox"][0] += 1
    s3.put_object(Bucket=bucket, Key="data/annotations.json", Body=json.dumps(content).encode())
    s3.upload_file(data.paths[2], bucket, f"data/images/{data.image_ids[0]}")
    monkeypatch.setattr(remote, "_FRESH_S", -1.0)
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    after = read_dataset(url)
    assert after.boxes[0, 0] == before.boxes[0, 0] + 1
    assert np.array_equal(after[0].image(), data[2].image())


def test_splits_and_single_files(s3: Any, bucket: str, data: Dataset, tmp_path: Path) -> None:
    from dataclasses import replace

    split = replace(data, split_indices={"train": np.arange(5), "val": np.arange(5, 8)})
    put(s3, bucket, write_dataset(split, tmp_path / "out", "coco"), "data")
    assert len(read_dataset(f"s3://{bucket}/data:val")) == 3
    one = read_dataset(f"s3://{bucket}/data/annotations/train.json")
    assert_same(data.take(range(5)), one)


def test_written_there(s3: Any, bucket: str, data: Dataset) -> None:
    url = f"s3://{bucket}/out"
    assert write_dataset(data, url, "coco") == url
    assert_same(data, read_dataset(url))
    before = keys(s3, bucket)
    with pytest.raises(UsageError, match="is not empty; nothing is overwritten"):
        write_dataset(data, url, "coco")
    assert keys(s3, bucket) == before


def test_converted_there_without_fetching_images(
    s3: Any, bucket: str, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(data, f"s3://{bucket}/coco", "coco")
    there = read_dataset(f"s3://{bucket}/coco")
    fetched = requests(s3, monkeypatch)
    write_dataset(there, f"s3://{bucket}/voc", "voc")
    assert fetched == [], "images are copied over there"
    assert_same(data, read_dataset(f"s3://{bucket}/voc"))


def test_manifest_refers_to_images_where_they_are(
    s3: Any, bucket: str, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_dataset(data, f"s3://{bucket}/coco", "coco")
    fetched = requests(s3, monkeypatch)
    write_dataset(read_dataset(f"s3://{bucket}/coco"), f"s3://{bucket}/manifest", "manifest")
    assert all(name.endswith(".json") for name in fetched)
    assert [key for key in keys(s3, bucket) if key.startswith("manifest/")] == ["manifest/output.manifest"]
    back = read_dataset(f"s3://{bucket}/manifest")
    assert back.paths[0] == f"s3://{bucket}/coco/images/{data.image_ids[0]}"
    assert [s.names for s in back] == [s.names for s in data]
    assert np.array_equal(back[0].image(), data[0].image())


def test_fetched_to_this_machine(s3: Any, bucket: str, data: Dataset, tmp_path: Path) -> None:
    write_dataset(data, f"s3://{bucket}/coco", "coco")
    here = read_dataset(write_dataset(read_dataset(f"s3://{bucket}/coco"), tmp_path / "here", "voc"))
    assert_same(data, here)


def test_trained_on(s3: Any, bucket: str, data: Dataset, clean: Path) -> None:
    pytest.importorskip("detkit_echo")
    from detkit import evaluate

    write_dataset(data, f"s3://{bucket}/coco", "coco")
    there = read_dataset(f"s3://{bucket}/coco")
    run = Trainer(model="echo/memory", epochs=4).fit(there, there, quiet=True)
    assert run.status == "finished"
    assert evaluate(run, f"s3://{bucket}/coco", allow_seen=True)["AP"] > 0.9


def test_a_predictor_takes_urls_where_it_may(s3: Any, bucket: str, data: Dataset, clean: Path) -> None:
    run = Trainer(model="echo/memory", epochs=8).fit(data, data, quiet=True)
    put(s3, bucket, Path(data.paths[0]).parent, "images")
    s3.put_object(Bucket=bucket, Key="images/notes.txt", Body=b"no image")
    folder = f"s3://{bucket}/images"
    with Predictor(run) as predictor:
        here = list(predictor.predict(Path(data.paths[0]).parent))
        for source in (folder, f"{folder}/", [folder], f"{folder}/000.jpg"):
            with pytest.raises(UsageError, match="nothing is fetched unless you say so"):
                list(predictor.predict(source))
        there = list(predictor.predict(folder, fetch=True))
        assert [one.path for one in there] == [f"{folder}/{Path(one.path).name}" for one in here]
        assert [one.names for one in there] == [one.names for one in here]
        assert predictor(there[0].path, fetch=True).names == here[0].names
        assert [one.names for one in predictor.predict(there[3].path, fetch=True)] == [here[3].names]
        with pytest.raises(UsageError, match=f"there is no file or folder s3://{bucket}/none"):
            list(predictor.predict(f"s3://{bucket}/none", fetch=True))
    write_dataset(data, f"s3://{bucket}/set", "coco")
    with Predictor(run) as predictor:
        found = list(predictor.predict(read_dataset(f"s3://{bucket}/set")))
        assert [one.names for one in found] == [one.names for one in here], "a data set has been asked for"


def test_findings_name_urls(s3: Any, bucket: str, data: Dataset, tmp_path: Path) -> None:
    folder = write_dataset(data, tmp_path / "out", "voc")
    (folder / "Annotations/002.xml").write_text("<annotation><object>")
    put(s3, bucket, folder, "data")
    with pytest.raises(InvalidData, match=f"s3://{bucket}/data/Annotations/002.xml") as caught:
        read_dataset(f"s3://{bucket}/data")
    assert caught.value.findings[0].file == f"s3://{bucket}/data/Annotations/002.xml"
    assert str(tmp_path) not in str(caught.value)
    found = check(f"s3://{bucket}/data")
    assert any(f.file.startswith(f"s3://{bucket}/data/Annotations/002.xml") for f in found)


def test_nothing_there(s3: Any, bucket: str) -> None:
    for url in (f"s3://{bucket}/nowhere", "s3://no-such-bucket-at-all/data"):
        with pytest.raises(UsageError, match=url):
            read_dataset(url)
    with pytest.raises(UsageError, match="Protocol not known"):
        read_dataset("nonsense://a/b")


def test_key_that_leaves_the_folder(s3: Any, bucket: str, data: Dataset, tmp_path: Path) -> None:
    put(s3, bucket, write_dataset(data, tmp_path / "out", "coco"), "data")
    s3.put_object(Bucket=bucket, Key="data/../../escaped.txt", Body=b"x")
    with pytest.raises(InvalidData, match="leaves its folder"):
        read_dataset(f"s3://{bucket}/data")
    assert not list(tmp_path.rglob("escaped*"))


def test_broken_transfer_leaves_nothing(s3: Any, bucket: str, data: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    from s3fs import S3FileSystem

    original = S3FileSystem._put_file
    count = iter(range(100))

    async def failing(self: Any, *rest: Any, **more: Any) -> Any:
        if next(count) == 4:
            raise OSError("the line is dead")
        return await original(self, *rest, **more)

    monkeypatch.setattr(S3FileSystem, "_put_file", failing)
    with pytest.raises(StorageError, match="the line is dead"):
        write_dataset(data, f"s3://{bucket}/out", "coco")
    assert keys(s3, bucket) == []


def test_interrupted_upload_leaves_nothing(
    s3: Any, bucket: str, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    original = S3FileSystem.put_file
    names: list[str] = []

    def interrupted(self: Any, path: str, target: str, *rest: Any, **more: Any) -> Any:
        names.append(target)
        if target.endswith(".yaml"):
            raise KeyboardInterrupt
        return original(self, path, target, *rest, **more)

    monkeypatch.setattr(S3FileSystem, "put_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(data, f"s3://{bucket}/out", "yolo")
    assert names[-1].endswith("data.yaml"), "what makes it a data set comes last"
    assert keys(s3, bucket) == []


def test_a_pack_that_changes_there_changes_nothing_here(
    s3: Any, bucket: str, data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from s3fs import S3FileSystem

    with pytest.warns(UserWarning, match="file names"):
        put(s3, bucket, write_dataset(data.take([0, 1]), tmp_path / "one", "recordio"), "packs")
        earlier = read_dataset(f"s3://{bucket}/packs")
        before = earlier[0].image()
        put(s3, bucket, write_dataset(data.take([2, 3]), tmp_path / "two", "recordio"), "packs")
    S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(remote, "_FRESH_S", -1.0)
    later = read_dataset(f"s3://{bucket}/packs")
    assert np.array_equal(earlier[0].image(), before)
    assert np.array_equal(later[0].image(), data[2].image())


def test_reads_within_one_another(s3: Any, bucket: str, data: Dataset, tmp_path: Path) -> None:
    put(s3, bucket, write_dataset(data, tmp_path / "out", "yolo"), "data")
    url = f"s3://{bucket}/data"
    with remote.mirrored(url, lambda name: name.endswith((".jpg", ".png"))) as mirror:
        assert len(read_dataset(url)) == len(data)
        assert remote.origin(f"{mirror.path}/images/x.jpg") == f"{url}/images/x.jpg"


def test_a_folder_that_is_gone_there_is_gone_here(s3: Any, bucket: str, data: Dataset, tmp_path: Path) -> None:
    from s3fs import S3FileSystem

    put(s3, bucket, write_dataset(data, tmp_path / "out", "coco"), "data")
    s3.put_object(Bucket=bucket, Key="data/images/old/more/a.txt", Body=b"x")
    url = f"s3://{bucket}/data"
    for there in (True, False):
        with remote.mirrored(url, lambda name: name.endswith((".jpg", ".png"))) as mirror:
            assert (mirror.path / "images/old").is_dir() == there
        s3.delete_object(Bucket=bucket, Key="data/images/old/more/a.txt")
        S3FileSystem.clear_instance_cache()


def test_a_missing_image_is_named(s3: Any, bucket: str, data: Dataset, tmp_path: Path) -> None:
    put(s3, bucket, write_dataset(data, tmp_path / "out", "coco"), "data")
    there = read_dataset(f"s3://{bucket}/data")
    s3.delete_object(Bucket=bucket, Key=f"data/images/{data.image_ids[3]}")
    with pytest.raises(InvalidData, match=f"cannot read image s3://{bucket}/data/images/{data.image_ids[3]}"):
        write_dataset(there, tmp_path / "here", "voc")
