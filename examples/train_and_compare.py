"""Train two small models on the same images, score both on the same test images, and lay their answers side by side.

    python examples/train_and_compare.py [--iterations 400] [--images 300] [--folder compare]

The pictures are drawn, so nothing has to be fetched. With the defaults it takes a few minutes on two CPU cores.
"""

# test: --iterations 6 --images 30 --size 96
# prints: torchvision/ssd_tiny .*torchvision/fcos_tiny .*wrote compare/sheet\.png

import argparse
from pathlib import Path

import detkit
from detkit.drawing import sheet, write_picture
from detkit.shapes import write_shapes

MODELS = ("torchvision/ssd_tiny", "torchvision/fcos_tiny")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train two small models and compare them.")
    parser.add_argument("--iterations", type=int, default=400, help="optimizer steps of each model")
    parser.add_argument("--images", type=int, default=300, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=160, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("compare"), help="where everything goes")
    given = parser.parse_args()

    data = detkit.read_dataset(write_shapes(given.folder / "shapes", num_images=given.images, size=given.size))
    train, val, test = data.split(0.64, 0.16, 0.20, seed=0)
    print(data)

    runs = []
    for model in MODELS:
        trainer = detkit.Trainer(model=model, iterations=given.iterations, image_size=given.size)
        run = trainer.fit(train, val, name=str(given.folder / model.replace("/", "-")))
        scores = detkit.evaluate(run, test)
        print(f"{model:<24} AP {scores['AP']:.3f}  AP50 {scores['AP50']:.3f}  on {len(test)} pictures")
        runs.append(run)

    shown = test[:4]
    rows = [detkit.draw(sample.path, truth=sample, classes=data.classes, min_side=320) for sample in shown]
    for run in runs:
        with detkit.Predictor(run) as predictor:
            rows += [detkit.draw(found.path, found, min_side=320) for found in predictor.predict(shown)]
    titles = [name for name in ("truth", *MODELS) for _ in shown]
    write_picture(sheet(rows, columns=len(shown), titles=titles), given.folder / "sheet.png")
    print(f"wrote {given.folder / 'sheet.png'}")


if __name__ == "__main__":
    main()
