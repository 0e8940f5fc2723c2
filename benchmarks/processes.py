"""Images per second of one, two ... processes on the CPU, a thread each, that train one model together.

Whole runs, started by torchrun where there are several, in turn (1 2 1 2 ...), so that a busy machine slows all. The
number of a run is the median of its progress events after the first epoch, which fills the cache, and every batch is
full; what is quoted is the ratio of medians to one process, and the seconds that more processes do not share.

    python benchmarks/processes.py [--model ssdlite320_mobilenet_v3_large] [--processes 1 2] [--rounds 3]
        [--batch-per-process 16] [--steps 30] [--compress none]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import detkit
from detkit.runs import Run
from detkit.shapes import write_shapes


def images_per_second(run: Run) -> float:
    """Return the median rate after the first epoch."""
    rates = [
        float(event.values["images_per_s"])
        for event in run.events(follow=False)
        if event.kind == "progress" and (event.epoch or 0) > 1
    ]
    return statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="ssdlite320_mobilenet_v3_large")
    parser.add_argument("--size", type=int, default=320)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-per-process", type=int, default=16)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compress", default="none", choices=("none", "bf16", "fp16"))
    args = parser.parse_args()
    rates: dict[int, list[float]] = {count: [] for count in args.processes}
    fixed: dict[int, list[float]] = {count: [] for count in args.processes}
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        most = args.batch_per_process * max(args.processes)
        # Both parts are given, or some of the images would be kept for scoring, and each epoch end in a small batch.
        train = detkit.read_dataset(write_shapes(root / "train", num_images=2 * most, size=args.size))
        val = detkit.read_dataset(write_shapes(root / "val", num_images=2, size=args.size, seed=1))
        for number in range(args.rounds):
            for count in args.processes:
                trainer = detkit.Trainer(
                    model=f"torchvision/{args.model}", image_size=args.size, weights=None, device="cpu", threads=1
                )
                run = trainer.fit(
                    train,
                    val,
                    iterations=args.steps,
                    batch_size=args.batch_per_process * count,
                    processes=count,
                    compress_gradients=args.compress,
                    checkpoint_every="1000 epochs",
                    validate_every="1000 epochs",
                    name=str(root / f"{count}-{number}"),
                    quiet=True,
                )
                rates[count].append(images_per_second(run))
                fixed[count].append(run.model.manifest.timings["not_scaling"])
    one = statistics.median(rates[args.processes[0]])
    print(f"{args.model}, {args.size} pixels, {args.batch_per_process} images a process and step, a thread each")
    print(f"{'processes':>9} {'img/s':>8} {'ratio':>7} {'not shared':>12}")
    for count in args.processes:
        rate = statistics.median(rates[count])
        print(f"{count:9} {rate:8.1f} {rate / one:6.2f}x {statistics.median(fixed[count]):10.1f} s")


if __name__ == "__main__":
    main()
