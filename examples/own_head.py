"""Train a detector with a head of your own: FCOS whose two towers are twice as deep, with a quarter of the weights.

    python examples/own_head.py [--iterations 400] [--images 200] [--folder own-head]

This file is the code that it trains with: `code=` copies it into the run, where the worker, and whoever opens the model
later, import `deep_light_towers` from it. The pictures are drawn, so nothing has to be fetched.
"""

# test: --iterations 24 --images 30 --size 96
# prints: stopped at step \d+.*finished, val/AP 0\.\d+.*\d+ detections, twice

import argparse
from pathlib import Path

from torch import nn

import detkit
from detkit.shapes import write_shapes

DEPTH = 4
"""Blocks of a tower; fcos_tiny has 2."""


def block(channels: int) -> nn.Sequential:
    """Return a separable convolution: one filter for each channel, then a mix of the channels."""
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False),
        nn.Conv2d(channels, channels, 1, bias=False),
        nn.GroupNorm(channels // 2, channels),
        nn.ReLU(),
    )


def deep_light_towers(network: nn.Module, num_outputs: int) -> nn.Module:
    """Put other towers into both branches of an FCOS; its last layers stay, and with them the outputs of each class."""
    for branch in (network.head.classification_head, network.head.regression_head):
        channels = branch.conv[0].in_channels
        branch.conv = nn.Sequential(*(block(channels) for _ in range(DEPTH)))
    return network


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a detector with a head of your own.")
    parser.add_argument("--iterations", type=int, default=400, help="optimizer steps")
    parser.add_argument("--images", type=int, default=200, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=160, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("own-head"), help="where everything goes")
    given = parser.parse_args()

    data = detkit.read_dataset(write_shapes(given.folder / "shapes", num_images=given.images, size=given.size))
    train, val = data.split(0.8, 0.2, seed=0)
    trainer = detkit.Trainer(
        model="torchvision/fcos_tiny",
        code=__file__,
        modify="own_head:deep_light_towers",
        iterations=given.iterations,
        image_size=given.size,
        checkpoint_every=f"{max(1, given.iterations // 4)} iterations",
    )

    run = trainer.start(train, val, name=str(given.folder / "deep"), leash=True)
    for event in run.events():  # stopped on the way, to show that it goes on
        if event.kind == "metric" and (event.step or 0) > given.iterations // 4:
            print(f"stopped at step {event.step}")
            break
    run.stop()
    if run.status != "finished":
        trainer.resume(run)
    print(f"{run.status}, val/AP {run.metrics['val/AP']:.3f}")

    image = val[0].image()
    with detkit.Predictor(run) as here, detkit.Predictor(run, isolate=True) as there:
        assert here(image).names == there(image).names
        print(f"{len(here(image))} detections, twice: in this process, and in one of its own")


if __name__ == "__main__":
    main()
