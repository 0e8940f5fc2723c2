"""What the SageMaker SDK's defaults files say counts where an option says nothing, and is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from detkit.errors import InvalidData, InvalidValue, UsageError
from detkit.params import set_fields
from detkit_sagemaker.defaults import ADMIN_VARIABLE, USER_VARIABLE, complete, files, role_arn
from detkit_sagemaker.options import DeployOptions, SagemakerOptions, TransformOptions

ADMIN, MINE = "arn:aws:iam::123456789012:role/admin", "arn:aws:iam::123456789012:role/mine"


@pytest.fixture(autouse=True)
def no_files_of_this_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in (ADMIN_VARIABLE, USER_VARIABLE):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CONFIG_DIRS", str(tmp_path / "site"))
    monkeypatch.setattr("sys.platform", "linux")


def write(file: Path, **sections: object) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(yaml.safe_dump({"SchemaVersion": "1.0", "SageMaker": sections}))
    return file


def test_without_files_nothing_changes() -> None:
    options = SagemakerOptions(role="r")
    completed, told = complete(options)
    assert completed == options
    assert (dict(told.origins), told.unused, told.notes()) == ({}, (), ())


def test_a_training_job_takes_everything_that_the_file_knows_of_it(tmp_path: Path) -> None:
    file = write(
        tmp_path / "home/sagemaker/config.yaml",
        TrainingJob={
            "RoleArn": MINE,
            "VpcConfig": {"Subnets": ["subnet-1", "subnet-2"], "SecurityGroupIds": ["sg-1"]},
            "EnableNetworkIsolation": True,
            "EnableInterContainerTrafficEncryption": True,
            "OutputDataConfig": {"KmsKeyId": "out"},
            "ResourceConfig": {"VolumeKmsKeyId": "disk"},
            "Tags": [{"Key": "team", "Value": "vision"}],
            "Environment": {"A": "1"},
        },
        PythonSDK={"Modules": {"Session": {"DefaultS3Bucket": "ours", "DefaultS3ObjectKeyPrefix": "/lab/"}}},
        ProcessingJob={"RoleArn": ADMIN},
    )
    options, told = complete(SagemakerOptions())
    assert options == SagemakerOptions(
        role=MINE,
        subnets=("subnet-1", "subnet-2"),
        security_groups=("sg-1",),
        network_isolation=True,
        encrypt_traffic=True,
        kms_key="out",
        volume_kms_key="disk",
        tags={"team": "vision"},
        output="s3://ours/lab/detkit",
    )
    assert set(told.origins.values()) == {str(file)}
    assert told.unused == ("TrainingJob.Environment.A",)
    assert any("TrainingJob.Environment.A" in note for note in told.notes())


def test_an_option_counts_before_the_users_file_and_that_before_the_administrators(tmp_path: Path) -> None:
    write(
        tmp_path / "site/sagemaker/config.yaml",
        TrainingJob={
            "RoleArn": ADMIN,
            "OutputDataConfig": {"KmsKeyId": "admins"},
            "ResourceConfig": {"VolumeKmsKeyId": "disk"},
            "VpcConfig": {"Subnets": ["subnet-9"], "SecurityGroupIds": ["sg-9"]},
            "EnableNetworkIsolation": True,
        },
    )
    user = write(tmp_path / "home/sagemaker/config.yaml", TrainingJob={"RoleArn": MINE})
    given = SagemakerOptions(kms_key="typed", subnets=("subnet-1",), security_groups=("sg-1",), network_isolation=False)
    options, told = complete(given)
    assert (options.role, options.kms_key, options.volume_kms_key) == (MINE, "typed", "disk")
    assert (options.subnets, options.security_groups) == (("subnet-1",), ("sg-1",))
    assert options.network_isolation is False
    assert told.origins["role"] == str(user)
    assert set(told.origins) == {"role", "volume_kms_key"}


def test_half_a_network_is_not_completed_with_half_of_another(tmp_path: Path) -> None:
    write(
        tmp_path / "home/sagemaker/config.yaml",
        TrainingJob={"VpcConfig": {"Subnets": ["subnet-9"], "SecurityGroupIds": ["sg-9"]}},
    )
    assert complete(SagemakerOptions(subnets=("subnet-1",)))[0].security_groups == ()


def test_tags_add_up_and_the_typed_one_counts(tmp_path: Path) -> None:
    tags = [{"Key": "team", "Value": "vision"}, {"Key": "site", "Value": "A"}]
    write(tmp_path / "home/sagemaker/config.yaml", TrainingJob={"Tags": tags})
    options, _ = complete(set_fields(SagemakerOptions(), {"tags": "site=B,run=1"}, kind="option"))
    assert options.tags == {"team": "vision", "site": "B", "run": "1"}


def test_transforms_and_endpoints_have_sections_of_their_own(tmp_path: Path) -> None:
    write(
        tmp_path / "home/sagemaker/config.yaml",
        TrainingJob={"RoleArn": ADMIN},
        Model={"ExecutionRoleArn": MINE},
        TransformJob={"TransformOutput": {"KmsKeyId": "out"}, "TransformResources": {"VolumeKmsKeyId": "disk"}},
        EndpointConfig={"KmsKeyId": "endpoint-disk", "Tags": [{"Key": "a", "Value": "b"}]},
    )
    transform, deploy = complete(TransformOptions())[0], complete(DeployOptions())[0]
    assert (transform.role, transform.kms_key, transform.volume_kms_key) == (MINE, "out", "disk")
    assert (deploy.role, deploy.volume_kms_key, deploy.tags) == (MINE, "endpoint-disk", {"a": "b"})


def test_the_variables_name_a_file_or_its_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    admin = write(tmp_path / "a/config.yaml", TrainingJob={"RoleArn": ADMIN})
    user = write(tmp_path / "b/my.yaml", TrainingJob={"RoleArn": MINE})
    monkeypatch.setenv(ADMIN_VARIABLE, str(admin.parent))
    monkeypatch.setenv(USER_VARIABLE, str(user))
    assert files() == [admin, user]
    assert complete(SagemakerOptions())[0].role == MINE


def test_a_named_file_has_to_be_here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(USER_VARIABLE, str(tmp_path / "missing.yaml"))
    with pytest.raises(UsageError, match=f"{USER_VARIABLE} names .*missing"):
        complete(SagemakerOptions())
    monkeypatch.setenv(USER_VARIABLE, "s3://bucket/config.yaml")
    with pytest.raises(UsageError, match="aws s3 cp s3://bucket/config.yaml config.yaml"):
        complete(SagemakerOptions())


@pytest.mark.parametrize(
    ("content", "error"),
    [
        ("SchemaVersion: '1.0'\nSageMaker: [1]", InvalidValue),
        ("SchemaVersion: '9'\nSageMaker: {}", InvalidValue),
        ("SageMaker: {}", InvalidValue),
        ("- 1", InvalidValue),
        ("a: [", InvalidData),
        ("x: !!python/object/apply:os.getcwd []", InvalidData),
        ("SchemaVersion: '1.0'\nSageMaker: {TrainingJob: {Tags: {a: b}}}", InvalidValue),
        ("SchemaVersion: '1.0'\nSageMaker: {TrainingJob: {VpcConfig: {Subnets: 3}}}", InvalidValue),
    ],
)
def test_a_broken_file_is_named(content: str, error: type[Exception], tmp_path: Path) -> None:
    file = tmp_path / "home/sagemaker/config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(error, match="config.yaml"):
        complete(SagemakerOptions())


def test_an_empty_file_says_nothing(tmp_path: Path) -> None:
    file = tmp_path / "home/sagemaker/config.yaml"
    file.parent.mkdir(parents=True)
    file.write_text("")
    assert complete(SagemakerOptions())[0] == SagemakerOptions()


def test_a_role_is_named_or_written_out() -> None:
    where = {"partition": "aws", "account": "123456789012"}
    assert role_arn("mine", **where) == MINE
    assert role_arn("path/mine", **where) == "arn:aws:iam::123456789012:role/path/mine"
    assert role_arn(ADMIN, **where) == ADMIN
