"""``detkit evaluate``."""

import math
import sys
from collections.abc import Collection, Mapping
from typing import Annotated

import typer

from detkit.cli import messages
from detkit.cli.prediction import ModelPlace
from detkit.cli.runs import Json

_NUMBERS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "ARs", "ARm", "ARl")


def evaluate(
    *,
    model: ModelPlace,
    data: Annotated[
        str | None,
        typer.Argument(metavar="DATA[:SPLIT]", help="Annotated images; those the run kept aside if absent."),
    ] = None,
    allow_seen: Annotated[
        bool, typer.Option("--allow-seen", help="Score images of the training, too, and mark the numbers.")
    ] = False,
    on_invalid: Annotated[
        str, typer.Option(metavar="raise|drop", help="Faulty boxes of DATA: refuse them, or leave them out.")
    ] = "raise",
    max_detections: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Detections of a class in an image that count.")
    ] = None,
    device: Annotated[str, typer.Option(metavar="DEVICE", help="auto, cpu, cuda or cuda:N.")] = "auto",
    format: Annotated[
        str | None, typer.Option(metavar="FORMAT", help="The data's format; recognised if absent.")
    ] = None,
    fail_under: Annotated[
        list[str] | None, typer.Option(metavar="AP=0.3", help="Leave with 1 if a number is lower; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Score a model on images it has not seen, by the COCO protocol."""
    from detkit import plugins
    from detkit.errors import UsageError
    from detkit.evaluation import evaluate
    from detkit.io import read_dataset
    from detkit.predictor import find_model

    limit = max_detections or find_model(model).manifest.max_detections
    # A plugin's metric may have numbers of any name.
    known = () if plugins.metrics() else (*_NUMBERS, f"AR{limit}")
    thresholds = dict(_threshold(text, known) for text in fail_under or [])
    if format is not None and data is None:
        raise UsageError("--format tells how to read DATA; name the data set, too")
    scores = evaluate(
        model,
        read_dataset(data, format=format) if data is not None and format is not None else data,
        allow_seen=allow_seen,
        on_invalid=on_invalid,  # type: ignore[arg-type]
        max_detections=max_detections,
        device=device,
        progress=sys.stderr.isatty(),
    )
    if not as_json:
        print(scores)
    missed = _missed(scores, thresholds)
    if as_json:
        messages.print_json({**scores.to_dict(), "failed": missed})
    for name, least in missed.items():
        messages.tell(f"failed: {name} {scores[name]:.4f} is under {least:g}")
    if missed:
        raise typer.Exit(messages.FINDINGS)


def _threshold(text: str, known: Collection[str]) -> tuple[str, float]:
    from detkit.errors import InvalidValue, UnknownName

    name, _, number = text.partition("=")
    try:
        least = float(number)
    except ValueError:
        least = math.nan
    if math.isnan(least):
        raise InvalidValue("fail-under", text, "NAME=NUMBER, for example AP=0.3")
    if known and name not in known:
        raise UnknownName("score", name, known)
    return name, least


def _missed(scores: Mapping[str, float], thresholds: Mapping[str, float]) -> dict[str, float]:
    """Return the thresholds that are not reached; a number that could not be measured reaches none."""
    from detkit.errors import UnknownName

    for name in thresholds:
        if name not in scores:
            raise UnknownName("score", name, scores)
    return {name: least for name, least in thresholds.items() if not scores[name] >= least}
