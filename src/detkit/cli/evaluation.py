"""``detkit evaluate``."""

import math
import re
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from detkit.cli import messages
from detkit.cli.prediction import Code, ModelPlace
from detkit.cli.runs import Json

if TYPE_CHECKING:
    from detkit.scores import Scores

ClassMap = Annotated[
    list[str] | None,
    typer.Option(
        "--class-map",
        metavar="MODEL'S=DATA'S",
        help="A class that both call differently; repeatable.",
    ),
]
AllowSeen = Annotated[
    bool, typer.Option("--allow-seen", help="Score images of the training, too, and mark the numbers.")
]
OnInvalid = Annotated[
    str, typer.Option(metavar="raise|drop", help="Faulty boxes of DATA: refuse them, or leave them out.")
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")]
DataFormat = Annotated[str | None, typer.Option(metavar="FORMAT", help="The data's format; recognised if absent.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Run the model, also where its predictions are in the cache.")]

_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "ARs", "ARm", "ARl")


def evaluate(
    *,
    model: ModelPlace,
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA[:SPLIT]", help="Annotated images; those the run kept aside if absent."),
    ] = None,
    class_map: ClassMap = None,
    allow_seen: AllowSeen = False,
    on_invalid: OnInvalid = "raise",
    max_detections: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Detections of a class in an image that count.")
    ] = None,
    device: Device = "auto",
    format: DataFormat = None,
    fail_under: Annotated[
        list[str] | None, typer.Option(metavar="AP=0.3", help="Leave with 1 if a number is worse; repeatable.")
    ] = None,
    fresh: Fresh = False,
    code: Code = None,
    as_json: Json = False,
) -> None:
    """Score a model, or a file of predictions, on images the model has not seen, by the COCO protocol."""
    from detkit import plugins
    from detkit.errors import UsageError
    from detkit.evaluation import evaluate
    from detkit.io import read_dataset
    from detkit.scores.certainty import FEWEST_IMAGES

    thresholds = dict(_threshold(text) for text in fail_under or [])
    for name in thresholds:
        _refuse_unknown(name, max_detections, has_plugins=bool(plugins.metrics()))
    if format is not None and data is None:
        raise UsageError("--format tells how to read DATA; name the data set, too")
    scores = evaluate(
        model,
        read_dataset(data, format=format) if data is not None and format is not None else data,
        allow_seen=allow_seen,
        on_invalid=on_invalid,  # type: ignore[arg-type]
        max_detections=max_detections,
        class_map=parse_class_map(class_map),
        device=device,
        fresh=fresh,
        progress=sys.stderr.isatty(),
        code=code,
    )
    interval = scores.interval()
    if not as_json:
        print(scores)
        if len(scores.data) < FEWEST_IMAGES:
            print(f"{len(scores.data)} image(s) are too few to tell how sure AP is; {FEWEST_IMAGES} or more are needed")
        elif not math.isnan(interval.low):
            print(f"AP {interval}: the {interval.level:.0%} interval, from {interval.replicates} draws of the images")
    for text in scores.warnings:
        messages.tell(f"warning: {text}")
    missed = _missed(scores, thresholds)
    if as_json:
        messages.print_json({**scores.to_dict(), "interval": interval.to_dict(), "failed": missed})
    for name, bound in missed.items():
        side = "over" if name in scores.lower_is_better else "under"
        messages.tell(f"failed: {name} {scores[name]:.4f} is {side} {bound:g}")
    if missed:
        raise typer.Exit(messages.FINDINGS)


def parse_class_map(words: Sequence[str] | None) -> dict[str, str]:
    """Read ``MODEL'S=DATA'S`` pairs. Raises `InvalidValue`."""
    from detkit.errors import InvalidValue

    pairs = {}
    for word in words or []:
        name, equals, target = word.partition("=")
        if not (equals and name and target):
            raise InvalidValue("class-map", word, "the model's name, =, the data's name: for example scratch=scratches")
        pairs[name] = target
    return pairs


def _threshold(text: str) -> tuple[str, float]:
    from detkit.errors import InvalidValue

    name, _, number = text.partition("=")
    try:
        bound = float(number)
    except ValueError:
        bound = math.nan
    if math.isnan(bound):
        raise InvalidValue("fail-under", text, "NAME=NUMBER, for example AP=0.3")
    return name, bound


def _refuse_unknown(name: str, max_detections: int | None, *, has_plugins: bool) -> None:
    """Raise `UnknownName`, before anything takes time, for a number that there will not be."""
    from detkit.errors import UnknownName

    base = name.removeprefix("mask_")
    recall = re.fullmatch(r"AR([1-9]\d*)", base)
    limits = {10, 100, max_detections}
    possible = recall is not None and (
        max_detections is None or (int(recall[1]) in limits and int(recall[1]) <= max(max_detections, 10))
    )
    if base not in _NUMBERS and not possible and not has_plugins:
        raise UnknownName("score", name, (*_NUMBERS, f"AR{max_detections or 100}"))


def _missed(scores: "Scores", thresholds: Mapping[str, float]) -> dict[str, float]:
    """Return the thresholds that are not reached; a number that could not be measured reaches none."""
    from detkit.errors import UnknownName

    for name in thresholds:
        if name not in scores:
            raise UnknownName("score", name, scores)
    sign = {name: -1 if name in scores.lower_is_better else 1 for name in thresholds}
    return {name: bound for name, bound in thresholds.items() if not sign[name] * scores[name] >= sign[name] * bound}
