"""The endpoint: one HTTP server for all of AWS. SageMaker and Service Quotas are answered here, the rest by moto."""

from __future__ import annotations

import hmac
import io
import json
import re
import threading
import uuid
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any
from urllib.parse import parse_qs, unquote

from detkit_sagemaker.testing.account import INTERNAL_KEY, USER_KEY, Account, Json, Resource, log
from detkit_sagemaker.testing.faults import DropConnection
from detkit_sagemaker.testing.hosting import Hosting
from detkit_sagemaker.testing.hub import Hub
from detkit_sagemaker.testing.listing import page
from detkit_sagemaker.testing.refusals import Exists, NotFound, Refused, rendered
from detkit_sagemaker.testing.schedules import CHANGING, Schedules
from detkit_sagemaker.testing.storage import Begun
from detkit_sagemaker.testing.training import TrainingJobs
from detkit_sagemaker.testing.transform import TransformJobs
from detkit_sagemaker.testing.tuning import TuningJobs
from detkit_sagemaker.testing.validation import (
    botocore_session,
    check_answer,
    check_request,
    operations,
    rest_operation,
    service_model,
)

_CREDENTIAL = re.compile(r"Credential=([^/,]+)/\d+/[^/]+/([^/]+)/aws4_request")
_INVOCATION = re.compile(r"/endpoints/([^/]+)/invocations")

Environ = dict[str, Any]
Answered = tuple[int, list[tuple[str, str]], bytes]


class _NotOurs(Refused):
    """A call by someone who has no business here. It is not noted, and no fault meets it."""


class Tagging:
    """SageMaker's operations on tags."""

    def __init__(self, account: Account) -> None:
        self._account = account

    def add_tags(self, request: Json) -> Json:
        """Add tags to a resource."""
        resource = self._account.with_arn(request["ResourceArn"])
        resource.tag(request["Tags"])
        return {"Tags": _tags(resource)}

    def delete_tags(self, request: Json) -> Json:
        """Take tags away from a resource."""
        resource = self._account.with_arn(request["ResourceArn"])
        for key in request["TagKeys"]:
            resource.tags.pop(key, None)
        return {}

    def list_tags(self, request: Json) -> Json:
        """List a resource's tags."""
        return page(_tags(self._account.with_arn(request["ResourceArn"])), request, "Tags", 50)


class Endpoint:
    """The WSGI application of one account.

    Who can call it can run programs as its owner. So a call must name the random access key of the account, come from
    no web page (no ``Origin``) and mean this machine (``Host``, against names that lead to it from elsewhere).
    """

    def __init__(self, account: Account) -> None:
        from moto.core.base_backend import AccountSpecificBackend
        from moto.moto_server import werkzeug_app

        werkzeug_app.DISABLE_GLOBAL_CORS = True  # type: ignore[attr-defined]  # as moto imported it
        # moto asks it for the names of regions; its own would read the user's profile, and fail where that is missing.
        AccountSpecificBackend.get_session = staticmethod(botocore_session)  # type: ignore[assignment,method-assign]
        self._account = account
        self._moto: Any = werkzeug_app.DomainDispatcherApplication(werkzeug_app.create_backend_app)
        self._hosting = Hosting(account)
        training = TrainingJobs(account)
        parts = (training, TuningJobs(account, training), self._hosting, TransformJobs(account), Hub(account))
        self._handlers: dict[str, Callable[[Json], Json]] = {
            operation: getattr(part, method)
            for method, operation in operations().items()
            for part in (*parts, Tagging(account))
            if hasattr(part, method)
        }
        self.schedules = Schedules(account, self.perform)
        self._begun = Begun()
        self._lock = threading.Lock()
        self.created: list[tuple[str, Json]] = []
        self.calls: list[str] = []

    def perform(self, operation: str, request: Json) -> Json:
        """Perform an operation of SageMaker. Raises `Refused`."""
        handler = self._handlers.get(operation)
        if handler is None:
            raise Refused(f"{operation} is not simulated", "UnknownOperationException")
        check_request(operation, request)
        known = [error.name for error in service_model("sagemaker").operation_model(operation).error_shapes]
        try:
            answer = handler(request)
        except NotFound as refused:
            refused.code = "ResourceNotFound" if "ResourceNotFound" in known else refused.code
            raise
        except Exists as refused:
            refused.code = "ResourceInUse" if "ResourceInUse" in known else refused.code
            raise
        check_answer(operation, answer)
        if operation.startswith("Create"):
            self._note(operation, request)
        return answer

    def _note(self, operation: str, request: Json) -> None:
        with self._lock:
            self.created.append((operation, request))

    def __call__(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        """Answer one HTTP request."""
        found = _CREDENTIAL.search(environ.get("HTTP_AUTHORIZATION", ""))
        key, service = (found[1], found[2]) if found else ("", "s3")
        ours = service in ("sagemaker", "servicequotas")
        try:
            try:
                self._check_caller(environ, key, service)
                operation = _operation(environ, service)
                if key == INTERNAL_KEY:
                    if not ours:
                        return self._by_moto(environ, start_response)
                    return _send(start_response, *self._answer(environ, service, operation))
                with self._lock:
                    self.calls.append(operation)
                self._account.faults.gate(service, operation)
                if not ours:
                    return self._passed_on(environ, start_response, operation)
                answered = self._answer(environ, service, operation)
            except _NotOurs as refused:
                return _send(start_response, *rendered(refused, service))
            except Refused as refused:
                answered = rendered(refused, service)
            if key != INTERNAL_KEY:
                self._account.faults.crash("after", operation)
        except DropConnection as dropped:
            raise ConnectionAbortedError("dropped, as asked") from dropped
        return _send(start_response, *answered)

    def _check_caller(self, environ: Environ, key: str, service: str) -> None:
        """Raise `_NotOurs` unless the call is one that the owner of the account makes, or one of its containers."""
        port = environ["SERVER_PORT"]
        if "HTTP_ORIGIN" in environ:
            raise _NotOurs("calls of web pages are refused", "AccessDenied", 403)
        if environ.get("HTTP_HOST") not in (f"127.0.0.1:{port}", f"localhost:{port}"):
            raise _NotOurs("the host is not this machine", "AccessDenied", 403)
        if not any(hmac.compare_digest(key.encode(), one.encode()) for one in (USER_KEY, INTERNAL_KEY)):
            code = {"s3": "InvalidAccessKeyId", "sts": "InvalidClientTokenId", "iam": "InvalidClientTokenId"}
            said = "The access key is not that of this simulated account; use what Simulator.environment has."
            raise _NotOurs(said, code.get(service, "UnrecognizedClientException"), 403)
        if environ.get("PATH_INFO", "").startswith("/moto-api"):
            raise _NotOurs("the simulator is not steered by HTTP", "AccessDenied", 403)

    def reset(self) -> None:
        """Empty the account. moto has one state in a process, and only this way to it that is meant for others."""
        from werkzeug.test import create_environ, run_wsgi_app

        run_wsgi_app(self._moto, create_environ("/moto-api/reset", method="POST"), buffered=True)

    def _answer(self, environ: Environ, service: str, operation: str) -> Answered:
        body = _body(environ)
        path = unquote(environ.get("PATH_INFO", ""))
        if (found := _INVOCATION.fullmatch(path)) and service == "sagemaker":
            names = {"Content-Type": "CONTENT_TYPE", "Accept": "HTTP_ACCEPT"}
            names["X-Amzn-SageMaker-Custom-Attributes"] = "HTTP_X_AMZN_SAGEMAKER_CUSTOM_ATTRIBUTES"
            headers = {name: environ[variable] for name, variable in names.items() if variable in environ}
            answer = self._hosting.invoke(found[1], body, headers)
            return answer.status, list(answer.headers.items()), answer.body
        try:
            request = json.loads(body or b"{}")
        except ValueError as error:
            raise Refused("the request is no JSON", "SerializationException") from error
        try:
            if service == "servicequotas":
                answered = self._account.quotas.answer(operation, request)
            else:
                answered = self.perform(operation, request)
        except Refused:
            raise
        except Exception as error:
            log.exception("the simulator failed in %s", operation)
            raise Refused(f"the simulator failed: {error!r}", "InternalFailure", 500) from error
        return 200, [("Content-Type", "application/x-amz-json-1.1")], json.dumps(answered, default=_plain).encode()

    def _passed_on(self, environ: Environ, start_response: Callable[..., Any], operation: str) -> Iterable[bytes]:
        """Let moto answer, and see what became of a schedule."""
        changing, request = operation in CHANGING, b""
        if changing:
            request = _body(environ)
            self.schedules.check(request)
        if wanted := environ.get("HTTP_X_AMZ_COPY_SOURCE_IF_MATCH"):
            self._account.storage.require_etag(unquote(environ["HTTP_X_AMZ_COPY_SOURCE"]), wanted)
        seen: list[str] = []

        def start(status: str, headers: list[tuple[str, str]], *more: Any) -> Any:
            seen.append(status)
            return start_response(status, headers, *more)

        answer = self._by_moto(environ, start)
        if operation in Begun.TOLD_OF:
            answer = [self._begun.heard(operation, b"".join(answer))]
        if changing and seen and seen[0].startswith("2"):
            if operation == "CreateSchedule":
                self._note(operation, json.loads(request))
            self.schedules.changed()
        self._account.faults.crash("after", operation)
        return answer

    def _by_moto(self, environ: Environ, start_response: Callable[..., Any]) -> Iterable[bytes]:
        try:
            answer: Iterable[bytes] = self._moto(environ, start_response)
        except NotImplementedError as error:  # not an internal error, which clients would try again
            raise Refused(str(error), "NotImplemented", 501) from error
        return answer


def _send(
    start_response: Callable[..., Any], status: int, headers: list[tuple[str, str]], body: bytes
) -> Iterable[bytes]:
    extra = [("Content-Length", str(len(body))), ("x-amzn-RequestId", str(uuid.uuid4()))]
    start_response(f"{status} -", [*headers, *extra])
    return [body]


def _operation(environ: Environ, service: str) -> str:
    """Return AWS's name of the operation that is called, as well as it can be told; else the HTTP method."""
    method: str = environ["REQUEST_METHOD"]
    path, query = environ.get("PATH_INFO", ""), parse_qs(environ.get("QUERY_STRING", ""), keep_blank_values=True)
    if target := environ.get("HTTP_X_AMZ_TARGET"):
        return str(target).split(".")[-1]
    if service == "sagemaker":
        return "InvokeEndpoint"
    if service in ("s3", "scheduler"):
        headers = {name.removeprefix("HTTP_").replace("_", "-").lower() for name in environ if name.startswith("HTTP_")}
        return rest_operation(service, method, path, {*query, *headers}) or method
    if environ.get("CONTENT_TYPE", "").startswith("application/x-www-form-urlencoded"):
        return parse_qs(_body(environ).decode()).get("Action", [method])[0]
    return method


def _body(environ: Environ) -> bytes:
    """Return the request's body; it can be read again."""
    body: bytes = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
    environ["wsgi.input"] = io.BytesIO(body)
    return body


def _tags(resource: Resource) -> list[dict[str, str]]:
    return [{"Key": key, "Value": value} for key, value in resource.tags.items()]


def _plain(value: object) -> float:
    if isinstance(value, datetime):
        return value.timestamp()
    raise TypeError(f"{value!r} has no JSON form")
