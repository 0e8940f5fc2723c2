"""Train three small models on the same images and compare them on one test set: who really beats whom, and on what.

    python examples/compare_three_models.py [--iterations 400] [--images 300] [--folder compare]

The pictures are drawn, so nothing has to be fetched. With the defaults it takes some minutes on two CPU cores; then
open compare/report.html.
"""

# test: --iterations 6 --images 30 --size 96
# prints: ssd_tiny .*fcos_tiny .*fcos_small .*COCO protocol.*wrote compare/report\.html

import argparse
from pathlib import Path

import detkit
from detkit.shapes import write_shapes

MODELS = ("ssd_tiny", "fcos_tiny", "fcos_small")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train three small models and compare them.")
    parser.add_argument("--iterations", type=int, default=400, help="optimizer steps of each model")
    parser.add_argument("--images", type=int, default=300, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=160, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("compare"), help="where everything goes")
    given = parser.parse_args()

    data = detkit.read_dataset(write_shapes(given.folder / "shapes", num_images=given.images, size=given.size))
    train, val, test = data.split(0.64, 0.16, 0.20, seed=0)
    print(data)

    runs = {}
    for model in MODELS:
        trainer = detkit.Trainer(model=f"torchvision/{model}", iterations=given.iterations, image_size=given.size)
        runs[model] = trainer.fit(train, val, name=str(given.folder / model))

    comparison = detkit.compare(runs, test)
    print(comparison)
    print(f"wrote {comparison.save(given.folder / 'report.html')}")


if __name__ == "__main__":
    main()
