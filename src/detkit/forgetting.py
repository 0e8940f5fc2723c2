"""How much a model that was trained on from another has forgotten: both scored on images held out of the first.

The controller lays these images out as the run's ``retention`` channel, with the classes that both models know and no
other. Nothing is trained on them. Test images, and the parent's validation images, choose no weights of the new run;
its own validation images, the last resort, do.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from detkit.backends import PredictOptions, load_engine
from detkit.curation import remap
from detkit.data import Dataset
from detkit.detections import Detections
from detkit.errors import DetkitError, ImageError, Stopped
from detkit.files import write_json
from detkit.forgetting_table import FILE, APChange, Forgetting
from detkit.formats.imagefacts import look
from detkit.job import Code, Job, Model, Workspace
from detkit.runs import LocalRun
from detkit.scores import SCORE_FLOOR, score

if TYPE_CHECKING:
    from detkit.formats.checks import Prepared
    from detkit.scores import Scores

CHANNEL = "retention"

_BATCH = 8
_ROLES = {"test": "test images", "validation": "validation images"}


@dataclass(frozen=True, kw_only=True)
class Retention:
    """The images on which forgetting is measured."""

    data: Dataset
    image_digests: list[str]
    what: str
    """Which images these are, in words."""


def choose_images(
    parent: Model, classes: Sequence[str], channels: dict[str, Prepared], code: Code | None = None
) -> Retention | str:
    """Return the images for the forgetting table, or why there are none.

    They are the test images of the parent's run, else its validation images; where neither is beside the model any
    more, those of the new run's own test, else validation images that have an object of a shared class and that the
    parent has not seen. What either model is trained on is left out, and of the parent's images those that the new run
    is validated on. There are none where the parent takes modules of the user's that are not the ``code`` of the new
    run, as one process scores both models.
    """
    if not parent.manifest.engine:
        return f"no forgetting table: {parent.path} answers only where it was trained"
    if parent.manifest.code not in (None, code):
        return f"no forgetting table: {parent.path} takes other code than this run has"
    shared = [name for name in classes if name in parent.classes]
    if not shared:
        return f"no forgetting table: {parent.path} knows none of the new classes"
    seen = parent.seen()
    trained = {*channels["train"].image_digests, *seen.get("train", [])}
    chosen_by = channels["validation"].image_digests if "validation" in channels else []
    not_of_parent = trained.union(chosen_by)
    run = Workspace(parent.path.absolute().parent)
    for channel, role in _ROLES.items():
        data = run.dataset(channel) if run.job_file.is_file() else None
        if data is None:
            continue
        digests = run.image_digests(channel)
        facts = look(data.paths, decode=False)
        there = [not isinstance(fact, ImageError) and fact.digest == d for fact, d in zip(facts, digests, strict=True)]
        keep = [i for i, digest in enumerate(digests) if there[i] and digest not in not_of_parent]
        found = _restricted(data, digests, keep, shared, f"{role} of {run.path.name}")
        if found is not None:
            return found
    trained |= {digest for known in seen.values() for digest in known}
    for channel, role in _ROLES.items():
        if channel not in channels:
            continue
        data, digests = channels[channel].data, channels[channel].image_digests
        wanted = {data.classes.index(name) for name in shared}
        keep = [
            i
            for i, digest in enumerate(digests)
            if digest not in trained
            and wanted.intersection(data.labels[data.offsets[i] : data.offsets[i + 1]].tolist())
        ]
        found = _restricted(data, digests, keep, shared, f"{role} of this run that have a class of {run.path.name}")
        if found is not None:
            return found
    return (
        f"no forgetting table: {run.path} holds no images that it kept aside, and of {', '.join(shared)} none are new"
    )


def _restricted(
    data: Dataset, digests: Sequence[str], keep: Sequence[int], classes: Sequence[str], what: str
) -> Retention | None:
    """Return some of the images with the boxes of some classes, None where no box is left."""
    others = [name for name in data.classes if name not in classes]
    chosen = remap(data.take(keep), {}, drop=others).with_classes(classes)
    if not (~(chosen.crowd | chosen.difficult)).any():
        return None
    return Retention(data=chosen, image_digests=[digests[i] for i in keep], what=what)


def report(job: Job, workspace: Workspace) -> None:
    """Score parent and new model, where there are images for it, and leave the record; say why where that fails."""
    data = workspace.dataset(CHANNEL)
    if data is None:
        return
    workspace.log("log", {"message": f"scoring the earlier and the new model on {len(data)} {job.retention}"})
    try:
        found = _measure(data, job, workspace)
        write_json(workspace.path / FILE, found)
    except Stopped:
        workspace.log("log", {"message": "no forgetting table: stopped before it was made; the model is there"})
    except Exception as error:  # the model is trained, whatever happens to a table about it
        traceback.print_exc(file=sys.stderr)
        why = str(error) if isinstance(error, DetkitError) else f"{type(error).__name__}: {error}"
        workspace.log("log", {"message": f"no forgetting table: {why}"})
    else:
        numbers = {"AP_before": found.overall.before, "AP_after": found.overall.after}
        known = {f"forgetting/{name}": value for name, value in numbers.items() if value is not None}
        workspace.log("metric", known, step=LocalRun(workspace).last_step or None)


def _measure(data: Dataset, job: Job, workspace: Workspace) -> Forgetting:
    models = (Model(workspace.parent_model), Model(workspace.model))
    limit = max(model.manifest.max_detections for model in models)
    before, after = (_score(model, data, job, workspace, limit) for model in models)
    objects = {name: int(row["boxes"]) for name, row in before.per_class.items()}
    return Forgetting(
        data=job.retention,
        images=len(data),
        overall=APChange.between(before["AP"], after["AP"], sum(objects.values())),
        classes={
            name: APChange.between(before.per_class[name]["AP"], after.per_class[name]["AP"], objects[name])
            for name in data.classes
        },
    )


def _score(model: Model, data: Dataset, job: Job, workspace: Workspace, limit: int) -> Scores:
    options = PredictOptions(
        device=str(job.options.get("device", "auto")), score_threshold=SCORE_FLOOR, max_detections=limit
    )
    detector = load_engine(job.engine).load(model, options)  # the parent may be from anywhere, so not what it names
    found: list[Detections] = []
    try:
        for start in range(0, len(data), _BATCH):
            workspace.raise_if_stopped()
            batch = range(start, min(start + _BATCH, len(data)))
            answers = detector.detect([data[i].image() for i in batch])
            found += [replace(one, path=data.paths[i]) for one, i in zip(answers, batch, strict=True)]
    finally:
        detector.close()
    return score(data, found, max_detections=limit, score_floor=SCORE_FLOOR)  # other classes count nowhere
