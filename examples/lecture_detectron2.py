"""Fine-tune Detectron2 on your own images, as its lectures do it: config, warm-up, curves, pictures, JSON.

    python examples/lecture_detectron2.py [--data FOLDER] [--model detectron2/faster_rcnn_R_50_FPN_3x] [--weights coco]

It needs Detectron2: `detkit backends install detectron2 --source PATH`, with PATH your checkout of it. Without --data
pictures are drawn, on which a tiny model learns in a few minutes on a CPU.
"""

# needs: the detectron2 backend
# test: --images 24 --size 64 --iterations 60 --model detectron2/faster_rcnn_tiny
# prints: warm-up 12 steps.*AP50 \d\.\d+.*curves.*\.html.*pictures.*predictions.json: \d+ boxes on 6 images

import argparse
from pathlib import Path

import detkit
from detkit.shapes import write_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tune Detectron2, and look at what it learned.")
    parser.add_argument("--data", type=Path, help="images and annotations; drawn if absent")
    parser.add_argument("--model", default="detectron2/faster_rcnn_tiny", help="one of `detkit models`")
    parser.add_argument("--weights", default="none", help="coco, imagenet, a file, a run, or none")
    parser.add_argument("--iterations", type=int, default=600, help="steps, which Detectron2 calls SOLVER.MAX_ITER")
    parser.add_argument("--images", type=int, default=120, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=128, help="pixels of the shorter side")
    parser.add_argument("--folder", type=Path, default=Path("lecture"), help="where everything goes")
    given = parser.parse_args()

    data = given.data or write_shapes(given.folder / "data", num_images=given.images, size=given.size)
    train, val, test = detkit.read_dataset(data).split(0.5, 0.25, 0.25, seed=0)

    # What the lecture sets in `cfg`. The number of classes, the data sets' names and the device are known already.
    trainer = detkit.Trainer(
        model=given.model,
        weights=None if given.weights == "none" else given.weights,
        image_size=given.size,
        overrides={
            "SOLVER.IMS_PER_BATCH": 4,
            "SOLVER.MAX_ITER": given.iterations,
            "SOLVER.WARMUP_ITERS": given.iterations // 5,  # the 1000 of its default would be all of this training
            "SOLVER.STEPS": (given.iterations * 2 // 3, given.iterations * 9 // 10),
            "TEST.EVAL_PERIOD": given.iterations // 3,
            "SOLVER.CHECKPOINT_PERIOD": given.iterations // 3,
            "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64,
        },
    )
    print(f"warm-up {given.iterations // 5} steps of {given.iterations}")
    run = trainer.fit(train, val, test, name=str(given.folder / "run"))
    print(f"test AP {run.metrics['test/AP']:.3f}, AP50 {run.metrics['test/AP50']:.3f} on {len(test)} images")

    curves = detkit.plot(run).save(given.folder / "curves.html")
    print(f"curves: {curves}")
    with detkit.Predictor(run) as predictor:
        found = list(predictor.predict(test))
    pictures = given.folder / "pictures"
    pictures.mkdir(exist_ok=True)
    for sample, detections in zip(test, found, strict=True):
        detkit.draw(sample.path, detections, truth=sample).save(pictures / f"{Path(sample.path).stem}.png")
    print(f"pictures: {pictures}")
    file = detkit.write_predictions(given.folder / "predictions.json", test, found)
    print(f"{file.name}: {sum(map(len, found))} boxes on {len(found)} images")


if __name__ == "__main__":
    main()
