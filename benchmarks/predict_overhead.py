"""What a worker process costs prediction: milliseconds per image above the same detector in its own interpreter.

Both open the model and predict the same batches in turn (A B A B ...), so that a busy machine slows both: the worker,
as `Predictor(isolate=True)` and every foreign backend use it, and a plain loop of `Detector.detect` in a process of the
interpreter that has the model's framework. What is quoted is the median over the rounds of their difference, and of
their ratio.

    python benchmarks/predict_overhead.py MODEL [--size 640x480 ...] [--batch 8] [--rounds 12] [--python PYTHON]

MODEL is a run, or a model's folder.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import numpy as np

from detkit.backends import Detector, LocalBackend, PredictOptions, load_engine
from detkit.environments import worker_variables
from detkit.images import Image
from detkit.job import Model
from detkit.processes import WorkerDetector

SIZES = ("300x300", "640x480", "1920x1080")
GOAL_MS, GOAL_SHARE = 1.0, 0.05
OPTIONS = PredictOptions(score_threshold=0.25, max_detections=100)


def pictures(size: str, count: int) -> list[Image]:
    """Return a batch of noise, the same in every process."""
    width, height = map(int, size.split("x"))
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(count)]


def seconds(detector: Detector, batch: Sequence[Image], times: int) -> float:
    """Return the wall time of predicting a batch so many times."""
    started = time.perf_counter()
    for _ in range(times):
        detector.detect(batch)
    return time.perf_counter() - started


def answer_directly(path: str) -> None:
    """Open a model in this interpreter and measure it as the lines of standard input say."""
    model = Model(path)
    detector = load_engine(model.manifest.engine).load(model, OPTIONS)
    batches: dict[tuple[str, int], list[Image]] = {}
    for line in sys.stdin:
        size, count, times = line.split()
        key = (size, int(count))
        batches[key] = batches.get(key) or pictures(*key)
        print("seconds", seconds(detector, batches[key], int(times)), flush=True)


def direct(python: str, model: Model) -> tuple[subprocess.Popen[str], Callable[[str, int, int], float]]:
    """Start `answer_directly` in an interpreter; returns its process and what asks it."""
    process = subprocess.Popen(
        [python, __file__, "--direct", str(model.path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=worker_variables(python),
    )  # fmt: skip

    def ask(size: str, count: int, times: int) -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        print(size, count, times, file=process.stdin, flush=True)
        for line in process.stdout:  # frameworks print, too
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise SystemExit(f"{python} could not predict with {model.path}")

    return process, ask


def main() -> None:
    from detkit import plugins
    from detkit.predictor import find_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--size", action="append", metavar="WIDTHxHEIGHT")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--python", help="the interpreter of the model's framework; the backend's own where not given")
    args = parser.parse_args()
    model = find_model(args.model)
    backend = plugins.backend(model.manifest.backend)
    python = args.python or (backend.interpreter(None) if isinstance(backend, LocalBackend) else sys.executable)
    process, directly = direct(python, model)
    worker = WorkerDetector(python, model, OPTIONS)
    try:
        print(f"{model.name} in {python}, batches of {args.batch}, medians of {args.rounds} rounds")
        print(f"{'size':>10} {'direct ms/image':>16} {'worker ms/image':>16} {'overhead':>11} {'ratio':>7}")
        for size in args.size or SIZES:
            batch = pictures(size, args.batch)
            directly(size, args.batch, 1), seconds(worker, batch, 1)  # warm-up
            times = max(1, round(0.3 / directly(size, args.batch, 1)))
            rounds = [(directly(size, args.batch, times), seconds(worker, batch, times)) for _ in range(args.rounds)]
            scale = 1000 / (times * args.batch)
            alone, isolated = (statistics.median(side) * scale for side in zip(*rounds, strict=True))
            overhead = statistics.median(b - a for a, b in rounds) * scale
            ratio = statistics.median(b / a for a, b in rounds)
            goal = "" if overhead <= max(GOAL_MS, GOAL_SHARE * alone) else "   above the goal"
            print(f"{size:>10} {alone:16.2f} {isolated:16.2f} {overhead:+8.2f} ms {ratio:6.3f}x{goal}", flush=True)
    finally:
        worker.close()
        process.kill()
        process.communicate()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--direct"]:
        answer_directly(sys.argv[2])
    else:
        main()
