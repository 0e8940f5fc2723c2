"""``detkit predict``."""

import os
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from detkit.cli import messages

if TYPE_CHECKING:
    from detkit.detections import Detections

ModelPlace = Annotated[
    str, typer.Argument(metavar="RUN|MODEL", help="A run's folder or name, `last`, `best`, or a model's folder.")
]

Code = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Your own modules that the model takes, where its run does not have them."),
]

_PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


def predict(
    *,
    model: ModelPlace,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="An image, a folder, a glob, or DATA:SPLIT.")],
    save: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write every picture with its boxes below this folder.")
    ] = None,
    score_threshold: Annotated[
        str, typer.Option(metavar="X|best", help="Leave out detections below it; best: where F1 was highest.")
    ] = "best",
    max_detections: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most so many on one image; the model's own if absent.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    isolate: Annotated[bool, typer.Option("--isolate", help="Open the model in a process of its own.")] = False,
    code: Code = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each image.")] = False,
) -> None:
    """Find objects in images with a trained model."""
    from detkit.drawing import draw, write_picture
    from detkit.predictor import Predictor, find_model

    opened = find_model(model, code)
    threshold = _threshold(score_threshold)
    sources = _list_images(source)
    targets = _targets(sources, _root(source, sources), save) if save else []
    with Predictor(
        opened, score_threshold=threshold, max_detections=max_detections, device=device, isolate=isolate
    ) as predictor:
        for i, found in enumerate(_tracked(predictor.predict(sources), len(sources))):
            if as_json:
                messages.print_json(found.to_dict(), indent=-1)
            else:
                print(_line(found), flush=True)
            if targets:
                write_picture(draw(found.path, found), targets[i])
    if targets:
        messages.tell(f"{len(targets)} pictures in {messages.shown(Path(save or '.'))}")


def _threshold(text: str) -> float | Literal["best"]:
    from detkit.errors import InvalidValue

    if text == "best":
        return "best"
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise InvalidValue("score-threshold", text, "a number from 0 to 1, or `best`")
    return value


def _list_images(source: str) -> list[str]:
    from detkit.errors import UsageError
    from detkit.io import read_dataset
    from detkit.predictor import list_sources

    path, colon, _ = source.rpartition(":")
    is_split = bool(colon) and not Path(source).exists() and Path(path).exists()
    found = [str(path) for path in list_sources(read_dataset(source) if is_split else source)]
    if not found:
        raise UsageError(f"no image in {source}")
    return found


def _root(source: str, sources: Sequence[str]) -> str:
    """The folder below which images keep their relative names."""
    return source if Path(source).is_dir() else os.path.commonpath([Path(path).absolute().parent for path in sources])


def _targets(sources: Sequence[str], root: str, folder: Path) -> list[Path]:
    """Where each picture goes. Raises `UsageError` rather than to replace an image or to write one file twice."""
    from detkit.errors import UsageError

    targets = [folder / os.path.relpath(path, root) for path in sources]
    targets = [path if path.suffix.lower() in _PICTURES else path.with_name(f"{path.name}.png") for path in targets]
    twice = [path for path, count in Counter(targets).items() if count > 1]
    if twice:
        raise UsageError(f"several images would be saved as {twice[0]}; predict them one folder at a time")
    own = {Path(path).resolve() for path in sources}
    replaced = [path for path in targets if path.resolve() in own]
    if replaced:
        raise UsageError(f"--save {folder} would replace {replaced[0]}, one of the images; choose another folder")
    return targets


def _line(found: "Detections") -> str:
    objects = ", ".join(f"{name} {score:.2f}" for name, score in zip(found.names, found.scores.tolist(), strict=True))
    return f"{found.path}: {len(found)} detection{'' if len(found) == 1 else 's'}" + (f": {objects}" if objects else "")


def _tracked(found: Iterable["Detections"], total: int) -> Iterator["Detections"]:
    """Show a bar on standard error where that is a terminal and the lines of the answer go somewhere else."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        yield from found
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        yield from bar.track(found, total=total, description="predict")
