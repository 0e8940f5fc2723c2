"""Requests are exactly what AWS is sent, and are checked against its own model without AWS."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detkit.errors import InvalidValue, UsageError
from detkit.params import set_fields
from detkit_sagemaker.options import AccountOptions, DeployOptions, SagemakerOptions, TransformOptions
from detkit_sagemaker.requests import (
    Channel,
    check_request,
    endpoint_config_request,
    endpoint_request,
    job_name,
    model_request,
    tag_list,
    training_request,
    transform_request,
)

ROLE = "arn:aws:iam::123456789012:role/detkit"
IMAGE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/detkit:1"
NAME = re.compile(r"[a-zA-Z0-9](-*[a-zA-Z0-9]){0,62}")


def training(request: dict[str, Any] | None = None, **options: Any) -> dict[str, Any]:
    """Return a request; ``request`` are arguments of `training_request`."""
    arguments: dict[str, Any] = {
        "name": "detkit-a-1",
        "image": IMAGE,
        "role": ROLE,
        "output": "s3://bucket/out",
        "channels": [Channel(name="train", s3_uri="s3://bucket/data/train/")],
        "options": set_fields(SagemakerOptions(), options, kind="option"),
        "instance_type": "ml.p3.2xlarge",
    }
    return training_request(**arguments | (request or {}))


def test_a_training_job_has_everything_and_always_a_limit_on_its_time() -> None:
    request = training(
        {"tags": {"detkit:run": "a"}, "hyperparameters": {"epochs": "3"}, "metrics": {"val/AP": "AP=(.*);"}}
    )
    assert request == {
        "TrainingJobName": "detkit-a-1",
        "AlgorithmSpecification": {
            "TrainingImage": IMAGE,
            "TrainingInputMode": "File",
            "MetricDefinitions": [{"Name": "val/AP", "Regex": "AP=(.*);"}],
        },
        "RoleArn": ROLE,
        "InputDataConfig": [
            {
                "ChannelName": "train",
                "DataSource": {
                    "S3DataSource": {
                        "S3DataType": "S3Prefix",
                        "S3Uri": "s3://bucket/data/train/",
                        "S3DataDistributionType": "FullyReplicated",
                    }
                },
            }
        ],
        "OutputDataConfig": {"S3OutputPath": "s3://bucket/out"},
        "ResourceConfig": {"InstanceType": "ml.p3.2xlarge", "InstanceCount": 1, "VolumeSizeInGB": 30},
        "StoppingCondition": {"MaxRuntimeInSeconds": 14400},
        "EnableNetworkIsolation": False,
        "EnableInterContainerTrafficEncryption": False,
        "EnableManagedSpotTraining": False,
        "Tags": [{"Key": "detkit:run", "Value": "a"}],
        "HyperParameters": {"epochs": "3"},
    }
    assert check_request("CreateTrainingJob", request) == []


def test_every_option_reaches_the_request() -> None:
    request = training(
        {
            "tags": {"detkit:run": "a"},
            "checkpoints": "s3://bucket/checkpoints",
            "environment": {"DETKIT_PRINT_EVENTS": "1"},
        },
        instance_count=2,
        volume_size=100,
        max_runtime="90m",
        input_mode="fastfile",
        spot=True,
        max_wait="2h",
        subnets="subnet-1,subnet-2",
        security_groups="sg-1",
        kms_key="alias/out",
        volume_kms_key="alias/disk",
        network_isolation=True,
        encrypt_traffic=True,
        tags="team=vision",
    )
    assert check_request("CreateTrainingJob", request) == []
    assert request["ResourceConfig"]["InstanceCount"] == 2
    assert request["ResourceConfig"]["VolumeSizeInGB"] == 100
    assert request["ResourceConfig"]["VolumeKmsKeyId"] == "alias/disk"
    assert request["StoppingCondition"] == {"MaxRuntimeInSeconds": 5400, "MaxWaitTimeInSeconds": 7200}
    assert request["AlgorithmSpecification"]["TrainingInputMode"] == "FastFile"
    assert request["EnableManagedSpotTraining"] is True
    assert request["VpcConfig"] == {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]}
    assert request["OutputDataConfig"]["KmsKeyId"] == "alias/out"
    assert request["EnableNetworkIsolation"] is True
    assert request["EnableInterContainerTrafficEncryption"] is True
    assert request["CheckpointConfig"] == {"S3Uri": "s3://bucket/checkpoints", "LocalPath": "/opt/ml/checkpoints"}
    assert request["Environment"] == {"DETKIT_PRINT_EVENTS": "1"}
    assert request["Tags"] == [{"Key": "team", "Value": "vision"}, {"Key": "detkit:run", "Value": "a"}]


def test_what_the_image_asks_for_counts_where_the_options_are_silent() -> None:
    request = training({"isolated": True, "encrypted": True, "volume_size": 50}, volume_size=20)
    assert request["EnableNetworkIsolation"] is True
    assert request["EnableInterContainerTrafficEncryption"] is True
    assert request["ResourceConfig"]["VolumeSizeInGB"] == 50
    assert training({"isolated": True}, network_isolation="false")["EnableNetworkIsolation"] is False


def test_spot_waits_twice_as_long_unless_told_and_never_less_than_it_runs() -> None:
    assert training(spot=True)["StoppingCondition"] == {"MaxRuntimeInSeconds": 14400, "MaxWaitTimeInSeconds": 28800}
    with pytest.raises(InvalidValue, match="at least max_runtime, 14400"):
        training(spot=True, max_wait="1h")
    with pytest.raises(InvalidValue, match="only with spot"):
        training(max_wait="8h")


def test_a_key_for_disks_is_left_out_where_machines_have_their_own() -> None:
    request = training({"instance_type": "ml.g4dn.xlarge"}, volume_kms_key="alias/disk")
    assert "VolumeKmsKeyId" not in request["ResourceConfig"]


def test_half_a_network_is_refused() -> None:
    with pytest.raises(UsageError, match="belong together"):
        training(subnets="subnet-1")


def test_a_channel_of_an_augmented_manifest_is_streamed() -> None:
    channel = Channel(
        name="train",
        s3_uri="s3://bucket/train.manifest",
        content_type="application/x-recordio",
        input_mode="Pipe",
        data_type="AugmentedManifestFile",
        compression="None",
        record_wrapper="RecordIO",
        attribute_names=["source-ref", "bounding-box"],
    )
    request = training({"channels": [channel]})
    assert request["InputDataConfig"] == [
        {
            "ChannelName": "train",
            "DataSource": {
                "S3DataSource": {
                    "S3DataType": "AugmentedManifestFile",
                    "S3Uri": "s3://bucket/train.manifest",
                    "S3DataDistributionType": "FullyReplicated",
                    "AttributeNames": ["source-ref", "bounding-box"],
                }
            },
            "ContentType": "application/x-recordio",
            "CompressionType": "None",
            "RecordWrapperType": "RecordIO",
            "InputMode": "Pipe",
        }
    ]
    assert check_request("CreateTrainingJob", request) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"name": "bad_name!"}, "TrainingJobName: 'bad_name!' does not match"),
        ({"name": "a" * 64}, "TrainingJobName: 64 long"),
        ({"role": "detkit"}, "RoleArn"),
        ({"instance_type": "ml.p99.huge"}, "'ml.p99.huge' is none of the words"),
        ({"hyperparameters": {f"h{i}": "1" for i in range(101)}}, "HyperParameters: 101 long"),
        ({"metrics": {f"m{i}": "(.*)" for i in range(41)}}, "MetricDefinitions: 41 long"),
        ({"hyperparameters": {"epochs": 3}}, "Invalid type for parameter HyperParameters.epochs"),
        ({"environment": {"1BAD": "x"}}, "Environment"),
        ({"output": "bucket/out"}, "S3OutputPath"),
        ({"tags": {"k": "v" * 300}}, None),
    ],
)
def test_what_aws_would_refuse_is_found_here(change: dict[str, Any], told: str | None) -> None:
    problems = check_request("CreateTrainingJob", training(change))
    assert (problems == []) if told is None else any(told in problem for problem in problems), problems


def test_an_unknown_or_missing_field_is_found() -> None:
    assert any("Instances" in p for p in check_request("CreateTrainingJob", {**training(), "Instances": 1}))
    assert any("RoleArn" in problem for problem in check_request("CreateTrainingJob", {"TrainingJobName": "a"}))


def test_a_model_a_transform_and_an_endpoint_are_what_aws_takes() -> None:
    deploy = set_fields(DeployOptions(), {"tags": "team=vision", "volume_kms_key": "alias/d"}, kind="option")
    transform = set_fields(TransformOptions(), {"concurrency": 4, "kms_key": "alias/out"}, kind="option")
    model = model_request(
        name="m", image=IMAGE, role=ROLE, model_data="s3://b/model.tar.gz", options=deploy, environment={"A": "1"}
    )
    job = transform_request(
        name="t",
        model="m",
        input_uri="s3://b/images/",
        output="s3://b/out",
        options=transform,
        content_type="image/jpeg",
    )
    config = endpoint_config_request(name="c", model="m", options=deploy)
    endpoint = endpoint_request(name="e", config="c", options=deploy, tags={"detkit:expires": "2026-11-21T10:00:00Z"})
    requests = {
        "CreateModel": model,
        "CreateTransformJob": job,
        "CreateEndpointConfig": config,
        "CreateEndpoint": endpoint,
    }
    assert {operation: check_request(operation, request) for operation, request in requests.items()} == {
        operation: [] for operation in requests
    }
    assert model["PrimaryContainer"] == {
        "Image": IMAGE,
        "Mode": "SingleModel",
        "ModelDataUrl": "s3://b/model.tar.gz",
        "Environment": {"A": "1"},
    }
    assert (job["BatchStrategy"], job["TransformInput"]["SplitType"]) == ("SingleRecord", "None")
    assert (job["MaxConcurrentTransforms"], job["MaxPayloadInMB"]) == (4, 6)
    assert job["TransformOutput"]["KmsKeyId"] == "alias/out"
    assert config["ProductionVariants"] == [
        {"VariantName": "all", "ModelName": "m", "InstanceType": "ml.m5.xlarge", "InitialInstanceCount": 1}
    ]
    assert config["KmsKeyId"] == "alias/d"
    assert endpoint["Tags"] == [
        {"Key": "team", "Value": "vision"},
        {"Key": "detkit:expires", "Value": "2026-11-21T10:00:00Z"},
    ]


def test_a_serverless_endpoint_has_memory_instead_of_machines() -> None:
    options = set_fields(DeployOptions(), {"serverless": True, "memory_size": 2048}, kind="option")
    config = endpoint_config_request(name="c", model="m", options=options)
    assert config["ProductionVariants"] == [
        {"VariantName": "all", "ModelName": "m", "ServerlessConfig": {"MemorySizeInMB": 2048, "MaxConcurrency": 5}}
    ]
    assert check_request("CreateEndpointConfig", config) == []


def test_a_transform_that_would_send_too_much_at_once_is_refused() -> None:
    options = set_fields(TransformOptions(), {"concurrency": 20}, kind="option")
    with pytest.raises(InvalidValue, match="at most 16 with max_payload=6"):
        transform_request(name="t", model="m", input_uri="s3://b/i/", output="s3://b/o", options=options)


def test_tags_of_the_users_cannot_pass_for_ours() -> None:
    with pytest.raises(InvalidValue, match="does not begin with aws: or detkit:"):
        tag_list(AccountOptions(tags={"detkit:run": "x"}))
    assert tag_list(AccountOptions(), {"detkit:owner": "Zoë (team)"}) == [
        {"Key": "detkit:owner", "Value": "Zoë _team_"}
    ]


@given(st.text(max_size=100))
def test_names_are_always_what_aws_takes(text: str) -> None:
    name = job_name(text)
    assert len(name) <= 63
    assert NAME.fullmatch(name)


def test_job_names_tell_the_run_and_differ_each_time() -> None:
    names = {job_name("20261121-fcos_small-1") for _ in range(20)}
    assert len(names) > 1
    assert all(re.fullmatch(r"detkit-20261121-fcos-small-1-[0-9a-f]{8}", name) for name in names)
