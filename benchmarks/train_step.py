"""Images per second of detkit's training against a plain torchvision loop: same network, batch, input size, float32.

The plain loop is that of torchvision's detection references: decode with Pillow, convert to float, flip, let the
network's own transform resize and normalise each image, step. Both train in this process in turn, a few steps each
(A B A B ...), so that a busy machine slows both; what is quoted is the ratio of medians. The start-up row is the
wall time from `fit()` to the first optimizer step in the worker.

    python benchmarks/train_step.py [--model ssd_tiny ...] [--rounds 6]
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from msgspec import to_builtins
from msgspec.structs import replace
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2 import functional as F

import detkit
from detkit.data import Dataset
from detkit.formats.checks import prepare
from detkit.job import Job, Workspace
from detkit.shapes import write_shapes
from detkit_torchvision.devices import keep_freed_memory
from detkit_torchvision.models import MODELS, build
from detkit_torchvision.params import MODELS as SPECS
from detkit_torchvision.params import TorchvisionOptions
from detkit_torchvision.training import Training

CASES = {
    "ssd_tiny": (160, 8),
    "fcos_small": (160, 8),
    "ssdlite320_mobilenet_v3_large": (320, 8),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (320, 4),
}
"""Input size and batch of each measured model."""


class Loader(torch.utils.data.Dataset):
    """What the references do for one image."""

    def __init__(self, data: Dataset, label_offset: int) -> None:
        self.data, self.label_offset = data, label_offset

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int):
        sample = self.data[index]
        image = F.to_dtype(F.pil_to_tensor(Image.open(sample.path).convert("RGB")), torch.float32, scale=True)
        boxes = torch.from_numpy(sample.boxes.copy()).float()
        if np.random.random() < 0.5:
            image = F.horizontal_flip(image)
            boxes = boxes[:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1]) + torch.tensor([1, 0, 1, 0]) * sample.width
        labels = torch.tensor([self.data.classes.index(name) + self.label_offset for name in sample.names])
        return image, {"boxes": boxes, "labels": labels}


def plain_steps(data: Dataset, model: str, size: int, batch: int) -> Iterator[int]:
    """Yield after each step of the plain loop."""
    spec = MODELS[model]
    network = build(model, len(data.classes), image_size=size)
    longest = size if spec.max_ratio is None else round(size * spec.max_ratio)
    fixed = {"fixed_size": (size, size)} if spec.max_ratio is None else {}
    network.transform = GeneralizedRCNNTransform(size, longest, list(spec.mean), list(spec.std), **fixed)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    loader = torch.utils.data.DataLoader(
        Loader(data, spec.label_offset),
        batch,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: tuple(zip(*rows, strict=True)),
    )
    network.train()
    for step, (images, targets) in enumerate(itertools.chain.from_iterable(itertools.repeat(loader))):
        total = sum(network(images, targets).values())
        if not math.isfinite(total.item()):
            raise SystemExit("the plain loop diverged")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        yield step


def detkit_steps(data: Dataset, model: str, size: int, batch: int, folder: Path) -> Iterator[int]:
    """Yield after each step of what the worker runs, with its logging and checkpoints."""
    params = replace(
        SPECS[model].params, batch_size=batch, image_size=size, iterations=10**6, epochs=None, weights=None,
        learning_rate=1e-3, optimizer="sgd", max_detections=100,
    )  # fmt: skip
    job = Job(
        backend="torchvision",
        engine="",
        model=model,
        params=to_builtins(params),
        options=to_builtins(TorchvisionOptions()),
        classes=list(data.classes),
    )
    workspace = Workspace(folder)
    workspace.create(job)
    prepared = prepare(data, on_invalid="raise")
    workspace.write_dataset("train", prepared.data, prepared.image_digests)
    training = Training(job, workspace)
    training.prepare()
    yield from training.steps()


def measure(steps: Iterator[int], count: int) -> tuple[float, float]:
    """Return CPU and wall seconds of the next steps."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(count):
        next(steps)
    return time.process_time() - cpu, time.perf_counter() - wall


def seconds_to_first_step(data: Dataset, folder: Path) -> float:
    """Return the wall time from `fit()` to the first step that the worker reports."""
    started = time.time()
    run = detkit.Trainer(model="torchvision/ssd_tiny", iterations=10, name=str(folder)).fit(data, quiet=True)
    return next(event.t for event in run.events(follow=False) if event.step) - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=CASES)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--images", type=int, default=200)
    args = parser.parse_args()
    keep_freed_memory()  # the plain loop profits, too: the ratio is on the safe side
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        data = detkit.read_dataset(write_shapes(root / "shapes", num_images=args.images, size=320))
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {args.images} JPEGs of 320x320")
        print(f"{'model':40} {'batch':>5} {'plain img/s':>12} {'detkit img/s':>13} {'wall':>11} {'CPU':>10}")
        for model in args.model or CASES:
            size, batch = CASES[model]
            plain = plain_steps(data, model, size, batch)
            ours = detkit_steps(data, model, size, batch, root / model)
            per_round = max(2, 48 // batch)
            measure(plain, 2), measure(ours, math.ceil(len(data) / batch))  # warm-up: the first epoch fills the cache
            rounds = [(measure(plain, per_round), measure(ours, per_round)) for _ in range(args.rounds)]
            (plain_cpu, plain_wall), (our_cpu, our_wall) = (
                tuple(statistics.median(side) for side in zip(*(r[i] for r in rounds), strict=True)) for i in (0, 1)
            )
            count = per_round * batch
            print(
                f"{model:40} {batch:5} {count / plain_wall:12.1f} {count / our_wall:13.1f} "
                f"{plain_wall / our_wall:10.2f}x {plain_cpu / our_cpu:9.2f}x",
                flush=True,
            )
        print(f"fit() to the first step, ssd_tiny: {seconds_to_first_step(data, root / 'start'):.1f} s")


if __name__ == "__main__":
    main()
