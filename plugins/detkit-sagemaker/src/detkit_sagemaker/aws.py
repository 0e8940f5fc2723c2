"""The AWS account that is used: region, clients, and what their errors mean. Nothing is asked before it is needed."""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Iterator
from typing import Any

from detkit.errors import DetkitError, StorageError, UsageError

_EXPIRED = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}
_REFUSED = {
    *("AccessDenied", "AccessDeniedException", "UnauthorizedOperation", "403"),
    *("InvalidClientTokenId", "InvalidAccessKeyId", "UnrecognizedClientException"),
}
_THROTTLED = {"ThrottlingException", "Throttling", "TooManyRequestsException", "RequestLimitExceeded", "SlowDown"}
_QUOTA = {"ResourceLimitExceeded", "ServiceQuotaExceededException", "LimitExceededException"}
_CAPACITY = {"CapacityError", "InsufficientCapacityException", "InsufficientInstanceCapacity"}

_PASSING = {
    *("", "InternalError", "InternalFailure", "InternalServerError", "InternalServerException"),
    *("ServerException", "ServiceFailure", "ServiceUnavailable", "500", "502", "503"),
}
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}

_TRIES = 8
"""Attempts of one call in all; between them botocore waits longer and longer, at most 20 s."""


class AwsError(DetkitError):
    """AWS refused a call, or could not be reached."""

    exit_code = 3

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code
        """AWS's own, such as ``ResourceInUse``; empty where no answer came."""


class CredentialsExpired(AwsError):
    """The credentials are no longer valid. What runs at AWS goes on."""


class AccessDenied(AwsError):
    """The credentials do not allow a call."""


class Throttled(AwsError):
    """AWS had too many calls, also after waiting and trying again."""


class QuotaExceeded(AwsError):
    """The account's quota does not allow it."""


class NoCapacity(AwsError):
    """AWS has no such machine free just now."""


class Aws:
    """One account in one region. Credentials, profile and ``AWS_ENDPOINT_URL`` are found by boto3 in its own way."""

    def __init__(self, region: str | None = None) -> None:
        """Raises `UsageError` where no region is named anywhere."""
        import boto3

        session = boto3.session.Session(region_name=region)
        if session.region_name is None:
            raise UsageError(
                "no AWS region is named; give region=, e.g. --region eu-west-1, or set AWS_REGION or AWS_DEFAULT_REGION"
            )
        self._session = session
        self.region: str = session.region_name
        self._clients: dict[str, Any] = {}

    @classmethod
    def of_account(cls, account: str, region: str, what: str) -> Aws:
        """Return the account that ``what`` is in. Raises `UsageError` where the credentials are of another one."""
        aws = cls(region)
        if aws.account != account:
            raise UsageError(
                f"{what} is in the AWS account {account}, and the credentials are of {aws.account}; choose others, "
                "e.g. with AWS_PROFILE"
            )
        return aws

    def client(self, service: str) -> Any:
        """Return the boto3 client of a service, e.g. ``"sagemaker"``; calls are tried again where that may help."""
        if service not in self._clients:
            from botocore.config import Config

            config = Config(
                retries={"mode": "adaptive", "total_max_attempts": _TRIES},
                connect_timeout=10,
                read_timeout=70,
                user_agent_extra="detkit",
            )
            with explained(f"opening {service} in {self.region}"):
                self._clients[service] = self._session.client(service, config=config)
        return self._clients[service]

    @functools.cached_property
    def account(self) -> str:
        """The account's number."""
        return self.identity["Account"]

    @functools.cached_property
    def identity(self) -> dict[str, str]:
        """Who the credentials are: ``Account``, ``Arn``, ``UserId``."""
        with explained("asking who the credentials belong to (sts:GetCallerIdentity)"):
            answer = self.client("sts").get_caller_identity()
        return {name: answer[name] for name in ("Account", "Arn", "UserId")}

    @property
    def partition(self) -> str:
        """``aws``, ``aws-cn`` or ``aws-us-gov``."""
        return str(self._session.get_partition_for_region(self.region))

    @property
    def bucket(self) -> str:
        """The account's default bucket, named as SageMaker's SDKs name it."""
        return f"sagemaker-{self.region}-{self.account}"

    def arn(self, service: str, resource: str) -> str:
        """Return the ARN of a resource of this account and region."""
        return f"arn:{self.partition}:{service}:{self.region}:{self.account}:{resource}"


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn boto3's errors into `AwsError` that say what was being done, why it failed and what to do.

    ``doing`` names the call, e.g. ``"starting training job x (sagemaker:CreateTrainingJob)"``.
    """
    import botocore.exceptions as boto
    from boto3.exceptions import Boto3Error

    try:
        yield
    except boto.ClientError as error:
        raise _explain(doing, error) from error
    except Boto3Error as error:  # of moving files, which hides what AWS said
        if isinstance(error.__context__, boto.ClientError):
            raise _explain(doing, error.__context__) from error
        raise AwsError(f"{doing}: {error}") from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise AccessDenied(
            f"{doing}: there are no AWS credentials; set AWS_PROFILE, or type `aws configure` or `aws sso login`"
        ) from error
    except (boto.TokenRetrievalError, boto.UnauthorizedSSOTokenError, boto.SSOTokenLoadError) as error:
        raise CredentialsExpired(f"{doing}: {error}; sign in again, e.g. `aws sso login`") from error
    except boto.ParamValidationError as error:
        raise UsageError(f"{doing}: {error}") from error
    except OSError as error:
        if error.filename is not None or error.errno in _OF_THE_DISK:
            raise StorageError(error.filename or "a file", error) from error
        raise _unreachable(doing, error) from error
    except boto.BotoCoreError as error:
        raise _unreachable(doing, error) from error


def _unreachable(doing: str, error: Exception) -> AwsError:
    return AwsError(f"{doing}: AWS could not be reached: {error}; check the network, the region and its endpoint")


def code_of(error: BaseException | None) -> str:
    """Return AWS's code of an error, of boto3's or of `AwsError`; empty where it has none."""
    if isinstance(error, AwsError):
        return error.code
    response = getattr(error, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def may_pass(error: AwsError) -> bool:
    """Return whether the same call may well succeed in a while: AWS was not reached, too busy, or failed itself."""
    return isinstance(error, Throttled) or error.code in _PASSING


def _explain(doing: str, error: Any) -> AwsError:
    code, said = code_of(error), str(error.response.get("Error", {}).get("Message", "")) or str(error)
    if code in _EXPIRED:
        return CredentialsExpired(
            f"{doing}: the AWS credentials have expired; sign in again. what runs at AWS goes on", code
        )
    if code in _REFUSED:
        return AccessDenied(
            f"{doing}: refused: {said}. `detkit sagemaker setup --print` shows the permissions that are needed", code
        )
    if code in _THROTTLED:
        return Throttled(f"{doing}: AWS had too many calls, also after {_TRIES} tries; try again later", code)
    if code in _QUOTA:
        return QuotaExceeded(
            f"{doing}: {said}. ask for more in the console of Service Quotas, or choose another instance_type", code
        )
    if code in _CAPACITY or "capacity" in said.lower():
        return NoCapacity(f"{doing}: {said}. try later, another instance_type or another region", code)
    return AwsError(f"{doing}: {said} ({code})", code)
