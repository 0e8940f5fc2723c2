"""The lines that a job prints, read from CloudWatch as they come."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from detkit_sagemaker.aws import Aws, code_of, explained

TRAINING = "/aws/sagemaker/TrainingJobs"
TRANSFORM = "/aws/sagemaker/TransformJobs"
ENDPOINTS = "/aws/sagemaker/Endpoints"

_NOT_YET = {"ResourceNotFoundException"}


def new_lines(aws: Aws, group: str, prefix: str, tokens: dict[str, str]) -> Iterator[tuple[float, str, str]]:
    """Yield time (POSIX seconds), stream and text of lines that were not read before; one stream is one machine's.

    ``tokens`` keeps for each stream where to go on, and is changed. No lines, and no error, while there is no stream.
    """
    client = aws.client("logs")
    for stream in _streams(client, group, prefix):
        while True:
            where: dict[str, Any] = {"nextToken": tokens[stream]} if stream in tokens else {}
            with explained(f"reading the log {group}/{stream} (logs:GetLogEvents)"):
                page = client.get_log_events(logGroupName=group, logStreamName=stream, startFromHead=True, **where)
            for event in page["events"]:
                yield event["timestamp"] / 1000, stream, event["message"].rstrip("\n")
            last, tokens[stream] = tokens.get(stream), page["nextForwardToken"]
            if last == tokens[stream]:
                break


def tail(aws: Aws, group: str, prefix: str, lines: int = 50) -> str:
    """Return the last lines of all machines' logs, in the order of time."""
    found = sorted(new_lines(aws, group, prefix, {}), key=lambda line: line[0])
    return "\n".join(text for _, _, text in found[-lines:])


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
