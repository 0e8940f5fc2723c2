"""``detkit compare``."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from detkit.cli import messages
from detkit.cli.evaluation import AllowSeen, ClassMap, DataFormat, Device, Fresh, OnInvalid, parse_class_map
from detkit.cli.runs import Json

if TYPE_CHECKING:
    from detkit.data import Dataset


def compare(
    *,
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[NAME=]RUN|MODEL|PREDICTIONS ... [DATA[:SPLIT]]",
            help="What to compare, and at the end annotated images; those the runs kept aside if absent.",
            show_default=False,
        ),
    ],
    save: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Write a page (.html) or a table (.md, .csv, .json); repeatable."),
    ] = None,
    metric: Annotated[str, typer.Option(metavar="AP|AP50|AP75", help="What says who is ahead.")] = "AP",
    class_map: ClassMap = None,
    allow_seen: AllowSeen = False,
    on_invalid: OnInvalid = "raise",
    max_detections: Annotated[
        int | None,
        typer.Option(
            metavar="N", min=1, help="Detections of a class in an image that count; the models' largest if absent."
        ),
    ] = None,
    device: Device = "auto",
    format: DataFormat = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Score several models, or files of predictions, on the same images, and say who really beats whom."""
    from detkit.comparison import compare, refuse_ending
    from detkit.errors import UsageError
    from detkit.io import read_dataset

    for path in save or []:  # before anything takes time
        refuse_ending(path)
    entrants, data = _sort(words)
    if format is not None and data is None:
        raise UsageError("--format tells how to read DATA; name the data set, too")
    truth: Dataset | str | None = read_dataset(data, format=format) if data is not None and format is not None else data
    found = compare(
        entrants,
        truth,
        metric=metric,
        allow_seen=allow_seen,
        on_invalid=on_invalid,  # type: ignore[arg-type]
        max_detections=max_detections,
        class_map=parse_class_map(class_map),
        device=device,
        fresh=fresh,
        progress=sys.stderr.isatty(),
    )
    if as_json:
        messages.print_json(found.to_dict())
    else:
        print(found)
    for path in save or []:
        messages.tell(f"wrote {messages.shown(found.save(path, command=shlex.join(['detkit', *sys.argv[1:]])))}")


def _sort(words: Sequence[str]) -> tuple[dict[str, str], str | None]:
    """Tell what to compare, by name, from the data set, which comes last and is none of that kind."""
    from detkit.comparison import name_entrants
    from detkit.errors import UsageError

    data = None
    if words and _is_data(words[-1]):
        *words, data = words
    if not words:
        raise UsageError(
            f"{data} is a data set; name runs, models or predictions, too: `detkit compare RUN RUN {data}`"
        )
    labelled = [_labelled(word) for word in words]
    named = name_entrants([place for _, place in labelled])
    names = [label or name for (label, _), name in zip(labelled, named, strict=True)]
    if len(set(names)) < len(names):
        raise UsageError(f"two entries have the same name: {', '.join(names)}; write NAME=RUN to tell them apart")
    return {name: place for name, (_, place) in zip(names, labelled, strict=True)}, data


def _labelled(word: str) -> tuple[str, str]:
    label, equals, place = word.partition("=")
    return (label, place) if equals and label and not Path(word).exists() and not _is_model(word) else ("", word)


def _is_data(word: str) -> bool:
    """Say whether the last word is a data set. Raises `UsageError` where it could be a run of that name, too."""
    from detkit.errors import UsageError
    from detkit.io import recognise
    from detkit.predictions import looks_like_predictions
    from detkit.remote import is_remote

    place = _labelled(word)[1]
    here = Path(place)
    if here.is_file() and looks_like_predictions(here):
        return False
    if _is_model(place):
        own = any((here / name).is_file() for name in ("run.json", "detkit.json"))
        if here.exists() and not own:
            raise UsageError(
                f"{place} is a folder here and a run; write ./{place} for the data, runs/{place} for the run"
            )
        return False
    if is_remote(place) or here.is_dir():
        return True
    try:
        recognise(place)
    except UsageError:
        # What is neither is refused in the words for runs, with those that there are.
        return not here.exists() and Path(place.rpartition(":")[0] or place).exists()
    return True


def _is_model(place: str) -> bool:
    from detkit.errors import UsageError
    from detkit.predictor import find_model

    try:
        find_model(place)
    except UsageError:
        return False
    return True
