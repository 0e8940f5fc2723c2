"""Every hook, used the way a plugin uses it; a test below checks that none is forgotten here."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import detkit
from detkit import hookspecs, plugins
from detkit.backends import LocalBackend, ModelSpec
from detkit.data import Dataset, Sample
from detkit.errors import PluginError
from detkit.events import Event
from detkit.formats import Format
from detkit.hookspecs import hookimpl
from detkit.metrics import Metric
from detkit.params import Options
from detkit.runs import Run

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture
def register() -> Iterator[Callable[[object], None]]:
    """Register an object with hook functions as the plugin ``guest``, for one test."""
    plugins.registry.cache_clear()
    yield lambda plugin: plugins.registry().manager.register(plugin, name="guest") and None
    plugins.registry.cache_clear()


def test_every_hook_is_tested_here() -> None:
    names = [name for name in vars(hookspecs) if name.startswith("detkit_")]
    source = Path(__file__).read_text()
    assert names
    assert [name for name in names if f"def {name}(" not in source] == []


def test_detkit_backends(register: Callable[[object], None], tiny: Dataset) -> None:
    class Guest:
        @hookimpl
        def detkit_backends(self) -> Iterator[LocalBackend]:
            (original,) = plugins.registry().manager.get_plugin("echo").detkit_backends()
            yield replace(original, name="parrot")

    register(Guest())
    assert {"echo", "parrot"} <= set(plugins.backends())
    assert plugins.registry().providers["backend", "parrot"] == "guest"
    run = detkit.Trainer(model="parrot/memory", epochs=1).fit(tiny, tiny, quiet=True)
    assert run.model.name == "parrot/memory"
    with pytest.raises(detkit.DetkitError, match="write backend/model"):
        detkit.Trainer(model="memory").explain()


def test_backend_whose_engine_needs_what_is_not_here(
    register: Callable[[object], None], tiny: Dataset, tmp_path: Path
) -> None:
    class Guest:
        @hookimpl
        def detkit_backends(self) -> Iterator[LocalBackend]:
            (original,) = plugins.registry().manager.get_plugin("echo").detkit_backends()
            yield replace(original, name="deep", requires=("numpy", "no_such_framework"), install="pip install deep")

    register(Guest())
    message = (
        "needs no_such_framework, which this Python does not have; install it with `pip install deep`.*PYTHON_DEEP"
    )
    with pytest.raises(PluginError, match=message):
        detkit.Trainer(model="deep/memory").fit(tiny, tiny, name="r", quiet=True)
    assert not (tmp_path / "runs/r").exists()


def test_detkit_formats(register: Callable[[object], None], tmp_path: Path) -> None:
    class WordsOptions(Options):
        side: int = 10

    def read(path: Path, options: WordsOptions) -> Dataset:
        box = np.array([[0.0, 0.0, options.side, options.side]])
        names = path.read_text().split()
        return Dataset.from_samples(names, [Sample(path="a.png", width=20, height=20, boxes=box, names=(names[0],))])

    class Guest:
        @hookimpl
        def detkit_formats(self) -> list[Format]:
            return [
                Format(name="words", summary="-", sniff=lambda p: p.suffix == ".words", read=read, options=WordsOptions)
            ]

    register(Guest())
    assert {"coco", "voc", "words"} <= set(plugins.formats())
    file = tmp_path / "a.words"
    file.write_text("cat dog")
    assert detkit.read_dataset(file).classes == ("cat", "dog")
    assert detkit.read_dataset(file, "words", side=5).boxes.tolist() == [[0, 0, 5, 5]]
    with pytest.raises(detkit.DetkitError, match="did you mean 'side'"):
        detkit.read_dataset(file, "words", sied=5)


def test_detkit_metrics(register: Callable[[object], None], tiny: Dataset) -> None:
    class Guest:
        @hookimpl
        def detkit_metrics(self) -> list[Metric]:
            found = Metric(
                name="found_any",
                summary="share of images with a detection",
                compute=lambda data, found: {"found_any": sum(map(bool, map(len, found))) / len(data)},
                higher_is_better=True,
            )
            return [found]

    register(Guest())
    run = detkit.Trainer(model="echo/memory", epochs=2).fit(tiny, tiny, quiet=True)
    scores = detkit.evaluate(run, tiny, allow_seen=True)
    assert 0 < scores["found_any"] <= 1
    assert list(scores)[-1] == "found_any"


def test_detkit_on_event(register: Callable[[object], None], tiny: Dataset) -> None:
    class Guest:
        seen: list[Event]
        runs: set[str]

        def __init__(self) -> None:
            self.seen, self.runs = [], set()

        @hookimpl
        def detkit_on_event(self, run: Run, event: Event) -> None:
            self.seen.append(event)
            self.runs.add(run.name)

    guest = Guest()
    register(guest)
    run = detkit.Trainer(model="echo/memory", epochs=2).fit(tiny, tiny, name="mine", quiet=True)
    assert guest.runs == {"mine"}
    assert guest.seen == list(run.events(follow=False))
    assert {event.kind for event in guest.seen} == {"log", "state", "metric", "progress"}
    assert [e.values["state"] for e in guest.seen if e.kind == "state"] == ["starting", "running", "finished"]


def test_detkit_on_event_that_fails_never_ends_a_run(register: Callable[[object], None], tiny: Dataset) -> None:
    class Guest:
        calls = 0

        @hookimpl
        def detkit_on_event(self, event: Event) -> None:
            Guest.calls += 1
            raise ConnectionError("the tracker's server is down")

    register(Guest())
    with pytest.warns(plugins.PluginWarning, match="server is down") as warned:
        run = detkit.Trainer(model="echo/memory", epochs=2).fit(tiny, tiny, quiet=True)
    assert run.status == "finished"
    assert Guest.calls == 1
    assert len(warned) == 1


def test_hooks_may_take_fewer_arguments_and_none(
    register: Callable[[object], None], tiny: Dataset, tmp_path: Path
) -> None:
    class Guest:
        @hookimpl
        def detkit_on_event(self) -> None:
            with (tmp_path / "ticks.csv").open("a", newline="") as file:
                csv.writer(file).writerow(["tick"])

    register(Guest())
    run = detkit.Trainer(model="echo/memory", epochs=1).fit(tiny, tiny, quiet=True)
    assert (tmp_path / "ticks.csv").read_text().count("tick") == len(list(run.events(follow=False)))


def test_model_specs_are_typed() -> None:
    for backend in plugins.backends().values():
        assert all(isinstance(spec, ModelSpec) for spec in backend.models.values())
