"""A model of SageMaker's built-in algorithm is trained on with new images, and answers at an endpoint for a while.

    python examples/incremental_endpoint.py --simulate
    python examples/incremental_endpoint.py VOC_FOLDER --role ROLE --max-cost 4

The first job never sees one of the classes; a second one goes on from its model, for one epoch, with the images of
that class. The algorithm's number of classes cannot change on the way, so all of them are named from the start. The
endpoint is deleted at the end of the block, and by AWS after two hours if this machine is gone by then.
`--simulate` does all of it in an account that is simulated on this machine, with a stand-in for the algorithm.
"""

# needs: an AWS account, real or simulated
# test: --simulate --images 40 --size 48 --epochs 2
# prints: first .*AP50 .*then .*AP50 .*answers until .*wrote 4 pictures.*endpoints left: none

import argparse
import contextlib
import os
import time
from pathlib import Path

import detkit
from detkit.deployment import list_endpoints
from detkit.shapes import write_shapes
from detkit_sagemaker.options import TransformOptions
from detkit_sagemaker.rescoring import transform


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a model of SageMaker on, and let it answer at an endpoint.")
    parser.add_argument("data", nargs="?", type=Path, help="images and annotations; drawn if absent")
    parser.add_argument("--new-class", default="star", help="the class that comes later")
    parser.add_argument("--epochs", type=int, default=30, help="epochs of the first job")
    parser.add_argument("--images", type=int, default=200, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=160, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("voc"), help="where everything goes")
    parser.add_argument("--role", help="execution role; `detkit sagemaker setup` makes one")
    parser.add_argument("--max-cost", type=float, help="US dollars that each job may cost at most, by the estimate")
    parser.add_argument("--simulate", action="store_true", help="in an account simulated on this machine")
    given = parser.parse_args()

    with contextlib.ExitStack() as stack:
        if given.simulate:
            from detkit_sagemaker.testing import Simulator

            account = stack.enter_context(Simulator())
            scheduler = account.role.rpartition("/")[2]
            os.environ.update(account.environment, DETKIT_SCHEDULER_ROLE=scheduler)
            given.role, given.max_cost = account.role, 5
        tell_story(given)


def tell_story(given: argparse.Namespace) -> None:
    source = given.data or write_shapes(given.folder / "shapes", num_images=given.images, size=given.size)
    data, test = detkit.read_dataset(source).split(0.8, 0.2, seed=0)
    has_new = [given.new_class in sample.names for sample in data]
    old = data.take([i for i, new in enumerate(has_new) if not new])
    arrived = data.take([i for i, new in enumerate(has_new) if new])
    print(f"at first: {old}\nlater:    {arrived}")

    paid = {"role": given.role, "max_cost": given.max_cost}
    trainer = detkit.Trainer(backend="sagemaker", model="object-detection", mini_batch_size=4, **paid)
    train, val = old.split(0.8, 0.2, seed=0)
    first = trainer.fit(train, val, name=str(given.folder / "first"), epochs=given.epochs)
    train, val = arrived.split(0.8, 0.2, seed=0)
    then = trainer.fit(train, val, name=str(given.folder / "then"), epochs=1, weights=first)

    for name, run in (("first", first), ("then", then)):
        transform(run.model, test, TransformOptions(**paid))
        scores = detkit.evaluate(run, test)
        of_new = scores.per_class[given.new_class]["AP50"]
        print(f"{name:<5}  AP50 {scores['AP50']:.3f}, of {given.new_class} {of_new:.3f}")

    pictures = given.folder / "found"
    pictures.mkdir(parents=True, exist_ok=True)
    with (
        detkit.deploy(then, ttl="2h", **paid) as endpoint,
        detkit.Predictor(endpoint, score_threshold=0.25) as predictor,
    ):
        print(f"{endpoint.name} answers until {time.strftime('%H:%M', time.localtime(endpoint.expires))}")
        for found in predictor.predict(test.take(range(4))):
            detkit.draw(found.path, found).save(pictures / f"{Path(found.path).stem}.png")
    print(f"wrote {len(list(pictures.iterdir()))} pictures to {pictures}")

    left = [endpoint.name for endpoint in list_endpoints("sagemaker")]
    print(f"endpoints left: {', '.join(left) or 'none'}")


if __name__ == "__main__":
    main()
