"""Errors as AWS sends them: what a handler raises, and how each protocol writes it."""

from __future__ import annotations

import json
from typing import Any
from xml.sax.saxutils import escape


class Refused(Exception):
    """A call is refused. ``code`` is AWS's error code, ``fields`` are further members of the error."""

    def __init__(self, message: str, code: str = "ValidationException", status: int = 400, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.status = status
        self.fields = fields


class NotFound(Refused):
    """Nothing has that name. Operations that know ``ResourceNotFound`` answer with it, the others as for bad input."""


class Exists(Refused):
    """The name is taken. Operations that know ``ResourceInUse`` answer with it, the others as for bad input."""


def rendered(refused: Refused, service: str) -> tuple[int, list[tuple[str, str]], bytes]:
    """Return status, headers and body of an error in the protocol of a service (its name in the signature)."""
    if service in ("s3", "sts", "iam", "monitoring"):
        error = f"<Code>{escape(refused.code)}</Code><Message>{escape(refused.message)}</Message>"
        if service == "s3":
            body = f'<?xml version="1.0" encoding="UTF-8"?><Error>{error}</Error>'
        else:
            body = f"<ErrorResponse><Error><Type>Sender</Type>{error}</Error></ErrorResponse>"
        return refused.status, [("Content-Type", "text/xml")], body.encode()
    # The name stands in the body for the JSON protocol and in a header for REST-JSON; each ignores the other's.
    answer = {"__type": refused.code, "message": refused.message, "Message": refused.message, **refused.fields}
    headers = [("Content-Type", "application/x-amz-json-1.1"), ("x-amzn-ErrorType", refused.code)]
    return refused.status, headers, json.dumps(answer).encode()
