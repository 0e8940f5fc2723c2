"""What scoring detections costs, against the packages one would use instead.

    python benchmarks/evaluation.py [--quick] [--rounds 3] [--cases coco dense] [--with-pycocotools]
                                    [--folder /fast/disk]

Two sets are drawn: one like COCO's validation images (5,000 images, 36,000 objects of 80 classes, one in a hundred a
crowd, 100 detections each, equal scores among them) and one of shelves like SKU-110K's (500 images of 147 objects, one
class, 300 detections each, limits 1, 10 and 300). Everybody gets the same columns, peers as the records that a JSON
file would give them; drawing and reading them is not counted. Each then does all its work up to the twelve numbers:
indexing, matching, accumulating. "hotcoco" is the engine alone; "detkit" begins with `Detections` and ends with the
numbers, the protocol, the row of each class, the best threshold and the curves; "detkit, all" adds Pascal VOC's
numbers, confusions, error types and warnings; "detkit, bootstrap" is what 1,000 replicates cost after that.

pycocotools takes minutes for each set, so it runs once, and only where ``--with-pycocotools`` asks for it. Each
measurement has a process of its own, and all tools take turns, so that a busy machine slows all of them. CPU seconds
are those of the process and its children; medians of the rounds are shown. Ratios are those of CPU and, after the
stroke, of wall time to the engine alone and to pycocotools. Memory is the peak of the whole process, with its input.
``AP`` is the mean over the arrays at the greatest limit.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

CASES = {
    "coco": {"images": 5000, "objects": 7.2, "classes": 80, "found": 100, "crowd": 0.01, "limits": [1, 10, 100]},
    "dense": {"images": 500, "objects": 147, "classes": 1, "found": 300, "crowd": 0.0, "limits": [1, 10, 300]},
}
TOOLS = {
    "pycocotools": "pycocotools",
    "faster-coco-eval": "faster_coco_eval",
    "hotcoco": "hotcoco",
    "detkit": "detkit",
    "detkit, all": "detkit",
    "detkit, bootstrap": "detkit",
}
"""Each with the package that it needs."""

SIDE = 640
REPLICATES = 1000


# --- data ---------------------------------------------------------------------------------------------------------


def write_data(file: Path, case: str, share: int) -> None:
    """Draw objects, detections near them and detections beside them; columns go into one file."""
    wanted = CASES[case]
    rng = np.random.default_rng(0)
    images, classes, per_image = wanted["images"] // share, wanted["classes"], wanted["found"]
    dense = classes == 1
    number = int(images * wanted["objects"])
    counts = np.full(images, number // images) if dense else np.bincount(rng.integers(0, images, number))
    counts = np.pad(counts, (0, images - len(counts)))
    number = int(counts.sum())
    least, greatest = (20, 50) if dense else (8, 300)
    boxes, labels = draw_boxes(rng, number, least, greatest), rng.integers(0, classes, number)
    # Every object is looked at a few times, and what is left of the list is noise of low scores.
    rows, offsets = images * per_image, np.concatenate([[0], np.cumsum(counts)])
    image = np.repeat(np.arange(images), per_image)
    pick = offsets[image] + (rng.random(rows) * counts[image]).astype(np.int64)
    pick = np.minimum(pick, number - 1)
    noise = (rng.random(rows) > np.minimum(1, 2 * counts[image] / per_image)) | (counts[image] == 0)
    sides = np.tile(boxes[pick, 2:] - boxes[pick, :2], 2)
    near = boxes[pick] + rng.normal(0, 0.08, (rows, 4)) * sides
    found = np.where(noise[:, None], draw_boxes(rng, rows, least, greatest), near)
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    wrong = noise | (rng.random(rows) < 0.15)
    found_labels = np.where(wrong, rng.integers(0, classes, rows), labels[pick])
    scores = np.round(np.where(noise, rng.beta(1, 6, rows), rng.beta(3, 2, rows)), 3)  # 1,001 scores: many are equal
    order = np.lexsort((-scores, image))
    np.savez(
        file,
        offsets=offsets,
        boxes=boxes,
        labels=labels,
        crowd=rng.random(number) < wanted["crowd"],
        found_boxes=found[order],
        found_labels=found_labels[order],
        scores=scores[order],
    )


def draw_boxes(rng: np.random.Generator, count: int, least: float, greatest: float) -> np.ndarray:
    size = np.exp(rng.uniform(np.log(least), np.log(greatest), (count, 2)))
    low = rng.uniform(0, SIDE - size)
    return np.round(np.concatenate([low, low + size], axis=1), 2)


class Columns:
    """One case, as every tool gets it."""

    def __init__(self, root: Path, case: str) -> None:
        with np.load(root / f"{case}.npz") as arrays:
            for name, column in arrays.items():
                setattr(self, name, column)
        self.limits, self.per_image = CASES[case]["limits"], CASES[case]["found"]
        self.images, self.classes = len(self.offsets) - 1, [f"class {i:02}" for i in range(CASES[case]["classes"])]
        self.image_of_box = np.repeat(np.arange(self.images), np.diff(self.offsets))
        self.image_of_found = np.repeat(np.arange(self.images), self.per_image)
        self.sizes = self.boxes[:, 2:] - self.boxes[:, :2]

    def records(self) -> tuple[dict, list[dict]]:
        """Return the contents of the two COCO files."""
        columns = (self.image_of_box, self.labels, self.boxes[:, :2], self.sizes, self.crowd)
        objects = [
            {
                "id": i,
                "image_id": image + 1,
                "category_id": label + 1,
                "bbox": [*low, *size],
                "area": size[0] * size[1],
                "iscrowd": int(crowd),
            }
            for i, (image, label, low, size, crowd) in enumerate(
                zip(*(column.tolist() for column in columns), strict=True), start=1
            )
        ]
        truth = {
            "images": [{"id": i + 1, "width": SIDE, "height": SIDE} for i in range(self.images)],
            "annotations": objects,
            "categories": [{"id": k + 1, "name": name} for k, name in enumerate(self.classes)],
        }
        sizes = self.found_boxes[:, 2:] - self.found_boxes[:, :2]
        columns = (self.image_of_found, self.found_labels, self.found_boxes[:, :2], sizes, self.scores)
        found = [
            {"image_id": image + 1, "category_id": label + 1, "bbox": [*low, *size], "score": score}
            for image, label, low, size, score in zip(*(column.tolist() for column in columns), strict=True)
        ]
        return truth, found

    def detkit(self) -> tuple[object, list]:
        """Return a `Dataset` and the `Detections` of each image."""
        from detkit.data import Dataset
        from detkit.detections import Detections

        number, names = len(self.boxes), tuple(f"{i:06}.jpg" for i in range(self.images))
        data = Dataset(
            classes=tuple(self.classes),
            image_ids=names,
            paths=names,
            sizes=np.full((self.images, 2), SIDE),
            offsets=self.offsets,
            boxes=self.boxes,
            labels=self.labels,
            difficult=np.zeros(number, dtype=bool),
            crowd=self.crowd,
            area=self.sizes.prod(axis=1),
            records=np.arange(number),
            sources=("",) * self.images,
        )
        found = []
        for i, name in enumerate(names):
            rows = slice(i * self.per_image, (i + 1) * self.per_image)
            found.append(
                Detections(
                    path=name,
                    width=SIDE,
                    height=SIDE,
                    classes=data.classes,
                    boxes=self.found_boxes[rows].copy(),
                    labels=self.found_labels[rows].copy(),
                    scores=self.scores[rows].copy(),
                )
            )
        return data, found


# --- one measurement, in a process of its own ---------------------------------------------------------------------


def cpu_seconds() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def peak_mb() -> float:
    """Return the most memory of this process; what ``getrusage`` tells begins with that of its parent."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts in bytes


def measure(tool: str, case: str, root: Path) -> dict[str, float]:
    columns = Columns(root, case)
    work = globals()[tool.partition(",")[0].replace("-", "_")](columns, tool)
    del columns
    cpu, wall = cpu_seconds(), time.perf_counter()
    ap = work()
    return {"cpu": cpu_seconds() - cpu, "wall": time.perf_counter() - wall, "peak": peak_mb(), "ap": ap}


def mean_precision(precision: np.ndarray) -> float:
    """Return AP at the greatest limit; pycocotools itself prints -1 where that is not 100."""
    measured = precision[:, :, :, 0, -1]
    return float(measured[measured > -1].mean())


def pycocotools(columns: Columns, _: str):
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    (truth, found), limits = columns.records(), columns.limits

    def work() -> float:
        with contextlib.redirect_stdout(None):
            objects = COCO()
            objects.dataset = truth
            objects.createIndex()
            run = COCOeval(objects, objects.loadRes(found), "bbox")
            run.params.maxDets = limits
            run.evaluate()
            run.accumulate()
            run.summarize()
        return mean_precision(run.eval["precision"])

    return work


def faster_coco_eval(columns: Columns, _: str):
    from faster_coco_eval import COCO, COCOeval_faster

    (truth, found), limits = columns.records(), columns.limits

    def work() -> float:
        with contextlib.redirect_stdout(None):
            objects = COCO(truth)
            run = COCOeval_faster(objects, objects.loadRes(found), "bbox", print_function=lambda *_: None)
            run.params.maxDets = limits
            run.evaluate()
            run.accumulate()
            run.summarize()
        return mean_precision(run.eval["precision"])

    return work


def hotcoco(columns: Columns, _: str):
    from hotcoco import COCO, COCOeval

    c = columns

    def work() -> float:
        objects = COCO.from_arrays(
            [{"id": i + 1, "width": SIDE, "height": SIDE} for i in range(c.images)],
            [{"id": k + 1, "name": name} for k, name in enumerate(c.classes)],
            c.image_of_box + 1,
            c.labels + 1,
            np.hstack([c.boxes[:, :2], c.sizes]),
            area=c.sizes.prod(axis=1),
            iscrowd=c.crowd,
        )
        sizes = c.found_boxes[:, 2:] - c.found_boxes[:, :2]
        found = np.column_stack([c.image_of_found + 1, c.found_boxes[:, :2], sizes, c.scores, c.found_labels + 1.0])
        run = COCOeval(objects, objects.load_res(found), "bbox")
        run.params.max_dets = c.limits
        with contextlib.redirect_stdout(None):
            run.evaluate()
            run.accumulate()
            run.summarize()
        return mean_precision(np.asarray(run.eval["precision"]))

    return work


def detkit(columns: Columns, tool: str):
    from detkit.scores import score

    (data, found), limit = columns.detkit(), columns.limits[-1]
    if tool == "detkit, bootstrap":
        scores = score(data, found, max_detections=limit)

        def resample() -> float:
            return scores.interval("AP", replicates=REPLICATES).value

        return resample

    def work() -> float:
        scores = score(data, found, max_detections=limit)
        str(scores)
        assert len(scores.curves.f1) == len(scores.per_class)
        if tool == "detkit, all":
            scores.to_dict()
        return scores["AP"]

    return work


# --- all of them --------------------------------------------------------------------------------------------------


def run_one(tool: str, case: str, root: Path) -> dict[str, float]:
    """Measure in a new process, with nothing left of an earlier one."""
    command = [sys.executable, "-W", "ignore", __file__, "--measure", tool, case, "--folder", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool}, {case}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tenth of the images, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--with-pycocotools", action="store_true", help="once for each case; takes minutes")
    parser.add_argument(
        "--folder", type=Path, help="where the data is written, by default the folder for temporary files"
    )
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.folder)))
        return
    tools = [tool for tool in TOOLS if tool != "pycocotools" or args.with_pycocotools]
    absent = [tool for tool in tools if importlib.util.find_spec(TOOLS[tool]) is None]
    if absent:
        print(f"left out: {', '.join(absent)}")
    tools = [tool for tool in tools if tool not in absent]
    rounds, share = (1, 10) if args.quick else (args.rounds, 1)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        print(f"{os.cpu_count()} cores, medians of {rounds} round(s); ratios of CPU / wall")
        print(f"{'':26}{'CPU s':>9}{'wall s':>9}{'to hotcoco':>16}{'to pycocotools':>18}{'peak MB':>9}  AP")
        for case in args.cases:
            write_data(root / f"{case}.npz", case, share)
            found = [
                {tool: run_one(tool, case, root) for tool in tools if i == 0 or tool != "pycocotools"}
                for i in range(rounds)
            ]
            report(case, tools, found)


def report(case: str, tools: list[str], rounds: list[dict[str, dict[str, float]]]) -> None:
    """Print a row for each tool."""
    table = {
        tool: {
            key: statistics.median(found[tool][key] for found in rounds if tool in found)
            for key in ("cpu", "wall", "peak", "ap")
        }
        for tool in tools
    }
    for tool, row in table.items():
        ratios = "".join(
            f"{row['cpu'] / base['cpu']:>{width - 7}.3f} /{row['wall'] / base['wall']:5.3f}" if base else " " * width
            for base, width in ((table.get("hotcoco"), 16), (table.get("pycocotools"), 18))
        )
        print(
            f"{case:7}{tool:19}{row['cpu']:9.2f}{row['wall']:9.2f}{ratios}{row['peak']:9.0f}  {row['ap']:.6f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
