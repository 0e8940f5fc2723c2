"""Service quotas of SageMaker: how many instances of a kind may run at once. The numbers are the simulator's."""

from __future__ import annotations

import functools
import hashlib
from typing import TYPE_CHECKING, Any

from detkit_sagemaker.testing.refusals import Refused
from detkit_sagemaker.testing.validation import service_model

if TYPE_CHECKING:
    from detkit_sagemaker.testing.account import Account

_DEFAULT = 20.0
"""The value of every quota that no one has set. A new account at AWS has 0 for most GPU instances."""

_USAGES = {
    "training job usage": "TrainingInstanceType",
    "spot training job usage": "TrainingInstanceType",
    "transform job usage": "TransformInstanceType",
    "endpoint usage": "ProductionVariantInstanceType",
}


class Quotas:
    """The quotas of an account, e.g. ``ml.m5.xlarge for endpoint usage``."""

    def __init__(self, account: Account) -> None:
        self._account = account

    def answer(self, operation: str, request: dict[str, Any]) -> dict[str, Any]:
        """Answer a call of Service Quotas."""
        if request.get("ServiceCode") != "sagemaker":
            raise Refused(f"no quotas of {request.get('ServiceCode')} are simulated", "NoSuchResourceException")
        if operation in ("GetServiceQuota", "GetAWSDefaultServiceQuota"):
            for name in _names():
                if _code(name) == request.get("QuotaCode"):
                    return {"Quota": self._quota(name)}
            raise Refused(f"The quota {request.get('QuotaCode')} does not exist.", "NoSuchResourceException")
        if operation in ("ListServiceQuotas", "ListAWSDefaultServiceQuotas"):
            start, count = int(request.get("NextToken", 0)), int(request.get("MaxResults", 100))
            page = [self._quota(name) for name in _names()[start : start + count]]
            more = start + count < len(_names())
            return {"Quotas": page, **({"NextToken": str(start + count)} if more else {})}
        raise Refused(f"{operation} of Service Quotas is not simulated", "UnknownOperationException")

    def check(self, usage: str, instance_type: str, running: int, wanted: int) -> None:
        """Raise `Refused` where more instances than allowed would run."""
        name = f"{instance_type} for {usage}"
        limit = self._account.faults.quota_of(name, _DEFAULT)
        if running + wanted > limit:
            raise Refused(
                f"The account-level service limit '{name}' is {limit:g} Instances, with current utilization of "
                f"{running} Instances and a request delta of {wanted} Instances. Please use AWS Service Quotas to "
                "request an increase for this quota.",
                "ResourceLimitExceeded",
            )

    def _quota(self, name: str) -> dict[str, Any]:
        code = _code(name)
        return {
            "ServiceCode": "sagemaker",
            "ServiceName": "Amazon SageMaker",
            "QuotaArn": f"arn:aws:servicequotas:{self._account.region}:{self._account.number}:sagemaker/{code}",
            "QuotaCode": code,
            "QuotaName": name,
            "Value": self._account.faults.quota_of(name, _DEFAULT),
            "Unit": "None",
            "Adjustable": True,
            "GlobalQuota": False,
        }


@functools.cache
def _names() -> list[str]:
    model = service_model("sagemaker")
    return [f"{kind} for {usage}" for usage, shape in _USAGES.items() for kind in model.shape_for(shape).enum]


def _code(name: str) -> str:
    """Return a code that looks like AWS's own, which are not known here."""
    return f"L-{hashlib.sha256(name.encode()).hexdigest()[:8].upper()}"
