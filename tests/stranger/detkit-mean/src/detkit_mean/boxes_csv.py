"""``boxes.csv``: one line for each box, and one without a name for a picture that has none; pictures in ``images/``."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from detkit.data import Dataset, Sample
from detkit.files import inside
from detkit.formats import Format
from detkit.formats.imagefiles import place_images
from detkit.params import Options

COLUMNS = ["file", "width", "height", "name", "xmin", "ymin", "xmax", "ymax"]


def sniff(path: Path) -> bool:
    file = path / "boxes.csv"
    return file.is_file() and file.read_text().startswith(",".join(COLUMNS))


def read(path: Path, options: Options) -> Dataset:
    rows: dict[str, list[dict[str, str]]] = {}
    with (path / "boxes.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            rows.setdefault(row["file"], []).append(row)
    samples = []
    for name, of_image in rows.items():
        boxes = [row for row in of_image if row["name"]]
        samples.append(
            Sample(
                path=str(path / "images" / inside(name)),
                width=int(of_image[0]["width"]),
                height=int(of_image[0]["height"]),
                boxes=np.array([[float(row[c]) for c in COLUMNS[4:]] for row in boxes]).reshape(-1, 4),
                names=tuple(row["name"] for row in boxes),
                image_id=name,
                source=str(path / "boxes.csv"),
            )
        )
    return Dataset.from_samples(sorted({name for sample in samples for name in sample.names}), samples)


def write(data: Dataset, folder: Path, options: Options) -> None:
    place_images(data, folder / "images")
    with (folder / "boxes.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for sample in data:
            image = [sample.image_id, sample.width, sample.height]
            lines = zip(sample.names, sample.boxes.tolist(), strict=True)
            writer.writerows([[*image, name, *box] for name, box in lines] or [[*image, "", "", "", "", ""]])


FORMAT = Format(name="boxes-csv", summary="boxes.csv, one line for each box", sniff=sniff, read=read, write=write)
