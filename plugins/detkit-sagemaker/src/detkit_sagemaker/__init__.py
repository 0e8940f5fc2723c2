"""The SageMaker backend. Nothing here imports boto3; what talks to AWS is loaded when somebody asks for it.

The backend itself is loaded then, too: `detkit_sagemaker.container` has this package on its way in, and has to hear a
signal before anything takes time.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from detkit.hookspecs import hookimpl

if TYPE_CHECKING:
    from detkit_sagemaker.backend import SagemakerBackend


@hookimpl
def detkit_backends() -> Iterable[SagemakerBackend]:
    """Offer the one backend."""
    from detkit_sagemaker.backend import SagemakerBackend

    yield SagemakerBackend()
