"""Which way a step is taken: measured by turns, without a trace in the run, kept with it and for the next one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from in_process import lay_out, make_job, replace_option
from torch._dynamo.utils import counters

from detkit.data import Dataset
from detkit.errors import UsageError
from detkit.job import Job, Workspace
from detkit_torchvision import probing
from detkit_torchvision.devices import CHANNELS_LAST, CONTIGUOUS
from detkit_torchvision.probing import Choice, Way, default_way, fastest
from detkit_torchvision.training import Training

DEFAULT = Way(CHANNELS_LAST, 1, None)


@pytest.fixture(autouse=True)
def _quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nobody else is busy, and no earlier run has measured."""
    monkeypatch.setattr("os.getloadavg", lambda: (0.0, 0.0, 0.0))
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def start(tiny: Dataset, tmp_path: Path) -> Any:
    """Return a function that prepares the training of a small model."""
    numbers = iter(range(100))

    def start(*, settings: Any = None, **options: Any) -> Training:
        job = make_job("fcos_tiny", tiny, **{"iterations": 4, "checkpoint_every": "2 iterations", **(settings or {})})
        job = replace_option(job, **options)
        return prepared(job, lay_out(tmp_path / f"run{next(numbers)}", job, tiny))

    return start


def prepared(job: Job, workspace: Workspace) -> Training:
    training = Training(job, workspace)
    training.prepare()
    return training


def finished(training: Training) -> dict[str, torch.Tensor]:
    list(training.steps())
    return training.network.state_dict()


def said(training: Training) -> str:
    lines = (training.workspace.path / "output/data/metrics.jsonl").read_text().splitlines()
    return "\n".join(json.loads(line)["values"].get("message", "") for line in lines)


class Clock:
    """Time that passes by what a way costs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, cost: Any) -> None:
        self.now, self.cost, self.taken = 0.0, cost, list[Way]()
        monkeypatch.setattr("time.perf_counter", lambda: self.now)

    def take(self, way: Way) -> None:
        self.taken.append(way)
        self.now += self.cost(way)


AXES = {"layout": (CHANNELS_LAST, CONTIGUOUS), "threads": (1, 2, 4), "amp": (None, "bf16")}


def test_axis_after_axis_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda way: (2.0 if way.layout == CONTIGUOUS else 3.0) + abs(way.threads - 2))
    choice = fastest(DEFAULT, AXES, clock.take)
    assert choice == Choice(Way(CONTIGUOUS, 2, None), pytest.approx(4 / 3 * 3 / 2))
    assert clock.taken[:8] == [DEFAULT, Way(CONTIGUOUS, 1, None)] * 4
    assert len(clock.taken) == 4 * (2 + 3 + 2)


def test_little_gain_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda way: 1.0 if way == DEFAULT else 0.96)
    assert fastest(DEFAULT, AXES, clock.take) == Choice(DEFAULT, 1.0)


def test_one_slow_step_does_not_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch, lambda way: 50.0 if len(clock.taken) == 3 else 1.0)
    assert fastest(DEFAULT, AXES, clock.take).way == DEFAULT


def test_off_is_the_default(start: Any) -> None:
    training = start()
    assert training.way == default_way(None, torch.device("cpu"))
    assert training.way.layout == CHANNELS_LAST
    assert not (training.workspace.checkpoints / "step.json").exists()


def test_measuring_leaves_no_trace(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and statistics end where they do without it, where nothing is chosen: no way saves all of the time."""
    settings = {"iterations": 1, "ema_decay": 0.9, "image_size": 64}
    plain = finished(start(settings=settings))
    monkeypatch.setattr(probing, "LEAST_GAIN", 1.0)
    monkeypatch.setattr(probing, "ROUNDS", 1)
    training = start(settings=settings, tune_step="auto")
    assert "nothing else was faster, measured now" in said(training)
    after = finished(training)
    assert all(torch.equal(value, after[name]) for name, value in plain.items())


def test_random_numbers_and_statistics_stay(start: Any) -> None:
    training = start(settings={"amp": "auto"})
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    numbers = torch.get_rng_state()
    choice = probing._measured(training, training._losses)
    assert torch.equal(numbers, torch.get_rng_state())
    after = training.network.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(parameter.grad is None for parameter in training.network.parameters())
    assert choice.speedup >= 1


def test_a_batch_too_small_for_several_processes(start: Any) -> None:
    training = start(processes="auto")
    assert "processes=auto: one process trains, on cpu; several need device=cpu, a core each, and 4" in said(training)
    assert (training.workspace.checkpoints / "processes.json").read_text().strip() == "1", "where it goes on, too"


def test_a_busy_machine_measures_nothing(start: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (99.0, 99.0, 99.0))
    training = start(tune_step="auto")
    assert training.way == default_way(None, torch.device("cpu"))
    assert "measures nothing, as this machine is busy (load 99.0" in said(training)
    assert not (training.workspace.checkpoints / "step.json").exists()


def test_the_next_run_knows(start: Any) -> None:
    first = start(tune_step="auto")
    assert "measured now" in said(first)
    again = start(tune_step="auto")
    assert "measured before" in said(again)
    assert again.way == first.way
    assert "measured now" in said(start(tune_step="auto", settings={"image_size": 96}))
    [known, _] = sorted((Path(str(first.workspace.path.parent)) / "cache/steps").iterdir())
    known.write_bytes(b"{")
    assert start(tune_step="auto").way is not None


def test_a_run_goes_on_in_its_way(start: Any, tiny: Dataset, tmp_path: Path) -> None:
    """Planes instead of pixels give other last bits; a run that goes on has those of the uninterrupted one."""
    whole = start(tune_step="auto", settings={"iterations": 4})
    planes = Way(CONTIGUOUS, 1, None)
    _keep(whole.workspace, planes)
    job = replace_option(whole.job, tune_step="off")
    whole = prepared(job, whole.workspace)
    assert whole.way == planes
    assert not whole.network.transform.channels_last
    part = lay_out(tmp_path / "part", job, tiny)
    _keep(part, planes)
    steps = prepared(job, part).steps()
    next(steps), next(steps)
    assert (part.checkpoints / "step.json").is_file()
    resumed = prepared(job, part)
    assert resumed.resumes
    assert resumed.way == planes
    assert resumed.step == 2
    expected, found = finished(whole), finished(resumed)
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_a_run_from_before_goes_on_as_it_was(start: Any, tiny: Dataset) -> None:
    training = start()
    finished(training)
    longer = msgspec.structs.replace(training.job, params={**training.job.params, "iterations": 6})
    resumed = prepared(replace_option(longer, tune_step="auto"), training.workspace)
    assert resumed.way == training.way
    assert "tune_step" not in said(resumed)


def test_optimizer_state_of_another_layout(start: Any) -> None:
    """A fused optimizer reads weights and state in the order of memory, whatever their strides say."""
    found = []
    for other in (False, True):
        training = start()
        steps = training.steps()
        next(steps), next(steps)
        if other:
            _keep(training.workspace, Way(CONTIGUOUS, 1, None))
        found.append(finished(prepared(training.job, training.workspace)))
    same, changed = found
    assert all(torch.allclose(value.float(), changed[name].float(), atol=1e-3) for name, value in same.items())


def test_threads_that_were_asked_for(start: Any) -> None:
    training = start(threads=1)
    _keep(training.workspace, Way(CONTIGUOUS, 7, None))
    assert prepared(training.job, training.workspace).way == Way(CONTIGUOUS, 1, None)


def test_auto_precision_is_float32_on_a_cpu(start: Any) -> None:
    assert start(settings={"amp": "auto"}).way.amp is None
    assert start(settings={"amp": "bf16"}).way.amp == "bf16"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch itself, deep inside of its compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler, and there is no g++")
def test_a_compiled_step_is_the_step(start: Any) -> None:
    losses, names, captured = [], [], []
    for compiled in (False, True):
        counters.clear()
        training = start(compile=compiled)
        losses.append(training.train_step(next(iter(training.batches())))["loss"])
        names.append(list(training.network.state_dict()))
        captured.append(counters["stats"]["calls_captured"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert captured[0] == 0 and captured[1] > 50, "the layers of the backbone"
    assert names[0] == names[1]


def test_graphs_need_a_gpu(start: Any) -> None:
    with pytest.raises(UsageError, match="this run is on cpu; say compile=true"):
        start(compile="graphs")
    with pytest.raises(UsageError, match="compile=graphs and grad_accumulation=2"):
        start(compile="graphs", settings={"grad_accumulation": 2})


@pytest.mark.filterwarnings("ignore")  # of torch itself, deep inside of its compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU, and there is none")
def test_steps_recorded_in_graphs_are_the_steps(start: Any) -> None:
    found = []
    for how in (False, "graphs"):
        training = start(compile=how, device="cuda", settings={"iterations": 4})
        found.append([training.train_step(batch)["loss"] for batch in training.batches()])
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def _keep(workspace: Workspace, way: Way) -> None:
    workspace.checkpoints.mkdir(exist_ok=True)
    (workspace.checkpoints / "step.json").write_bytes(msgspec.json.encode(way))
