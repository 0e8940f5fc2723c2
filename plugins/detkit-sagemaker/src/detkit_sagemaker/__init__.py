"""The SageMaker backend. Nothing here imports boto3; what talks to AWS is loaded when somebody asks for it."""

from __future__ import annotations

from collections.abc import Iterable

from detkit.hookspecs import hookimpl
from detkit_sagemaker.backend import SagemakerBackend


@hookimpl
def detkit_backends() -> Iterable[SagemakerBackend]:
    """Offer the one backend."""
    yield SagemakerBackend()
