"""AP reached from scratch with a budget of CPU seconds: detkit's small models, and others that the user has installed.

Each contender trains in a process of its own on the same images at the same size and on the same threads, as long as
the budget lasts: an epoch is timed first. Predictions of all are scored by detkit on the same test images. CPU seconds
are those of the process and its children, start and last prediction included; `epoch` is of training alone.

    python benchmarks/peers.py [--data NEU-DET] [--size 160] [--cpu-seconds 100] [--threads 2]
        [--model fcos_tiny ...] [--ultralytics PYTHON] [--yolo yolov8n.yaml ...]
        [--detectron2 PYTHON --config CHECKOUT/configs/COCO-Detection/retinanet_R_50_FPN_1x.yaml ...]

Ultralytics' package is under AGPL-3.0 and no part of detkit: an interpreter that has it is started, and trains from
scratch with its own defaults, without what needs a network. Detectron2 trains with its own ``DefaultTrainer`` and one
of its own configurations, with batches of 16 and clipped gradients; what these expect of pretrained weights is changed:
stages that are frozen, frozen batch norms, and a warm-up and a schedule that would be longer than the training.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

CONFIDENCE = 0.001


def train_yolo(request: str) -> None:
    """Train and predict in Ultralytics' own interpreter; boxes go to a file."""
    asked = json.loads(request)
    os.environ["YOLO_OFFLINE"] = "1"
    import torch
    from ultralytics import YOLO, settings

    settings.update({"sync": False, "mlflow": False, "tensorboard": False})
    torch.set_num_threads(asked["threads"])
    model = YOLO(asked["model"])
    model.train(
        data=asked["data"], epochs=asked["epochs"], imgsz=asked["size"], batch=16, pretrained=False, amp=False, seed=0,
        workers=0, plots=False, val=False, verbose=False, project=asked["folder"], name="yolo", exist_ok=True,
        device="cpu",
    )  # fmt: skip
    found = []
    for image in asked["test"]:
        boxes = model.predict(image, imgsz=asked["size"], conf=CONFIDENCE, verbose=False)[0].boxes
        found.append([boxes.xyxy.tolist(), boxes.conf.tolist(), boxes.cls.int().tolist()])
    Path(asked["found"]).write_text(json.dumps(found))


def train_detectron2(request: str) -> None:
    """Train and predict in an interpreter that has Detectron2, or a checkout that detkit knows; boxes go to a file."""
    asked = json.loads(request)
    import torch

    from detkit_detectron2 import sources

    sources.load()
    from detectron2.config import get_cfg
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.data.detection_utils import read_image
    from detectron2.engine import DefaultPredictor, DefaultTrainer

    torch.set_num_threads(asked["threads"])
    register_coco_instances("peer", {}, asked["data"], str(Path(asked["data"]).with_name("images")))
    records = DatasetCatalog.get("peer")
    num_classes = len(MetadataCatalog.get("peer").thing_classes)
    cfg = get_cfg()
    cfg.merge_from_file(asked["model"])
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("peer",), ()
    cfg.DATALOADER.NUM_WORKERS, cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = 0, False
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TEST = (asked["size"],), asked["size"]
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.RESNETS.NORM = "cpu", "", 0, "BN"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = cfg.MODEL.RETINANET.SCORE_THRESH_TEST = CONFIDENCE
    cfg.SOLVER.IMS_PER_BATCH, cfg.SEED, cfg.OUTPUT_DIR = 16, 0, asked["folder"]
    # Its schedule of three parts takes no fewer steps than 9.
    cfg.SOLVER.MAX_ITER = steps = max(9, asked["epochs"] * len(records) // 16)
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.STEPS = steps // 10, (steps * 2 // 3, steps * 8 // 9)
    cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True
    trainer = DefaultTrainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    cfg.MODEL.WEIGHTS = str(Path(asked["folder"], "model_final.pth"))
    predict = DefaultPredictor(cfg)
    found = []
    for image in asked["test"]:
        instances = predict(read_image(image, "BGR"))["instances"]
        found.append([instances.pred_boxes.tensor.tolist(), instances.scores.tolist(), instances.pred_classes.tolist()])
    Path(asked["found"]).write_text(json.dumps(found))


PEERS = {"ultralytics": train_yolo, "detectron2": train_detectron2}


def cpu_seconds(do: Callable[[], object]) -> float:
    """Return the CPU seconds of what this process and those that it starts do."""
    whose = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)

    def spent() -> float:
        return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, whose))

    before = spent()
    do()
    return spent() - before


def within(budget: float, train: Callable[[int], object]) -> tuple[int, float, float]:
    """Train as many epochs as the budget allows, one at least; returns them, CPU seconds of an epoch, and of all."""
    one = cpu_seconds(lambda: train(1))
    if one > budget / 2:
        return 1, one, one
    epoch = max(1e-3, (cpu_seconds(lambda: train(3)) - one) / 2)
    epochs = max(1, round((budget - (one - epoch)) / epoch))
    return epochs, epoch, cpu_seconds(lambda: train(epochs))


def main() -> None:
    import detkit
    from detkit.shapes import write_shapes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="a data set; 500 drawn pictures where none is named")
    parser.add_argument("--size", type=int, default=160)
    parser.add_argument("--cpu-seconds", type=float, default=100)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", nargs="*", default=["ssd_tiny", "fcos_tiny", "fcos_small"])
    parser.add_argument("--ultralytics", metavar="PYTHON", help="an interpreter that has ultralytics")
    parser.add_argument("--yolo", nargs="*", default=["yolov8n.yaml"])
    parser.add_argument("--detectron2", metavar="PYTHON", help="an interpreter that has detectron2")
    parser.add_argument("--config", nargs="*", default=[], help="configuration files of Detectron2")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        source = args.data or write_shapes(root / "shapes", num_images=500, size=args.size)
        train, test = detkit.read_dataset(source).split(0.8, 0.2, seed=0)
        print(f"{len(train)} images to learn from, {len(test)} to be scored on, {args.size} px, {args.threads} threads")
        print(f"{'model':22} {'epochs':>7} {'epoch':>9} {'CPU in all':>11} {'AP':>7} {'AP50':>7}")

        def tell(name: str, spent: tuple[int, float, float], scores: detkit.Scores) -> None:
            epochs, epoch, whole = spent
            ap, ap50 = scores["AP"], scores["AP50"]
            print(f"{name:22} {epochs:7} {epoch:7.1f} s {whole:9.0f} s {ap:7.3f} {ap50:7.3f}", flush=True)

        for name in args.model:
            trainer = detkit.Trainer(
                model=f"torchvision/{name}", image_size=args.size, device="cpu", threads=args.threads,
                validate_every="1000 epochs", checkpoint_every="1000 epochs",
            )  # fmt: skip
            runs: list[detkit.Run] = []

            def fit(epochs: int, trainer: detkit.Trainer = trainer, runs: list[detkit.Run] = runs) -> None:
                folder = tempfile.mkdtemp(dir=root)
                runs.append(trainer.fit(train, test, epochs=epochs, name=folder, quiet=True))

            spent = within(args.cpu_seconds, fit)
            tell(name, spent, detkit.evaluate(runs[-1], test, allow_seen=True))
        if args.ultralytics:
            data = write_yolo(train, test, root / "yolo")
            for model in args.yolo:
                spent, scores = measure_peer(args, "ultralytics", model, data, test)
                tell(model.removesuffix(".yaml"), spent, scores)
        if args.detectron2:
            data = detkit.write_dataset(train, root / "coco", "coco") / "annotations.json"
            for model in args.config:
                spent, scores = measure_peer(args, "detectron2", model, data, test)
                tell(Path(model).stem, spent, scores)


def write_yolo(train, test, folder: Path) -> Path:  # type: ignore[no-untyped-def]
    """Write both parts as YOLO's data set and return its ``data.yaml``."""
    import detkit

    places = {
        name: next(Path(detkit.write_dataset(data, folder / name, "yolo")).rglob("images"))
        for name, data in (("train", train), ("val", test))
    }
    names = dict(enumerate(train.classes))
    file = folder / "data.yaml"
    file.write_text(json.dumps({"path": str(folder), **{n: str(p) for n, p in places.items()}, "names": names}))
    return file


def measure_peer(args, peer: str, model: str, data: Path, test):  # type: ignore[no-untyped-def]
    """Train a peer's model within the budget; returns what it spent and its scores."""
    import detkit

    folder = Path(tempfile.mkdtemp(dir=data.parent))
    found = folder / "found.json"

    def fit(epochs: int) -> None:
        request = {
            "model": model, "data": str(data), "epochs": epochs, "size": args.size, "threads": args.threads,
            "folder": str(folder), "test": list(test.paths), "found": str(found),
        }  # fmt: skip
        command: Sequence[str] = [getattr(args, peer), __file__, "--peer", peer, json.dumps(request)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])

    spent = within(args.cpu_seconds, fit)
    detections = [
        detkit.Detections.from_arrays(
            *arrays, classes=test.classes, path=sample.path, width=sample.width, height=sample.height
        )
        for arrays, sample in zip(json.loads(found.read_text()), test, strict=True)
    ]
    return spent, detkit.evaluate(detections, test)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peer"]:
        PEERS[sys.argv[2]](sys.argv[3])
    else:
        main()
