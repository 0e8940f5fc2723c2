"""A Pascal VOC folder becomes .lst and RecordIO files and trains GluonCV's SSD, which then learns a further class.

    python examples/voc_to_recordio.py [--epochs 12] [--images 120] [--folder incremental]

GluonCV runs in an environment of its own: `detkit backends install gluoncv` makes it once, or DETKIT_PYTHON_GLUONCV
names its Python. The pictures are drawn, so nothing has to be fetched. The defaults take a few
minutes on two CPU cores, in which little is learnt; 100 epochs show more.
"""

# needs: the gluoncv backend
# test: --epochs 2 --images 40 --size 128
# prints: train 28, val 6, test 6 .*first: circle, square, star \|.*then: circle, square, star, triangle \|.* kept from

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

import detkit
from detkit.shapes import write_shapes

TRAINER = {"model": "gluoncv/ssd_300_mobilenet0.25", "batch_size": 8, "learning_rate": 4e-3}
NEW_CLASS = "triangle"


def pack(data: detkit.Dataset, folder: Path) -> detkit.Dataset:
    """Write lists as im2rec reads them, and the same as packs; return what is in the packs."""
    detkit.write_dataset(data, folder / "lists", "lst", negatives="drop")
    lists = detkit.read_dataset(folder / "lists")
    return detkit.read_dataset(detkit.write_dataset(lists, folder / "packs", "recordio"))


def tell(which: str, run: detkit.Run, data: detkit.Dataset) -> None:
    """Print how good a model is on the pictures that it has never seen."""
    test = data.splits["test"]
    scores = detkit.evaluate(run, test)
    print(
        f"{which}: {', '.join(data.classes)} | AP {scores['AP']:.3f}  AP50 {scores['AP50']:.3f} on {len(test)} pictures"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="From Pascal VOC to a model of GluonCV, which learns a class more.")
    parser.add_argument("--epochs", type=int, default=12, help="how often each training sees every picture")
    parser.add_argument("--images", type=int, default=120, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=160, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("incremental"), help="where everything goes")
    given = parser.parse_args()

    voc = write_shapes(given.folder / "voc", num_images=given.images, size=given.size)
    errors = [finding for finding in detkit.check(voc) if finding.severity == "error"]
    if errors:
        sys.exit("\n".join(map(str, errors)))

    data = detkit.read_dataset(voc)
    parts = data.split_positions(0.7, 0.15, 0.15, seed=0)  # every class has its share in each
    data = replace(data, split_indices=dict(zip(("train", "val", "test"), map(np.array, parts), strict=True)))
    print(", ".join(f"{name} {len(at)}" for name, at in data.split_indices.items()), "pictures in", voc)

    known = pack(detkit.remap(data, {}, drop=[NEW_CLASS]), given.folder / "first")
    first = detkit.Trainer(**TRAINER, epochs=given.epochs).fit(known, name=str(given.folder / "first/run"))
    tell("first", first, known)

    # Boxes of the new class are drawn in; the model keeps what it knows of the others, matched by name.
    more = pack(data, given.folder / "then")
    then = detkit.Trainer(**TRAINER, epochs=given.epochs, weights=first).fit(more, name=str(given.folder / "then/run"))
    tell("then", then, more)
    print(f"{given.folder / 'then/run'} kept from {given.folder / 'first/run'} what both have")


if __name__ == "__main__":
    main()
