"""Several processes for one training: what their options mean, `detkit.backends.SeveralOptions`, to torchrun.

With the options of one machine, torchrun's own rendezvous on a free port is used. On several machines each runs the
same command; the run directory has to lie where all of them see it, and rank 0 may be on any of them.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from detkit.checkpoints import PROCESSES
from detkit.environments import python_command
from detkit.errors import InvalidValue, UsageError
from detkit.job import Job, Workspace
from detkit.loading import count_cores
from detkit.ranks import ALONE_THREADS, LAUNCHER, LOAD_BEFORE

MEETING = ".rendezvous"
"""File in a run directory where the processes of one machine meet."""

_GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Devices of NVIDIA's and AMD's drivers, and of either in WSL."""

LEAST_IMAGES = 4
"""Of a pass, for each of the processes that ``processes=auto`` tries: batch norms take statistics of them."""

_TORCHRUN = "from detkit.launching import launch; launch()"
_TORCHRUN_OR_ALONE = "import sys; from detkit.launching import launch; launch(choice=sys.argv.pop(1))"

_NO_PYTHON = "--no-python"
"""torchrun's option before the command of a worker."""

_GRACE_S = 120
"""How long workers may take to end when torchrun asks them to."""


def launch(choice: str = "") -> None:
    """Be torchrun, with the arguments of this process; SIGTERM asks its workers to stop, as SIGINT does.

    By itself torchrun would pass SIGTERM on, which is also what it sends to those that are left when one is lost. Where
    ``DETKIT_LEASH`` is set they are asked to stop when standard input ends, too, which they share. Where they have
    written into ``choice``, a file, that one process is faster, this process becomes that one.
    """
    import torch
    from torch.distributed import run

    environment = dict(os.environ)
    if choice:
        environment.setdefault(LOAD_BEFORE, str(os.getloadavg()[0]))
        os.environ |= {**environment, ALONE_THREADS: str(torch.get_num_threads())}
    own = {option for action in run.get_args_parser()._actions for option in action.option_strings}
    given = ["--signals-to-handle=SIGINT,SIGHUP,SIGQUIT"] if "--signals-to-handle" in own else []
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_GRACE_S)
    os.environ[LAUNCHER] = str(os.getpid())

    def stop(*_signal: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    def watch() -> None:
        while os.read(0, 4096):
            pass
        stop()

    signal.signal(signal.SIGTERM, stop)
    if os.environ.get("DETKIT_LEASH") == "1":
        threading.Thread(target=watch, daemon=True, name="leash").start()
    # It would leave a folder in the system's temporary one, where its workers write errors for it.
    with tempfile.TemporaryDirectory(prefix="detkit-torchrun-") as logs:
        run.main([*given, f"--log-dir={logs}", *sys.argv[1:]])
    if choice and _chosen(Path(choice)) == 1:
        worker = sys.argv[sys.argv.index(_NO_PYTHON) + 1 :]
        os.execve(worker[0], worker, environment)


def launches(options: Mapping[str, Any]) -> bool:
    """Return whether a job's options ask for more than one process; ``auto`` is one where nobody measures."""
    gpus = options.get("gpus")
    return gpus not in (None, 1) or options.get("processes", 1) not in (1, "auto") or options.get("nodes", 1) > 1


def decided(job: Job, workspace: Workspace) -> dict[str, Any]:
    """Return a job's options with a number in place of ``processes=auto``.

    It is what the run's processes have chosen; where they have not yet, as many as are tried beside one: one on each
    core, with `LEAST_IMAGES` or more of a pass. It is one where a GPU may be taken, and where ``batch_size=auto`` is
    chosen by what one process has memory for.
    """
    if job.options.get("processes") != "auto":
        return dict(job.options)
    size, passes = job.params["batch_size"], job.params.get("grad_accumulation", 1)
    takes_gpu = job.options.get("device", "auto") == "auto" and _has_gpu()
    is_one = takes_gpu or size == "auto"
    tried = 1 if is_one else max(1, min(count_cores(), size // (passes * LEAST_IMAGES)))
    return {**job.options, "processes": _chosen(workspace.checkpoints / PROCESSES) or tried}


def _chosen(choice: Path) -> int | None:
    try:
        return msgspec.json.decode(choice.read_bytes(), type=int)
    except (OSError, msgspec.MsgspecError):
        return None


def _has_gpu() -> bool:
    return any(Path(place).exists() for place in _GPUS)


def check(options: Mapping[str, Any]) -> None:
    """Raise `UsageError` for options that contradict each other."""
    if "processes" not in options:
        return
    gpus, processes, nodes, meeting = (options[name] for name in ("gpus", "processes", "nodes", "rendezvous"))
    device = str(options.get("device", "auto"))
    several = processes != 1
    if gpus is not None and several:
        raise UsageError(f"gpus={gpus} and processes={processes}: a process trains on each GPU; leave processes out")
    if gpus is not None and device != "auto":
        raise UsageError(f"gpus={gpus} and device={device!r}: each process takes a GPU; leave device out")
    if several and device not in {"auto", "cpu"}:
        raise UsageError(f"processes={processes} train on the CPU, not on device={device!r}; say gpus=")
    if nodes > 1 and processes == "auto":
        raise UsageError("processes=auto measures on one machine; say how many of each of them with processes=")
    if nodes > 1 and not meeting:
        raise UsageError(
            f"nodes={nodes} machines need a place to meet: rendezvous=HOST:PORT, one of them and a free port"
        )
    if meeting and nodes == 1:
        raise UsageError(f"rendezvous={meeting!r} is for several machines; say how many with nodes=")
    if gpus is not None and not _has_gpu():
        raise UsageError(
            f"gpus={gpus}: this machine has no GPU; train on its CPU, with processes= in several processes"
        )
    host, colon, port = meeting.rpartition(":")
    if meeting and not (host and colon and port.isdigit()):
        raise InvalidValue("rendezvous", meeting, "HOST:PORT, such as node0:29400")


class Machine(NamedTuple):
    """Which of several machines this is, where a platform has numbered them and the first one is known."""

    rank: int
    address: str
    """Of the first one."""
    port: int


def command(
    python: str,
    worker: Sequence[str],
    options: Mapping[str, Any],
    run: Path,
    *,
    machine: Machine | None = None,
    choice: Path | None = None,
) -> list[str]:
    """Return the command that lets torchrun start workers in a run directory.

    It is the same on each machine, and ranks go to them as they come, unless ``machine`` says which one this is. On one
    machine they meet in a file in the run directory and not at a port, as torchrun unpickles what it finds there.
    ``choice`` is the file in which workers may say that one process is faster.
    """
    nodes, gpus = options["nodes"], options["gpus"]
    found = {
        "nnodes": nodes,
        "nproc-per-node": {"all": "gpu", None: options["processes"]}.get(gpus, gpus),
        "max-restarts": options["max_restarts"] if nodes == 1 else 0,  # machines count on their own
    }
    if machine is not None:
        found |= {"node-rank": machine.rank, "master-addr": machine.address, "master-port": machine.port}
    elif nodes > 1:
        found |= {"rdzv-backend": "c10d", "rdzv-endpoint": options["rendezvous"], "rdzv-id": run.name}
    else:
        place = run / MEETING
        place.unlink(missing_ok=True)
        found |= {"rdzv-backend": "c10d", "rdzv-endpoint": place, "rdzv-conf": "store_type=file", "rdzv-id": run.name}
    said = [f"--{name}={value}" for name, value in found.items()]
    begin = [_TORCHRUN] if choice is None else [_TORCHRUN_OR_ALONE, str(choice)]
    return python_command(python, *begin, *said, _NO_PYTHON, *worker)
