"""CPU time of a training step with detkit, against Detectron2's own ``DefaultTrainer`` with the same configuration.

``python benchmarks/detectron2_step.py [MODEL [IMAGE_SIZE [BATCH_SIZE]]]``, where Detectron2 can be imported. Both train
in turns, the same images at the same size, without a worker for the data, on one thread; each does all that it does
beside the step: learning rate, log, metrics.
"""

from __future__ import annotations

import contextlib
import io
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from msgspec import to_builtins
from msgspec.structs import replace

from detkit.data import Dataset
from detkit.formats.checks import prepare
from detkit.job import Job, Workspace
from detkit.testing import tiny_dataset
from detkit_detectron2 import sources

ROUNDS, STEPS, NUM_IMAGES = 7, 6, 32

sources.load()


def training(folder: Path, model: str, data: Dataset, image_size: int, batch_size: int) -> Any:
    """Return detkit's training, ready for its first step."""
    from detkit_detectron2.params import MODELS, Detectron2Options
    from detkit_detectron2.training import Training

    never = f"{10**6} iterations"
    params = replace(
        MODELS[model].params,
        epochs=None,
        iterations=10**5,
        batch_size=batch_size,
        optimizer="sgd",
        learning_rate=1e-3,
        gradient_clip=None,
        image_size=image_size,
        weights=None,
        max_detections=100,
        validate_every=never,
        checkpoint_every=never,
        warmup_iterations=1000,
    )
    job = Job(
        backend="detectron2",
        engine="detkit_detectron2.engine:Detectron2Engine",
        model=model,
        params=to_builtins(params),
        options=to_builtins(Detectron2Options(device="cpu", threads=1, num_workers=0)),
        classes=list(data.classes),
    )
    workspace = Workspace(folder)
    workspace.create(job)
    ready = prepare(data, on_invalid="raise")
    workspace.write_dataset("train", ready.data, ready.image_digests)
    made = Training(job, workspace)
    made.prepare()
    return made


def own_steps(cfg: Any, data: Dataset, folder: Path) -> Iterator[None]:
    """Train with Detectron2's trainer as its ``train`` does, yielding after each step."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.engine import DefaultTrainer
    from detectron2.structures import BoxMode
    from detectron2.utils.events import EventStorage

    records = [
        {
            "file_name": sample.path,
            "image_id": sample.image_id,
            "height": sample.height,
            "width": sample.width,
            "annotations": [
                {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": data.classes.index(name), "iscrowd": 0}
                for name, box in zip(sample.names, sample.boxes.tolist(), strict=True)
            ],
        }
        for sample in data
    ]
    DatasetCatalog.register("benchmark", lambda: records)
    MetadataCatalog.get("benchmark").thing_classes = list(data.classes)
    cfg = cfg.clone()
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("benchmark",), ()
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 0, False
    cfg.MODEL.WEIGHTS, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.OUTPUT_DIR = "", 10**6, str(folder)
    trainer = DefaultTrainer(cfg)
    trainer.start_iter, trainer.iter = 0, 0
    with EventStorage(0) as trainer.storage:
        trainer.before_train()
        while True:
            trainer.before_step()
            trainer.run_step()
            trainer.after_step()
            trainer.iter += 1
            yield


def cpu_s(steps: Iterator[Any], *, deterministic: bool) -> float:
    """Return the CPU time of a step."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    began = time.process_time()
    for _ in range(STEPS):
        next(steps)
    return (time.process_time() - began) / STEPS


def main() -> None:
    given = sys.argv[1:]
    model = given[0] if given else "faster_rcnn_tiny"
    image_size, batch_size = (int(word) for word in (*given[1:], *("256", "4")[len(given[1:]) :]))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as temporary, contextlib.redirect_stdout(io.StringIO()):
        data = tiny_dataset(Path(temporary, "images"), num_images=NUM_IMAGES, size=image_size)
        made = training(Path(temporary, "run"), model, data, image_size, batch_size)
        ours, theirs = made.steps(), own_steps(made.cfg, data, Path(temporary))
        cpu_s(ours, deterministic=True), cpu_s(theirs, deterministic=False)
        rounds = [(cpu_s(ours, deterministic=True), cpu_s(theirs, deterministic=False)) for _ in range(ROUNDS)]
    own, other = (statistics.median(column) for column in zip(*rounds, strict=True))
    ratios = [one / two for one, two in rounds]
    print(
        f"{model} at {image_size} pixels, batch {batch_size}: detkit {1e3 * own:.0f} ms, DefaultTrainer "
        f"{1e3 * other:.0f} ms of CPU a step; ratio {statistics.median(ratios):.3f}, from {min(ratios):.3f} to "
        f"{max(ratios):.3f} in {ROUNDS} rounds of {STEPS}"
    )


if __name__ == "__main__":
    main()
