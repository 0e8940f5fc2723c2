"""Train a small model of each installed stack on the same images by changing one word, and compare them in one report.

    python examples/three_stacks.py [DATA] [--epochs 12] [--folder three-stacks]

DATA is a folder of images and annotations in any format; without it pictures are drawn. A stack that is not installed
is left out: `detkit backends ls` says which are here, and `detkit backends install gluoncv` brings one.
"""

# needs: the gluoncv backend
# test: --epochs 1 --images 30 --size 64
# prints: training images.*gluoncv/ssd_300_mobilenet0\.25 .*COCO protocol.*wrote three-stacks/report\.html

import argparse
from pathlib import Path

import detkit
from detkit.errors import PluginError, UnknownName
from detkit.shapes import write_shapes

MODELS = ("torchvision/fcos_tiny", "gluoncv/ssd_300_mobilenet0.25", "detectron2/faster_rcnn_tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train torchvision, GluonCV and Detectron2 alike, and compare them.")
    parser.add_argument("data", nargs="?", type=Path, help="images and annotations; drawn if absent")
    parser.add_argument("--models", nargs="+", default=MODELS, help="the one word that changes; see `detkit models`")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of every model")
    parser.add_argument("--images", type=int, default=200, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=160, help="pixels of a drawn picture's side")
    parser.add_argument("--folder", type=Path, default=Path("three-stacks"), help="where everything goes")
    given = parser.parse_args()

    source = given.data or write_shapes(given.folder / "data", num_images=given.images, size=given.size)
    train, val, test = detkit.read_dataset(source).split(0.64, 0.16, 0.20, seed=0)
    print(f"{len(train)} training images, {len(val)} for validation, {len(test)} to compare on: {train.classes}")

    runs = {}
    for model in given.models:
        trainer = detkit.Trainer(model=model, epochs=given.epochs, batch_size=8, weights=None)
        try:
            runs[model] = trainer.fit(train, val, name=str(given.folder / model.replace("/", "-")))
        except (PluginError, UnknownName) as error:  # the framework is missing, or the plugin
            print(f"{model} is left out: {error}")

    comparison = detkit.compare(runs, test)
    print(comparison)
    print(f"wrote {comparison.save(given.folder / 'report.html')}")


if __name__ == "__main__":
    main()
