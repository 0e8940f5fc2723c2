"""The backends that an image has, and what to say of one that it lacks."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

from detkit import plugins
from detkit.backends import LocalBackend
from detkit.environments import prove
from detkit.errors import DetkitError, PluginError, UnknownName, UsageError


def find(name: str, engine: str) -> LocalBackend:
    """Return the backend of a job or a model, which names its ``engine``, too; nothing is imported by that name.

    Raises `PluginError` where the image lacks it or what its engine needs, `UsageError` where its engine is another.
    """
    try:
        found = plugins.backend(name)
    except (UnknownName, PluginError) as error:
        here = ", ".join(sorted(plugins.backends())) or "none"
        why = f"; {error}" if isinstance(error, PluginError) else ""
        raise PluginError(f"backend {name!r} is not in this image, which has {here}{why}. {_build(name)}") from error
    if not isinstance(found, LocalBackend):
        raise UsageError(f"backend {name!r} has no engine that could run in a container")
    if found.engine != engine:
        raise UsageError(
            f"the engine {engine!r} is asked for, and that of backend {name!r} in this image is {found.engine!r}; "
            f"nothing else is run. {_build(name, found)}"
        )
    if found.missing():
        raise PluginError(
            f"this image lacks {', '.join(found.missing())}, which backend {name!r} needs. {_build(name, found)}"
        )
    return found


def check(names: Sequence[str]) -> int:
    """Import the engine of each backend, and the framework that it needs, when an image is built.

    An engine may import its framework only when it trains, and a framework that lies there may lack a library of the
    system. Returns an exit code, and says what is wrong.
    """
    failed = 0
    for name in names:
        try:
            backend = plugins.backend(name)
            found = find(name, backend.engine if isinstance(backend, LocalBackend) else "")
            versions = prove(sys.executable, found).versions
            told = ", ".join([found.engine, *(" ".join(filter(None, one)) for one in versions.items())])
            print(f"{name}: {told} can be imported")
        except DetkitError as error:
            print(f"{name}: {error}", file=sys.stderr)
            failed += 1
        except Exception:
            traceback.print_exc()
            failed += 1
    return 3 if failed else 0


def _build(name: str, backend: LocalBackend | None = None) -> str:
    source = " --source PATH" if backend and backend.environment and backend.environment.checkout else ""
    return f"make an image that fits: `detkit sagemaker build-image --with {name}{source}`, and name it with image_uri"
