"""What every backend has to do, as a pytest class to subclass::

    class TestMine(BackendTests):
        backend = "mine"
        model = "small"
        settings = {"image_size": 64}     # whatever makes it tiny and quick

Each distinct job trains once for a class and many cases look at it. A case that the backend cannot pass is declared by
the backend itself, in ``LocalBackend.gaps``: its name here and the reason. It is then expected to fail, strictly.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import numpy as np
import pytest

from detkit import plugins
from detkit.backends import API, LocalBackend, SeveralOptions
from detkit.detections import Detections
from detkit.errors import DetkitError, RunExists, RunFailed, Unsupported
from detkit.evaluation import evaluate
from detkit.exporting import export
from detkit.files import file_sha256
from detkit.io import read_dataset
from detkit.params import CANONICAL, VARIANTS
from detkit.predictor import Predictor
from detkit.resolution import OWN_SETTINGS
from detkit.runs import Run
from detkit.scores import SCORE_FLOOR, score
from detkit.testing.jobs import CATEGORY_IDS, Interrupted, Jobs, write_coco

HEAVY = frozenset({"torch", "torchvision", "mxnet", "gluoncv", "tensorflow", "boto3", "onnx", "onnxruntime", "hotcoco"})
"""Modules that importing a plugin's entry point must not load, beside those that the backend requires."""

LIGHT = frozenset({"numpy", "PIL", "msgspec", "pluggy"})
"""Modules that detkit's own core loads."""


class BackendTests:
    """Subclass it, name a backend and a model, and run pytest."""

    backend: ClassVar[str]
    model: ClassVar[str]
    settings: ClassVar[Mapping[str, Any]] = {}
    """Parameters that make training tiny and quick. ``epochs`` is 4 unless given here, and at least 3."""
    options: ClassVar[Mapping[str, Any]] = {}
    """Options of every run, e.g. ``{"device": "cpu"}``."""
    slowly: ClassVar[Mapping[str, Any]] = {}
    """Options that make a step last some 20 ms, so that a run can be stopped halfway."""
    learns: ClassVar[Mapping[str, Any]] = {}
    """Parameters, on top of `settings`, with which training is long enough to learn the tiny data set."""
    least_ap50: ClassVar[float] = 0.5
    """AP50 on the training images that a model trained with `learns` reaches at least."""
    diverges: ClassVar[Mapping[str, Any]] = {"learning_rate": 1e30}
    """Parameters with which the loss soon is not finite."""
    like_two: ClassVar[Mapping[str, Any]] = {}
    """Settings with which one process does what two do together, e.g. ``{"grad_accumulation": 2}``; what is compared
    then are the losses of every step. Left empty, the two have to agree with `settings` alone."""
    tolerance_px: ClassVar[float] = 0.01
    """How far boxes may differ between one image at a time and several; scores by a hundredth of it."""

    @pytest.fixture(autouse=True)
    def _declared_gaps(self, request: pytest.FixtureRequest) -> None:
        reason = _gaps(self.backend).get(request.function.__name__)
        if reason:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.fixture(autouse=True)
    def _nothing_from_outside(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Keep the user's ``detkit.yaml`` and ``DETKIT_*`` away; where interpreters and weights lie stays known."""
        monkeypatch.chdir(tmp_path)
        for name in list(os.environ):
            kept = ("DETKIT_PYTHON_", "DETKIT_ENVIRONMENTS", "DETKIT_CACHE", "DETKIT_VERIFY_")
            if name.startswith("DETKIT_") and not name.startswith(kept):
                monkeypatch.delenv(name)

    @pytest.fixture(scope="class")
    @classmethod
    def jobs(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
        """The runs of this class, each trained when it is first asked for."""
        jobs = Jobs(cls, tmp_path_factory.mktemp("backend"))
        yield jobs
        jobs.close()

    def test_importing_the_plugin_is_cheap(self) -> None:
        """The entry point's module loads neither what the engine needs nor any other heavy package."""
        (module,) = _entry_modules(self.backend)
        loaded = _modules_after(f"import importlib; importlib.import_module({module!r})")
        heavy = sorted(loaded & _heavy(self.backend))
        assert not heavy, f"importing {module} loads {heavy}; import them in the engine's module"

    def test_declaration(self) -> None:
        """Names keep their canonical types, parameters and options do not overlap, gaps name cases that exist."""
        backend = plugins.backend(self.backend)
        assert backend.models, "a backend offers at least one model"
        assert backend.summary
        params = backend.spec(self.model).params
        hints = typing.get_type_hints(type(params), include_extras=True)
        for name in set(hints) & set(CANONICAL):
            known = {CANONICAL[name], VARIANTS.get(name, CANONICAL[name])}
            expected = known | {typing.Optional[one] for one in known}  # noqa: UP045
            assert hints[name] in expected, f"{name} is a canonical name: give it the type of detkit.params"
        assert msgspec.convert(msgspec.to_builtins(params), type(params)) == params
        names = [*params.__struct_fields__, *backend.options.__struct_fields__, *OWN_SETTINGS]
        assert len(names) == len(set(names)), "parameters, options and detkit's own settings share a name"
        assert backend.options(), "every option has a default"
        unknown = [name for name in _gaps(self.backend) if not hasattr(type(self), name)]
        assert not unknown, f"gaps of cases that do not exist: {unknown}"
        if isinstance(backend, LocalBackend):
            assert backend.api == API
            assert backend.install

    def test_unknown_setting_is_refused_before_anything_heavy(self, jobs: Jobs) -> None:
        script = (
            "from detkit import Trainer\nfrom detkit.errors import UnknownName\n"
            "try:\n"
            f"    Trainer(model={self.backend + '/' + self.model!r}, epohcs=3).fit({str(jobs.folder / 'coco')!r})\n"
            "except UnknownName as error:\n"
            "    assert \"did you mean 'epochs'\" in str(error), error\n"
            "else:\n"
            "    raise SystemExit('an unknown setting was taken')"
        )
        heavy = sorted(_modules_after(script) & _heavy(self.backend))
        assert not heavy, f"refusing a setting loads {heavy}"

    def test_learns(self, jobs: Jobs) -> None:
        """After training the images it was trained on are found, and were not before."""
        untrained, trained = jobs.ap50(jobs.untrained), jobs.ap50(jobs.trained)
        assert trained >= self.least_ap50
        assert trained >= untrained + 0.25

    def test_same_seed_same_result(self, jobs: Jobs) -> None:
        again = jobs.fit("again")
        assert _losses(again) == _losses(jobs.base)
        assert _losses(again), "engines log train/loss"
        _assert_same(jobs.predict(again), jobs.predict(jobs.base))

    def test_a_warm_worker_does_the_same(self, jobs: Jobs) -> None:
        assert _losses(jobs.warm) == _losses(jobs.base)
        _assert_same(jobs.predict(jobs.warm), jobs.predict(jobs.base))

    def test_parts_of_the_loss_are_declared(self, jobs: Jobs) -> None:
        """What a place has to know beforehand, to find it in a log: the metrics beside the loss and its parts."""
        logged = {name for row in jobs.base.history for name in row if name.startswith("train/")}
        declared = {f"train/{name}" for name in plugins.backend(self.backend).spec(self.model).losses}
        assert logged - {"train/loss", "train/learning_rate"} == declared
        of_validation = {name for row in jobs.base.history for name in row if name.startswith("val/loss")}
        assert of_validation <= set(plugins.backend(self.backend).tuning_metrics(self.model))

    def test_metrics_arrive_while_running(self, jobs: Jobs) -> None:
        stopped = jobs.interrupted("stop")
        assert stopped.status_at_event == "running"
        assert stopped.event.kind == "metric"
        assert stopped.event.step
        assert any(name.startswith("train/loss") for name in stopped.event.values)

    def test_failure_text_arrives(self, jobs: Jobs) -> None:
        """An image that was damaged after the run was laid out is named to the user."""
        run, image = jobs.run_with_damaged_image()
        with pytest.raises(RunFailed, match=re.escape(image)):
            run.wait()
        assert run.status == "failed"

    def test_missing_device_is_an_error(self, jobs: Jobs) -> None:
        with pytest.raises(DetkitError, match="cuda:99"):
            Predictor(jobs.base, score_threshold=SCORE_FLOOR, device="cuda:99")

    def test_stop_leaves_no_process(self, jobs: Jobs) -> None:
        stopped = jobs.interrupted("stop")
        assert stopped.status_after == "stopped"
        assert not stopped.survivors

    def test_resume_after_stop(self, jobs: Jobs) -> None:
        self._assert_resumed(jobs, "stop")

    def test_resume_after_kill(self, jobs: Jobs) -> None:
        assert self._assert_resumed(jobs, "kill").status_after == "interrupted"

    def _assert_resumed(self, jobs: Jobs, how: str) -> Interrupted:
        declared = self._declared_resume()
        interrupted = jobs.interrupted(how)
        run = jobs.resume(how)
        assert run.status == "finished"
        steps = [event.step for event in run.events(follow=False) if event.kind == "metric" and event.step]
        assert max(steps) == jobs.base.history[-1]["step"]
        at = next(i for i, event in enumerate(run.events(follow=False)) if event == interrupted.event)
        repeated = [e.step for e in list(run.events(follow=False))[at + 1 :] if e.kind == "metric" and e.step]
        assert min(repeated) > 1, "it began again instead of continuing from its checkpoint"
        if declared == "exact":
            assert _losses(run) == _losses(jobs.base)
            _assert_same(jobs.predict(run), jobs.predict(jobs.base))
        return interrupted

    def test_resume_from_the_checkpoint_before_a_damaged_one(self, jobs: Jobs) -> None:
        """Checkpoints are kept as `detkit.checkpoints` does: a damaged one is noticed, and there is one before it."""
        declared = self._declared_resume()
        run, first = jobs.resume_damaged()
        assert 1 < first <= jobs.base.history[-1]["step"]
        if declared == "exact":
            _assert_same(jobs.predict(run), jobs.predict(jobs.base))

    def test_finished_run_is_made_longer(self, jobs: Jobs) -> None:
        """It goes on in a new directory; the finished run stays as it was."""
        self._declared_resume()
        before = jobs.base.history
        run = jobs.lengthen()
        assert run.path != jobs.base.path
        assert run.job.continued_from is not None
        assert run.job.continued_from.manifest == file_sha256(jobs.base.model.path / "detkit.json")
        assert run.history[0]["step"] > before[-1]["step"], "it began again instead of continuing from its checkpoint"
        assert jobs.base.history == before

    def _declared_resume(self) -> str:
        declared: str | None = getattr(plugins.backend(self.backend), "resume", None)
        if declared is None:
            pytest.skip(f"backend {self.backend!r} declares that it cannot resume")
        return declared

    def test_two_processes_agree_with_one(self, jobs: Jobs) -> None:
        """Each image is seen once, by one of them, the batch is the global one, and one of them writes."""
        if not issubclass(plugins.backend(self.backend).options, SeveralOptions):
            pytest.skip(f"backend {self.backend!r} trains in one process")
        two, alone = jobs.fit("two", processes=2), jobs.fit("like two", **self.like_two)
        for one, other in zip(_steps(two), _steps(alone), strict=True):
            assert one == pytest.approx(other, rel=1e-4), "losses of a step"
        assert two.model.manifest.data == alone.model.manifest.data
        assert {"val/AP", "val/AP50"} <= set(two.metrics)
        for found in jobs.predict(two):
            _assert_well_formed(found, jobs.data.classes)

    def test_incremental_starts_from_the_parent(self, jobs: Jobs) -> None:
        """A model that saw one more step is nearly as good as its parent, though its classes are in another order."""
        if not getattr(plugins.backend(self.backend), "incremental", False):
            pytest.skip(f"backend {self.backend!r} declares that it cannot start from an earlier model")
        child = jobs.child
        origin = child.model.manifest.weights
        assert set(origin.kept) == set(jobs.data.classes) - {"never"}
        assert origin.new == ["newcomer"]
        assert child.model.manifest.parent == file_sha256(jobs.trained.model.path / "detkit.json")
        assert jobs.ap50(child) >= 0.5 * jobs.ap50(jobs.trained)
        assert jobs.ap50(child) >= jobs.ap50(jobs.untrained) + 0.2

    def test_detections_are_well_formed(self, jobs: Jobs) -> None:
        for run in (jobs.base, jobs.trained):
            for sample, found in zip(jobs.data, jobs.predict(run), strict=True):
                _assert_well_formed(found, jobs.data.classes)
                assert (found.path, found.width, found.height) == (sample.path, sample.width, sample.height)

    def test_thresholds_are_kept(self, jobs: Jobs) -> None:
        everything = jobs.predict(jobs.trained)
        middle = float(np.median(np.concatenate([found.scores for found in everything])))
        with Predictor(jobs.trained, score_threshold=middle, max_detections=1) as predictor:
            few = list(predictor.predict(jobs.data))
        assert all(len(found) <= 1 for found in few)
        assert all((found.scores >= middle).all() for found in few)
        assert any(len(found) for found in few)

    @pytest.mark.parametrize("ids", CATEGORY_IDS)
    def test_category_ids_keep_their_names(self, ids: str, jobs: Jobs) -> None:
        """However a COCO file numbers its categories, the names are those that went in, and scores are the same."""
        data = read_dataset(write_coco(jobs.source, jobs.folder / ids.replace(" ", "-"), ids))
        assert [sample.names for sample in data] == [sample.names for sample in jobs.source]
        assert set(data.classes) == {*jobs.source.classes, "never"}
        found = jobs.predict(jobs.trained)
        scores, expected = score(data, found).per_class, score(jobs.data, found).per_class
        assert set(scores) == set(expected)
        for name in jobs.source.classes:
            assert scores[name] == expected[name]

    def test_names_out_as_in(self, jobs: Jobs) -> None:
        """The model, trained from unsorted ids and a class without boxes, finds each class under its own name."""
        truth = {name for sample in jobs.source for name in sample.names}
        best = {name for found in jobs.predict(jobs.trained) for name in found.above(_best(jobs.trained)).names}
        assert best
        assert best <= truth
        scores = evaluate(jobs.trained, jobs.data, allow_seen=True)
        assert sum(scores.per_class[name]["AP50"] > 0.2 for name in truth) > len(truth) / 2

    def test_image_without_boxes(self, jobs: Jobs) -> None:
        empty = np.flatnonzero(jobs.data.boxes_per_image() == 0)
        assert len(empty), "the data set has an image without boxes, and training went through"
        assert jobs.trained.model.manifest.data["train"]["images"] == len(jobs.data)
        for i in empty:
            _assert_well_formed(jobs.predict(jobs.trained)[i], jobs.data.classes)

    def test_one_image_equals_many(self, jobs: Jobs) -> None:
        with Predictor(jobs.trained, score_threshold=SCORE_FLOOR) as predictor:
            single = [predictor(path) for path in jobs.data.paths]
        _assert_same(single, jobs.predict(jobs.trained), self.tolerance_px)

    def test_isolated_equals_in_process(self, jobs: Jobs) -> None:
        with Predictor(jobs.trained, score_threshold=SCORE_FLOOR, isolate=True) as predictor:
            isolated = list(predictor.predict(jobs.data))
        _assert_same(isolated, jobs.predict(jobs.trained), self.tolerance_px)

    def test_non_finite_loss_stops(self, jobs: Jobs) -> None:
        """Training ends within the step and names iteration, learning rate and the files of the batch."""
        run = jobs.start("diverges", **self.diverges)
        with pytest.raises(RunFailed, match="not finite") as caught:
            run.wait()
        text = str(caught.value)
        at = re.search(r"iteration (\d+)", text)
        assert at, text
        assert re.search(r"learning rate [\d.]", text), text
        assert any(image_id in text for image_id in jobs.data.image_ids), text
        assert all(row["step"] <= int(at[1]) for row in run.history)
        assert all(math.isfinite(value) for row in run.history for value in row.values())
        assert not (run.workspace.model / "detkit.json").exists()

    def test_manifest_is_complete(self, jobs: Jobs) -> None:
        model = jobs.base.model
        manifest = model.manifest
        assert manifest.backend == self.backend
        assert manifest.model == self.model
        assert tuple(manifest.classes) == jobs.data.classes
        assert set(manifest.params) == set(plugins.backend(self.backend).spec(self.model).params.__struct_fields__)
        assert {"detkit", "python"} < set(manifest.versions), "engines add the version of their framework"
        assert manifest.data["train"]["digest"] == jobs.base.workspace.dataset("train").digest()  # type: ignore[union-attr]
        assert sorted(model.seen()["train"]) == sorted(file_sha256(Path(path)) for path in jobs.data.paths)
        for name in plugins.backend(self.backend).space(self.model):
            told = manifest.native.get(name)
            assert told == pytest.approx(manifest.params[name], rel=1e-9), (
                f"{name} is usually searched: native= of `Trained` has to say, by that name, what the framework had"
            )
        assert {"val/AP", "val/AP50"} <= set(manifest.metrics)
        assert manifest.seconds > 0
        assert manifest.max_detections >= 1
        on_disk = {p.relative_to(model.path).as_posix(): p for p in model.path.rglob("*") if p.is_file()}
        del on_disk["detkit.json"]
        assert set(manifest.artifacts) == set(on_disk)
        for name, artifact in manifest.artifacts.items():
            assert artifact.sha256 == file_sha256(on_disk[name])
            assert artifact.bytes == on_disk[name].stat().st_size

    def test_exports_what_it_declares(self, jobs: Jobs, tmp_path: Path) -> None:
        """Every declared format is written into a folder that need not be there; others are refused by name."""
        declared = plugins.backend(self.backend).formats
        for name in declared:
            main = export(jobs.base, name, tmp_path / "deep" / name)
            assert main.is_file()
            assert main.parent == tmp_path / "deep" / name
            files = {path.name for path in main.parent.iterdir()}
            assert export(jobs.base, name, main.parent) == main, "an export can be repeated"
            assert {path.name for path in main.parent.iterdir()} == files
        with pytest.raises(Unsupported, match="papyrus"):
            export(jobs.base, "papyrus", tmp_path)

    def test_used_directory_is_refused(self, jobs: Jobs) -> None:
        with pytest.raises(RunExists):
            jobs.start(jobs.base.name)


def _gaps(name: str) -> Mapping[str, str]:
    gaps: Mapping[str, str] = getattr(plugins.backend(name), "gaps", {})
    return gaps


def _heavy(name: str) -> set[str]:
    return {*HEAVY, *getattr(plugins.backend(name), "requires", ())} - LIGHT


def _entry_modules(backend: str) -> list[str]:
    plugins.backends()
    plugin = plugins.registry().providers["backend", backend]
    return sorted({entry.module for entry in metadata.entry_points(group=plugins.GROUP, name=plugin)})


def _modules_after(script: str) -> set[str]:
    """Run a script in a new interpreter and return the top-level modules it has loaded."""
    script += "\nimport json, sys; print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def _losses(run: Run) -> list[tuple[str, float, float]]:
    return [
        (name, row["step"], value)
        for row in run.history
        for name, value in row.items()
        if name.startswith(("train/loss", "val/"))
    ]


def _steps(run: Run) -> list[dict[str, float]]:
    """Return the training losses of a run, row by row."""
    rows = [{n: v for n, v in row.items() if n == "step" or n.startswith("train/")} for row in run.history]
    return [row for row in rows if len(row) > 1]


def _best(run: Run) -> float:
    known = run.model.manifest.score_threshold
    return 0.25 if known is None else known


def _assert_same(one: Sequence[Detections], other: Sequence[Detections], tolerance_px: float = 0.0) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.path == b.path
        assert a.names == b.names
        np.testing.assert_allclose(a.boxes, b.boxes, rtol=0, atol=tolerance_px)
        np.testing.assert_allclose(a.scores, b.scores, rtol=0, atol=tolerance_px / 100)


def _assert_well_formed(found: Detections, classes: tuple[str, ...]) -> None:
    assert found.classes == classes
    assert found.boxes.dtype == np.float64
    assert found.boxes.shape == (len(found), 4)
    assert np.isfinite(found.boxes).all()
    assert (found.boxes[:, 2:] > found.boxes[:, :2]).all()
    assert (found.boxes >= 0).all()
    assert (found.boxes <= [found.width, found.height, found.width, found.height]).all()
    assert found.scores.dtype == np.float64
    assert ((found.scores >= 0) & (found.scores <= 1)).all()
    assert (np.diff(found.scores) <= 0).all()
    assert np.issubdtype(found.labels.dtype, np.integer)
    assert ((found.labels >= 0) & (found.labels < len(classes))).all()
