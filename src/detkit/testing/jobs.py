"""The runs that `BackendTests` looks at: each distinct job trains once, all on one tiny data set."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from detkit import plugins
from detkit.catalog import open_run
from detkit.data import Dataset
from detkit.detections import Detections
from detkit.errors import RunFailed
from detkit.evaluation import evaluate
from detkit.events import Event
from detkit.files import place, place_all, write_json
from detkit.io import read_dataset
from detkit.job import Workspace
from detkit.predictor import Predictor
from detkit.resuming import go_on
from detkit.runs import LocalRun, Run
from detkit.scores import SCORE_FLOOR
from detkit.testing.data import tiny_dataset
from detkit.trainer import Trainer

if TYPE_CHECKING:
    from detkit.testing.backends import BackendTests

T = TypeVar("T")

CATEGORY_IDS: Mapping[str, Callable[[int], Sequence[int]]] = {
    "from 0": range,
    "from 1": lambda n: range(1, n + 1),
    "sparse": lambda n: [7 * i + 3 for i in range(n)],
    "unsorted": lambda n: [90 - 11 * i for i in range(n)],
}
"""Ways in which COCO files in the wild number their categories."""


@dataclass(frozen=True)
class Interrupted:
    """What was seen of a run that was ended halfway."""

    run: Run
    event: Event
    """The first metric of the second epoch, when the first one's checkpoint is safe."""
    status_at_event: str
    status_after: str
    survivors: list[int]
    """Processes of the run that were still there."""


class Jobs:
    """Trains each distinct job of a suite once, all on the same tiny data set."""

    def __init__(self, suite: type[BackendTests], folder: Path) -> None:
        self.suite, self.folder = suite, folder
        self.source = tiny_dataset(folder / "source")
        self.data = read_dataset(write_coco(self.source, folder / "coco", "unsorted"))
        self._made: dict[str, Any] = {}
        self._started: list[Run] = []

    def start(self, name: str, data: Dataset | None = None, **settings: Any) -> Run:
        """Lay out and start a run; the settings go on top of the suite's."""
        merged = {"epochs": 4, **self.suite.settings, **self.suite.options, **settings}
        if merged.get("iterations"):
            del merged["epochs"]
        trainer = Trainer(model=f"{self.suite.backend}/{self.suite.model}", **merged)
        train = self.data if data is None else data
        run = trainer.start(train, train, name=str(self.folder / name), leash=True)
        self._started.append(run)
        return run

    def fit(self, name: str, data: Dataset | None = None, **settings: Any) -> Run:
        """Train to the end, once for each name."""
        return self._once(name, lambda: self.start(name, data, **settings).wait())

    @property
    def base(self) -> Run:
        """A run with the suite's settings."""
        return self.fit("base")

    @property
    def trained(self) -> Run:
        """A run that is long enough to learn."""
        return self.fit("trained", **self.suite.learns) if self.suite.learns else self.base

    @property
    def warm(self) -> Run:
        """The job of `base`, the second of two that a backend which was kept warm has started."""

        def fit() -> Run:
            with plugins.backend(self.suite.backend).kept_warm(self.base.job) as backend:
                for name in ("warming", "warm"):
                    workspace = Workspace(self.folder / name)
                    workspace.create(self.base.job)
                    place_all(self.base.path / "input/data", workspace.path / "input/data")
                    self._started.append(backend.start(self.base.job, workspace, leash=True))
                    run = self._started[-1].wait()
            return run

        return self._once("warm", fit)

    @property
    def untrained(self) -> Run:
        """A single step."""
        return self.fit("untrained", iterations=1)

    @property
    def child(self) -> Run:
        """A single step on top of `trained`: classes turned round, one gone, one new."""
        used = [name for name in self.data.classes if name != "never"]
        data = self.data.with_classes(["newcomer", *reversed(used)])
        return self.fit("child", data, weights=self.trained, iterations=1)

    def predict(self, run: Run) -> list[Detections]:
        """Return a run's detections on every image, down to the score floor."""

        def predict() -> list[Detections]:
            with Predictor(run, score_threshold=SCORE_FLOOR, batch_size=4) as predictor:
                return list(predictor.predict(self.data))

        return self._once(f"predict {run.name}", predict)

    def ap50(self, run: Run) -> float:
        """Return a run's AP50 on the training images."""
        return self._once(f"ap50 {run.name}", lambda: evaluate(run, self.data, allow_seen=True)["AP50"])

    def interrupted(self, how: str) -> Interrupted:
        """End the job of `base` in its second epoch: ``stop`` it, or ``kill`` its worker."""
        return self._once(f"interrupted {how}", lambda: self._interrupt(how))

    def resume(self, how: str) -> Run:
        """Continue the interrupted run to its end."""
        return self._once(f"resumed {how}", lambda: self.interrupted(how).run.resume(leash=True).wait())

    def lengthen(self) -> Run:
        """Make the run of `base` an epoch longer."""
        epochs = int(self.base.history[-1]["epoch"]) + 1
        settings = {"epochs": epochs}

        def finish() -> Run:
            run, _ = go_on(self.base, settings, leash=True, name=str(self.folder / "longer"))
            return run.wait()

        return self._once("longer", finish)

    def resume_damaged(self) -> tuple[Run, int]:
        """Resume a copy of `base` without end, its last checkpoint damaged; return it and the first step it logs."""
        path = Path(shutil.copytree(self.base.path, self.folder / "cut-off"))
        (path / "model/detkit.json").unlink()
        run = open_run(path)
        last = max(run.workspace.checkpoints.glob("step-*"))
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 0xFF
        last.write_bytes(content)
        since = run.position
        run.resume(leash=True).wait()
        first = next(e.step for e in run.events(follow=False, since=since) if e.kind == "metric" and e.step)
        return run, first

    def _interrupt(self, how: str) -> Interrupted:
        import psutil

        run = self.start(how, **self.suite.slowly)
        for event in run.events():
            if (
                event.kind == "metric"
                and (event.epoch or 0) > 1
                and any(n.startswith("train/loss") for n in event.values)
            ):
                break
        else:
            raise AssertionError("no train/loss of the second epoch came while the run went on")
        status = run.status
        assert status == "running", "the run was over before it could be ended; give options that slow it in `slowly`"
        processes: list[psutil.Process] = []
        if isinstance(run, LocalRun) and psutil.pid_exists(run.record.pid):
            worker = psutil.Process(run.record.pid)
            processes = [worker, *worker.children(recursive=True)]
        if how == "kill":
            for process in processes:
                process.kill()
            with pytest.raises(RunFailed):
                run.wait()
        else:
            run.stop()
        _, alive = psutil.wait_procs(processes, timeout=5)
        return Interrupted(run, event, status, run.status, [process.pid for process in alive])

    def run_with_damaged_image(self) -> tuple[Run, str]:
        """Start the job of `base` anew, with one of its images cut off; return the run and the image's id."""
        base = self.base.workspace
        workspace = Workspace(self.folder / "damaged")
        workspace.create(base.job())
        for file in sorted(path for path in (base.path / "input/data").rglob("*") if path.is_file()):
            target = workspace.path / file.relative_to(base.path)
            if not target.exists():
                place(file, target)
        image = next(iter((workspace.channel("train") / "images").iterdir()))
        content = image.read_bytes()
        for channel in ("train", "validation"):
            same = workspace.channel(channel) / "images" / image.name
            same.unlink()  # it is a hard link to the file of `base`
            same.write_bytes(content[: len(content) // 2])
        return plugins.backend(self.suite.backend).start(base.job(), workspace, leash=True), image.name

    def close(self) -> None:
        """End whatever a failed case left running."""
        for run in self._started:
            run.stop(timeout_s=5)

    def _once(self, key: str, make: Callable[[], T]) -> T:
        if key not in self._made:
            try:
                self._made[key] = make()
            except Exception as error:  # raised below, now and for every later case
                self._made[key] = error
        if isinstance(self._made[key], Exception):
            raise self._made[key]
        made: T = self._made[key]
        return made


def write_coco(data: Dataset, folder: Path, ids: str) -> Path:
    """Write COCO with categories numbered one of the `CATEGORY_IDS` ways, and one more category without boxes."""
    names = [*data.classes[1:], "never", data.classes[0]]
    number = dict(zip(names, CATEGORY_IDS[ids](len(names)), strict=True))
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i, sample in enumerate(data):
        place(Path(sample.path), folder / "images" / sample.image_id)
        images.append({"id": 1000 - i, "file_name": sample.image_id, "width": sample.width, "height": sample.height})
        for name, (x0, y0, x1, y1) in zip(sample.names, sample.boxes.tolist(), strict=True):
            box = {
                "id": len(annotations),
                "image_id": 1000 - i,
                "category_id": number[name],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
            }
            annotations.append({**box, "area": (x1 - x0) * (y1 - y0), "iscrowd": 0})
    categories = [{"id": i, "name": name} for name, i in number.items()]
    write_json(folder / "annotations.json", {"images": images, "annotations": annotations, "categories": categories})
    return folder
