"""What ending trials early saves, and what it costs: one search without pruning, replayed through every pruner.

The trials are drawn at random, so they are the same ones whatever is pruned; only how far each is trained differs. Told
is the share of the training time that is left out, and the best score among the trials that were finished; beside it
the time that a trial takes outside of its training.

    python benchmarks/pruning.py [--trials 16] [--epochs 20] [--model torchvision/ssd_tiny] [--study DIRECTORY]

With --study, a study of yours that was searched with ``pruner=none`` is replayed instead.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import optuna

import detkit
from detkit.searching import PRUNERS, make_pruner
from detkit.shapes import write_shapes
from detkit.studies import Study, Trial


def replay(trials: list[Trial], pruner: str, mode: str) -> tuple[float, float]:
    """Return the share of the training that is done, and the best value among finished trials."""
    study = optuna.create_study(
        direction="maximize" if mode == "max" else "minimize",
        pruner=make_pruner(pruner),
        sampler=optuna.samplers.RandomSampler(seed=0),
    )
    done, finished = 0.0, []
    for trial in trials:
        asked = study.ask()
        seconds, reached = trial.seconds or 0.0, 100
        for percent, value in trial.intermediate.items():
            asked.report(value, percent)
            if percent < 100 and asked.should_prune():
                reached = percent
                break
        done += seconds * reached / 100
        if reached < 100:
            study.tell(asked, state=optuna.trial.TrialState.PRUNED)
        else:
            assert trial.value is not None
            finished.append(trial.value)
            study.tell(asked, trial.value)
    best = max(finished) if mode == "max" else min(finished)
    return done / sum(trial.seconds or 0.0 for trial in trials), best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--images", type=int, default=240)
    parser.add_argument("--model", default="torchvision/ssd_tiny")
    parser.add_argument("--study", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        study = Study(arguments.study) if arguments.study else search(Path(folder), arguments)
        report(study)


def search(folder: Path, arguments: argparse.Namespace) -> Study:
    """Train every trial to its end."""
    data = write_shapes(folder / "shapes", num_images=arguments.images, size=128)
    trainer = detkit.Trainer(model=arguments.model, epochs=arguments.epochs)
    space = {"learning_rate": "1e-5..1e-1:log", "weight_decay": "1e-4..0.5:log"}
    tuner = detkit.Tuner(trainer, space, trials=arguments.trials, sampler="random", pruner="none")
    return tuner.fit(data, name=str(folder / "study"))


def report(study: Study) -> None:
    trials = [trial for trial in study.trials if trial.state == "finished" and trial.path is not None]
    outside = [(trial.seconds or 0.0) - steps_of(trial) for trial in trials]
    print(
        f"{len(trials)} trials of {study.record.backend}/{study.record.model}, best of all {study.best_trial.value:.4f}"
    )
    print(f"{'pruner':>10} {'training done':>14} {'best finished':>14}")
    for pruner in PRUNERS:
        done, best = replay(trials, pruner, study.search.mode)
        print(f"{pruner:>10} {done:>13.0%} {best:>14.4f}")
    seconds = sorted(outside)[len(outside) // 2]
    print(
        f"a trial takes {seconds:.2f} s (median) besides its steps: interpreter, framework, reading and laying out data"
    )


def steps_of(trial: Trial) -> float:
    """Return the seconds from the first step to the last validation."""
    timings = trial.run.model.manifest.timings
    return timings["total"] - timings["start"]


if __name__ == "__main__":
    main()
