"""Search for the best learning rate, weight decay and batch size of the default model, and see whether it was worth it.

    python examples/tune.py [--trials 12] [--iterations 400] [--images 300] [--folder tune]

The pictures are drawn, so nothing has to be fetched. With the defaults it takes about half an hour on two CPU cores;
then open tune/study.html. Stopped by Ctrl-C, it goes on when it is started again.
"""

# test: --trials 3 --iterations 4 --images 30 --size 64
# prints: search learning_rate .*trial 0 .*defaults .*COCO protocol.*wrote tune/study\.html

import argparse
from pathlib import Path

import detkit
from detkit.shapes import write_shapes


def main() -> None:
    parser = argparse.ArgumentParser(description="Tune the default model.")
    parser.add_argument("--trials", type=int, default=12, help="how many models are trained, at most")
    parser.add_argument("--iterations", type=int, default=400, help="optimizer steps of each")
    parser.add_argument("--images", type=int, default=300, help="how many pictures are drawn")
    parser.add_argument("--size", type=int, default=160, help="pixels of a picture's side")
    parser.add_argument("--folder", type=Path, default=Path("tune"), help="where everything goes")
    given = parser.parse_args()

    every = f"{max(1, given.iterations // 5)} iterations"
    trainer = detkit.Trainer(iterations=given.iterations, image_size=given.size, validate_every=every)
    tuner = detkit.Tuner(trainer, trials=given.trials)
    study_folder = given.folder / "study"
    if study_folder.is_dir():
        study = tuner.resume(study_folder, trials=given.trials)
    else:
        data = detkit.read_dataset(write_shapes(given.folder / "shapes", num_images=given.images, size=given.size))
        train, val, test = data.split(0.64, 0.16, 0.20, seed=0)
        print(tuner.plan(train, val, test))
        study = tuner.fit(train, val, test, name=str(study_folder))

    for trial in study.trials:
        print(f"trial {trial.number} {trial.state}: {trial.value} {trial.values}")
    if len(study.contenders()) > 1:
        print(detkit.compare(study.contenders()))
    detkit.plot_study(study, given.folder / "study.html")
    print(f"wrote {given.folder / 'study.html'}")


if __name__ == "__main__":
    main()
