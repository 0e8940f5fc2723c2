"""Batch transform in the simulated account: real jobs, real containers, real answers, and nothing left over."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import boto3
import msgspec
import numpy as np
import pytest
from PIL import Image

from detkit import plugins
from detkit.backends import PredictOptions
from detkit.errors import ImageError, InvalidValue, MissingSettings, UsageError
from detkit.images import read_image
from detkit.recordio import RecordWriter, pack
from detkit_sagemaker import batchjobs
from detkit_sagemaker.aws import Aws, AwsError, CredentialsExpired, NoCapacity
from detkit_sagemaker.endpoints import remove
from detkit_sagemaker.ledger import Ledger
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.testing import Simulator
from detkit_sagemaker.testing.faults import DropConnection
from detkit_sagemaker.transform import TransformFailed, collect_batch, plan_batch, predict_batch, start_batch

if TYPE_CHECKING:
    from conftest import Trained
    from detkit.detections import Detections
    from detkit.job import Model

OPENED: dict[str, Aws] = {}


@pytest.fixture
def simulator_images() -> dict[str, list[str]]:
    return {
        "echo:latest": [sys.executable, "-m", "detkit_sagemaker.container"],
        "broken:latest": [sys.executable, "-c", "import sys; sys.exit('the weights are missing')"],
    }


@pytest.fixture
def account(echo_account: Simulator) -> Simulator:
    return echo_account


def options(account: Simulator, **more: Any) -> TransformOptions:
    return TransformOptions(**{"role": account.role, "image_uri": account.image("echo:latest"), "yes": True, **more})


def account_of() -> Aws:
    """Return the simulated account, opened once: reading AWS's service models takes longer than most tests."""
    url = os.environ["AWS_ENDPOINT_URL"]
    if url not in OPENED:
        OPENED[url] = Aws()
    return OPENED[url]


def is_clean(account: Simulator) -> bool:
    return account.live() == [] and Ledger.of(account_of()).pending() == []


def here(trained: Trained, paths: list[str], score_threshold: float = 0.0) -> list[Detections]:
    opened = plugins.backend("echo").open(trained.model, PredictOptions(score_threshold=score_threshold))
    return opened.detect([read_image(path) for path in paths])


def same(found: list[Detections], expected: list[Detections]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.names == other.names
        assert np.allclose(one.boxes, other.boxes, atol=1e-6)
        assert np.allclose(one.scores, other.scores)


def stored(account: Simulator) -> dict[str, bytes]:
    client = boto3.client("s3")
    listed = client.list_objects_v2(Bucket=account.bucket).get("Contents", [])
    return {item["Key"]: client.get_object(Bucket=account.bucket, Key=item["Key"])["Body"].read() for item in listed}


def test_images_are_predicted_in_order_sent_as_they_are_and_only_once(
    account: Simulator, trained: Trained, tmp_path: Path
) -> None:
    paths = [*trained.data.paths, trained.data.paths[0]]
    told: list[str] = []
    found = list(
        predict_batch(trained.model, paths, options(account), account_of(), score_threshold=0.3, tell=told.append)
    )
    same(found, here(trained, paths, 0.3))
    assert [one.path for one in found] == paths
    assert is_clean(account)
    objects = {key: content for key, content in stored(account).items() if key.startswith("detkit/data/")}
    assert sorted(objects.values()) == sorted(Path(path).read_bytes() for path in trained.data.paths)
    assert "8 of 8 images to upload" in told[0]
    # Others are where somebody else has them; who stops listening leaves nothing behind, too.
    first, second = (Path(path) for path in trained.data.paths[:2])
    with (tmp_path / "images.rec").open("wb") as file:
        writer = RecordWriter(file)
        writer.write(0, pack(1.0, 0, first.read_bytes()))
        offset = writer.write(1, pack(1.0, 1, second.read_bytes()))
    client = boto3.client("s3")
    client.create_bucket(Bucket="photos")
    client.put_object(Bucket="photos", Key="a/b c.jpg", Body=first.read_bytes())
    others = ["s3://photos/a/b c.jpg", f"{tmp_path}/images.rec#{offset}"]
    found = list(islice(predict_batch(trained.model, [*others, paths[2]], options(account), account_of()), 2))
    same(found, here(trained, [str(first), str(second)]))
    assert [(one.path, one.width, one.height) for one in found] == [(path, 96, 96) for path in others]
    assert is_clean(account)
    plan = plan_batch(trained.model, paths, options(account), account_of())
    assert plan.uploads is not None and (plan.uploads["bytes"], plan.uploads["files_there"]) == (0, 8)
    plan = plan_batch(trained.model, others[:1], options(account), account_of())
    assert plan.uploads is not None and plan.uploads["bytes"] == 0


def test_aws_s_own_model_sees_each_image_as_it_is_displayed(
    account: Simulator, trained: Trained, aws_model: Model, tmp_path: Path
) -> None:
    pixels = read_image(trained.data.paths[0])
    turned, odd = tmp_path / "turned.jpg", tmp_path / "odd.bmp"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.ascontiguousarray(np.rot90(pixels))).save(turned, quality=100, exif=exif)
    Image.fromarray(pixels[:64]).save(odd)
    content = io.BytesIO()
    Image.fromarray(pixels[:, :64]).save(content, "WEBP", lossless=True)
    client = boto3.client("s3")
    client.put_object(Bucket=account.bucket, Key="mine/a.webp", Body=content.getvalue())
    client.put_object(Bucket=account.bucket, Key="mine/a.jpg", Body=Path(trained.data.paths[0]).read_bytes())
    paths = [str(turned), str(odd), f"s3://{account.bucket}/mine/a.webp", f"s3://{account.bucket}/mine/a.jpg"]
    found = list(predict_batch(aws_model, paths, options(account, image_uri=None), account_of()))
    assert [(one.width, one.height) for one in found] == [(96, 96), (96, 64), (64, 96), (96, 96)]
    copies = [tmp_path / "a.webp", tmp_path / "a.jpg"]
    copies[0].write_bytes(content.getvalue())
    copies[1].write_bytes(Path(trained.data.paths[0]).read_bytes())
    same(found, here(trained, [str(turned), str(odd), *map(str, copies)]))
    assert is_clean(account)


def test_images_that_fail_are_named_and_hold_up_no_other(
    account: Simulator, trained: Trained, aws_model: Model, tmp_path: Path
) -> None:
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(Path(trained.data.paths[0]).read_bytes()[:-300])
    paths = [trained.data.paths[0], str(cut), trained.data.paths[1]]
    for model, image in ((trained.model, account.image("echo:latest")), (aws_model, None)):
        found: list[Detections] = []
        with pytest.raises(TransformFailed, match=r"1 of 3 images have no detections(.|\n)*cut\.jpg") as raised:
            for one in predict_batch(model, paths, options(account, image_uri=image), account_of()):
                found.append(one)
        same(found, here(trained, [paths[0], paths[2]]))
        assert list(raised.value.failed) == [str(cut)]
        assert is_clean(account)


def test_a_container_that_does_not_start_is_told_with_its_last_lines(account: Simulator, trained: Trained) -> None:
    with pytest.raises(TransformFailed, match="the weights are missing"):
        list(
            predict_batch(
                trained.model,
                trained.data.paths,
                options(account, image_uri=account.image("broken:latest")),
                account_of(),
            )
        )
    assert is_clean(account)


def test_what_cannot_be_sent_is_refused_before_anything_is_created(
    account: Simulator, trained: Trained, tmp_path: Path
) -> None:
    before = account.created
    large = tmp_path / "large.png"
    noise = np.random.default_rng(0).integers(0, 255, (800, 800, 3), dtype=np.uint8)
    Image.fromarray(noise).save(large)
    paths = [trained.data.paths[0], str(large)]
    with pytest.raises(UsageError, match=r"1 of 2 images are larger than 1 MB(.|\n)*max_payload=2$"):
        list(predict_batch(trained.model, paths, options(account, max_payload=1), account_of()))
    with pytest.raises(UsageError, match="max_payload=2 concurrency=50"):
        list(predict_batch(trained.model, paths, options(account, max_payload=1, concurrency=100), account_of()))
    with pytest.raises(InvalidValue, match="at most 10 with concurrency=10"):
        list(predict_batch(trained.model, paths, options(account, max_payload=11, concurrency=10), account_of()))
    (tmp_path / "no.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"no\.jpg"):
        list(predict_batch(trained.model, [tmp_path / "no.jpg"], options(account), account_of()))
    with pytest.raises(UsageError, match="there is no image"):
        list(predict_batch(trained.model, [], options(account), account_of()))
    with pytest.raises(MissingSettings, match=r"role(.|\n)*image_uri"):
        list(predict_batch(trained.model, paths, TransformOptions()))
    with pytest.raises(UsageError, match=r"costs money(.|\n)*8 images"):
        list(predict_batch(trained.model, trained.data.paths, options(account, yes=False), account_of()))
    assert account.created == before


def test_no_capacity_is_told_and_leaves_nothing(account: Simulator, trained: Trained) -> None:
    account.faults.refuse("CreateTransformJob", "ResourceLimitExceeded", "no capacity for ml.m5.xlarge", times=1)
    with pytest.raises(Exception, match="no capacity") as raised:
        list(predict_batch(trained.model, trained.data.paths, options(account), account_of()))
    assert not isinstance(raised.value, NoCapacity) or raised.value.code
    assert is_clean(account)
    account.faults.capacity()
    with pytest.raises(TransformFailed, match="CapacityError"):
        list(predict_batch(trained.model, trained.data.paths, options(account), account_of()))
    assert is_clean(account)


def test_ctrl_c_and_the_limit_on_the_time_stop_the_job(account: Simulator, trained: Trained) -> None:
    account.faults.slow(3.0)

    def interrupt(line: str) -> None:
        if "InProgress" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(predict_batch(trained.model, trained.data.paths, options(account), account_of(), tell=interrupt))
    with pytest.raises(TransformFailed, match="max_runtime=1 s"):
        list(predict_batch(trained.model, trained.data.paths, options(account, max_runtime=1), account_of()))
    account.faults.clear()
    account.wait()
    assert is_clean(account)


def test_a_job_that_nobody_waits_for_is_collected_later(account: Simulator, trained: Trained) -> None:
    account.faults.slow(1.0)
    name = start_batch(trained.model, trained.data.paths, options(account), account_of())
    assert account.live("transform-job") == [name]
    assert remove(account_of()) == []  # it is somebody's
    account.faults.clear()
    found = list(collect_batch(name, options(account), account_of(), score_threshold=0.3))
    same(found, here(trained, list(trained.data.paths), 0.3))
    assert [one.path for one in found] == list(trained.data.paths)
    assert is_clean(account)
    assert len(list(collect_batch(name, options(account), account_of()))) == 8
    with pytest.raises(UsageError, match="no transform 'detkit-nothing'"):
        list(collect_batch("detkit-nothing", options(account), account_of()))


def test_trouble_of_the_network_leaves_the_job_and_says_how_to_collect_it(
    account: Simulator, trained: Trained, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    account.faults.refuse("DescribeTransformJob", "InternalFailure", times=2)
    found = list(predict_batch(trained.model, trained.data.paths[:1], options(account), account_of(), tell=told.append))
    assert len(found) == 1
    assert any("asked for again" in line for line in told)
    account.faults.slow(2.0)
    account.faults.refuse("DescribeTransformJob", "InternalFailure", times=1000)
    monkeypatch.setattr(batchjobs, "_PATIENCE_S", 0.5)
    with pytest.raises(AwsError, match=r"goes on at AWS(.|\n)*--collect detkit-transform-memory-[0-9a-f]+") as raised:
        list(predict_batch(trained.model, trained.data.paths, options(account), account_of()))
    account.faults.clear()
    [name] = account.live("transform-job")
    assert name in str(raised.value)
    assert remove(account_of(), expired=True) == []  # it is somebody's
    assert len(list(collect_batch(name, options(account), account_of()))) == 8
    assert is_clean(account)


@pytest.mark.parametrize("when", ["before", "after"])
def test_answers_that_get_lost_are_asked_for_again(account: Simulator, trained: Trained, when: str) -> None:
    before, steps = len(account.created), ["CreateModel", "CreateTransformJob"]
    for operation in steps:
        getattr(account.faults, f"crash_{when}")(operation)
    assert len(list(predict_batch(trained.model, trained.data.paths, options(account), account_of()))) == 8
    assert [operation for operation, _ in account.created[before:]] == steps, "none is there twice"
    assert is_clean(account)


def test_credentials_that_expire_leave_the_job(account: Simulator, trained: Trained) -> None:
    account.faults.slow(1.0)
    account.faults.crash_after("CreateTransformJob", account.faults.expire_tokens)
    with pytest.raises(CredentialsExpired, match="--collect detkit-transform-memory-"):
        list(predict_batch(trained.model, trained.data.paths, options(account), account_of()))
    account.faults.clear()
    [name] = account.live("transform-job")
    assert len(list(collect_batch(name, options(account), account_of()))) == 8


def test_an_amount_cannot_be_kept_where_nobody_waits(account: Simulator, trained: Trained) -> None:
    with pytest.raises(UsageError, match=r"max_cost=5 cannot be kept(.|\n)*nobody waits(.|\n)*say yes=True"):
        start_batch(trained.model, trained.data.paths, options(account, yes=False, max_cost=5), account_of())
    assert "CreateTransformJob" not in account.calls


def test_what_aws_would_reject_is_found_before_anything_is_created(account: Simulator, trained: Trained) -> None:
    before = account.created
    account.faults.quota("ml.m5.xlarge for transform job usage", 1)
    with pytest.raises(UsageError, match=r"would reject this(.|\n)*no role nobody(.|\n)*is 1, and 2 are needed"):
        list(
            predict_batch(
                trained.model, trained.data.paths, options(account, role="nobody", instance_count=2), account_of()
            )
        )
    assert account.created == before


@pytest.mark.parametrize("function", ["predict_batch", "start_batch"])
@pytest.mark.parametrize(
    ("when", "operation"),
    [
        ("before", "CreateModel"),
        ("after", "CreateModel"),
        ("before", "CreateTransformJob"),
        ("after", "CreateTransformJob"),
    ],
)
def test_what_a_killed_process_began_is_found(
    account: Simulator, trained: Trained, when: str, operation: str, function: str
) -> None:
    """Also where nobody was to wait for the job: whoever began it was never told its name."""
    account.faults.slow(2.0)
    script = f"""if True:
        import json, sys, msgspec
        from detkit.job import Model
        from detkit_sagemaker.options import TransformOptions
        from detkit_sagemaker.transform import {function}
        given = TransformOptions(**json.loads(sys.argv[1]))
        list({function}(Model({str(trained.model.path)!r}), [{trained.data.paths[0]!r}], given))
    """
    given = json.dumps(msgspec.to_builtins(options(account)))
    with subprocess.Popen([sys.executable, "-c", script, given], env=dict(os.environ)) as child:

        def kill() -> None:
            child.kill()
            if when == "before":
                raise DropConnection

        getattr(account.faults, f"crash_{when}")(operation, kill)
        assert child.wait(timeout=60) == -signal.SIGKILL
    was_there = (when, operation) != ("before", "CreateModel")
    assert len(account.live("model")) == was_there
    paid = account.live("model") if (when, operation) == ("after", "CreateTransformJob") else []
    assert account.live("transform-job") == paid
    begun = {(entry.kind, entry.name) for entry in Ledger.of(account_of()).pending()}
    assert begun >= {("transform-job", name) for name in paid}
    assert len(remove(account_of(), expired=True)) == was_there
    account.faults.clear()
    account.wait()
    end = time.monotonic() + 10
    while not is_clean(account):
        assert time.monotonic() < end
        time.sleep(0.1)
