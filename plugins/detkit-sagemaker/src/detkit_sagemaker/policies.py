"""The permissions that detkit needs in an account, as small as they can be, and the roles that SageMaker works with.

Four parties: the *user*, who types `detkit`; the *execution role*, which containers run as; the *scheduler role*, by
which EventBridge Scheduler deletes an endpoint when its time is over; and the *build role*, by which CodeBuild makes
images where there is no Docker. `Policies.document` has all of it, `apply` makes the roles and the user's policy, and
only when it is asked.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from detkit_sagemaker.aws import explained
from detkit_sagemaker.resources import ensure

if TYPE_CHECKING:
    from detkit_sagemaker.aws import Aws

Statement = dict[str, Any]

EXECUTION_ROLE, SCHEDULER_ROLE, BUILD_ROLE = "detkit-execution", "detkit-scheduler", "detkit-build"
USER_POLICY = "detkit-user"
"""Names in the account. Roles are those of every region; what is of one region, has its name at the end."""

NAMES = "detkit-*"
"""What detkit creates is named so, and no statement about creating or deleting covers anything else."""

_VERSION = "2012-10-17"
_DELETES = ("DeleteEndpoint", "DeleteEndpointConfig", "DeleteModel")
_PULL = ("ecr:BatchCheckLayerAvailability", "ecr:BatchGetImage", "ecr:GetDownloadUrlForLayer")
_PUSH = ("ecr:CompleteLayerUpload", "ecr:InitiateLayerUpload", "ecr:PutImage", "ecr:UploadLayerPart")
_DESCRIPTION = "made by detkit sagemaker setup"


@dataclass(frozen=True, kw_only=True)
class Policies:
    """The statements for one account, region and bucket."""

    account: str
    region: str
    bucket: str
    partition: str = "aws"
    execution_role: str = EXECUTION_ROLE
    """Name of the role that containers run as."""
    data_buckets: tuple[str, ...] = ()
    """Other buckets, in which images may stay that are trained on."""
    scheduler_role: str = SCHEDULER_ROLE

    @classmethod
    def of(cls, aws: Aws, bucket: str | None = None, data_buckets: Sequence[str] = ()) -> Policies:
        """Return those of the account that is used."""
        return cls(
            account=aws.account,
            region=aws.region,
            bucket=bucket or aws.bucket,
            partition=aws.partition,
            data_buckets=tuple(data_buckets),
        )

    def _arn(self, service: str, resource: str, region: str = "") -> str:
        return f"arn:{self.partition}:{service}:{region or self.region}:{self.account}:{resource}"

    def role_arn(self, name: str) -> str:
        return f"arn:{self.partition}:iam::{self.account}:role/{name}"

    @property
    def data(self) -> list[Statement]:
        """Data, models and results in the bucket, and the logs of containers."""
        bucket = f"arn:{self.partition}:s3:::{self.bucket}"
        return [
            _allow(
                "DetkitBucket",
                [
                    *("s3:CreateBucket", "s3:GetBucketLocation"),
                    *("s3:ListBucket", "s3:ListBucketMultipartUploads"),
                ],
                [bucket],
            ),
            _allow(
                "DetkitObjects",
                ["s3:AbortMultipartUpload", "s3:GetObject", "s3:PutObject"],
                [f"{bucket}/*"],
            ),
            _allow(
                "DetkitLogs",
                ["logs:DescribeLogStreams", "logs:GetLogEvents"],
                [self._arn("logs", f"log-group:/aws/{place}/*") for place in ("sagemaker", "codebuild")],
            ),
        ]

    @property
    def train(self) -> list[Statement]:
        return [
            self._jobs("DetkitTraining", "training-job", "TrainingJob"),
            _allow("DetkitLooking", ["sagemaker:List*", "sagemaker:DescribeHubContent"], ["*"]),
            _allow("DetkitQuotas", ["servicequotas:ListServiceQuotas"], ["*"]),
            _allow("DetkitRole", ["iam:GetRole"], [self.role_arn(self.execution_role)]),
            _allow("DetkitWhoAmI", ["sts:GetCallerIdentity"], ["*"]),
            self._tags(),
            self._pass(self.execution_role, "sagemaker.amazonaws.com", "DetkitPassExecutionRole"),
        ]

    @property
    def tune(self) -> list[Statement]:
        return [self._jobs("DetkitTuning", "hyper-parameter-tuning-job", "HyperParameterTuningJob")]

    @property
    def deploy(self) -> list[Statement]:
        """Endpoints and batch transform."""
        kinds = {"model": "Model", "endpoint-config": "EndpointConfig", "endpoint": "Endpoint"}
        operations = [f"sagemaker:{verb}{kind}" for verb in ("Create", "Describe", "Delete") for kind in kinds.values()]
        return [
            _allow(
                "DetkitEndpoints",
                [*operations, "sagemaker:InvokeEndpoint"],
                [self._arn("sagemaker", f"{kind}/{NAMES}") for kind in kinds],
            ),
            self._jobs("DetkitTransform", "transform-job", "TransformJob"),
        ]

    @property
    def images(self) -> list[Statement]:
        """Container images: looking at them, and building one with CodeBuild or Docker."""
        return [
            _allow("DetkitEcrSignIn", ["ecr:GetAuthorizationToken"], ["*"]),
            _allow(
                "DetkitEcr",
                ["ecr:CreateRepository", "ecr:DescribeImages", *_PULL, *_PUSH],
                [self._arn("ecr", "repository/detkit*")],
            ),
            _allow(
                "DetkitBuild",
                [
                    *("codebuild:BatchGetBuilds", "codebuild:CreateProject"),
                    *("codebuild:StartBuild", "codebuild:StopBuild"),
                ],
                [self._arn("codebuild", f"project/{NAMES}")],
            ),
            self._pass(BUILD_ROLE, "codebuild.amazonaws.com", "DetkitPassBuildRole"),
        ]

    @property
    def building(self) -> list[Statement]:
        """What the build role may do: read what is to be built, write its log, push the image."""
        return [
            _allow("DetkitSource", ["s3:GetObject"], [f"arn:{self.partition}:s3:::{self.bucket}/*"]),
            _allow(
                "DetkitBuildLogs",
                ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:PutLogEvents"],
                [self._arn("logs", f"log-group:/aws/codebuild/{NAMES}")],
            ),
            _allow("DetkitEcrSignIn", ["ecr:GetAuthorizationToken"], ["*"]),
            _allow("DetkitPush", sorted({*_PULL, *_PUSH}), [self._arn("ecr", "repository/detkit*")]),
        ]

    @property
    def schedule(self) -> list[Statement]:
        """What the user needs so that endpoints end by themselves."""
        return [
            _allow(
                "DetkitSchedules",
                ["scheduler:CreateSchedule", "scheduler:DeleteSchedule"],
                [self._arn("scheduler", f"schedule/default/{NAMES}")],
            ),
            _allow("DetkitListSchedules", ["scheduler:ListSchedules"], ["*"]),
            self._pass(self.scheduler_role, "scheduler.amazonaws.com", "DetkitPassSchedulerRole"),
        ]

    @property
    def user(self) -> list[Statement]:
        """Everything that a user needs who trains, tunes, deploys and builds images."""
        return [
            *self.data, *self._reading_data(), *self.train, *self.tune, *self.deploy, *self.schedule, *self.images,
        ]  # fmt: skip

    @property
    def execution(self) -> list[Statement]:
        """What containers need: the bucket, JumpStart's files, their logs and metrics, and their image."""
        place = f"arn:{self.partition}:s3:::{self.bucket}"
        hub = f"arn:{self.partition}:s3:::jumpstart-*"
        return [
            _allow("DetkitBucket", ["s3:GetBucketLocation", "s3:ListBucket"], [place, hub]),
            _allow("DetkitObjects", ["s3:AbortMultipartUpload", "s3:GetObject", "s3:PutObject"], [f"{place}/*"]),
            _allow("DetkitJumpStart", ["s3:GetObject"], [f"{hub}/*"]),
            *self._reading_data(),
            _allow(
                "DetkitLogs",
                ["logs:CreateLogGroup", "logs:CreateLogStream", "logs:DescribeLogStreams", "logs:PutLogEvents"],
                [self._arn("logs", "log-group:/aws/sagemaker/*")],
            ),
            _allow("DetkitMetrics", ["cloudwatch:PutMetricData"], ["*"])
            | {"Condition": {"StringLike": {"cloudwatch:namespace": ["/aws/sagemaker/*", "aws/sagemaker/*"]}}},
            _allow("DetkitEcrSignIn", ["ecr:GetAuthorizationToken"], ["*"]),
            _allow(
                "DetkitEcr",
                _PULL,
                ["*"],  # AWS's own images lie in AWS's accounts
            ),
        ]

    def _reading_data(self) -> list[Statement]:
        places = [f"arn:{self.partition}:s3:::{name}" for name in self.data_buckets]
        if not places:
            return []
        return [
            _allow("DetkitDataBuckets", ["s3:GetBucketLocation", "s3:ListBucket"], places),
            _allow("DetkitData", ["s3:GetObject"], [f"{place}/*" for place in places]),
        ]

    @property
    def expiry(self) -> list[Statement]:
        """What the scheduler role may do: delete what detkit deployed, in every region, nothing else.

        Endpoints of any region depend on it, so one region's `apply` takes nothing from another.
        """
        kinds = ("endpoint", "endpoint-config", "model")
        return [
            _allow(
                "DetkitDeleteExpired",
                [f"sagemaker:{operation}" for operation in _DELETES],
                [self._arn("sagemaker", f"{kind}/{NAMES}", region="*") for kind in kinds],
            )
        ]

    def trust(self, service: str) -> dict[str, Any]:
        """Return the trust policy of a role that a service of AWS takes, for work in this account only."""
        return {
            "Version": _VERSION,
            "Statement": [
                {
                    "Effect": "Allow",
                    "Principal": {"Service": f"{service}.amazonaws.com"},
                    "Action": "sts:AssumeRole",
                    "Condition": {"StringEquals": {"aws:SourceAccount": self.account}},
                }
            ],
        }

    def document(self) -> dict[str, Any]:
        """Return everything: what `apply` would make, as plain data."""
        return {
            "account": self.account,
            "region": self.region,
            "bucket": self.bucket,
            "user": {"policy": f"{USER_POLICY}-{self.region}", "document": policy(self.user)},
            "roles": {
                self.execution_role: {
                    "trust": self.trust("sagemaker"),
                    "policies": {f"detkit-{self.region}": policy(self.execution)},
                },
                self.scheduler_role: {
                    "trust": self.trust("scheduler"),
                    "policies": {"detkit": policy(self.expiry)},
                },
                BUILD_ROLE: {
                    "trust": self.trust("codebuild"),
                    "policies": {f"detkit-{self.region}": policy(self.building)},
                },
            },
        }

    def _jobs(self, sid: str, kind: str, name: str) -> Statement:
        verbs = [f"sagemaker:{verb}{name}" for verb in ("Create", "Describe", "Stop")]
        return _allow(sid, verbs, [self._arn("sagemaker", f"{kind}/{NAMES}")])

    def _tags(self) -> Statement:
        return _allow("DetkitTags", ["sagemaker:AddTags", "sagemaker:ListTags"], [self._arn("sagemaker", f"*/{NAMES}")])

    def _pass(self, role: str, service: str, sid: str) -> Statement:
        return _allow(sid, ["iam:PassRole"], [self.role_arn(role)]) | {
            "Condition": {"StringEquals": {"iam:PassedToService": service}}
        }


def _allow(sid: str, actions: Sequence[str], resources: Sequence[str]) -> Statement:
    return {"Sid": sid, "Effect": "Allow", "Action": sorted(actions), "Resource": list(resources)}


def policy(statements: Sequence[Statement]) -> dict[str, Any]:
    """Return statements as a policy document."""
    return {"Version": _VERSION, "Statement": list(statements)}


def apply(aws: Aws, policies: Policies) -> list[str]:
    """Make the roles and the user's policy, or bring them up to date; return what was done, a line for each.

    What another region was given before stays.

    Nobody is given the user's policy: that is for an administrator to decide. Raises `AwsError`.
    """
    plan = policies.document()
    done = [_role(aws, name, role) for name, role in plan["roles"].items()]
    return [*done, _managed(aws, policies, plan["user"]["policy"], plan["user"]["document"])]


def _role(aws: Aws, name: str, role: dict[str, Any]) -> str:
    iam, trust = aws.client("iam"), json.dumps(role["trust"])
    made = "created"
    request = {"RoleName": name, "AssumeRolePolicyDocument": trust, "Description": _DESCRIPTION}
    if not ensure(aws, "role", request):
        made = "brought up to date"
        with explained(f"changing who may take role {name} (iam:UpdateAssumeRolePolicy)"):
            iam.update_assume_role_policy(RoleName=name, PolicyDocument=trust)
    for policy_name, document in role["policies"].items():
        with explained(f"changing what role {name} may do (iam:PutRolePolicy)"):
            iam.put_role_policy(RoleName=name, PolicyName=policy_name, PolicyDocument=json.dumps(document))
    return f"role {name}: {made}"


def _managed(aws: Aws, policies: Policies, name: str, document: dict[str, Any]) -> str:
    iam, text = aws.client("iam"), json.dumps(document)
    arn = f"arn:{policies.partition}:iam::{policies.account}:policy/{name}"
    if ensure(aws, "policy", {"PolicyName": name, "PolicyDocument": text, "Description": _DESCRIPTION}):
        return f"policy {arn}: created; attach it to whoever uses detkit"
    with explained(f"changing policy {name} (iam:CreatePolicyVersion)"):
        versions = iam.list_policy_versions(PolicyArn=arn)["Versions"]
        current = next(version["VersionId"] for version in versions if version["IsDefaultVersion"])
        there = iam.get_policy_version(PolicyArn=arn, VersionId=current)["PolicyVersion"]["Document"]
        if there == document:
            return f"policy {arn}: is as it should be"
        old = [version for version in versions if not version["IsDefaultVersion"]]
        if len(versions) >= 5:  # as many as IAM keeps
            oldest = min(old, key=lambda version: version["CreateDate"])
            iam.delete_policy_version(PolicyArn=arn, VersionId=oldest["VersionId"])
        iam.create_policy_version(PolicyArn=arn, PolicyDocument=text, SetAsDefault=True)
    return f"policy {arn}: brought up to date"
