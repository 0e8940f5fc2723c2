"""Writing event files as TensorBoard's own writer does."""

from __future__ import annotations

import atexit
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from tensorboard.compat.proto.event_pb2 import Event as TensorBoardEvent
from tensorboard.compat.proto.event_pb2 import SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams import api_pb2, metadata
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData, SessionEndInfo
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from detkit.files import lock_file

if TYPE_CHECKING:
    from detkit.events import Event
    from detkit.runs import Run

FOLDER = "output/tensorboard"
"""In the run directory."""

_FLUSH_S = 5
_STATUS = {"finished": api_pb2.STATUS_SUCCESS, "failed": api_pb2.STATUS_FAILURE}
_ENDS = {"finished", "failed", "stopped", "interrupted"}

_LOCK = ".lock"
"""In `FOLDER`: held by the process that writes there."""

_open: dict[Path, _Log | None] = {}
"""The runs that this process follows, by directory; None for one that another process writes."""


def write(event: Event, run: Run) -> None:
    """Write a metric event; a state event opens and closes the file.

    Of several processes that follow a run, the first writes; nothing is written by the others.
    """
    state = event.values.get("state") if event.kind == "state" else None
    if run.path not in _open or (_open[run.path] is None and state == "starting"):
        try:
            _open[run.path] = _Log(run, event.t)
        except BlockingIOError:
            _open[run.path] = None
    log = _open[run.path]
    if state in _ENDS:
        del _open[run.path]
    if log is None:
        return
    if state in _ENDS:
        log.close(str(state), event.t)
    elif state is not None:
        log.starts_anew = True  # a resumed run does the steps since its checkpoint again
    else:
        log.add_scalars(event)


@atexit.register
def close_all() -> None:
    """Write what is still waiting when the program ends before the runs do."""
    while _open:
        if (log := _open.popitem()[1]) is not None:
            log.close()


class _Log:
    """One event file of one run."""

    def __init__(self, run: Run, t: float) -> None:
        folder = run.path / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(folder / _LOCK)
        _wait_for_a_later_name(folder)
        self._writer = EventFileWriter(str(folder), flush_secs=_FLUSH_S)
        self._step = 0
        self.starts_anew = True
        job = run.job
        params = {name: _plain(value) for name, value in {"model": f"{job.backend}/{job.model}", **job.params}.items()}
        self._add(t, 0, summary=hparams_pb(params, trial_id=str(run.path), start_time_secs=t))

    def add_scalars(self, event: Event) -> None:
        """Write the numbers of a metric event; one without a step has that of the event before it."""
        self._step = self._step if event.step is None else event.step
        if self.starts_anew:  # readers drop what earlier files say of this step and later ones
            self._add(event.t, self._step, session_log=SessionLog(status=SessionLog.START))
            self.starts_anew = False
        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in event.values.items()]
        self._add(event.t, self._step, summary=Summary(value=values))

    def close(self, state: str = "", t: float | None = None) -> None:
        """Write how the run ended, where it did, and close the file."""
        if state:
            t = t or time.time()
            ending = SessionEndInfo(status=_STATUS.get(state, api_pb2.STATUS_UNKNOWN), end_time_secs=t)
            value = Summary.Value(
                tag=metadata.SESSION_END_INFO_TAG,
                metadata=metadata.create_summary_metadata(HParamsPluginData(session_end_info=ending)),
                tensor=metadata.NULL_TENSOR,
            )
            self._add(t, self._step, summary=Summary(value=[value]))
        self._writer.close()
        if self._lock is not None:
            self._lock.close()

    def _add(self, t: float, step: int, **content: Any) -> None:
        self._writer.add_event(TensorBoardEvent(wall_time=t, step=step, **content))


def _wait_for_a_later_name(folder: Path) -> None:
    """Wait up to a second, until a new file is named after those that are there: readers go by the second in it."""
    seconds = [
        int(stamp) for file in folder.glob("events.out.tfevents.*") if (stamp := file.name.split(".")[3]).isdigit()
    ]
    wait = max(seconds, default=0) + 1 - time.time()
    if 0 < wait <= 1:
        time.sleep(wait)


def _plain(value: Any) -> bool | float | str:
    """Return a hyperparameter as TensorBoard takes it; lists and None become JSON."""
    return value if isinstance(value, bool | int | float | str) else msgspec.json.encode(value).decode()
