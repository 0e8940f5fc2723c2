"""What MLflow is told of a run: hyperparameters, numbers by step, tags, how it ended, and the manifest."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

import detkit
from detkit.errors import UsageError
from detkit.files import write_json
from detkit.job import CHANNELS

if TYPE_CHECKING:
    from detkit.events import Event
    from detkit.runs import Run

FILE = "output/data/mlflow.json"
"""In the run directory: which MLflow run it is, so that a resumed run goes on with the same one."""

LOG_MODEL = "DETKIT_MLFLOW_LOG_MODEL"
"""Environment variable; ``1`` uploads the whole model, not only its manifest."""

_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",  # instead of 7, which take minutes when the server is not there
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "1",  # `detkit train --json` prints JSON there, and nothing else
}
"""Of MLflow's own settings; what the environment says goes first."""
_STATUS = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED", "interrupted": "KILLED"}
_BATCH = 100
"""Parameters that MLflow takes in one request."""

_open: dict[Path, _Record] = {}
"""The runs that this process logs, by directory."""


class _Written(msgspec.Struct, kw_only=True):
    """The content of `FILE`."""

    run_id: str
    tracking_uri: str


def track(event: Event, run: Run) -> None:
    """Log a metric event; a state event says how the run stands."""
    if run.path not in _open:
        _open[run.path] = _Record(run)
    if event.kind == "metric":
        _open[run.path].log(event)
    elif (status := _STATUS.get(str(event.values["state"]))) is not None:
        _open.pop(run.path).end(status)


class _Record:
    """One MLflow run: that of a run directory, made where there is none yet."""

    def __init__(self, run: Run) -> None:
        os.environ.update({name: value for name, value in _DEFAULTS.items() if name not in os.environ})
        self._run = run
        self._client = MlflowClient()
        self._steps: dict[str, int] = {}
        """The last step of each metric that MLflow has."""
        self._step = 0
        file = run.path / FILE
        if file.is_file():
            written = msgspec.json.decode(file.read_bytes(), type=_Written)
            if written.tracking_uri == self._client.tracking_uri:
                self._run_id, self._is_new = written.run_id, False
                self._client.update_run(self._run_id, status="RUNNING")
                return
        self._run_id, self._is_new = self._create(), True
        write_json(file, _Written(run_id=self._run_id, tracking_uri=self._client.tracking_uri))

    def log(self, event: Event) -> None:
        """Log numbers. Steps that MLflow has already, which a resumed run does again, are not logged twice."""
        self._step = self._step if event.step is None else event.step
        t = round(event.t * 1000)
        new = [
            Metric(name, float(value), t, self._step)
            for name, value in event.values.items()
            if self._last_step(name) < self._step
        ]
        if new:
            self._client.log_batch(self._run_id, metrics=new)
            self._steps.update({metric.key: metric.step for metric in new})

    def end(self, status: str) -> None:
        """Set how it ended, and upload the manifest of a finished run."""
        try:
            model = self._run.workspace.model
            if status == "FINISHED" and os.environ.get(LOG_MODEL) == "1":
                self._client.log_artifacts(self._run_id, str(model), "model")
            elif status == "FINISHED":
                self._client.log_artifact(self._run_id, str(model / "detkit.json"), "model")
        finally:
            self._client.set_terminated(self._run_id, status)

    def _create(self) -> str:
        job = self._run.job
        digests = {
            f"detkit.data.{name}": data.digest() for name in CHANNELS if (data := self._run.workspace.dataset(name))
        }
        tags = {
            "detkit.run": str(self._run.path),
            "detkit.backend": job.backend,
            "detkit.model": f"{job.backend}/{job.model}",
            "detkit.version": detkit.__version__,
            **digests,
        }
        run_id: str = self._client.create_run(self._experiment(), run_name=self._run.name, tags=tags).info.run_id
        params = [Param(name, _shown(value)) for name, value in job.params.items()]
        for start in range(0, len(params), _BATCH):
            self._client.log_batch(run_id, params=params[start : start + _BATCH])
        return run_id

    def _experiment(self) -> str:
        """Return the id of the experiment that the environment names; one that has a name alone is made.

        Raises `MlflowException` for an id that the server does not have, and `UsageError` for one of another name.
        """
        name, number = (os.environ.get(f"MLFLOW_EXPERIMENT_{part}", "") for part in ("NAME", "ID"))
        if number:
            named = self._client.get_experiment(number).name
            if name not in ("", named):
                raise UsageError(
                    f"MLFLOW_EXPERIMENT_ID={number} is the experiment {named!r}, and MLFLOW_EXPERIMENT_NAME={name!r} "
                    "is another; unset one of them"
                )
            return number
        name = name or "Default"
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return self._experiment()  # somebody else made it just now

    def _last_step(self, name: str) -> int:
        if name not in self._steps:
            had = [] if self._is_new else self._client.get_metric_history(self._run_id, name)
            self._steps[name] = max((metric.step for metric in had), default=-1)
        return self._steps[name]


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value).decode()
