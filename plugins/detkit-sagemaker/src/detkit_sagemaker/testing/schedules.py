"""EventBridge Scheduler: moto keeps the schedules, this performs those of one time whose target is SageMaker."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from datetime import datetime
from typing import Any
from zoneinfo import ZoneInfo

from detkit_sagemaker.testing.account import Account, Json, log, now
from detkit_sagemaker.testing.refusals import Refused

_TARGET = re.compile(r"arn:aws:scheduler:::aws-sdk:sagemaker:(\w+)")
_ONCE = re.compile(r"at\((\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2})\)")

CHANGING = ("CreateSchedule", "UpdateSchedule", "DeleteSchedule")
"""Operations after which `Schedules.changed` is to be called."""


class Schedules:
    """Waits for the next schedule that is due, and performs its operation."""

    def __init__(self, account: Account, perform: Callable[[str, Json], Json]) -> None:
        self._account, self._perform = account, perform
        self._changed = threading.Event()
        self._started = False
        self._done: set[str] = set()

    def check(self, body: bytes) -> None:
        """Raise `Refused` for a schedule whose role the scheduler cannot take."""
        try:
            target = json.loads(body)["Target"]
            role = target["RoleArn"]
        except (ValueError, TypeError, KeyError):
            return  # moto says what is wrong with it
        try:
            self._account.check_role(role, "scheduler.amazonaws.com")
        except (Refused, IndexError) as error:
            said = "The execution role you provide must allow AWS EventBridge Scheduler to assume the role."
            raise Refused(said) from error

    def changed(self) -> None:
        """Look at the schedules again."""
        with self._account.lock:
            if not self._started:
                self._started = True
                self._account.start(self._run, "schedules")
        self._changed.set()

    @property
    def names(self) -> list[str]:
        """The names of all schedules."""
        return [one["Name"] for one in self._all()] if self._started else []

    def _all(self) -> list[Json]:
        pages = self._account.client("scheduler").get_paginator("list_schedules").paginate()
        return [one for page in pages for one in page["Schedules"]]

    def _run(self) -> None:
        from botocore.exceptions import ClientError

        while not self._account.closing.is_set():
            self._changed.clear()
            waiting = [60.0]
            for one in self._all():
                try:
                    schedule = self._account.client("scheduler").get_schedule(
                        Name=one["Name"], GroupName=one["GroupName"]
                    )
                except ClientError:  # deleted since it was listed
                    continue
                due = _due(schedule)
                if due is None or schedule["Arn"] in self._done or schedule.get("State") == "DISABLED":
                    continue
                seconds = (due - now() - self._account.elapsed).total_seconds()
                if seconds <= 0:
                    self._fire(schedule)
                else:
                    waiting.append(seconds)
            self._wait(min(waiting))

    def _wait(self, seconds: float) -> None:
        end = now().timestamp() + seconds
        while not self._account.closing.is_set() and (left := end - now().timestamp()) > 0:
            if self._changed.wait(min(left, 0.2)):
                return

    def _fire(self, schedule: Json) -> None:
        target = schedule["Target"]
        found = _TARGET.fullmatch(target["Arn"])
        if found is None:
            log.warning("schedule %s: the target %s is not simulated", schedule["Name"], target["Arn"])
        else:
            operation = found[1][0].upper() + found[1][1:]
            try:
                self._perform(operation, json.loads(target.get("Input", "{}")))
            except (Refused, ValueError) as error:
                log.warning("schedule %s: %s failed: %s", schedule["Name"], operation, error)
        self._done.add(schedule["Arn"])
        if schedule.get("ActionAfterCompletion") == "DELETE":
            client: Any = self._account.client("scheduler")
            client.delete_schedule(Name=schedule["Name"], GroupName=schedule["GroupName"])


def _due(schedule: Json) -> datetime | None:
    """Return when a one-time schedule is due; None for one that recurs, which is not simulated."""
    found = _ONCE.fullmatch(schedule["ScheduleExpression"])
    if found is None:
        return None
    zone = ZoneInfo(schedule.get("ScheduleExpressionTimezone") or "UTC")
    return datetime.fromisoformat(found[1]).replace(tzinfo=zone)
