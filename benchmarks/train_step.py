"""Images per second of detkit's training against a plain torchvision loop that does the same work.

The plain loop is that of torchvision's detection references: decode with Pillow, convert to float, flip, let the
network's own transform resize and normalise each image, step. detkit's is what its worker runs, logging and checkpoints
included, with the same network, batch, input size, flips and optimizer. Each has a process of its own, and they take a
few steps in turn (A B A B ...), so that a busy machine slows both; what is quoted is the ratio of medians of wall time,
and of processor time over all threads. Memory is the most that a process ever had, torch itself included.

    python benchmarks/train_step.py [--model ssd_tiny ...] [--heavy] [--amp bf16 [--ap 20]] [--compile] [--switches]
        [--rounds 6]
    python benchmarks/train_step.py --model retinanet_resnet50_fpn_v2 --rounds 0 --amp bf16 --ap 6 --ap-size 160

``--amp bf16`` measures both loops in bf16 too; ``--switches`` measures what each thing that detkit does is worth, and
what the model's own augmentations, clipping and average cost.
``--device cuda`` takes the steps of both on a GPU; ``--compile`` then measures CUDA graphs, too. ``--profile`` says on
which of torch's operations detkit's step spends its time.
Processors that others use make two threads wait for each other: there, measure with OMP_NUM_THREADS=1.
"""

from __future__ import annotations

import argparse
import itertools
import math
import multiprocessing
import os
import resource
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from msgspec import to_builtins
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.transforms.v2 import functional as F

import detkit
from detkit.checkpoints import STEP
from detkit.data import Dataset
from detkit.formats.checks import prepare
from detkit.job import Job, Workspace
from detkit.processes import for_speed
from detkit.ranks import Place
from detkit.shapes import write_shapes
from detkit_torchvision import batches
from detkit_torchvision.devices import CHANNELS_LAST, CONTIGUOUS, keep_freed_memory
from detkit_torchvision.distributed import device_of, join
from detkit_torchvision.models import MODELS, build
from detkit_torchvision.params import MODELS as SPECS
from detkit_torchvision.params import TorchvisionOptions
from detkit_torchvision.probing import Way
from detkit_torchvision.training import AMP_DTYPES, Training

CASES = {
    "ssd_tiny": (160, 8),
    "fcos_small": (160, 8),
    "ssdlite320_mobilenet_v3_large": (320, 16),
    "fasterrcnn_mobilenet_v3_large_320_fpn": (320, 4),
}
"""Input size and batch of each measured model."""

HEAVY = {
    "ssd300_vgg16": (300, 4),
    "fasterrcnn_resnet50_fpn_v2": (320, 2),
    "retinanet_resnet50_fpn_v2": (320, 2),
}


@dataclass(frozen=True)
class Contender:
    """One loop in one process."""

    model: str
    size: int
    batch: int
    plain: bool = False
    amp: str | None = None
    allocator: bool = True
    """Whether freed memory is kept for the next step."""
    layout: str = CHANNELS_LAST
    cache: bool = True
    """Whether decoded images are kept."""
    num_workers: int | str = "auto"
    """Threads that load images."""
    device: str = "cpu"
    compiled: bool | str = False
    """What the option ``compile`` is. Compiling takes a minute or two, which do not count."""
    own_recipe: bool = False
    """Whether images are changed as the model's defaults say, gradients clipped and weights averaged."""
    variables: Mapping[str, str] = field(default_factory=dict)
    """Of the environment, in place of what detkit gives its workers."""
    processes: int = 1
    """That share each batch, and the cores."""

    def environments(self) -> Iterator[None]:
        """For each of its processes: let one that is started meanwhile have the environment of a user's, or of a
        worker of detkit.
        """
        before = dict(os.environ)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for rank in range(self.processes):
            place = {
                "RANK": rank, "WORLD_SIZE": self.processes, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": self.processes,
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "race",
                "TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0,
            }  # fmt: skip
            os.environ.update({name: str(value) for name, value in place.items()} if self.processes > 1 else {})
            os.environ.update({} if self.plain else for_speed({**before, **self.variables}))
            try:
                yield
            finally:
                os.environ.clear()
                os.environ.update(before)


SWITCHES = {
    "memory is given back": {"allocator": False},
    "small pages": {"variables": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}},
    "threads wait long": {"variables": {"GOMP_SPINCOUNT": "300000"}},
    "tensors in planes": {"layout": CONTIGUOUS},
    "images decoded every time": {"cache": False},
    "one thread loads images": {"num_workers": 1},
    "own augmentations, clipping, average": {"own_recipe": True},
    "two processes": {"processes": 2},
}


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


def plain_steps(data: Dataset, one: Contender) -> Iterator[int]:
    """Yield after each step of the plain loop."""
    spec = MODELS[one.model]
    network = build(one.model, len(data.classes), image_size=one.size)
    longest = one.size if spec.max_ratio is None else round(one.size * spec.max_ratio)
    fixed = {"fixed_size": (one.size, one.size)} if spec.max_ratio is None else {}
    network.transform = GeneralizedRCNNTransform(one.size, longest, list(spec.mean), list(spec.std), **fixed)
    network.to(one.device)
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    loader = torch.utils.data.DataLoader(
        Loader(data, spec.label_offset),
        one.batch,
        shuffle=True,
        drop_last=True,
        collate_fn=lambda rows: tuple(zip(*rows, strict=True)),
    )
    network.train()
    for step, (loaded, boxes) in enumerate(itertools.chain.from_iterable(itertools.repeat(loader))):
        images = [image.to(one.device) for image in loaded]
        targets = [{name: value.to(one.device) for name, value in target.items()} for target in boxes]
        with torch.autocast(one.device, AMP_DTYPES.get(one.amp or ""), enabled=one.amp is not None):
            total = sum(value.float() for value in network(images, targets).values())
        if not math.isfinite(total.item()):
            raise SystemExit("the plain loop diverged")
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        yield step


def detkit_steps(data: Dataset, one: Contender, folder: Path) -> Iterator[int]:
    """Yield after each step of what the worker runs, with its logging and checkpoints."""
    params = msgspec.structs.replace(
        SPECS[one.model].params, batch_size=one.batch, image_size=one.size, iterations=10**6, epochs=None, weights=None,
        learning_rate=1e-3, optimizer="sgd", max_detections=100, amp=one.amp,
    )  # fmt: skip
    if not one.own_recipe:
        params = msgspec.structs.replace(params, augmentations=("hflip",), gradient_clip=None, ema_decay=None)
    job = Job(
        backend="torchvision",
        engine="",
        model=one.model,
        params=to_builtins(params),
        options=to_builtins(TorchvisionOptions(num_workers=one.num_workers, compile=one.compiled, device=one.device)),
        classes=list(data.classes),
    )
    if not one.cache:
        batches._CACHE_SHARE = 0.0
    workspace = Workspace(folder)
    workspace.is_silent = Place.here().rank > 0
    workspace.create(job)
    prepared = prepare(data, on_invalid="raise")
    workspace.write_dataset("train", prepared.data, prepared.image_digests)
    if one.layout != CHANNELS_LAST:
        workspace.checkpoints.mkdir(exist_ok=True)
        way = Way(one.layout, torch.get_num_threads(), one.amp)
        (workspace.checkpoints / STEP).write_bytes(msgspec.json.encode(way))
    training = Training(job, workspace, join(device_of(job)))
    training.prepare()
    for index in range(len(data)):
        training.inputs.image(index)  # as the first epoch does
    yield from training.steps()


def work(one: Contender, images: Path, connection: multiprocessing.connection.Connection) -> None:
    """Take steps when told how many; answer with processor and wall seconds, and the peak of memory in bytes."""
    if one.allocator:
        keep_freed_memory()
    data = detkit.read_dataset(images)
    with tempfile.TemporaryDirectory() as folder:
        steps = plain_steps(data, one) if one.plain else detkit_steps(data, one, Path(folder))
        while count := connection.recv():
            cpu, wall = time.process_time(), time.perf_counter()
            for _ in range(count):
                next(steps)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            if one.device != "cpu":
                torch.cuda.synchronize()
                peak = torch.cuda.max_memory_allocated()
            connection.send((time.process_time() - cpu, time.perf_counter() - wall, peak))


@dataclass(frozen=True)
class Measured:
    """Medians of one contender."""

    cpu: float
    """Seconds an image."""
    wall: float
    peak: float
    """Bytes."""


def race(contenders: list[Contender], images: Path, rounds: int) -> list[Measured]:
    """Let several loops take steps in turn."""
    context = multiprocessing.get_context("spawn")
    groups: list[list[multiprocessing.connection.Connection]] = []
    processes = []

    def take(ends: list[multiprocessing.connection.Connection], steps: int) -> tuple[float, float, float]:
        for end in ends:
            end.send(steps)
        cpu, wall, peak = zip(*(end.recv() for end in ends), strict=True)
        return sum(cpu), max(wall), sum(peak)

    try:
        for one in contenders:
            groups.append([])
            for _ in one.environments():
                here, there = context.Pipe()
                processes.append(context.Process(target=work, args=(one, images, there), daemon=True))
                processes[-1].start()
                there.close()
                groups[-1].append(here)
            take(groups[-1], 2)  # the first steps are not counted
        counts = [max(1, 32 // one.batch) for one in contenders]
        taken: list[list[tuple[float, float, float]]] = [[] for _ in contenders]
        for _ in range(rounds):
            for ends, count, times in zip(groups, counts, taken, strict=True):
                times.append(take(ends, count))
        for end in itertools.chain(*groups):
            end.send(0)
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [
        Measured(
            *(statistics.median(one[part] for one in times) / (count * contender.batch) for part in (0, 1)),
            times[-1][2],
        )
        for contender, count, times in zip(contenders, counts, taken, strict=True)
    ]


def compare(name: str, contenders: dict[str, Contender], images: Path, rounds: int) -> None:
    """Print a row for each contender but the first, which the others are compared with."""
    measured = dict(zip(contenders, race(list(contenders.values()), images, rounds), strict=True))
    (first, base), *others = measured.items()
    for label, own in others:
        print(
            f"{name:38} {contenders[label].batch:5} {f'{label} / {first}':44} {base.wall / own.wall:7.2f}x "
            f"{base.cpu / own.cpu:7.2f}x {1000 * base.cpu:9.1f} {1000 * own.cpu:8.1f} "
            f"{base.peak / 1e6:9.0f} {own.peak / 1e6:8.0f}",
            flush=True,
        )


def reached(model: str, amp: str | None, args: argparse.Namespace, folder: Path) -> float:
    """Return the AP on 90 drawn pictures after so many epochs of others, from scratch.

    The recipe is the model's own; that of large ones, which is for fine-tuning, with AdamW at 2e-4.
    """
    size, batch = (CASES | HEAVY)[model]
    size = args.ap_size or size
    recipe = {"optimizer": "adamw", "learning_rate": 2e-4} if model in HEAVY else {}
    parts = {"train": (args.ap_images, 1), "test": (100, 2)}
    train, test = (
        detkit.read_dataset(write_shapes(folder / f"{name}-{size}", num_images=count, size=size, seed=seed))
        for name, (count, seed) in parts.items()
    )
    run = detkit.Trainer(model=f"torchvision/{model}", image_size=size, weights=None, device="cpu").fit(
        train,
        test.take(range(10)),
        epochs=args.ap,
        batch_size=batch,
        amp=amp,
        **recipe,
        name=str(folder / f"{model}-{amp}"),
        quiet=True,
    )
    return float(detkit.evaluate(run, test.take(range(10, 100)))["AP"])


def profile(one: Contender, images: Path) -> str:
    """Return a table of the operations that a few steps spend most of their time on."""
    keep_freed_memory()
    activities = [torch.profiler.ProfilerActivity.CPU]
    if one.device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with tempfile.TemporaryDirectory() as folder:
        steps = detkit_steps(detkit.read_dataset(images), one, Path(folder))
        next(steps), next(steps)
        with torch.profiler.profile(activities=activities) as found:
            for _ in range(4):
                next(steps)
        steps.close()
    table: str = found.key_averages().table(
        sort_by="self_cpu_time_total" if one.device == "cpu" else "self_cuda_time_total",
        row_limit=25,
        max_name_column_width=48,
    )
    return table


def seconds_to_first_step(data: Dataset, folder: Path) -> float:
    """Return the wall time from `fit()` to the first step that the worker reports."""
    started = time.time()
    run = detkit.Trainer(model="torchvision/ssd_tiny", iterations=10, name=str(folder)).fit(data, quiet=True)
    return next(event.t for event in run.events(follow=False) if event.step) - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=CASES | HEAVY)
    parser.add_argument("--heavy", action="store_true", help="the large models too")
    parser.add_argument("--amp", choices=["bf16"], help="rows in half precision too")
    parser.add_argument("--ap", type=int, metavar="EPOCHS", help="with --amp: the AP after so many epochs, both ways")
    parser.add_argument("--ap-images", type=int, default=400, help="that are learned from for --ap")
    parser.add_argument("--ap-size", type=int, help="input size for --ap, instead of each model's")
    parser.add_argument("--compile", action="store_true", help="rows with a compiled backbone, too")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--profile", action="store_true", help="where detkit's step spends its time, too")
    parser.add_argument("--switches", action="store_true", help="rows for what each switch is worth")
    parser.add_argument("--batch", type=int, help="instead of each model's")
    parser.add_argument("--rounds", type=int, default=6, help="0: no times, only --ap and --profile")
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--image-size", type=int, default=320, help="of the JPEGs")
    parser.add_argument("--first-step", action="store_true", help="seconds from fit() to the first step, too")
    args = parser.parse_args()
    cases = CASES | (HEAVY if args.heavy or args.model else {})
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        images = write_shapes(root / "shapes", num_images=args.images, size=args.image_size)
        print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, JPEGs of {args.image_size} pixels")
        print(
            f"{'model':38} {'batch':>5} {'compared':44} {'wall':>8} {'CPU':>8} {'CPU ms':>9} {'an image':>8} "
            f"{'MB':>9} {'':>8}"
        )
        for model in args.model or cases:
            size, batch = cases[model]
            ours = Contender(model, size, args.batch or batch, device=args.device)
            plain = replace(ours, plain=True, allocator=False)
            contenders = {"plain": plain, "detkit": ours}
            if args.compile:
                contenders["detkit compiled"] = replace(ours, compiled=True)
                if args.device == "cuda":
                    contenders["detkit graphs"] = replace(ours, compiled="graphs")
            if args.amp:
                contenders |= {"detkit bf16": replace(ours, amp=args.amp), "plain bf16": replace(plain, amp=args.amp)}
            if args.rounds:
                compare(model, contenders, images, args.rounds)
            if args.rounds and args.amp:
                pair = {"plain bf16": contenders["plain bf16"], "detkit bf16": contenders["detkit bf16"]}
                compare(model, pair, images, args.rounds)
            if args.amp and args.ap:
                both = [reached(model, amp, args, root) for amp in (None, args.amp)]
                told = f"AP after {args.ap} epochs of {args.ap_images} images at {args.ap_size or size} pixels"
                print(f"{model:38} {told}: float32 {both[0]:.3f}, {args.amp} {both[1]:.3f}", flush=True)
            if args.rounds and args.switches:
                others = {label: replace(ours, **change) for label, change in SWITCHES.items()}
                if args.device != "cpu":
                    del others["two processes"]
                others["plain, memory kept"] = replace(plain, allocator=True)
                compare(model, {"detkit": ours, **others}, images, args.rounds)
            if args.profile:
                print(profile(ours, images))
        if args.first_step:
            seconds = seconds_to_first_step(detkit.read_dataset(images), root / "start")
            print(f"fit() to the first step, ssd_tiny: {seconds:.1f} s")


if __name__ == "__main__":
    main()
