"""Requests and answers checked against botocore's own model of SageMaker: what AWS refuses is refused here."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Collection, Iterator
from typing import Any

from detkit_sagemaker.testing.refusals import Refused


@functools.cache
def service_model(name: str) -> Any:
    """Return botocore's model of a service."""
    return botocore_session().get_service_model(name)


@functools.cache
def botocore_session() -> Any:
    """Return the one botocore session of the simulator: reading the models takes most of a client's time.

    It knows no profile and no file of the user's.
    """
    import botocore.session

    ours = {"profile": None, "config_file": os.devnull, "credentials_file": os.devnull}
    return botocore.session.Session({name: (None, None, value, None) for name, value in ours.items()})


@functools.cache
def operations() -> dict[str, str]:
    """Return the methods that answer SageMaker's operations: ``{"create_model": "CreateModel", ...}``."""
    from botocore import xform_name

    return {xform_name(name): name for name in service_model("sagemaker").operation_names}


def rest_operation(service: str, method: str, path: str, given: Collection[str]) -> str | None:
    """Return the operation that a request calls in a service of REST: the one that asks for most of what is given.

    ``given`` are the names of its parameters and, in small letters, of its headers.
    """
    fitting = [
        (len(needed), -len(name), name)  # ListBuckets rather than ListDirectoryBuckets, which has another address
        for name, verb, pattern, needed in _rest_operations(service)
        if verb == method and pattern.fullmatch(path) and needed <= set(given)
    ]
    return max(fitting)[-1] if fitting else None


@functools.cache
def _rest_operations(service: str) -> list[tuple[str, str, re.Pattern[str], frozenset[str]]]:
    """Return name, method, pattern of the path, and what a request has to have of every operation."""
    from botocore.loaders import create_loader
    from botocore.model import ServiceModel

    # A session of its own: clients take the bucket out of the paths of the models that they share.
    known = ServiceModel(create_loader().load_service_model(service, "service-2"), service)
    found = []
    for name in known.operation_names:
        model = known.operation_model(name)
        uri, _, query = model.http["requestUri"].partition("?")
        pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.sub(r"\\{\w+\\\+\\}", ".+", re.escape(uri)))
        needed = {part.partition("=")[0] for part in query.split("&") if part}
        shape = model.input_shape
        for member in shape.required_members if shape else ():
            place = shape.members[member].serialization
            if place.get("location") in ("querystring", "header"):
                needed.add(place["name"] if place["location"] == "querystring" else place["name"].lower())
        if not model.deprecated:
            found.append((name, model.http["method"], re.compile(f"{pattern}/?"), frozenset(needed)))
    return found


def check_request(operation: str, request: Any) -> None:
    """Raise `Refused` where a request breaks its shape: types, required members, patterns, choices, lengths, ranges."""
    from botocore.validate import ParamValidator

    shape = service_model("sagemaker").operation_model(operation).input_shape
    if shape is None:
        return
    report = ParamValidator().validate(request, shape)
    if report.has_errors():
        raise Refused(report.generate_report())
    broken = list(_broken(request, shape, ""))
    if broken:
        plural = "s" if len(broken) > 1 else ""
        raise Refused(f"{len(broken)} validation error{plural} detected: {'; '.join(broken)}")


def check_answer(operation: str, answer: Any) -> None:
    """Raise `RuntimeError` where an answer of the simulator is none that AWS could give."""
    from botocore.validate import ParamValidator

    shape = service_model("sagemaker").operation_model(operation).output_shape
    # SageMaker leaves ModelArtifacts out before there are any, although its model calls them required.
    absent = {"ModelArtifacts": {"S3ModelArtifacts": ""}} if operation == "DescribeTrainingJob" else {}
    if shape is not None:
        report = ParamValidator().validate({**absent, **answer}, shape)
        if report.has_errors():
            raise RuntimeError(f"the simulator's answer to {operation} is wrong: {report.generate_report()}")


def _broken(value: Any, shape: Any, path: str) -> Iterator[str]:
    kind = shape.type_name
    if kind == "structure":
        for name, item in value.items():
            yield from _broken(item, shape.members[name], f"{path}.{name}" if path else name)
    elif kind == "list":
        yield from _out_of_bounds(len(value), shape, path, "length")
        for index, item in enumerate(value):
            yield from _broken(item, shape.member, f"{path}.{index + 1}.member")
    elif kind == "map":
        yield from _out_of_bounds(len(value), shape, path, "length")
        for name, item in value.items():
            yield from _broken(name, shape.key, f"{path}.{name}.key")
            yield from _broken(item, shape.value, f"{path}.{name}.value")
    elif kind == "string":
        yield from _broken_string(value, shape, path)
    elif kind in ("integer", "long", "float", "double"):
        yield from _out_of_bounds(value, shape, path, "value")


def _broken_string(value: str, shape: Any, path: str) -> Iterator[str]:
    said = f"Value '{value}' at '{path}' failed to satisfy constraint: Member must"
    if shape.enum and value not in shape.enum:
        yield f"{said} satisfy enum value set: [{', '.join(shape.enum)}]"
    pattern = _compiled(shape.metadata.get("pattern"))
    if pattern is not None and not pattern.fullmatch(value):
        yield f"{said} satisfy regular expression pattern: {pattern.pattern}"
    yield from _out_of_bounds(len(value), shape, path, "length")


def _out_of_bounds(number: float, shape: Any, path: str, what: str) -> Iterator[str]:
    low, high = shape.metadata.get("min"), shape.metadata.get("max")
    said = f"Value at '{path}' failed to satisfy constraint: Member must have {what}"
    if low is not None and number < low:
        yield f"{said} greater than or equal to {low}"
    if high is not None and number > high:
        yield f"{said} less than or equal to {high}"


@functools.cache
def _compiled(pattern: str | None) -> re.Pattern[str] | None:
    try:
        return re.compile(pattern) if pattern else None
    except re.error:
        return None  # a pattern in a dialect that Python cannot read says nothing
