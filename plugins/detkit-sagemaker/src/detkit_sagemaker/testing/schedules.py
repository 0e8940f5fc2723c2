"""EventBridge Scheduler: moto keeps the schedules, this performs those of one time whose target is SageMaker."""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo

from detkit_sagemaker.testing.account import Account, Json, log, now
from detkit_sagemaker.testing.refusals import Refused

_TARGET = re.compile(r"arn:aws:scheduler:::aws-sdk:sagemaker:(\w+)")
_ONCE = re.compile(r"at\((\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2})\)")

_RETRY_S = 1.0
"""From one attempt to the next; AWS waits longer and longer, for hours in the end."""

_POLICY = {"MaximumRetryAttempts": 185, "MaximumEventAgeInSeconds": 86400}
"""AWS's own, of what a schedule does not say."""

CHANGING = ("CreateSchedule", "UpdateSchedule", "DeleteSchedule")
"""Operations after which `Schedules.changed` is to be called."""


class Schedules:
    """Waits for the next schedule that is due, and performs its operation, again where that fails."""

    def __init__(self, account: Account, perform: Callable[[str, Json], Json]) -> None:
        self._account, self._perform = account, perform
        self._changed = threading.Event()
        self._started = False
        self._attempts: dict[tuple[str, datetime], tuple[int, datetime | None]] = {}
        """How often each schedule was tried as it is now, and when it is to be again; None: it is over."""

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
                if due is None or schedule.get("State") == "DISABLED":
                    continue
                _, again = self._attempts.get(_key(schedule), (0, due))
                if again is not None and again <= self._clock():
                    again = self._try(schedule, self._clock() - due)
                if again is not None:
                    waiting.append((again - self._clock()).total_seconds())
            self._wait(min(waiting))

    def _clock(self) -> datetime:
        return now() + self._account.elapsed

    def _wait(self, seconds: float) -> None:
        end = now().timestamp() + seconds
        while not self._account.closing.is_set() and (left := end - now().timestamp()) > 0:
            if self._changed.wait(min(left, 0.2)):
                return

    def _try(self, schedule: Json, age: timedelta) -> datetime | None:
        """Perform an operation that is so long overdue; return when to do it again, None where it is over."""
        attempts, _ = self._attempts.get(_key(schedule), (0, None))
        policy = _POLICY | schedule["Target"].get("RetryPolicy", {})
        is_last = (
            attempts >= policy["MaximumRetryAttempts"] or age.total_seconds() >= policy["MaximumEventAgeInSeconds"]
        )
        again = None if self._perform_once(schedule) or is_last else self._clock() + timedelta(seconds=_RETRY_S)
        self._attempts[_key(schedule)] = attempts + 1, again
        if again is None and schedule.get("ActionAfterCompletion") == "DELETE":
            client: Any = self._account.client("scheduler")
            with contextlib.suppress(client.exceptions.ResourceNotFoundException):
                client.delete_schedule(Name=schedule["Name"], GroupName=schedule["GroupName"])
        return again

    def _perform_once(self, schedule: Json) -> bool:
        """Return False where the operation failed."""
        target = schedule["Target"]
        found = _TARGET.fullmatch(target["Arn"])
        if found is None:
            log.warning("schedule %s: the target %s is not simulated", schedule["Name"], target["Arn"])
            return True
        operation = found[1][0].upper() + found[1][1:]
        try:
            self._perform(operation, json.loads(target.get("Input", "{}")))
        except (Refused, ValueError) as error:
            log.warning("schedule %s: %s failed: %s", schedule["Name"], operation, error)
            return False
        return True


def _key(schedule: Json) -> tuple[str, datetime]:
    """Return what says that a schedule is the same one still, neither changed nor made anew."""
    return schedule["Arn"], schedule["LastModificationDate"]


def _due(schedule: Json) -> datetime | None:
    """Return when a one-time schedule is due; None for one that recurs, which is not simulated."""
    found = _ONCE.fullmatch(schedule["ScheduleExpression"])
    if found is None:
        return None
    zone = ZoneInfo(schedule.get("ScheduleExpressionTimezone") or "UTC")
    return datetime.fromisoformat(found[1]).replace(tzinfo=zone)
