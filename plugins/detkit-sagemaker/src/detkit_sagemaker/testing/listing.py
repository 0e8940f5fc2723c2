"""List operations: filters, order and pages, alike for every kind of resource."""

from __future__ import annotations

import base64
from datetime import datetime
from typing import Any

from detkit_sagemaker.testing.account import Json, Resource
from detkit_sagemaker.testing.refusals import Refused


def listed(resources: list[Any], request: Json, member: str, default_page: int = 10) -> Json:
    """Return one page of resources that pass the request's filters, under the name ``member``."""
    found = [resource for resource in resources if _passes(resource, request)]
    sort_by = request.get("SortBy", "CreationTime")
    if sort_by == "Name":
        found.sort(key=lambda resource: resource.name)
    elif sort_by == "Status":
        found.sort(key=lambda resource: resource.status)
    else:
        found.sort(key=lambda resource: resource.created)
    if request.get("SortOrder", "Descending") == "Descending":
        found.reverse()
    return page([resource.summary for resource in found], request, member, default_page)


def page(items: list[Any], request: Json, member: str, default_page: int = 10) -> Json:
    """Return the page of a list that ``NextToken`` and ``MaxResults`` ask for."""
    start = _start(request.get("NextToken"))
    end = start + request.get("MaxResults", default_page)
    answer: Json = {member: items[start:end]}
    if end < len(items):
        answer["NextToken"] = base64.urlsafe_b64encode(f"from {end}".encode()).decode()
    return answer


def _start(token: str | None) -> int:
    if token is None:
        return 0
    try:
        return int(base64.urlsafe_b64decode(token).decode().removeprefix("from "))
    except ValueError as error:
        raise Refused("Invalid pagination token") from error


def _passes(resource: Resource, request: Json) -> bool:
    wanted = request.get("StatusEquals")
    times = {"CreationTime": resource.created, "LastModifiedTime": resource.modified}
    return (
        request.get("NameContains", "").lower() in resource.name.lower()
        and (wanted is None or resource.status == wanted)
        and all(
            _time(request.get(f"{name}After"), time) <= time <= _time(request.get(f"{name}Before"), time)
            for name, time in times.items()
        )
    )


def _time(value: float | None, default: datetime) -> datetime:
    return default if value is None else datetime.fromtimestamp(value, default.tzinfo)
