"""What reading, converting and writing data sets costs, against the packages one would use instead.

    python benchmarks/formats.py [--quick] [--rounds 3] [--tasks voc-load coco-load] [--without supervision]
                                 [--folder /fast/disk] [--mxnet-python /other/bin/python]

Peers are globox, supervision, pycocotools and hotcoco, as far as they are installed beside detkit; RecordIO is compared
with MXNet's own reader in the interpreter that ``--mxnet-python`` names. Each measurement has a process of its own,
imports are not counted, and all tools take turns, so that a busy machine slows all of them. CPU seconds and the peak
of memory are those of the process with its children; medians of the rounds are shown. ``shift`` is how far corners lie
from where they belong, ``difficult`` how many such objects are still marked. Every VOC set counts pixels from 1, as its
devkit does.

detkit is told the format, as the peers are, and its cache is off but for two rows: "kept" is a first opening that fills
the cache, "again" the second one. Its conversions link all images into the new data set, which no peer does.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import importlib.util
import json
import os
import random
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np

NAMES = [f"class {i:02}" for i in range(20)]
WIDTH, HEIGHT = 500, 375
SLOW = {"supervision"}
"""Measured in the first round only."""

TASKS = {
    "voc-load": ["detkit", "detkit, 1 process", "detkit, kept", "detkit, again", "globox", "supervision", "hotcoco"],
    "voc-to-coco": ["detkit", "globox", "supervision", "hotcoco"],
    "coco-to-voc": ["detkit", "globox", "supervision", "hotcoco"],
    "coco-load": [
        "detkit",
        "detkit, 1 process",
        "detkit, kept",
        "detkit, again",
        "pycocotools",
        "globox",
        "supervision",
        "hotcoco",
    ],
    "rec-sequential": ["detkit", "detkit, as bytes", "mxnet"],
    "rec-random": ["detkit", "detkit, as bytes", "mxnet"],
    "rec-labels": ["detkit", "mxnet"],
    "rec-write": ["detkit", "mxnet"],
}
AGAINST = {"voc": "globox", "coco-to-voc": "globox", "coco-load": "pycocotools", "rec": "mxnet"}


# --- data ---------------------------------------------------------------------------------------------------------


def write_data(root: Path, files: int, images: int, boxes: int, records: int) -> None:
    """Write a VOC set of 8 objects a file, the same as COCO, a large COCO file and a pack's worth of images."""
    from PIL import Image

    rng = np.random.default_rng(0)
    noise = rng.integers(0, 255, (150, 200, 3), dtype=np.uint8)
    Image.new("RGB", (WIDTH, HEIGHT)).save(root / "one.jpg")
    Image.fromarray(noise).save(root / "noise.jpg", quality=90)
    picture = (root / "one.jpg").read_bytes()
    truth = draw_boxes(rng, files * 8, WIDTH, HEIGHT, whole=True)
    labels, difficult = rng.integers(0, len(NAMES), files * 8), rng.random(files * 8) < 0.1
    np.savez(root / "voc.npz", boxes=truth, labels=labels, difficult=difficult)
    for folder in ("voc/Annotations", "voc/JPEGImages", "coco/images", "large/images"):
        (root / folder).mkdir(parents=True)
    for i in range(files):
        (root / f"voc/JPEGImages/{i:06}.jpg").write_bytes(picture)
        (root / f"coco/images/{i:06}.jpg").write_bytes(picture)
        rows = range(8 * i, 8 * i + 8)
        objects = "".join(voc_object(truth[r].tolist(), NAMES[labels[r]], bool(difficult[r]), r % 2) for r in rows)
        (root / f"voc/Annotations/{i:06}.xml").write_text(
            "<annotation>\n\t<folder>VOC2007</folder>\n"
            f"\t<filename>{i:06}.jpg</filename>\n"
            "\t<source>\n\t\t<database>The VOC2007 Database</database>\n\t\t<image>flickr</image>\n\t</source>\n"
            f"\t<size>\n\t\t<width>{WIDTH}</width>\n\t\t<height>{HEIGHT}</height>\n\t\t<depth>3</depth>\n\t</size>\n"
            f"\t<segmented>0</segmented>\n{objects}</annotation>\n"
        )
    owner = np.repeat(np.arange(files), 8)
    write_coco(root / "coco/annotations.json", files, owner, truth, labels, difficult)
    large = draw_boxes(rng, boxes, WIDTH, HEIGHT, whole=False)
    labels, difficult = rng.integers(0, len(NAMES), boxes), rng.random(boxes) < 0.1
    np.savez(root / "large.npz", boxes=large, labels=labels, difficult=difficult)
    write_coco(
        root / "large/annotations.json", images, np.sort(rng.integers(0, images, boxes)), large, labels, difficult
    )
    (root / "records.json").write_text(json.dumps(records))
    past = time.time() - 60  # data that has just been written is not kept by detkit's cache
    for path in root.rglob("*"):
        os.utime(path, (past, past))


def draw_boxes(rng: np.random.Generator, count: int, width: int, height: int, *, whole: bool) -> np.ndarray:
    low = rng.random((count, 2)) * (0.7 * width, 0.7 * height)
    side = 2 + rng.random((count, 2)) * (0.25 * width, 0.25 * height)
    boxes = np.concatenate([low, low + side], axis=1)
    return np.floor(boxes) + np.array([0, 0, 1, 1]) if whole else boxes.round(2)


def voc_object(box: list[float], name: str, difficult: bool, truncated: int) -> str:
    corners = zip(("xmin", "ymin", "xmax", "ymax"), (box[0] + 1, box[1] + 1, box[2], box[3]), strict=True)
    lines = "".join(f"\t\t\t<{tag}>{int(value)}</{tag}>\n" for tag, value in corners)
    return (
        f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>{truncated}</truncated>\n"
        f"\t\t<difficult>{int(difficult)}</difficult>\n\t\t<bndbox>\n{lines}\t\t</bndbox>\n\t</object>\n"
    )


def write_coco(  # noqa: PLR0917
    file: Path, images: int, owner: np.ndarray, boxes: np.ndarray, labels: np.ndarray, hard: np.ndarray
) -> None:
    sides = (boxes[:, 2:] - boxes[:, :2]).round(2)
    annotations = [
        {
            "id": i,
            "image_id": image + 1,
            "category_id": label + 1,
            "bbox": [*low, *side],
            "area": round(side[0] * side[1], 4),
        }
        | {"iscrowd": 0}
        | ({"difficult": 1} if flag else {})
        for i, (image, label, low, side, flag) in enumerate(
            zip(owner.tolist(), labels.tolist(), boxes[:, :2].tolist(), sides.tolist(), hard.tolist(), strict=True),
            start=1,
        )
    ]
    content = {
        "images": [{"id": i + 1, "file_name": f"{i:06}.jpg", "width": WIDTH, "height": HEIGHT} for i in range(images)],
        "annotations": annotations,
        "categories": [{"id": i, "name": name, "supercategory": ""} for i, name in enumerate(NAMES, start=1)],
    }
    file.write_text(json.dumps(content))


# --- one measurement, in a process of its own ---------------------------------------------------------------------


def cpu_seconds() -> float:
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


class Memory(threading.Thread):
    """Looks from time to time how much memory this process and its children take together."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.together = 0.0

    def run(self) -> None:
        while True:
            with contextlib.suppress(OSError):  # a process that has just ended
                children = [
                    pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()
                ]
                self.together = max(self.together, sum(map(self._resident_mb, ["self", *children])))
            time.sleep(0.02)

    def _resident_mb(self, process: str) -> float:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize() / 2**20

    def peak_mb(self) -> float:
        """Return the most seen, of this process the most there ever was; ``getrusage`` begins with its parent's."""
        status = Path("/proc/self/status")
        if status.is_file():
            return max(self.together, int(re.search(r"VmHWM:\s*(\d+)", status.read_text())[1]) / 1024)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts in bytes


def measure(tool: str, task: str, root: Path) -> dict[str, object]:
    """Run one task with one tool and judge what came out."""
    package = tool.partition(",")[0]
    work, judge = globals()[f"{package}_{task.partition('-')[0]}"](task, root)
    memory = Memory()
    memory.start()
    cpu, wall = cpu_seconds(), time.perf_counter()
    result = work()
    cpu, wall = cpu_seconds() - cpu, time.perf_counter() - wall
    return {"cpu": cpu, "wall": wall, "peak": memory.peak_mb(), **(judge(result) if judge else {})}


def verdict(boxes: np.ndarray, difficult: np.ndarray | int, truth: dict[str, np.ndarray]) -> dict[str, str]:
    """Compare corners, in the order of the records, and the number of marked objects."""
    if boxes.shape != truth["boxes"].shape:
        return {"shift": f"{len(boxes)} boxes of {len(truth['boxes'])}"}
    away = boxes - truth["boxes"]
    shift = [float(np.round(np.median(column), 3)) for column in away.T]
    wrong = int((np.abs(away).max(axis=1) > 0.011).sum())
    text = "0" if not wrong else ",".join(f"{value:g}" for value in shift) + f" ({wrong / len(boxes):.0%})"
    kept = int(np.sum(difficult))
    return {"shift": text, "difficult": f"{kept / int(truth['difficult'].sum()):.0%}"}


def read_truth(root: Path, task: str) -> dict[str, np.ndarray]:
    with np.load(root / ("large.npz" if task == "coco-load" else "voc.npz")) as arrays:
        return dict(arrays)


def judge_coco(content: dict, truth: dict[str, np.ndarray]) -> dict[str, str]:
    """Judge the object of a COCO file, or of a package that holds its data as one."""
    name_of = {image["id"]: image["file_name"] for image in content["images"]}
    rows = content["annotations"]
    rows = sorted(rows, key=lambda row: Path(name_of[row["image_id"]]).name) if "voc" in truth else rows
    boxes = np.array([row["bbox"] for row in rows], dtype=np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    return verdict(boxes, sum(bool(row.get("difficult")) for row in rows), truth)


def judge_coco_file(file: Path, truth: dict[str, np.ndarray]) -> dict[str, str]:
    return judge_coco(json.loads(file.read_bytes()), {**truth, "voc": np.zeros(0)})


def judge_voc_folder(folder: Path, truth: dict[str, np.ndarray]) -> dict[str, str]:
    boxes, difficult = [], 0
    for file in sorted(folder.glob("*.xml")):
        for element in ElementTree.parse(file).getroot().iter("object"):
            box = element.find("bndbox")
            boxes.append([float(box.findtext(tag)) for tag in ("xmin", "ymin", "xmax", "ymax")])
            difficult += element.findtext("difficult") == "1"
    found = np.array(boxes).reshape(-1, 4)
    found[:, :2] -= 1
    return verdict(found, difficult, truth)


def detkit_voc(task: str, root: Path):
    import detkit
    from detkit import plugins

    plugins.formats()
    truth = read_truth(root, task)
    if task == "voc-load":
        return lambda: detkit.read_dataset(root / "voc", "voc"), lambda data: verdict(data.boxes, data.difficult, truth)
    return (
        lambda: detkit.write_dataset(detkit.read_dataset(root / "voc", "voc"), root / "out", "coco"),
        lambda folder: judge_coco_file(folder / "annotations.json", truth),
    )


def detkit_coco(task: str, root: Path):
    import detkit
    from detkit import plugins

    plugins.formats()
    truth = read_truth(root, task)
    if task == "coco-load":

        def judge(data) -> dict[str, str]:
            order = np.argsort(data.records)
            return verdict(data.boxes[order], data.difficult, truth)

        return lambda: detkit.read_dataset(root / "large/annotations.json", "coco"), judge
    return (
        lambda: detkit.write_dataset(detkit.read_dataset(root / "coco/annotations.json", "coco"), root / "out", "voc"),
        lambda folder: judge_voc_folder(folder / "Annotations", truth),
    )


def globox_voc(task: str, root: Path):
    from globox import AnnotationSet

    truth = read_truth(root, task)

    def corners(data) -> dict[str, str]:
        rows = [b for image in sorted(data, key=lambda a: a.image_id) for b in image.boxes]
        boxes = np.array([[b.xmin, b.ymin, b.xmax, b.ymax] for b in rows])
        return verdict(boxes, sum(bool(getattr(b, "difficult", False)) for b in rows), truth)

    def load():
        return AnnotationSet.from_pascal_voc(root / "voc/Annotations")

    if task == "voc-load":
        return load, corners
    return (
        lambda: load().save_coco(root / "out.json", auto_ids=True),
        lambda _: judge_coco_file(root / "out.json", truth),
    )


def globox_coco(task: str, root: Path):
    from globox import AnnotationSet

    truth = read_truth(root, task)
    if task == "coco-load":
        return lambda: AnnotationSet.from_coco(root / "large/annotations.json"), None
    (root / "out").mkdir()
    return (
        lambda: AnnotationSet.from_coco(root / "coco/annotations.json").save_pascal_voc(root / "out"),
        lambda _: judge_voc_folder(root / "out", truth),
    )


def supervision_voc(task: str, root: Path):
    from supervision import DetectionDataset

    truth = read_truth(root, task)

    def load():
        return DetectionDataset.from_pascal_voc(str(root / "voc/JPEGImages"), str(root / "voc/Annotations"))

    if task == "voc-load":
        return load, lambda data: verdict(
            np.concatenate([data.annotations[path].xyxy for path in sorted(data.annotations)]), 0, truth
        )
    return (
        lambda: load().as_coco(annotations_path=str(root / "out.json")),
        lambda _: judge_coco_file(root / "out.json", truth),
    )


def supervision_coco(task: str, root: Path):
    from supervision import DetectionDataset

    truth = read_truth(root, task)
    if task == "coco-load":
        return lambda: DetectionDataset.from_coco(
            str(root / "large/images"), str(root / "large/annotations.json")
        ), None
    return (
        lambda: DetectionDataset.from_coco(
            str(root / "coco/images"), str(root / "coco/annotations.json")
        ).as_pascal_voc(annotations_directory_path=str(root / "out")),
        lambda _: judge_voc_folder(root / "out", truth),
    )


def pycocotools_coco(task: str, root: Path):
    from pycocotools.coco import COCO

    def load():
        with contextlib.redirect_stdout(None):
            return COCO(root / "large/annotations.json")

    return load, lambda data: judge_coco(data.dataset, read_truth(root, task))


def hotcoco_voc(task: str, root: Path):
    from hotcoco import COCO

    truth = read_truth(root, task)
    if task == "voc-load":
        return lambda: COCO.from_voc(str(root / "voc")), lambda data: judge_coco(
            data.dataset, {**truth, "voc": np.zeros(0)}
        )
    return (
        lambda: COCO.from_voc(str(root / "voc")).save(str(root / "out.json")),
        lambda _: judge_coco_file(root / "out.json", truth),
    )


def hotcoco_coco(task: str, root: Path):
    from hotcoco import COCO

    truth = read_truth(root, task)
    if task == "coco-load":
        return lambda: COCO(str(root / "large/annotations.json")), lambda data: judge_coco(data.dataset, truth)
    return (
        lambda: COCO(str(root / "coco/annotations.json")).to_voc(str(root / "out")),
        lambda _: judge_voc_folder(root / "out/Annotations", truth),
    )


def record_labels(count: int) -> list[np.ndarray]:
    """Labels as im2rec packs them: header width, object width, then class and normalised corners of 8 objects."""
    rng = np.random.default_rng(0)
    return [np.concatenate([[2, 5], rng.random(40)]).astype(np.float32) for _ in range(count)]


def detkit_rec(task: str, root: Path):
    """Images come as views of the map, which decoders take as they are; "as bytes" copies them, as MXNet does."""
    from detkit.recordio import RecordFile, RecordWriter, pack, read_index, read_labels, unpack

    count, image = json.loads((root / "records.json").read_text()), (root / "noise.jpg").read_bytes()
    copied = "AS_BYTES" in os.environ

    def write() -> None:
        with (root / "out.rec").open("wb") as file, (root / "out.idx").open("wb") as index:
            writer = RecordWriter(file, index)
            for i, label in enumerate(labels):
                writer.write(i, pack(label, i, image))

    def sequential() -> None:
        for _, payload in RecordFile(root / "data.rec"):
            header, content = unpack(payload)
            assert len(header.label) == 42
            assert len(bytes(content) if copied else content) == len(image)

    def shuffled() -> None:
        records, index = RecordFile(root / "data.rec"), read_index(root / "data.idx")
        for i in order:
            header, content = unpack(records.read(index[i]))
            assert len(header.label) == 42
            assert len(bytes(content) if copied else content) == len(image)

    def labels_only() -> None:
        for _, _, label, _ in read_labels(root / "data.rec"):
            assert len(label) == 42

    labels = record_labels(count) if task == "rec-write" else []
    order = random.Random(0).sample(range(count), count)
    works = {"rec-write": write, "rec-sequential": sequential, "rec-random": shuffled, "rec-labels": labels_only}
    return works[task], None


def mxnet_rec(task: str, root: Path):
    with contextlib.suppress(ImportError):
        import detkit_gluoncv.runtime  # noqa: F401 (MXNet 1.9 uses names that numpy has dropped)
    from mxnet import recordio

    count, image = json.loads((root / "records.json").read_text()), (root / "noise.jpg").read_bytes()

    def write() -> None:
        writer = recordio.MXIndexedRecordIO(str(root / "out.idx"), str(root / "out.rec"), "w")
        for i, label in enumerate(labels):
            writer.write_idx(i, recordio.pack(recordio.IRHeader(0, label, i, 0), image))
        writer.close()

    def sequential() -> None:
        records = recordio.MXRecordIO(str(root / "data.rec"), "r")
        while (payload := records.read()) is not None:
            header, content = recordio.unpack(payload)
            assert len(header.label) == 42
            assert len(content) == len(image)

    def shuffled() -> None:
        records = recordio.MXIndexedRecordIO(str(root / "data.idx"), str(root / "data.rec"), "r")
        for i in order:
            header, content = recordio.unpack(records.read_idx(i))
            assert len(header.label) == 42
            assert len(content) == len(image)

    labels = record_labels(count) if task == "rec-write" else []
    order = random.Random(0).sample(range(count), count)
    works = {"rec-write": write, "rec-sequential": sequential, "rec-random": shuffled, "rec-labels": sequential}
    return works[task], None


# --- all of them --------------------------------------------------------------------------------------------------


def run_one(tool: str, task: str, root: Path, python: str) -> dict[str, object]:
    """Measure in a new process, with nothing of an earlier one in the way."""
    for name in ("out.json", "out.rec", "out.idx"):
        (root / name).unlink(missing_ok=True)
    if (root / "out").is_dir():
        # Not removed: where thousands of files went a moment ago, ext4 makes new ones three times as slowly.
        (root / "out").rename(root / f"out-{time.time_ns()}")
    if tool != "detkit, again":
        shutil.rmtree(root / "cache", ignore_errors=True)
    keeps = tool.endswith(("kept", "again"))
    variables = {**os.environ, "DETKIT_CACHE": str(root / "cache") if keeps else "off"}
    variables.update({"DETKIT_WORKERS": "1"} if tool.endswith("1 process") else {})
    variables.update({"AS_BYTES": "1"} if tool.endswith("as bytes") else {})
    command = [python, "-W", "ignore", __file__, "--measure", tool, task, "--folder", str(root)]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{tool}, {task}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a twentieth of the data, one round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument(
        "--folder", type=Path, help="where the data is written, by default the folder for temporary files"
    )
    parser.add_argument("--without", nargs="*", default=[], metavar="PEER", help="supervision takes minutes")
    parser.add_argument("--mxnet-python", help="interpreter with mxnet 1.9, and detkit-gluoncv where numpy is too new")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(*args.measure, args.folder)))
        return
    pythons = collections.defaultdict(lambda: sys.executable, mxnet=args.mxnet_python)
    peers = {tool.partition(",")[0] for tools in TASKS.values() for tool in tools}
    absent = {peer for peer in peers - {"mxnet"} if importlib.util.find_spec(peer) is None}
    absent |= set() if args.mxnet_python else {"mxnet"}
    absent |= set(args.without)
    if absent:
        print(f"left out: {', '.join(sorted(absent))}")
    rounds, share = (1, 20) if args.quick else (args.rounds, 1)
    with tempfile.TemporaryDirectory(dir=args.folder) as temporary:
        root = Path(temporary)
        write_data(root, 20_000 // share, 100_000 // share, 1_000_000 // share, 20_000 // share)
        if any(task.startswith("rec") for task in args.tasks):
            run_one("detkit", "rec-write", root, sys.executable)
            (root / "out.rec").rename(root / "data.rec")
            (root / "out.idx").rename(root / "data.idx")
        print(f"{20_000 // share} XML files, {1_000_000 // share} boxes, {20_000 // share} records; ", end="")
        print(f"{os.cpu_count()} cores, medians of {rounds} round(s)")
        print(f"{'':34}{'CPU s':>8}{'ratio':>7}{'wall s':>8}{'peak MB':>9}  shift / difficult kept")
        for task in args.tasks:
            tools = [tool for tool in TASKS[task] if tool.partition(",")[0] not in absent]
            report(
                task,
                tools,
                [
                    {tool: run_one(tool, task, root, pythons[tool]) for tool in tools if i == 0 or tool not in SLOW}
                    for i in range(rounds)
                ],
            )


def report(task: str, tools: list[str], rounds: list[dict[str, dict]]) -> None:
    """Print a row for each tool; ratios are those of CPU to the peer that the goals name."""
    table = {
        tool: {
            key: statistics.median(found[tool][key] for found in rounds if tool in found)
            for key in ("cpu", "wall", "peak")
        }
        for tool in tools
    }
    base = next((table[peer] for start, peer in AGAINST.items() if task.startswith(start) and peer in table), None)
    for tool, row in table.items():
        ratio = f"{row['cpu'] / base['cpu']:7.2f}" if base else f"{'':7}"
        judged = rounds[0][tool]
        said = f"{judged['shift']} / {judged.get('difficult', '-')}" if "shift" in judged else ""
        print(f"{task:15}{tool:19}{row['cpu']:8.2f}{ratio}{row['wall']:8.2f}{row['peak']:9.0f}  {said}", flush=True)


if __name__ == "__main__":
    main()
