"""Several processes train one model: with gloo on the CPU, started by torchrun, lost, begun again, on two machines."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from in_process import lay_out, make_job, replace_option

from detkit import Dataset, Trainer, open_run, plugins
from detkit.backends import LocalBackend
from detkit.errors import RunFailed, UsageError, WorkerDied
from detkit.job import Workspace
from detkit.processes import worker_environment
from detkit.ranks import LOAD_BEFORE, Alone, Place
from detkit.runs import LocalRun, Run
from detkit.testing.jobs import write_coco
from detkit_torchvision import probing
from detkit_torchvision.distributed import summed
from detkit_torchvision.training import Training
from detkit_torchvision.weights import ARTIFACT

SETTINGS: dict[str, Any] = {
    "model": "torchvision/ssd_tiny",
    "epochs": 12,
    "image_size": 64,
    "batch_size": 4,
    "lr_scheduler": "constant",
    "warmup_iterations": 0,
    "checkpoint_every": "1 iterations",
    "validate_every": "6 epochs",
    "batch_norm": "frozen",
    "device": "cpu",
    "threads": 1,
}
TRAINER = Trainer(**SETTINGS)
"""With norms that keep their statistics, which else are those of each process's own images, on average."""


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.history if "train/loss" in row]


def messages(run: Run) -> str:
    return "\n".join(str(event.values["message"]) for event in run.events(follow=False) if event.kind == "log")


def ranks(run: Run) -> list[psutil.Process]:
    """Return the processes that torchrun started, when all are there."""
    assert isinstance(run, LocalRun)
    launcher = psutil.Process(run.record.pid)
    while len(found := launcher.children()) < 2:
        assert run.status == "running", run.log_tail()
        time.sleep(0.05)
    return found


def wait_for_step(run: Run, step: int) -> None:
    for event in run.events():
        if (event.step or 0) >= step and event.kind == "metric":
            return
    raise AssertionError(f"the run ended before step {step}: {run.status}")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("processes")


@pytest.fixture(scope="module")
def alone(tiny: Dataset, folder: Path) -> Run:
    """One process, which takes the batch in the two parts that two processes have."""
    return TRAINER.fit(tiny, tiny, tiny, name=str(folder / "alone"), grad_accumulation=2, quiet=True)


@pytest.fixture(scope="module")
def two(tiny: Dataset, folder: Path) -> Run:
    (folder / "tmp").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(folder / "tmp"))
        return TRAINER.fit(tiny, tiny, tiny, name=str(folder / "two"), processes=2, quiet=True)


def test_two_processes_end_where_one_does(alone: Run, two: Run) -> None:
    assert losses(two) == pytest.approx(losses(alone), rel=1e-4)
    compared = [name for name in alone.metrics if name.startswith(("val/", "test/"))]
    assert {"val/AP", "val/loss", "test/AP"} <= set(compared)
    for name in compared:
        assert two.metrics[name] == pytest.approx(alone.metrics[name], abs=1e-3), name
    assert two.model.manifest.hardware["processes"] == "2"


def test_nothing_stays_in_the_temporary_folder(two: Run, folder: Path) -> None:
    assert two.status == "finished"
    assert list((folder / "tmp").iterdir()) == []


def test_time_is_told_by_its_parts(alone: Run, two: Run) -> None:
    times = two.model.manifest.timings
    parts = {"start", "data", "forward", "communication", "backward", "optimizer", "validation", "checkpoint", "other"}
    assert parts < set(times)
    assert sum(times[name] for name in parts) == pytest.approx(times["total"], rel=0.01)
    assert 0 < times["not_scaling"] < times["total"]
    assert times["bytes_per_step"] > 1e5
    assert "of gradients a step" in messages(two)
    assert "bytes_per_step" not in alone.model.manifest.timings


@pytest.mark.slow
def test_gradients_in_half_the_bytes(tiny: Dataset, two: Run) -> None:
    run = TRAINER.fit(tiny, processes=2, compress_gradients="bf16", epochs=2, quiet=True)
    assert 0 < abs(losses(run)[0] / losses(two)[0] - 1) < 0.02


def test_stop_and_resume(tiny: Dataset, two: Run) -> None:
    run = TRAINER.start(tiny, tiny, tiny, processes=2, leash=True)
    wait_for_step(run, 4)
    processes = ranks(run)
    run.stop()
    assert run.status == "stopped"
    assert not psutil.wait_procs(processes, timeout=5)[1]
    assert run.resume(leash=True).wait().status == "finished"
    assert "resumed after step" in messages(run)
    assert losses(run) == losses(two)
    assert run.model.manifest.artifacts[ARTIFACT] == two.model.manifest.artifacts[ARTIFACT]


def test_lost_process_is_started_again(tiny: Dataset, two: Run) -> None:
    """torchrun starts all anew, and they go on from the last checkpoint."""
    run = TRAINER.start(tiny, tiny, tiny, processes=2, leash=True)
    wait_for_step(run, 4)
    ranks(run)[1].kill()
    assert run.wait().status == "finished"
    assert "resumed after step" in messages(run)
    assert losses(run) == losses(two)
    assert run.model.manifest.artifacts[ARTIFACT] == two.model.manifest.artifacts[ARTIFACT]


def test_lost_process_is_named_where_none_is_started_again(tiny: Dataset) -> None:
    run = TRAINER.start(tiny, processes=2, max_restarts=0, leash=True)
    wait_for_step(run, 4)
    processes = ranks(run)
    processes[1].kill()
    with pytest.raises(RunFailed, match="of the 2 processes that train together"):
        run.wait()
    assert run.status == "failed"
    assert not psutil.wait_procs(processes, timeout=5)[1]


def test_killed_launcher_leaves_no_process(tiny: Dataset) -> None:
    run = TRAINER.start(tiny, processes=2, leash=True)
    wait_for_step(run, 2)
    processes = ranks(run)
    os.kill(run.record.pid, signal.SIGKILL)
    assert not psutil.wait_procs(processes, timeout=10)[1]
    with pytest.raises(WorkerDied):
        run.wait()
    assert run.status == "interrupted"


def test_killed_controller_ends_all(tiny: Dataset, tmp_path: Path) -> None:
    data = write_coco(tiny, tmp_path / "coco", "from 1")
    script = (
        "from detkit import Trainer, read_dataset\n"
        f"Trainer(model='torchvision/ssd_tiny', image_size=64, epochs=1000, threads=1, device='cpu').fit("
        f"{str(data)!r}, processes=2, name={str(tmp_path / 'run')!r}, quiet=True)"
    )
    controller = subprocess.Popen([sys.executable, "-c", script], env=worker_environment(sys.executable))
    try:
        while not (tmp_path / "run/run.json").is_file():
            assert controller.poll() is None
            time.sleep(0.05)
        run = open_run(tmp_path / "run")
        wait_for_step(run, 2)
        processes = [psutil.Process(run.record.pid), *ranks(run)]
    finally:
        controller.kill()
        controller.wait()
    assert not psutil.wait_procs(processes, timeout=30)[1]
    assert run.status == "stopped"


def test_failure_of_one_process_is_the_runs(tiny: Dataset) -> None:
    """An explained failure is told once, and not tried again."""
    run = TRAINER.start(tiny, processes=2, learning_rate=1e30, leash=True)
    with pytest.raises(RunFailed, match="not finite"):
        run.wait()
    states = [event.values["state"] for event in run.events(follow=False) if event.kind == "state"]
    assert states.count("running") == 1


def test_batch_smaller_than_the_processes(tiny: Dataset) -> None:
    run = TRAINER.start(tiny, processes=2, batch_size=1, leash=True)
    with pytest.raises(RunFailed, match="batch_size=1 for 2 processes"):
        run.wait()


@pytest.mark.slow
def test_last_batch_smaller_than_the_processes(tiny: Dataset, tmp_path: Path) -> None:
    """Of 7 images in batches of 5 the last has 2, and the third process none."""
    few = tiny.take(range(7))
    common: dict[str, Any] = {"epochs": 2, "batch_size": 5, "quiet": True}
    three = TRAINER.fit(few, few, processes=3, **common)
    one = TRAINER.fit(few, few, grad_accumulation=3, **common)
    assert losses(three) == pytest.approx(losses(one), rel=1e-4)


SLOW = """
import time


def by_images(network, num_outputs):
    network.register_forward_pre_hook(lambda network, inputs: time.sleep(0.1 * len(inputs[0])))
    return network


def by_passes(network, num_outputs):
    network.register_forward_pre_hook(lambda network, inputs: time.sleep(0.1 + 0.5 * (len(inputs[0]) < 8)))
    return network
"""
"""A network in which an image takes a tenth of a second, and one in which a small batch is slow."""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(LOAD_BEFORE, "0.1")  # whatever else the machine of the test does
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path


def test_as_many_processes_as_are_faster(tiny: Dataset, slow: Path) -> None:
    """They go on where they have measured, without a trace in what they learn, and a resumed run is theirs again."""
    trainer = Trainer(**SETTINGS | {"epochs": 3, "batch_size": 8, "code": slow, "modify": "slow:by_images"})
    expected = trainer.fit(tiny, tiny, processes=2, quiet=True)
    run = trainer.start(tiny, tiny, processes="auto", leash=True)
    wait_for_step(run, 1)
    run.stop()
    assert "processes=auto: 2 processes train; 2 are" in messages(run)
    assert "measured now" in messages(run)
    run = run if run.status == "finished" else run.resume(leash=True).wait()
    assert losses(run) == losses(expected)
    assert run.model.manifest.hardware["processes"] == "2"
    assert messages(run).count("processes=auto") == 1


def test_one_process_where_that_is_faster(tiny: Dataset, slow: Path) -> None:
    """The others end, and what they have measured leaves no trace; a resumed run begins alone."""
    trainer = Trainer(**SETTINGS | {"epochs": 3, "batch_size": 8, "code": slow, "modify": "slow:by_passes"})
    expected = trainer.fit(tiny, tiny, quiet=True)
    run = trainer.start(tiny, tiny, processes="auto", leash=True)
    wait_for_step(run, 1)
    assert isinstance(run, LocalRun)
    assert psutil.Process(run.record.pid).children() == []
    run.stop()
    assert "processes=auto: one process trains; 2 are 0." in messages(run)
    assert run.status == "stopped"
    run = run.resume(leash=True).wait()
    assert losses(run) == losses(expected)
    assert run.model.manifest.hardware["processes"] == "1"
    assert messages(run).count("processes=auto") == 1


@pytest.mark.slow
def test_a_process_that_is_lost_while_they_measure(tiny: Dataset, slow: Path) -> None:
    """What was too much for the machine is not tried again."""
    trainer = Trainer(**SETTINGS | {"epochs": 1, "batch_size": 8, "code": slow, "modify": "slow:by_images"})
    run = trainer.start(tiny, tiny, processes="auto", leash=True)
    ranks(run)[1].kill()
    assert run.wait().status == "finished"
    assert "one process trains, as one of several was lost while they measured" in messages(run)
    assert run.model.manifest.hardware["processes"] == "1"


@pytest.mark.slow
def test_a_run_dies_with_its_controller_after_the_choice(tiny: Dataset, slow: Path) -> None:
    """The one process that torchrun became holds the leash that torchrun held."""
    trainer = Trainer(**SETTINGS | {"epochs": 100, "batch_size": 8, "code": slow, "modify": "slow:by_passes"})
    run = trainer.start(tiny, tiny, processes="auto", leash=True)
    wait_for_step(run, 1)
    assert isinstance(run, LocalRun)
    assert run._process is not None
    assert run._process.stdin is not None
    run._process.stdin.close()
    assert run._process.wait() == 0
    assert run.status == "stopped"


def test_processes_are_remembered(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Pair(Alone):
        place = Place(0, 2)

    def training(name: str) -> Training:
        job = replace_option(make_job("ssd_tiny", tiny, batch_size=8), processes="auto")
        return Training(job, lay_out(tmp_path / name, job, tiny), Pair())

    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 99.0, 99.0))
    assert probing._remembered(training("busy")) == 1
    assert probing._judged(training("measured"), probing.Together(1.04)) == 1
    assert probing._judged(training("again"), probing.Together(1.2)) == 2
    assert probing._remembered(training("later")) == 2
    assert (tmp_path / "later/checkpoints/processes.json").read_text().strip() == "2"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gpus": 2, "processes": 2}, "leave processes out"),
        ({"gpus": 2, "device": "cuda:1"}, "leave device out"),
        ({"processes": 2, "device": "cuda"}, "say gpus="),
        ({"nodes": 2}, "rendezvous=HOST:PORT"),
        ({"rendezvous": "here:29400"}, "say how many with nodes="),
        ({"nodes": 2, "rendezvous": "here"}, "node0:29400"),
    ],
)
def test_options_that_contradict_each_other(tiny: Dataset, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Trainer(model="torchvision/ssd_tiny").start(tiny, **options)


def test_two_machines(tiny: Dataset, two: Run) -> None:
    """Each has its own torchrun, which find each other; here on one machine, as both see the run directory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{free.getsockname()[1]}"
    run = TRAINER.start(tiny, tiny, tiny, nodes=2, rendezvous=place, leash=True)
    joined = subprocess.Popen(["detkit", "runs", "join", str(run.path)], start_new_session=True)
    assert joined.wait(timeout=120) == 0
    assert run.wait().status == "finished"
    assert losses(run) == losses(two)


def test_only_runs_on_several_machines_are_joined(two: Run) -> None:
    backend = plugins.backend("torchvision")
    assert isinstance(backend, LocalBackend)
    with pytest.raises(UsageError, match="trains on one machine"):
        backend.joining(Workspace(two.path))


def test_decoded_images_are_kept_once_for_all(tiny: Dataset, tmp_path: Path) -> None:
    """Each process finds what another one has decoded; nothing is left of it."""
    script = tmp_path / "share.py"
    script.write_text(
        "import os, torch\n"
        "from detkit.ranks import TorchRanks\n"
        "from detkit_torchvision.caching import shared_cache\n"
        "ranks = TorchRanks(cuda=False)\n"
        "cache = shared_cache([(5, 4), (3, 2)], ranks)\n"
        "assert cache is not None and cache[0] is None and cache[1] is None\n"
        "ranks.sum([0.0])  # both have looked before one writes\n"
        "image = torch.arange(18, dtype=torch.uint8).reshape(2, 3, 3).permute(2, 0, 1)\n"
        "if ranks.rank == 1:\n"
        "    cache[1] = image\n"
        "ranks.sum([0.0])\n"
        "assert cache[0] is None and torch.equal(cache[1], image), ranks.rank\n"
        "ranks.leave()\n"
        "os._exit(0)\n"
    )
    before = set(Path("/dev/shm").glob(".detkit-*"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    done = subprocess.run(command, env=worker_environment(sys.executable), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert set(Path("/dev/shm").glob(".detkit-*")) <= before


def test_sigterm_stops_all(tiny: Dataset) -> None:
    """As from a batch system: the launcher is asked to end, and not one of its processes is lost."""
    run = TRAINER.start(tiny, processes=2, leash=True)
    wait_for_step(run, 4)
    os.kill(run.record.pid, signal.SIGTERM)
    assert run.wait().status == "stopped"


def test_non_finite_validation_loss_is_left_out() -> None:
    """Numbers that JSON does not have travel between processes, too."""

    class Pair(Alone):
        place = Place(0, 2)

        def gather(self, part: bytes) -> list[bytes]:
            return [part, part]

    found = summed({"loss": float("nan"), "bbox_regression": 1.5}, Pair())
    assert np.isnan(found["loss"])
    assert found["bbox_regression"] == 3.0


def test_gpus_where_there_is_none(tiny: Dataset) -> None:
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UsageError, match="this machine has no GPU"):
        Trainer(model="torchvision/ssd_tiny").start(tiny, gpus="all")


def test_resume_checks_options_together(tiny: Dataset) -> None:
    run = TRAINER.start(tiny, epochs=1, leash=True)
    run.stop()
    with pytest.raises(UsageError, match="rendezvous=HOST:PORT"):
        Trainer().resume(run, nodes=2, quiet=True)
