"""``detkit demo``: a detector trained on drawn pictures, from nothing, on this machine."""

import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detkit.cli import messages
from detkit.cli.runs import Json

if TYPE_CHECKING:
    from detkit.data import Dataset
    from detkit.runs import Run

_MODEL = "torchvision/fcos_tiny"
"""What ``model="auto"`` starts from scratch."""

_NUM_IMAGES, _SIZE_PX, _SEED = 500, 160, 0
_SHARES = (0.72, 0.08, 0.20)
"""360 images to train on, 40 to choose weights by and to show an AP meanwhile, 100 only for the final numbers."""

_ITERATIONS, _QUICK_ITERATIONS = 1000, 400
_VALIDATIONS = 2
_SHOWN_IMAGES = 12


def demo(
    *,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps: 30 s instead of a minute on two cores.")] = False,
    folder: Annotated[Path, typer.Option(metavar="DIR", help="Where pictures and runs go.")] = Path("detkit-demo"),
    model: Annotated[str, typer.Option(metavar="MODEL", help="`backend/model` to train.")] = _MODEL,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Train a detector on drawn shapes and show what it finds in pictures it has never seen."""
    from detkit.evaluation import evaluate

    began = time.monotonic()
    data = _draw_data(folder / "shapes")
    train, val, test = data.split(*_SHARES, seed=_SEED)
    run = _train(model, folder, train, val, test, iterations=_QUICK_ITERATIONS if quick else _ITERATIONS, quiet=quiet)
    scores = evaluate(run)
    sheet = _write_sheet(
        run, folder, test, caption=f"{run.model.name}: AP50 {scores['AP50']:.3f}, AP {scores['AP']:.3f}"
    )
    record = {
        "run": run.path,
        "model": run.model.name,
        "AP50": scores["AP50"],
        "AP": scores["AP"],
        "seconds": time.monotonic() - began,
        "sheet": sheet.absolute(),
        "data": (folder / "shapes").absolute(),
        "images": {"train": len(train), "validation": len(val), "test": len(test)},
    }
    if as_json:
        messages.print_json(record)
    else:
        _print(record, run, sheet)


def _draw_data(folder: Path) -> "Dataset":
    """Return the pictures; they are drawn once, and appear only when all are there."""
    from detkit.errors import StorageError, UsageError
    from detkit.io import read_dataset
    from detkit.shapes import write_shapes

    recipe = {"num_images": _NUM_IMAGES, "size": _SIZE_PX, "seed": _SEED}
    stamp = folder / "shapes.json"
    if not folder.exists():
        messages.tell(f"drawing {_NUM_IMAGES} pictures into {messages.shown(folder)}")
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".shapes-") as beside:
                drawn = write_shapes(Path(beside) / "shapes", **recipe)
                (drawn / stamp.name).write_text(json.dumps(recipe))
                drawn.rename(folder)
        except OSError as error:
            raise StorageError(folder, error) from error
    elif not stamp.is_file() or json.loads(stamp.read_text()) != recipe:
        raise UsageError(f"{folder} holds something else than the demo's pictures; choose another --folder")
    return read_dataset(folder, format="voc")


def _train(
    model: str, folder: Path, train: "Dataset", val: "Dataset", test: "Dataset", *, iterations: int, quiet: bool
) -> "Run":
    from detkit.trainer import Trainer

    every = f"{iterations // _VALIDATIONS} iterations"
    wanted: dict[str, Any] = {"seed": _SEED, "validate_every": every, "checkpoint_every": every}
    trainer = Trainer(model=model, name=str(_new_folder(folder)))
    known = {row.name for row in trainer.explain(iterations=iterations).rows}
    settings = {name: value for name, value in wanted.items() if name in known}
    return trainer.fit(train, val, test, quiet=quiet, iterations=iterations, **settings)


def _new_folder(folder: Path) -> Path:
    number = 1
    while (folder / f"run-{number}").exists():
        number += 1
    return (folder / f"run-{number}").absolute()


def _write_sheet(run: "Run", folder: Path, test: "Dataset", *, caption: str) -> Path:
    from detkit.drawing import comparison_sheet, write_picture
    from detkit.predictor import Predictor

    shown = test[:_SHOWN_IMAGES]
    with Predictor(run) as predictor:
        found = list(predictor.predict(shown))
        picture = comparison_sheet(shown, found, score_threshold=predictor.score_threshold, caption=caption)
    write_picture(picture, folder / "sheet.png")
    return folder / "sheet.png"


def _print(record: dict[str, Any], run: "Run", sheet: Path) -> None:
    images, place = record["images"], messages.shown(run.path)
    print(f"AP50 {record['AP50']:.3f}  AP {record['AP']:.3f}  on {images['test']} pictures the model has never seen")
    print(f"{record['seconds']:.0f} s in all, {record['model']} trained on {images['train']} pictures")
    print(f"ground truth beside predictions: {messages.shown(sheet)}")
    print("next, with your own images and annotations (Pascal VOC or COCO):")
    print("       detkit train YOUR_FOLDER")
    print(f"or:    detkit predict {place} {messages.shown(sheet.parent / 'shapes' / 'JPEGImages')} --save out/")
