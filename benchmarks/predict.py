"""Milliseconds per image of prediction: what `Predictor` adds to a model, and what an export saves.

Every row does the same images in this process, in turn (A B A B ...), so that a busy machine slows all; what is quoted
is the median over the rounds, and the median over the rounds of the ratio to the first row.

    engine     the model's own detector, handed batches of decoded images: nothing of ours around it
    Predictor  `Predictor` on the same arrays
    files      `Predictor` on the images' files, decoding included: what a user waits for, images in, `Detections` out
    onnx       the same with the model exported to ONNX, in ONNX Runtime
    openvino   the same export in OpenVINO, where that is installed
    bf16       in OpenVINO again, computed in bf16, where the CPU does that
    int8       the same with the model in eight bits; only with ``--calibrate``

    python benchmarks/predict.py MODEL DATA [--calibrate DATA] [--batch 8] [--images 64] [--rounds 9]

MODEL is a run, or a model's folder, whose framework this interpreter has. The number of threads of torch and of ONNX
Runtime is ``OMP_NUM_THREADS``. AP is that on DATA, which no model may have seen.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import detkit
from detkit.backends import PredictOptions, load_engine
from detkit.data import Dataset
from detkit.images import read_image
from detkit.predictor import Predictor, find_model
from detkit.verification import spread

GOAL_SHARE = 0.03
"""What `Predictor` may add to the engine."""
SCORE_THRESHOLD = 0.25


class Took(NamedTuple):
    cpu: float
    wall: float


def timed(work: Callable[[], object]) -> Took:
    """Return the seconds that some work takes; CPU time is that of all threads of this process."""
    cpu, wall = time.process_time(), time.perf_counter()
    work()
    return Took(time.process_time() - cpu, time.perf_counter() - wall)


def exports(model: str, data: str, calibrate: str | None, folder: Path) -> dict[str, Path]:
    """Write the exports, verified."""
    found = {"onnx": detkit.export(model, "onnx", folder / "onnx", verify=data).parent}
    if calibrate is not None:
        int8 = detkit.export(
            found["onnx"], "onnx-int8", folder / "int8", verify=data, calibrate=calibrate, max_ap_drop=0.05
        )
        found["int8"] = int8.parent
    return found


def openvino_devices() -> dict[str, str]:
    """Return the devices that OpenVINO has here, by the names of their rows."""
    try:
        from openvino import Core
    except ImportError:
        return {}
    half = {"bf16": "openvino:bf16"} if "BF16" in Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES") else {}
    return {"openvino": "openvino", **half}


def average_precision(model: Path, device: str, data: Dataset) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(detkit.evaluate(model, data, device=device)["AP"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--calibrate", metavar="DATA")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    original, data = find_model(args.model), detkit.read_dataset(args.data)
    paths = spread(data, args.images).paths
    images = [read_image(path) for path in paths]
    batches = [images[i : i + args.batch] for i in range(0, len(images), args.batch)]
    with tempfile.TemporaryDirectory() as temporary:
        models = {"files": original.path, **exports(args.model, args.data, args.calibrate, Path(temporary))}
        devices = openvino_devices()
        models |= dict.fromkeys(devices, models["onnx"])
        options = PredictOptions(score_threshold=SCORE_THRESHOLD, max_detections=original.manifest.max_detections)
        engine = load_engine(original.manifest.engine).load(original, options)
        opened = {
            name: Predictor(
                model, score_threshold=SCORE_THRESHOLD, batch_size=args.batch, device=devices.get(name, "auto")
            )
            for name, model in models.items()
        }
        rows: dict[str, Callable[[], object]] = {
            "engine": lambda: [engine.detect(batch) for batch in batches],
            "Predictor": lambda: list(opened["files"].predict(images)),
            **{name: (lambda one=one: list(one.predict(paths))) for name, one in opened.items()},
        }
        for work in rows.values():
            work()
        rounds = [{name: timed(work) for name, work in rows.items()} for _ in range(args.rounds)]
        ap = {name: average_precision(model, devices.get(name, "auto"), data) for name, model in models.items()}
    print(f"{original.name}, {len(images)} images, {args.batch} at a time, {args.rounds} rounds")
    print(f"{'':10} {'CPU ms/img':>10} {'wall ms/img':>11} {'CPU ratio':>9} {'wall ratio':>10} {'AP':>7}")
    added: list[float] = []
    for name in rows:
        cpu, wall = (1e3 * statistics.median(one[name][k] for one in rounds) / len(images) for k in (0, 1))
        base = "engine" if name == "Predictor" else "files"  # each beside what does the same work
        ratios = [statistics.median(one[name][k] / one[base][k] for one in rounds) for k in (0, 1)]
        if name == "Predictor":
            added = [ratio - 1 for ratio in ratios]
        shown = ["", ""] if name in {"engine", "files"} else [f"{ratio:.3f}" for ratio in ratios]
        print(
            f"{name:10} {cpu:10.2f} {wall:11.2f} {shown[0]:>9} {shown[1]:>10} "
            + (f"{ap[name]:7.4f}" if name in ap else "")
        )
    print(f"Predictor adds {added[0]:+.1%} of CPU and {added[1]:+.1%} of wall time; the goal is {GOAL_SHARE:.0%}")


if __name__ == "__main__":
    main()
