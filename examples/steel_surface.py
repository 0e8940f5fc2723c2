"""Steel surfaces in SageMaker: models trained and tuned at AWS and one trained here, scored by one protocol.

    python examples/steel_surface.py --simulate
    python examples/steel_surface.py NEU-DET --role ROLE --image-uri IMAGE --max-cost 4 --model torchvision/fcos_small

AWS's built-in algorithm, a JumpStart model and a model in our container train at the same time. Then AWS's automatic
model tuning searches for the built-in algorithm's learning rate and optimizer. AWS's own models answer by batch
transform, which ends by itself; ours comes back and answers here. `--simulate` does all of it in an account that is
simulated on this machine, where nothing costs and AWS's models are stand-ins that learn little. In a real account
nothing starts without `--max-cost`, US dollars for each job, and as much for each trial of the search, by the estimate;
without it you see the plan. The data is a folder of images and annotations, such as the steel surfaces of NEU-DET;
drawn where none is given.
"""

# needs: an AWS account, real or simulated
# test: --simulate --model echo/memory --images 24 --size 48 --epochs 2 --trials 2 --parallel 2
# prints: trial .*built-in .*tuned .*jumpstart .*here .*COCO protocol.*wrote steel/report\.html.*endpoints left: none

import argparse
import contextlib
import os
import sys
from pathlib import Path

import detkit
from detkit.deployment import list_endpoints
from detkit.shapes import write_shapes
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.rescoring import transform

JUMPSTART = "jumpstart/mxnet-od-ssd-512-resnet50-v1-coco"


def main() -> None:
    parser = argparse.ArgumentParser(description="Train three models in SageMaker and one here, and compare them.")
    parser.add_argument("data", nargs="?", type=Path, help="images and annotations; drawn if absent")
    parser.add_argument(
        "--model", default="torchvision/fcos_tiny", help="backend/model, trained in our container and here"
    )
    parser.add_argument("--epochs", type=int, default=30, help="epochs of every model")
    parser.add_argument("--trials", type=int, default=20, help="how many trials the search has")
    parser.add_argument("--parallel", type=int, default=10, help="how many of them run at once")
    parser.add_argument("--images", type=int, default=200, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=160, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("steel"), help="where everything goes")
    parser.add_argument("--role", help="execution role; `detkit sagemaker setup` makes one")
    parser.add_argument("--image-uri", help="our container; `detkit sagemaker build-image` makes it")
    parser.add_argument("--max-cost", type=float, help="US dollars that each job may cost at most, by the estimate")
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
    source = given.data or write_shapes(given.folder / "shapes", num_images=given.images, size=given.size)
    train, val, test = detkit.read_dataset(source).split(0.64, 0.16, 0.20, seed=0)
    print(f"train {train}\ntest  {test}")

    paid = {"backend": "sagemaker", "role": given.role, "max_cost": given.max_cost, "epochs": given.epochs}
    trainers = {
        "built-in": detkit.Trainer(model="object-detection", mini_batch_size=8, **paid),
        "jumpstart": detkit.Trainer(model=JUMPSTART, **paid),
        "ours": detkit.Trainer(model=given.model, image_uri=given.image_uri, **paid),
        "here": detkit.Trainer(model=given.model, epochs=given.epochs),
    }
    runs = {
        name: trainer.start(train, val, name=str(given.folder / name))  # the jobs run at the same time
        for name, trainer in trainers.items()
    }
    for run in runs.values():
        run.wait()

    runs = {"built-in": runs.pop("built-in"), "tuned": tune(given, trainers["built-in"], train, val), **runs}

    # AWS's own images answer only there. What they found is kept here, so that it is scored like any other.
    for name in ("built-in", "tuned", "jumpstart"):
        options = TransformOptions(role=given.role, max_cost=given.max_cost)
        looked, total = transform(runs[name].model, test, options)
        print(f"{name}: batch transform of {looked} images, {total - looked} were known")

    comparison = detkit.compare(runs, test)
    print(comparison)
    print(f"wrote {comparison.save(given.folder / 'report.html')}")

    # Jobs end by themselves, and a transform removes its model. Endpoints are what goes on costing; there are none.
    left = [endpoint.name for endpoint in list_endpoints("sagemaker")]
    print(f"endpoints left: {', '.join(left) or 'none'}; data and models stay in S3, below detkit/ in the bucket")


def tune(given: argparse.Namespace, trainer: detkit.Trainer, train: detkit.Dataset, val: detkit.Dataset) -> detkit.Run:
    """Let AWS search for what trains the built-in algorithm best, by its own metric; return the best trial's run."""
    space = {"learning_rate": detkit.Float(1e-5, 0.1, log=True), "optimizer": detkit.Choice(("sgd", "adam", "rmsprop"))}
    tuner = detkit.Tuner(trainer, space, trials=given.trials, parallel=given.parallel)
    max_cost = None if given.max_cost is None else given.max_cost * given.trials
    study = tuner.fit(train, val, name=str(given.folder / "study"), max_cost=max_cost)
    head, rows = study.rows()
    for row in [head, *rows]:
        print("  ".join(f"{cell:18.18}" for cell in row))
    return study.best


if __name__ == "__main__":
    main()
