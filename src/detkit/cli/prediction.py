"""``detkit predict``."""

import contextlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer

from detkit.cli import messages

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from detkit.data import Dataset
    from detkit.detections import Detections
    from detkit.drawing import Picture
    from detkit.images import Image
    from detkit.predictor import Predictor

ModelPlace = Annotated[
    str,
    typer.Argument(metavar="RUN|MODEL", help="A run's folder or name, `last`, `best`, a model's folder or .onnx file."),
]

Code = Annotated[
    Path | None,
    typer.Option(metavar="FOLDER", help="Your own modules that the model takes, where its run does not have them."),
]

_PICTURES = {".jpg", ".jpeg", ".png", ".webp"}


def predict(
    *,
    model: ModelPlace,
    source: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE...", help="Images, folders, globs, videos, or DATA:SPLIT."),
    ],
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR|VIDEO", help="Write every picture with its boxes below this folder; or one video as another."
        ),
    ] = None,
    to: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write what is found to this .jsonl, .json (COCO results) or .csv; print no lines."
        ),
    ] = None,
    score_threshold: Annotated[
        str, typer.Option(metavar="X|best", help="Leave out detections below it; best: where F1 was highest.")
    ] = "best",
    nms_threshold: Annotated[
        float | None,
        typer.Option(metavar="X", help="IoU above which the weaker of two boxes goes; the model's own."),
    ] = None,
    max_detections: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="At most so many on one image; the model's own if absent.")
    ] = None,
    tile_size: Annotated[
        int | None,
        typer.Option(metavar="PIXELS", help="Look at larger images in tiles of this side, for small objects."),
    ] = None,
    tile_overlap: Annotated[
        float | None, typer.Option(metavar="SHARE", help="Of the tiles' side; 0.2 if absent. With --tile-size.")
    ] = None,
    tiles_only: Annotated[
        bool, typer.Option("--tiles-only", help="With --tile-size: do not look at the whole image, too.")
    ] = False,
    every: Annotated[int, typer.Option(metavar="N", min=1, help="Of videos, look at the first of so many frames.")] = 1,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Allow URLs: http(s)://, and s3:// images and folders.")
    ] = False,
    on_invalid: Annotated[
        str, typer.Option(metavar="raise|warn", help="Images that cannot be read: stop, or go on and leave with 1.")
    ] = "raise",
    batch_size: Annotated[int, typer.Option(metavar="N", min=1, help="Images that the model takes at once.")] = 8,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    isolate: Annotated[bool, typer.Option("--isolate", help="Open the model in a process of its own.")] = False,
    code: Code = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON for each image.")] = False,
) -> None:
    """Find objects in images and videos with a trained model."""
    from detkit import sources
    from detkit.errors import ImageError, UsageError
    from detkit.formats.resultwriter import require_ending, write_predictions
    from detkit.predictor import Predictor, find_model

    if tile_size is None and (tile_overlap is not None or tiles_only):
        raise UsageError("--tile-overlap and --tiles-only say how tiles are cut; give --tile-size, too")
    if to is not None:
        require_ending(to)
        if as_json:
            raise UsageError("--json prints what --to writes; give one of them")
    opened = find_model(model, code)
    named = [_named(word) for word in source]
    listed = sources.Listed(sources.list_sources(named, fetch=fetch))
    paths = [str(item) for item in listed if not isinstance(item, ImageError)]
    saving = None if save is None else _saving(paths, source, save, every)
    predictor = Predictor(
        opened,
        score_threshold=_threshold(score_threshold),  # type: ignore[arg-type]
        nms_threshold=nms_threshold,
        max_detections=max_detections,
        tile_size=tile_size,
        tile_overlap=0.2 if tile_overlap is None else tile_overlap,
        tile_whole=not tiles_only,
        batch_size=batch_size,
        device=device,
        isolate=isolate,
    )
    with predictor, contextlib.ExitStack() as closing:
        keep = None if saving is None else closing.enter_context(saving)
        began = time.perf_counter()
        pairs = predictor.predict_with_images(listed, every=every, on_invalid=on_invalid)  # type: ignore[arg-type]
        shown = _Shown(as_json=as_json, lines=to is None, keep=keep)
        found = shown.each(_tracked(pairs, lambda: sources.count(listed, every)))
        if to is None:
            for _ in found:
                pass
        else:
            write_predictions(to, _data_of(named, on_invalid), found)
            messages.tell(f"{shown.num_detections} detections on {predictor.num_images} images in {messages.shown(to)}")
        closing.close()
        if save is not None:
            messages.tell(f"{shown.num_pictures} pictures in {messages.shown(save)}")
        _tell_speed(predictor, time.perf_counter() - began)
    if predictor.num_invalid:
        messages.tell(f"{predictor.num_invalid} could not be read and were left out")
        raise typer.Exit(messages.FINDINGS)


def _threshold(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _named(source: str) -> "str | Dataset":
    """Return the data set that a word names the split of; any other word itself."""
    from detkit.io import read_dataset

    path, colon, _ = source.rpartition(":")
    is_split = bool(colon) and not Path(source).exists() and Path(path).exists()
    return read_dataset(source) if is_split else source


def _data_of(named: "Sequence[str | Dataset]", on_invalid: str) -> "Dataset | None":
    """Return the data set whose ids the results can have: where it is all, and each of its images has an answer."""
    return named[0] if len(named) == 1 and not isinstance(named[0], str) and on_invalid == "raise" else None


def _saving(
    items: Sequence[str], words: Sequence[str], place: Path, every: int
) -> "AbstractContextManager[Callable[[Picture, str], None]]":
    """Return what keeps a picture and the path of its image while it is open: as a file, or as a frame of a video."""
    import numpy as np

    from detkit import videos
    from detkit.drawing import write_picture
    from detkit.errors import UsageError

    if videos.is_video(place) and not place.is_dir():
        if len(items) != 1 or not videos.is_video(items[0]):
            raise UsageError(f"--save {place} writes a video out of one video; name a folder for pictures")
        if place.exists() and place.samefile(items[0]):
            raise UsageError(f"--save {place} would replace the video itself; choose another file")
        return _as_video(videos.writing(place, videos.frame_rate(items[0]) / every), np.asarray)
    target = _pictures(items, words, place)
    return contextlib.nullcontext(lambda picture, path: write_picture(picture, target(path)))


@contextlib.contextmanager
def _as_video(writing: Any, pixels: Callable[[Any], Any]) -> "Iterator[Callable[[Picture, str], None]]":
    with writing as append:
        yield lambda picture, path: append(pixels(picture))


def _pictures(items: Sequence[str], words: Sequence[str], folder: Path) -> Callable[[str], Path]:
    """Return where the picture of an image or a frame goes, below the folder as its file lies below what was named.

    Raises `UsageError` rather than to replace an image or to write one file twice.
    """
    from detkit import remote, videos
    from detkit.errors import UsageError

    local = [path for path in items if not remote.is_remote(path)]
    root = words[0] if len(words) == 1 and Path(words[0]).is_dir() else None
    if root is None and local:
        root = os.path.commonpath([Path(path).absolute().parent for path in local])

    def target(path: str) -> Path:
        frame = videos.numbered(path)
        if frame is not None:
            below = os.path.relpath(frame[0], root)
            return folder / f"{below}#{frame[1]}.jpg"
        below = Path(urlsplit(path).path).name or "image" if remote.is_remote(path) else os.path.relpath(path, root)
        placed = folder / below
        return placed if placed.suffix.lower() in _PICTURES else placed.with_name(f"{placed.name}.png")

    # Of a video, this stands for all its frames.
    targets = [target(f"{path}#0") if videos.is_video(path) else target(path) for path in items]
    twice = [path for path, count in Counter(targets).items() if count > 1]
    if twice:
        raise UsageError(f"several images would be saved as {twice[0]}; predict them one folder at a time")
    own = {Path(path).resolve() for path in local}
    replaced = [path for path in targets if path.resolve() in own]
    if replaced:
        raise UsageError(f"--save {folder} would replace {replaced[0]}, one of the images; choose another folder")
    return target


class _Shown:
    """Prints what is found, and draws it where pictures are wanted, as it comes by."""

    def __init__(self, *, as_json: bool, lines: bool, keep: "Callable[[Picture, str], None] | None") -> None:
        self._as_json, self._lines, self._keep = as_json, lines, keep
        self.num_detections = self.num_pictures = 0

    def each(self, pairs: "Iterable[tuple[Image, Detections]]") -> "Iterator[Detections]":
        from detkit.drawing import draw

        for image, found in pairs:
            if self._as_json:
                messages.print_json(found.to_dict(), indent=-1)
            elif self._lines:
                print(_line(found), flush=True)
            if self._keep is not None:
                self._keep(draw(image, found), found.path)
                self.num_pictures += 1
            self.num_detections += len(found)
            yield found


def _line(found: "Detections") -> str:
    objects = ", ".join(f"{name} {score:.2f}" for name, score in zip(found.names, found.scores.tolist(), strict=True))
    return f"{found.path}: {len(found)} detection{'' if len(found) == 1 else 's'}" + (f": {objects}" if objects else "")


def _tell_speed(predictor: "Predictor", seconds: float) -> None:
    n = predictor.num_images
    if n > 1:
        share = predictor.busy_s / seconds
        messages.tell(
            f"{n} images in {seconds:.1f} s: {n / seconds:.1f} images/s; the model took {share:.0%} of the time"
        )


def _tracked(found: Iterable[Any], total: Callable[[], int | None]) -> Iterator[Any]:
    """Show a bar on standard error where that is a terminal and the lines of the answer go somewhere else."""
    if not sys.stderr.isatty() or sys.stdout.isatty():
        yield from found
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True, redirect_stdout=False) as bar:
        yield from bar.track(found, total=total(), description="predict")
