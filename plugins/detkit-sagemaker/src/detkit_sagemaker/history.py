"""What a job told, from its log and from its own file, kept as events and lines of the run."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from detkit.errors import InvalidData
from detkit.events import Event, from_line
from detkit.files import atomic_write
from detkit.job import Workspace
from detkit_sagemaker import uploads
from detkit_sagemaker.aws import Aws, AwsError, CredentialsExpired, may_pass
from detkit_sagemaker.builtin import read_line
from detkit_sagemaker.container.archives import unpack

Line = tuple[float, str, str]
"""Time (POSIX seconds), stream and text."""


def events_of(lines: Iterable[Line], metrics: Mapping[str, str]) -> tuple[list[Event], list[str]]:
    """Return the events that lines are or tell by the expressions ``metrics``, and the lines that are no events."""
    events, others = [], []
    for t, _, text in lines:
        event = from_line(text)
        if event is None:
            others.append(text)
            reading = read_line(text, metrics)
            if reading is None:
                continue
            done = None if reading.epoch is None else reading.epoch + 1  # the log counts from 0
            event = Event(t=t, kind="metric", values=dict(reading.values), epoch=done)
        # How it ended is said once all that it left is here.
        if not (event.kind == "state" and event.values.get("state") in {"finished", "stopped"}):
            events.append(event)
    return events, others


def keep(workspace: Workspace, lines: Iterable[Line], metrics: Mapping[str, str]) -> None:
    """Append log lines to the run's log; those that are events, or tell a metric, to its events."""
    events, others = events_of(lines, metrics)
    with workspace.log_file.open("a", encoding="utf-8") as log:
        log.writelines(f"{text}\n" for text in others)
    with workspace.metrics_file.open("ab") as file:
        file.writelines(msgspec.json.encode(event) + b"\n" for event in events)


def told_by(aws: Aws, url: str, workspace: Workspace) -> list[Event] | None:
    """Return the events that our container left in its ``output.tar.gz``; None where it left none that can be read."""
    with tempfile.TemporaryDirectory(dir=workspace.path, prefix=".output-") as beside:
        archive, folder = Path(beside) / "output.tar.gz", Path(beside) / "output"
        try:
            uploads.get(aws, url, archive)
            unpack(archive, folder)
        except InvalidData:
            return None
        except AwsError as error:
            if isinstance(error, CredentialsExpired) or may_pass(error):
                raise
            return None
        file = folder / "metrics.jsonl"
        if not file.is_file():
            return None
        # The worker's lines as its log would have them.
        return events_of(((0.0, "", f"detkit {line}") for line in file.read_text().splitlines()), {})[0]


def complete(workspace: Workspace, told: Sequence[Event]) -> None:
    """Let the run have each event that a job told exactly once, in the job's order; what others told stays."""
    file = workspace.metrics_file
    content = file.read_bytes() if file.is_file() else b""
    here = content.splitlines()
    merged = list(_merged(here, [_canonical(msgspec.json.encode(event)) for event in told]))
    if merged[: len(here)] == here and content.endswith(
        b"\n"
    ):  # the usual case: readers that follow the file are not disturbed
        with file.open("ab") as end:
            end.writelines(line + b"\n" for line in merged[len(here) :])
        return
    with atomic_write(file) as whole:
        whole.writelines(line + b"\n" for line in merged)


def _merged(here: Iterable[bytes], told: Sequence[bytes]) -> Iterator[bytes]:
    places = {line: number for number, line in enumerate(told)}
    done = 0
    for line in here:
        number = places.get(_canonical(line))
        if number is None:
            yield line
        elif number >= done:
            yield from told[done:number]
            yield line
            done = number + 1
    yield from told[done:]


def _canonical(line: bytes) -> bytes:
    """Return an event's line as one that was read is written: numbers that were whole are no other than the rest."""
    with contextlib.suppress(msgspec.DecodeError):
        return msgspec.json.encode(msgspec.json.decode(line, type=Event))
    return line
