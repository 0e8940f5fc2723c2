"""The reference backend: it memorises the boxes of each training image and echoes those of the most similar one."""

from __future__ import annotations

from collections.abc import Iterable

from detkit.backends import LocalBackend, ModelSpec
from detkit.hookspecs import hookimpl
from detkit_echo.params import EchoOptions, EchoParams


@hookimpl
def detkit_backends() -> Iterable[LocalBackend]:
    """Offer the one backend."""
    yield LocalBackend(
        name="echo",
        summary="memorises training boxes; numpy only; for tests and as a pattern to copy",
        engine="detkit_echo.engine:EchoEngine",
        models={"memory": ModelSpec(params=EchoParams(), summary="nearest training image by a small grey thumbnail")},
        options=EchoOptions,
        install="pip install detkit-echo",
        resume="exact",
        incremental=True,
    )
