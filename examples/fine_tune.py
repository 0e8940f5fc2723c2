"""Fine-tune a detector on your own images: weights from COCO, a file or an earlier run, and a backbone held still.

    python examples/fine_tune.py [WEIGHTS] [--model torchvision/ssdlite320_mobilenet_v3_large] [--data FOLDER]

WEIGHTS is what training starts from: `coco`, a weights file, or a run of the same model. Without it, a first run is
trained here, so that the example needs neither network nor data; the pictures are then drawn.
"""

# test: --epochs 1 --first-epochs 1 --images 24 --size 32
# prints: kept circle, square, star, triangle.*from scratch\s+AP50 \d\.\d+.*fine-tuned\s+AP50 \d\.\d+

import argparse
from pathlib import Path

import detkit
from detkit.shapes import write_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune a detector, and compare with one from scratch.")
    parser.add_argument("weights", nargs="?", help="coco, a weights file, or a run; trained here if absent")
    parser.add_argument("--model", default="torchvision/fcos_tiny", help="backend/model")
    parser.add_argument("--data", type=Path, help="images and annotations; drawn if absent")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of fine-tuning")
    parser.add_argument("--first-epochs", type=int, default=30, help="epochs of the first run, if it is trained here")
    parser.add_argument("--frozen-stages", type=int, default=1, help="stages of the backbone that do not learn")
    parser.add_argument("--images", type=int, default=300, help="how many pictures are drawn for the first run")
    parser.add_argument("--size", type=int, default=128, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("fine_tune"), help="where everything goes")
    given = parser.parse_args()

    trainer = detkit.Trainer(model=given.model, image_size=given.size)
    weights = given.weights
    if weights is None:
        plenty = write_shapes(given.folder / "plenty", num_images=given.images, size=given.size)
        weights = trainer.fit(plenty, name=str(given.folder / "first"), epochs=given.first_epochs)

    # Few images of one's own: seeds differ, so these pictures are others than those of the first run.
    few = max(12, given.images // 5)
    data = given.data or write_shapes(given.folder / "few", num_images=few, size=given.size, seed=1)
    train, val, test = detkit.read_dataset(data).split(0.5, 0.2, 0.3, seed=0)

    scratch = trainer.fit(train, val, test, name=str(given.folder / "scratch"), epochs=given.epochs)
    tuned = trainer.fit(
        train,
        val,
        test,
        name=str(given.folder / "tuned"),
        epochs=given.epochs,
        weights=weights,
        frozen_stages=given.frozen_stages,  # keeps what the first layers know, and is faster
    )
    origin = tuned.model.manifest.weights
    print(f"weights from {origin.source}: kept {', '.join(origin.kept)}; fresh {', '.join(origin.new) or 'none'}")
    for name, run in (("from scratch", scratch), ("fine-tuned", tuned)):
        print(f"{name:<12}  AP50 {run.metrics['test/AP50']:.3f} on {len(test)} test images, {given.epochs} epochs each")


if __name__ == "__main__":
    main()
