"""The lines that a job prints, read from CloudWatch as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from detkit_sagemaker.aws import Aws, AwsError, code_of, explained

TRAINING = "/aws/sagemaker/TrainingJobs"
TRANSFORM = "/aws/sagemaker/TransformJobs"
ENDPOINTS = "/aws/sagemaker/Endpoints"

_NOT_YET = {"ResourceNotFoundException"}
_TOO_OLD = "InvalidParameterException"
"""CloudWatch's answer to a token of more than 24 hours ago."""


class Position(msgspec.Struct, frozen=True, kw_only=True):
    """How far a stream was read."""

    token: str
    """Where to go on; good for 24 hours."""
    last: int = 0
    """When its last line was written, milliseconds since the epoch."""


def new_lines(aws: Aws, group: str, prefix: str, positions: dict[str, Position]) -> Iterator[tuple[float, str, str]]:
    """Yield time (POSIX seconds), stream and text of lines that were not read before; one stream is one machine's.

    ``positions`` keeps for each stream where to go on, and is changed. No lines, and no error, while there is no
    stream. Raises `AwsError`.
    """
    client = aws.client("logs")
    for stream in _streams(client, group, prefix):
        while True:
            before = positions.get(stream)
            page = _page(client, group, stream, before)
            last = 0 if before is None else before.last
            for event in page["events"]:
                last = max(last, event["timestamp"])
                yield event["timestamp"] / 1000, stream, event["message"].rstrip("\n")
            positions[stream] = Position(token=page["nextForwardToken"], last=last)
            if before is not None and before.token == positions[stream].token:
                break


def tail(aws: Aws, group: str, prefix: str, lines: int = 50) -> str:
    """Return the last lines of all machines' logs, in the order of time."""
    found = sorted(new_lines(aws, group, prefix, {}), key=lambda line: line[0])
    return "\n".join(text for _, _, text in found[-lines:])


def _page(client: Any, group: str, stream: str, after: Position | None) -> Any:
    """Return the next lines of a stream; by their time where the token is too old."""
    ways: list[dict[str, Any]] = [{}]
    if after is not None:
        ways = [{"nextToken": after.token}, {"startTime": after.last + 1}]
    for where in ways:
        try:
            with explained(f"reading the log {group}/{stream} (logs:GetLogEvents)"):
                return client.get_log_events(logGroupName=group, logStreamName=stream, startFromHead=True, **where)
        except AwsError as error:
            if "nextToken" not in where or code_of(error) != _TOO_OLD:
                raise
    raise AssertionError("the last way returns or raises")


def _streams(client: Any, group: str, prefix: str) -> list[str]:
    try:
        with explained(f"looking for the log {group} (logs:DescribeLogStreams)"):
            pages = client.get_paginator("describe_log_streams").paginate(
                logGroupName=group, logStreamNamePrefix=prefix
            )
            return [stream["logStreamName"] for page in pages for stream in page["logStreams"]]
    except Exception as error:
        if code_of(error) in _NOT_YET:
            return []
        raise
