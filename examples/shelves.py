"""Crowded shelves in SageMaker: a CSV file like SKU-110K's, 147 boxes an image, two broken files; AR at 300.

    python examples/shelves.py --simulate
    python examples/shelves.py SKU110K --role ROLE --image-uri IMAGE --max-cost 20 --model torchvision/fcos_small

The data is checked, what is broken is left out by name, and an augmented manifest is written, as SageMaker's tools
read it. Our container trains on it, with `--machines 2` on two machines that share each batch. The test images go
through a batch transform, and up to 300 detections of each count. `--simulate` does all of it in an account that is
simulated on this machine. The shelves are drawn where no folder is given.
"""

# needs: an AWS account, real or simulated
# test: --simulate --model echo/memory --images 12 --boxes 40 --size 200 --epochs 2
# prints: shelf_0002\.jpg.*shelf_0005\.jpg.*left out 2.*output\.manifest.*AP \d\.\d+  AP75 \d\.\d+  AR300 \d\.\d+

import argparse
import contextlib
import csv
import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

import detkit
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.rescoring import transform

LIMIT = 300
BROKEN = (2, 5)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train on crowded shelves in SageMaker.")
    parser.add_argument("data", nargs="?", type=Path, help="SKU-110K, or a folder like it; drawn if absent")
    parser.add_argument("--model", default="torchvision/fcos_tiny", help="backend/model, trained in our container")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of training")
    parser.add_argument("--images", type=int, default=60, help="how many shelves are drawn")
    parser.add_argument("--boxes", type=int, default=147, help="products on a shelf")
    parser.add_argument("--size", type=int, default=640, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("shelves"), help="where everything goes")
    parser.add_argument("--role", help="execution role; `detkit sagemaker setup` makes one")
    parser.add_argument("--image-uri", help="our container; `detkit sagemaker build-image` makes it")
    parser.add_argument("--max-cost", type=float, help="US dollars that each job may cost at most, by the estimate")
    parser.add_argument("--machines", type=int, default=1, help="machines that train together")
    parser.add_argument("--simulate", action="store_true", help="in an account simulated on this machine")
    given = parser.parse_args()

    with contextlib.ExitStack() as stack:
        if given.simulate:
            from detkit_sagemaker.testing import Simulator

            container = [sys.executable, "-m", "detkit_sagemaker.container"]
            account = stack.enter_context(Simulator(images={"detkit:latest": container}))
            os.environ.update(account.environment)
            given.role, given.image_uri, given.max_cost = account.role, account.image("detkit:latest"), 5
        tell_story(given)


def tell_story(given: argparse.Namespace) -> None:
    source = given.data or write_shelves(given.folder / "sku", given.images, given.boxes, given.size)

    errors = [finding for finding in detkit.check(source) if finding.severity == "error"]
    for finding in errors:
        print(finding)
    broken = sorted({Path(finding.image_file or finding.file).name for finding in errors})
    data = detkit.read_dataset(source, exclude=broken)
    print(f"left out {len(broken)}: {', '.join(broken)}\n{data}")

    manifest = Path(detkit.write_dataset(data, given.folder / "manifest", "manifest")) / "output.manifest"
    print(f"wrote {manifest}")
    train, val, test = detkit.read_dataset(manifest).split(0.6, 0.2, 0.2, seed=0)

    paid = {"role": given.role, "image_uri": given.image_uri, "max_cost": given.max_cost}
    trainer = detkit.Trainer(
        backend="sagemaker", model=given.model, max_detections=LIMIT, instance_count=given.machines, **paid
    )
    run = trainer.fit(train, val, name=str(given.folder / "run"), epochs=given.epochs)

    transform(run.model, test, TransformOptions(**paid))
    scores = detkit.evaluate(run, test, max_detections=LIMIT)
    shown = "  ".join(f"{name} {scores[name]:.3f}" for name in ("AP", "AP75", f"AR{LIMIT}"))
    print(f"{shown} on {len(test)} shelves, at most {LIMIT} detections each")


def write_shelves(folder: Path, num_images: int, num_boxes: int, size: int) -> Path:
    """Draw shelves full of products beside SKU-110K's kind of CSV file, and break two of the pictures."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, rows = np.random.default_rng(0), []
    columns = int(np.ceil(np.sqrt(num_boxes)))
    side = size / columns
    for number in range(1, num_images + 1):
        name = f"shelf_{number:04}.jpg"
        picture = Image.new("RGB", (size, size), tuple(rng.integers(200, 240, 3)))
        draw = ImageDraw.Draw(picture)
        for place in rng.permutation(columns**2)[:num_boxes]:
            left, top = (place % columns) * side, (place // columns) * side
            x1, y1 = int(left + rng.uniform(0, 0.2) * side), int(top + rng.uniform(0, 0.2) * side)
            x2, y2 = int(left + rng.uniform(0.75, 1) * side), int(top + rng.uniform(0.75, 1) * side)
            draw.rectangle((x1, y1, x2 - 1, y2 - 1), tuple(rng.integers(20, 180, 3)))
            rows.append([name, x1, y1, x2, y2, "object", size, size])
        picture.save(folder / "images" / name)
        if number in BROKEN:
            whole = (folder / "images" / name).read_bytes()
            (folder / "images" / name).write_bytes(whole[: len(whole) // 2])
    with (folder / "annotations.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return folder


if __name__ == "__main__":
    main()
