"""What AWS would reject is found before anything is created, by calls that only read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit.data import Dataset, Sample
from detkit.params import set_fields
from detkit.plans import Concern
from detkit.testing import tiny_dataset
from detkit_sagemaker import preflight
from detkit_sagemaker.aws import Aws, AwsError, CredentialsExpired
from detkit_sagemaker.builtin import ObjectDetectionParams
from detkit_sagemaker.options import DeployOptions, SagemakerOptions
from detkit_sagemaker.testing import Simulator

TRAINING = "ml.g4dn.xlarge for training job usage"


def told(concerns: Sequence[Concern], level: str = "error") -> str:
    """Return the one concern, which has to be of that level."""
    assert [concern.level for concern in concerns] == [level], concerns
    return concerns[0].message


@pytest.fixture
def aws(simulator: Simulator) -> Aws:
    return Aws()


def own_image(aws: Aws, tag: str = "1") -> str:
    ecr = aws.client("ecr")
    ecr.create_repository(repositoryName="detkit")
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.docker.distribution.manifest.v2+json"}
    ecr.put_image(repositoryName="detkit", imageTag=tag, imageManifest=json.dumps(manifest))
    return f"{aws.account}.dkr.ecr.{aws.region}.amazonaws.com/detkit:{tag}"


def test_an_account_in_which_all_is_well_says_nothing_and_nothing_is_created(aws: Aws, simulator: Simulator) -> None:
    aws.client("s3").create_bucket(Bucket="mine")
    image = own_image(aws)
    before = list(simulator.created)
    found = preflight.account(
        aws,
        role_arn=simulator.role,
        output="s3://mine/detkit",
        needs={("training", "ml.g4dn.xlarge"): 2, ("hosting", "ml.m5.xlarge"): 1, ("transform", "ml.m5.xlarge"): 1},
        image_uri=image,
    )
    assert found == []
    assert list(simulator.created) == before
    assert simulator.live() == []


def test_a_role_has_to_be_there_and_to_trust_sagemaker(aws: Aws, simulator: Simulator) -> None:
    assert preflight.role(aws, simulator.role) == []
    missing = f"arn:aws:iam::{aws.account}:role/nobody"
    assert "there is no role nobody" in told(preflight.role(aws, missing))
    for principal in ({"Service": "ec2.amazonaws.com"}, {"AWS": "*"}):
        policy = {"Statement": [{"Effect": "Allow", "Principal": principal, "Action": "sts:AssumeRole"}]}
        name = f"for-{next(iter(principal)).lower()}"
        arn = aws.client("iam").create_role(RoleName=name, AssumeRolePolicyDocument=json.dumps(policy))["Role"]["Arn"]
        assert "does not trust sagemaker.amazonaws.com" in told(preflight.role(aws, arn))
    assert "999999999999" in told(preflight.role(aws, "arn:aws:iam::999999999999:role/x"), "warning")


def test_a_single_statement_and_a_list_of_services_count(aws: Aws) -> None:
    services = ["ec2.amazonaws.com", "sagemaker.amazonaws.com"]
    policy = {"Statement": {"Effect": "Allow", "Principal": {"Service": services}, "Action": "sts:AssumeRole"}}
    made = aws.client("iam").create_role(RoleName="both", AssumeRolePolicyDocument=json.dumps(policy))
    assert preflight.role(aws, made["Role"]["Arn"]) == []


def test_a_check_that_is_not_allowed_is_a_warning(aws: Aws, simulator: Simulator) -> None:
    simulator.faults.refuse("GetRole", code="AccessDenied", times=99)
    simulator.faults.refuse("ListServiceQuotas", code="AccessDeniedException", times=99)
    assert "was not looked at" in told(preflight.role(aws, simulator.role), "warning")
    assert "was not looked at" in told(preflight.quotas(aws, {("training", "ml.g4dn.xlarge"): 1}), "warning")


def test_expired_credentials_are_raised(aws: Aws, simulator: Simulator) -> None:
    assert aws.account
    simulator.faults.expire_tokens()
    with pytest.raises(CredentialsExpired):
        preflight.quotas(aws, {("training", "ml.g4dn.xlarge"): 1})


def test_other_errors_are_raised(aws: Aws, simulator: Simulator) -> None:
    simulator.faults.refuse("ListServiceQuotas", code="ServiceException", times=99)
    with pytest.raises(AwsError):
        preflight.quotas(aws, {("training", "ml.g4dn.xlarge"): 1})


def test_a_bucket_has_to_be_there_and_in_the_region(aws: Aws) -> None:
    assert "aws s3 mb s3://nowhere-1 --region us-east-1" in told(preflight.bucket(aws, "s3://nowhere-1/detkit"))
    assert preflight.bucket(aws, f"s3://{aws.bucket}/detkit") == []
    s3 = aws.client("s3")
    s3.delete_bucket(Bucket=aws.bucket)
    assert "will be created" in told(preflight.bucket(aws, f"s3://{aws.bucket}/detkit"), "warning")
    s3.create_bucket(Bucket="far-away", CreateBucketConfiguration={"LocationConstraint": "eu-west-1"})
    assert "far-away is in eu-west-1, and the job in us-east-1" in told(preflight.bucket(aws, "s3://far-away/x"))


def test_quotas_for_training_spot_transform_and_endpoints_are_told_apart(aws: Aws, simulator: Simulator) -> None:
    for name in (TRAINING, "ml.g4dn.xlarge for spot training job usage"):
        simulator.faults.quota(name, 1)
    simulator.faults.quota("ml.m5.xlarge for transform job usage", 0)
    simulator.faults.quota("ml.m5.xlarge for endpoint usage", 0)
    assert preflight.quotas(aws, {("training", "ml.g4dn.xlarge"): 1, ("spot", "ml.g4dn.xlarge"): 1}) == []
    both: list[tuple[preflight.Use, str]] = [("training", TRAINING), ("spot", "spot training job usage")]
    for use, name in both:
        assert name in told(preflight.quotas(aws, {(use, "ml.g4dn.xlarge"): 2}))
    assert "is 0, and 1 are needed" in told(preflight.quotas(aws, {("transform", "ml.m5.xlarge"): 1}))
    assert "for endpoint usage' is 0" in told(preflight.quotas(aws, {("hosting", "ml.m5.xlarge"): 1}))
    assert "no quota 'ml.z9.huge" in told(preflight.quotas(aws, {("hosting", "ml.z9.huge"): 1}), "warning")
    assert preflight.quotas(aws, {}) == []


def test_our_image_has_to_be_in_ecr_in_the_region_and_there(aws: Aws) -> None:
    image = own_image(aws)
    registry = image.rpartition("/")[0]
    assert preflight.own_image(aws, image) == []
    assert "build-image" in told(preflight.own_image(aws, f"{registry}/detkit:2"))
    assert "there is no image" in told(preflight.own_image(aws, f"{registry}/other:1"))
    assert "no image in ECR" in told(preflight.own_image(aws, "docker.io/detkit:1"))
    elsewhere = image.replace(aws.region, "eu-west-1")
    assert "is in eu-west-1, and the job in us-east-1" in told(preflight.own_image(aws, elsewhere))


def test_a_region_without_the_built_in_algorithm_is_told() -> None:
    assert preflight.builtin_image("us-east-1") == []
    assert "did you mean" in told(preflight.builtin_image("us-east-9"))


@pytest.mark.parametrize(
    ("way", "options", "instance_type", "level", "words"),
    [
        ("builtin", {}, "ml.m5.xlarge", "error", "trains on GPUs only"),
        ("builtin", {}, "ml.g6.xlarge", "warning", "may not run there"),
        ("builtin", {"input_mode": "pipe", "data_format": "json"}, "ml.p3.2xlarge", "error", "streams RecordIO"),
        ("jumpstart", {"instance_count": 2}, "ml.p3.2xlarge", "warning", "do nothing"),
        ("jumpstart", {"spot": True}, "ml.p3.2xlarge", "warning", "begins anew"),
        ("ours", {"input_mode": "pipe"}, "ml.p3.2xlarge", "error", "choose file or fastfile"),
    ],
)
def test_what_does_not_go_together_is_told(
    way: preflight.Way, options: dict[str, object], instance_type: str, level: str, words: str
) -> None:
    chosen = set_fields(SagemakerOptions(), options, kind="option")
    assert words in told(preflight.machine(way, chosen, instance_type), level)


def test_a_machine_that_is_not_named_for_the_built_ins_answers_is_told() -> None:
    assert "may not run there" in told(preflight.builtin_hosting("ml.inf2.xlarge"), "warning")
    assert preflight.builtin_hosting(DeployOptions().instance_type) == []


def test_a_key_that_a_machines_own_disks_do_not_take_is_told() -> None:
    options = SagemakerOptions(volume_kms_key="k")
    assert "disks of its own" in told(preflight.volume_key(options, "ml.g4dn.xlarge"), "warning")
    assert (
        preflight.volume_key(options, "ml.m5.xlarge") == preflight.volume_key(SagemakerOptions(), "ml.g5.xlarge") == []
    )


@pytest.mark.parametrize("way", ["builtin", "jumpstart", "ours"])
def test_the_usual_machine_is_fine(way: preflight.Way) -> None:
    assert preflight.machine(way, SagemakerOptions(), "ml.g4dn.xlarge") == []


@pytest.fixture
def channels(tmp_path: Path) -> dict[str, Dataset]:
    data = tiny_dataset(tmp_path / "tiny", num_images=12)
    return {"train": data.take(range(8)), "validation": data.take(range(8, 11))}


def params(**values: object) -> ObjectDetectionParams:
    return set_fields(ObjectDetectionParams(), {"mini_batch_size": 4, **values}, kind="parameter")


def test_sound_data_says_nothing(channels: dict[str, Dataset]) -> None:
    assert preflight.builtin_data(params(), channels, "recordio") == []
    assert preflight.builtin_data(params(num_classes=2, num_training_samples=8), channels, "json") == []


def test_the_built_in_needs_validation_images(channels: dict[str, Dataset]) -> None:
    assert "needs validation images" in told(preflight.builtin_data(params(), {"train": channels["train"]}, "json"))


def test_the_users_numbers_have_to_be_those_of_the_data(channels: dict[str, Dataset]) -> None:
    for values, words in (
        ({"num_training_samples": 9}, "num_training_samples=9"),
        ({"num_classes": 20}, "num_classes=20"),
        ({"label_width": 11}, "at least 12"),
        ({"mini_batch_size": 9}, "more than the 8 training images"),
    ):
        assert words in told(preflight.builtin_data(params(**values), channels, "recordio"))


def test_images_without_boxes_count_where_they_are_sent(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "tiny", num_images=8)  # the last one is empty
    both = {"train": data, "validation": data.take(range(3))}
    assert preflight.builtin_data(params(num_training_samples=7), both, "recordio") == []
    assert "num_training_samples=8" in told(preflight.builtin_data(params(num_training_samples=8), both, "recordio"))
    assert "1 images without boxes" in told(preflight.builtin_data(params(), both, "json"), "warning")


def test_a_class_without_a_box_is_told(channels: dict[str, Dataset]) -> None:
    more = {name: data.with_classes(["disc", "square", "star"]) for name, data in channels.items()}
    assert "no training image has a box of star" in told(preflight.builtin_data(params(), more, "json"), "warning")


def test_images_have_three_channels(tmp_path: Path, channels: dict[str, Dataset]) -> None:
    file = tmp_path / "grey.png"
    Image.new("L", (64, 64)).save(file)
    sample = Sample(path=str(file), width=64, height=64, boxes=np.array([[1.0, 1, 9, 9]]), names=("disc",))
    grey = {**channels, "validation": Dataset.from_samples(["disc", "square"], [sample])}
    assert "grey.png" in told(preflight.builtin_data(params(), grey, "json"))
    assert "make grey ones RGB" in told(preflight.builtin_data(params(), grey, "recordio"), "warning")


def test_training_goes_on_only_from_the_same_network_and_classes() -> None:
    native = {"base_network": "vgg-16", "num_classes": "2"}
    assert preflight.incremental(params(), ["a", "b"], native, ["a", "b"]) == []
    other = params(base_network="resnet-50")
    assert "base_network=vgg-16" in told(preflight.incremental(other, ["a", "b"], native, ["a", "b"]))
    assert "with as many" in told(preflight.incremental(params(), ["a", "b", "c"], native, ["a", "b"]))
    assert "order them the same" in told(preflight.incremental(params(), ["b", "a"], native, ["a", "b"]))
