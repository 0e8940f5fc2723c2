"""Incremental training: a model is there, new images and a new class arrive, and one more epoch has to do.

    python examples/incremental.py [--epochs 30] [--images 300] [--folder incremental]

Three ways to take the new images in are compared: one epoch from scratch, one epoch from the model, and the same with
some of its old training images among the new ones. The forgetting table says what each cost the old classes. The
pictures are drawn, so nothing has to be fetched.
"""

# test: --epochs 1 --images 24 --size 32
# prints: scratch +AP50 .*from the model +AP50.*forgetting on \d+ test images of first.*with replay +AP50.*replayed \d+

import argparse
from pathlib import Path

import detkit
from detkit.shapes import write_shapes

NEW_CLASS = "star"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model on, with images of a new class.")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of the first model")
    parser.add_argument("--images", type=int, default=300, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=128, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("incremental"), help="where everything goes")
    given = parser.parse_args()

    everything = detkit.read_dataset(write_shapes(given.folder / "shapes", num_images=given.images, size=given.size))
    has_new = [NEW_CLASS in sample.names for sample in everything]
    old = everything.take([i for i, new in enumerate(has_new) if not new])
    old = detkit.remap(old, {}, drop=[NEW_CLASS])  # nobody had thought of stars yet
    arrived, test = everything.take([i for i, new in enumerate(has_new) if new]).split(0.6, 0.4, seed=0)
    print(f"at first: {old}\nlater:    {arrived}")

    trainer = detkit.Trainer(model="torchvision/fcos_tiny", image_size=given.size)
    first = trainer.fit(old, name=str(given.folder / "first"), epochs=given.epochs)

    ways = {
        "scratch": {},
        "from the model": {"weights": first},
        "with replay": {"weights": first, "replay": "parent", "replay_share": 0.3},
    }
    for way, settings in ways.items():
        name = str(given.folder / way.replace(" ", "-"))
        run = trainer.fit(arrived, test, name=name, epochs=1, **settings)
        print(f"\n{way:<14}  AP50 {run.metrics['val/AP50']:.3f} on {len(test)} new images, after one epoch")
        if run.forgetting is not None:
            print(run.forgetting)
        if run.job.replayed is not None:
            print(f"replayed {run.job.replayed.images} images of {run.job.replayed.source}")


if __name__ == "__main__":
    main()
