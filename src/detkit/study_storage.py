"""Where Optuna keeps what was tried: a file beside the study, or a database server that several processes share."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from detkit.errors import PluginError, UsageError
from detkit.spaces import Choice, Float, Range

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

HEARTBEAT_S, GRACE_S = 15, 60
"""How often a process that shares a study says that it lives, and after how much silence its trials are done anew."""

_ATTEMPTS = 10

_VARIABLE = re.compile(r"\$\{?(\w+)\}?")


class Storage(NamedTuple):
    """Where Optuna keeps what was tried."""

    url: str
    shared: bool
    """Whether several processes work on it at once."""


def import_optuna() -> Any:
    """Import Optuna, quiet. Raises `PluginError` with what to install."""
    try:
        import optuna
    except ImportError as error:
        raise PluginError(
            f"a search needs Optuna ({error}); install it with `pip install 'detkit-sdk[tune]'`"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    warnings.filterwarnings("ignore", message="Heartbeat of storage is supposed")  # `detkit.trials` says it itself
    return optuna


def distribution(range_: Range) -> BaseDistribution:
    """Return a range as Optuna has it."""
    distributions = import_optuna().distributions
    if isinstance(range_, Choice):
        return distributions.CategoricalDistribution(range_.values)  # type: ignore[no-any-return]
    if isinstance(range_, Float):
        return distributions.FloatDistribution(range_.low, range_.high, log=range_.log, step=range_.step)  # type: ignore[no-any-return]
    return distributions.IntDistribution(range_.low, range_.high, log=range_.log, step=range_.step)  # type: ignore[no-any-return]


def open_storage(storage: Storage) -> Any:
    optuna = import_optuna()
    import sqlalchemy

    # Nothing stays open between two questions, which may be hours apart.
    engine: dict[str, Any] = {"poolclass": sqlalchemy.pool.NullPool}
    if not storage.shared:
        return optuna.storages.RDBStorage(storage.url, engine_kwargs={**engine, "connect_args": {"timeout": 60}})
    for attempts_left in range(_ATTEMPTS, -1, -1):
        try:
            return optuna.storages.RDBStorage(
                storage.url,
                engine_kwargs=engine,
                heartbeat_interval=HEARTBEAT_S,
                grace_period=GRACE_S,
                heartbeat_stale_trial_callback=optuna.storages.RetryHeartbeatStaleTrialCallback(),
            )
        except (sqlalchemy.exc.IntegrityError, sqlalchemy.exc.ProgrammingError):
            if not attempts_left:
                raise
            time.sleep(0.5)  # somebody else makes the tables in this moment
    raise AssertionError


def neutral() -> dict[str, Any]:
    """Return sampler and pruner of a study that is only looked at."""
    optuna = import_optuna()
    return {"sampler": optuna.samplers.RandomSampler(), "pruner": optuna.pruners.NopPruner()}


@contextlib.contextmanager
def plain_errors(url: str) -> Iterator[None]:
    """Say what a database's driver says, without its password and the stack."""
    try:
        yield
    except (ImportError, OSError) as error:
        raise PluginError(f"cannot open the study's storage {without_password(url)}: {error}") from None
    except Exception as error:
        if type(error).__module__.split(".")[0] not in {"sqlalchemy", "optuna", "alembic"}:
            raise
        first = str(error).splitlines()[0]
        raise PluginError(f"cannot open the study's storage {without_password(url)}: {first}") from None


def refuse_password(url: str) -> None:
    """Raise `UsageError` for an address with a password in plain text: it is kept in a file, and passed on with it."""
    import_optuna()
    from sqlalchemy.engine import make_url

    with plain_errors(url):
        read = make_url(url)
    password = next((read.query[name] for name in ("password", "passwd") if name in read.query), read.password)
    if password is not None and _VARIABLE.fullmatch(str(password)) is None:
        user = read.username or read.query.get("user") or "USER"
        port = f":{read.port}" if read.port else ""
        raise UsageError(
            f"the storage's address has a password, and is kept in study.json; put it into an environment variable and "
            f"write '{read.drivername}://{user}:$PASSWORD@{read.host}{port}/{read.database or ''}'"
        )


def with_password(url: str) -> str:
    """Put in the password that an address has by the name of a variable; nothing else of it is looked up."""
    import_optuna()
    from sqlalchemy.engine import make_url

    with plain_errors(url):
        read = make_url(url)
    found = _VARIABLE.fullmatch(read.password or "")
    if found is None:
        return url
    if found[1] not in os.environ:
        raise UsageError(f"the storage's password is in ${found[1]}, which is not set here")
    return read.set(password=os.environ[found[1]]).render_as_string(hide_password=False)


def without_password(url: str) -> str:
    head, at, tail = url.rpartition("@")
    scheme, slashes, user = head.partition("://")
    return f"{scheme}{slashes}{user.partition(':')[0]}@{tail}" if at else url
