"""The permissions: complete for what detkit calls, narrow, and put in place as often as one likes."""

from __future__ import annotations

import ast
import fnmatch
import json
import re
from pathlib import Path
from typing import Any

import boto3
import pytest

import detkit_sagemaker
from detkit_sagemaker import resources
from detkit_sagemaker.aws import Aws
from detkit_sagemaker.policies import BUILD_ROLE, EXECUTION_ROLE, SCHEDULER_ROLE, USER_POLICY, Policies, apply
from detkit_sagemaker.testing import Simulator

POLICIES = Policies(account="123456789012", region="eu-west-1", bucket="my-bucket")


@pytest.fixture(autouse=True)
def ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made in the simulated account is none of the user's."""
    monkeypatch.setenv("DETKIT_LEDGER", str(tmp_path / "ledger.jsonl"))


def actions(statements: list[dict[str, Any]]) -> set[str]:
    return {action for statement in statements for action in statement["Action"]}


def test_every_call_that_is_named_in_an_error_is_allowed() -> None:
    """`explained` names the permission of each call; the user's policy has to have them all."""
    sources = [path for path in Path(detkit_sagemaker.__file__).parent.glob("*.py") if path.name != "policies.py"]
    named = set()
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= set(re.findall(r"\(([a-z0-9]+:[A-Z][A-Za-z]+)\)", node.value))
    named -= {"s3:HeadBucket"}  # no permission of its own: it is s3:ListBucket
    for service, creates, method, _ in resources._OPERATIONS.values():
        named |= {f"{service}:{creates}", f"{service}:{method.title().replace('_', '')}"}
    for kind, (method, *_) in resources._LISTS.items():
        named.add(f"{resources._OPERATIONS[kind][0]}:{method.title().replace('_', '')}")
    for service, creates, *_ in resources._LASTING.values():
        if service != "iam":  # only who sets up an account makes roles
            named.add(f"{service}:{creates}")
    allowed = actions(POLICIES.user)
    assert len(named) > 20
    missing = {one for one in named if not any(fnmatch.fnmatchcase(one, pattern) for pattern in allowed)}
    assert not missing


def test_what_creates_or_deletes_is_limited_to_names_of_detkit() -> None:
    for statement in [*POLICIES.user, *POLICIES.expiry]:
        verbs = {action.partition(":")[2] for action in statement["Action"]}
        writes = [verb for verb in verbs if verb.startswith(("Create", "Delete", "Stop", "Start", "Put"))]
        if writes:
            assert all("detkit" in arn or "my-bucket" in arn for arn in statement["Resource"]), statement
        assert "*" not in statement["Action"]
    wide = {action for statement in POLICIES.user if "*" in statement["Resource"] for action in statement["Action"]}
    assert all(re.match(r"\w+:(List|Get|Describe|Search)", action) for action in wide), wide


@pytest.mark.parametrize("whose", ["jobs", "user"])
def test_images_may_stay_in_other_buckets_that_are_named(whose: str) -> None:
    policies = Policies(account="1", region="r", bucket="b", data_buckets=("pictures",))
    statements = policies.execution if whose == "jobs" else policies.user
    allowed = {
        (action, place)
        for one in statements
        for action in one["Action"]
        for place in one["Resource"]
        if "pict" in place
    }
    assert allowed == {
        ("s3:GetBucketLocation", "arn:aws:s3:::pictures"),
        ("s3:ListBucket", "arn:aws:s3:::pictures"),
        ("s3:GetObject", "arn:aws:s3:::pictures/*"),
    }


def test_roles_are_passed_to_their_own_service_alone() -> None:
    passed = [statement for statement in POLICIES.user if statement["Action"] == ["iam:PassRole"]]
    assert {statement["Resource"][0].rpartition("/")[2] for statement in passed} == {
        EXECUTION_ROLE, SCHEDULER_ROLE, BUILD_ROLE,
    }  # fmt: skip
    assert all("iam:PassedToService" in statement["Condition"]["StringEquals"] for statement in passed)


def test_the_scheduler_may_delete_and_nothing_else() -> None:
    assert actions(POLICIES.expiry) == {
        "sagemaker:DeleteEndpoint", "sagemaker:DeleteEndpointConfig", "sagemaker:DeleteModel",
    }  # fmt: skip
    trusted = POLICIES.document()["roles"][SCHEDULER_ROLE]["trust"]["Statement"][0]
    assert trusted["Principal"] == {"Service": "scheduler.amazonaws.com"}
    assert trusted["Condition"] == {"StringEquals": {"aws:SourceAccount": "123456789012"}}


def test_other_partitions_have_other_arns() -> None:
    china = Policies(account="123456789012", region="cn-north-1", bucket="b", partition="aws-cn")
    assert "arn:aws:" not in json.dumps(china.document())


def test_a_policy_is_no_longer_than_iam_takes() -> None:
    compact = json.dumps(POLICIES.document()["user"]["document"], separators=(",", ":"))
    assert len(compact) <= 6144


def test_apply_makes_what_print_shows_and_may_be_repeated(simulator: Simulator) -> None:
    iam, aws = boto3.client("iam"), Aws()
    policies = Policies.of(aws)
    assert [line.rpartition(": ")[2].partition(";")[0] for line in apply(aws, policies)] == ["created"] * 4
    assert "is as it should be" in apply(aws, policies)[-1]
    for name, role in policies.document()["roles"].items():
        there = iam.get_role(RoleName=name)["Role"]
        assert there["AssumeRolePolicyDocument"] == role["trust"]
        for inline, document in role["policies"].items():
            assert iam.get_role_policy(RoleName=name, PolicyName=inline)["PolicyDocument"] == document
    arn = f"arn:aws:iam::{aws.account}:policy/{USER_POLICY}-{aws.region}"
    for i in range(7):  # more versions than IAM keeps
        apply(aws, Policies.of(aws, f"bucket-{i}"))
    versions = iam.list_policy_versions(PolicyArn=arn)["Versions"]
    assert len(versions) == 5
    current = next(version for version in versions if version["IsDefaultVersion"])
    document = iam.get_policy_version(PolicyArn=arn, VersionId=current["VersionId"])["PolicyVersion"]["Document"]
    assert "bucket-6" in json.dumps(document)


def test_a_second_region_takes_nothing_from_the_first(simulator: Simulator) -> None:
    iam = boto3.client("iam")
    for region in ("us-east-1", "eu-west-1"):
        aws = Aws(region)
        apply(aws, Policies.of(aws))
    for region in ("us-east-1", "eu-west-1"):
        policies = Policies.of(Aws(region))
        for role in (EXECUTION_ROLE, BUILD_ROLE):
            names = iam.list_role_policies(RoleName=role)["PolicyNames"]
            texts = [json.dumps(iam.get_role_policy(RoleName=role, PolicyName=one)["PolicyDocument"]) for one in names]
            assert any(policies.bucket in text for text in texts)
        expiry = iam.get_role_policy(RoleName=SCHEDULER_ROLE, PolicyName="detkit")["PolicyDocument"]["Statement"][0]
        endpoint = f"arn:aws:sagemaker:{region}:{policies.account}:endpoint/detkit-a"
        assert any(fnmatch.fnmatchcase(endpoint, arn) for arn in expiry["Resource"])
        user = f"arn:aws:iam::{policies.account}:policy/{USER_POLICY}-{region}"
        current = iam.get_policy(PolicyArn=user)["Policy"]["DefaultVersionId"]
        document = iam.get_policy_version(PolicyArn=user, VersionId=current)["PolicyVersion"]["Document"]
        assert document == policies.document()["user"]["document"]


@pytest.mark.parametrize("role", [EXECUTION_ROLE, SCHEDULER_ROLE])
def test_the_roles_can_be_taken_by_who_they_are_for(simulator: Simulator, role: str) -> None:
    aws = Aws()
    apply(aws, Policies.of(aws))
    service = {"detkit-execution": "sagemaker", "detkit-scheduler": "scheduler"}[role]
    simulator._account.check_role(Policies.of(aws).role_arn(role), f"{service}.amazonaws.com")
