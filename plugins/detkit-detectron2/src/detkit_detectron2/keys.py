"""Detectron2's own keys, such as ``SOLVER.BASE_LR``: which are parameters here, which are not to be set, which stay."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from detkit.errors import InvalidValue, UnknownName, UsageError
from detkit.natives import Adopted, Meaning, written
from detkit_detectron2 import earlier, releases, sources, yamls
from detkit_detectron2.zoo import ENTRIES, FROM_CONFIG


def _schedule(name: str) -> str:
    known = {"WarmupMultiStepLR": "step", "WarmupCosineLR": "cosine"}
    if name not in known:
        raise ValueError(f"one of {', '.join(known)}, or lr_scheduler=")
    return known[name]


def _every(iterations: Any) -> str:
    if int(iterations) < 1:
        raise ValueError("a number of iterations from 1")
    return f"{int(iterations)} iterations"


def _flag(value: Any) -> bool:
    """Read true and false, also as YAML and the command line write them."""
    if str(value).lower() not in {"true", "false"}:
        raise ValueError("True or False")
    return str(value).lower() == "true"


def _amp(enabled: Any) -> str | None:
    return "fp16" if _flag(enabled) else None


def _same(value: Any) -> Any:
    return value


MEANINGS: Mapping[str, tuple[str, Callable[[Any], Any]]] = {
    "SOLVER.BASE_LR": ("learning_rate", _same),
    "SOLVER.MAX_ITER": ("iterations", _same),
    "SOLVER.IMS_PER_BATCH": ("batch_size", _same),
    "SOLVER.WARMUP_ITERS": ("warmup_iterations", _same),
    "SOLVER.LR_SCHEDULER_NAME": ("lr_scheduler", _schedule),
    "SOLVER.STEPS": ("lr_scheduler_iterations", _same),
    "SOLVER.GAMMA": ("lr_scheduler_factor", _same),
    "SOLVER.MOMENTUM": ("momentum", _same),
    "SOLVER.WEIGHT_DECAY": ("weight_decay", _same),
    "SOLVER.CHECKPOINT_PERIOD": ("checkpoint_every", _every),
    "SOLVER.AMP.ENABLED": ("amp", _amp),
    "TEST.EVAL_PERIOD": ("validate_every", _every),
    "TEST.DETECTIONS_PER_IMAGE": ("max_detections", _same),
    "MODEL.BACKBONE.FREEZE_AT": ("frozen_stages", _same),
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": ("nms_threshold", _same),
    "MODEL.RETINANET.NMS_THRESH_TEST": ("nms_threshold", _same),
    "MODEL.MASK_ON": ("masks", _flag),
    "MODEL.WEIGHTS": ("weights", _same),
    "SEED": ("seed", _same),
}
"""Keys that are parameters here, whose names and values the loop, validation and every other engine share."""

RIVALS: Mapping[str, str] = {
    "INPUT.MIN_SIZE_TRAIN": "image_size",
    "INPUT.MIN_SIZE_TEST": "image_size",
    "INPUT.MIN_SIZE_TRAIN_SAMPLING": "image_size",
    "INPUT.MAX_SIZE_TRAIN": "max_image_size",
    "INPUT.MAX_SIZE_TEST": "max_image_size",
    "MODEL.ANCHOR_GENERATOR.SIZES": "anchor_sizes",
    "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": "anchor_ratios",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "proposals",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "proposals",
    "SOLVER.CLIP_GRADIENTS.ENABLED": "gradient_clip",
    "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "gradient_clip",
    "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "gradient_clip",
    "SOLVER.CLIP_GRADIENTS.NORM_TYPE": "gradient_clip",
}
"""Keys that say more than the parameter which sets them too; of both only one may be given."""

_BY_DATA = "the data says how many classes there are"
_THRESHOLD = "give score_threshold where you predict; training keeps all that the scores need, and finds the best one"
_LOADS = "detkit loads and orders the images itself: num_workers, sampling and seed are for that"

_ALSO_KEPT = ("MODEL.WEIGHTS", "MODEL.MASK_ON")
"""What the model ``config`` needs too, beside the parameters: where its weights are, and whether it has masks."""

_CLIPPING = "SOLVER.CLIP_GRADIENTS"

_WITH_MASKS = "mask_rcnn_R_50_FPN_3x"

_NMS = {"RetinaNet": "MODEL.RETINANET.NMS_THRESH_TEST"}
"""Which of two thresholds a network looks at, by ``MODEL.META_ARCHITECTURE``; all others that of ``ROI_HEADS``."""

REFUSED: Mapping[str, str] = {
    "MODEL.ROI_HEADS.NUM_CLASSES": _BY_DATA,
    "MODEL.RETINANET.NUM_CLASSES": _BY_DATA,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": _THRESHOLD,
    "MODEL.RETINANET.SCORE_THRESH_TEST": _THRESHOLD,
    "INPUT.MASK_FORMAT": "the data's masks may be polygons and run-length encodings, and are learned as bitmasks",
    "MODEL.DEVICE": "give the option device, gpus or processes",
    "OUTPUT_DIR": "give name, the run's directory",
    "DATASETS": "give the data as train, val and test",
    "DATALOADER": _LOADS,
    "SOLVER.REFERENCE_WORLD_SIZE": "lr_batch_size scales the learning rate to the batch",
    "SOLVER.WARMUP_FACTOR": "warm-up begins at the learning rate divided by its steps: give warmup_iterations",
    "SOLVER.WARMUP_METHOD": "warm-up is linear: give warmup_iterations",
    "SOLVER.NUM_DECAYS": "give lr_scheduler=step and lr_scheduler_iterations",
    "SOLVER.RESCALE_INTERVAL": "give lr_scheduler=step and lr_scheduler_iterations",
    "SOLVER.BASE_LR_END": "the cosine ends at 0",
    "MODEL.LOAD_PROPOSALS": "proposals from files are not supported",
    "MODEL.KEYPOINT_ON": "detkit's data has boxes and masks, no keypoints",
    "TEST.EXPECTED_RESULTS": "compare the scores yourself: detkit.evaluate",
    "TEST.AUG": "augmentation at test time is not supported",
    "TEST.PRECISE_BN": "it is not supported; batch norms keep their moving averages",
    "VIS_PERIOD": "see what is predicted with detkit draw",
    "CUDNN_BENCHMARK": "it is not a matter of the model that comes out",
    "FLOAT32_PRECISION": "give amp",
    "GLOBAL": "it has no effect",
}
"""Keys, and sections of them, that detkit owns or that have no effect, with what to do instead."""


def adopt(model: str, keys: Mapping[str, str], given: Mapping[str, Any]) -> Adopted:
    """Return which keys stay as they are, and which are parameters here, those of ``config`` among them.

    Raises `UsageError` for a key that Detectron2 does not have, where there is one to ask, that detkit owns, or that
    says the same as a parameter which is given, and `PluginError` where the variable names no checkout. Beside
    ``add_config`` a key that Detectron2 does not have is left to the worker, which can run the function and so know.
    """
    sources.check_variable()
    overrides, meanings = _read_config(model, keys, given)
    for key, text in keys.items():
        _refuse(key, text, given)
        overrides.pop(key, None)
        if key not in MEANINGS:
            overrides[key] = text
            continue
        own = _meaning(model, key, text)
        meanings[:] = [one for one in meanings if not (one.origin and one.name == own.name)]
        meanings.append(own)
        if model == FROM_CONFIG and key in _ALSO_KEPT:
            overrides[key] = written(own.value) if key == "MODEL.MASK_ON" else text
    _clip_as_said(overrides, keys, meanings)
    _choose_steps(meanings, given)
    _require_mask_head(model, overrides, keys, given)
    if model == FROM_CONFIG and "masks" not in given and (why := _has_no_masks(overrides, given)):
        meanings.append(Meaning("MODEL.MASK_ON", "masks", False, why))
    return Adopted(overrides, meanings)


def _read_config(model: str, keys: Mapping[str, str], given: Mapping[str, Any]) -> tuple[dict[str, str], list[Meaning]]:
    """Return what the file ``config`` says and inherits; what detkit owns is left out, as any such file has it."""
    overrides: dict[str, str] = {}
    meanings: list[Meaning] = []
    if given.get("config") is None:
        return overrides, meanings
    config = yamls.read(Path(str(given["config"])))
    flat = yamls.flatten(config.values)
    network = keys.get("MODEL.META_ARCHITECTURE", flat.get("MODEL.META_ARCHITECTURE"))
    threshold = _NMS.get(str(network), "MODEL.ROI_HEADS.NMS_THRESH_TEST")
    for key, value in flat.items():
        if (
            key == "VERSION"
            or _why_refused(key) is not None
            or given.get(RIVALS.get(key, "")) not in (None, "auto", ())
            or (key == "SOLVER.NESTEROV" and given.get("optimizer") not in (None, "sgd"))
        ):
            continue
        if key not in MEANINGS or key in _ALSO_KEPT:
            overrides[key] = written(value)
        if key not in MEANINGS or key == "MODEL.MASK_ON" or _says_nothing(key, value):
            continue
        name, _ = MEANINGS[key]
        # Steps choose a schedule, too.
        is_needed = name not in given or key == "SOLVER.STEPS"
        if is_needed and (name != "nms_threshold" or key == threshold):
            meanings.append(_meaning(model, key, written(value), str(config.origins[key])))
    return overrides, meanings


def _says_nothing(key: str, value: Any) -> bool:
    """Tell whether a value stands for none, as in the files that Detectron2's own trainer writes."""
    return (key, str(value)) in {("TEST.EVAL_PERIOD", "0"), ("SEED", "-1")}


def _clip_as_said(overrides: dict[str, str], keys: Mapping[str, str], meanings: list[Meaning]) -> None:
    """Let what is said of Detectron2's clipping take the place of a model's own, and mean that there is some."""
    said = [key for key in keys if key.startswith(f"{_CLIPPING}.")]
    meanings += [Meaning(key, "gradient_clip", None) for key in said]
    if said and f"{_CLIPPING}.ENABLED" not in said:
        overrides[f"{_CLIPPING}.ENABLED"] = "True"


def _require_mask_head(
    model: str, overrides: Mapping[str, str], keys: Mapping[str, str], given: Mapping[str, Any]
) -> None:
    """Raise `UsageError` where masks are asked for of a network that has none."""
    key, config = "MODEL.MASK_ON", given.get("config")
    is_asked = str(given.get("masks")).lower() == "true"
    if model != FROM_CONFIG:
        said = f"{key}={keys[key]}" if key in keys and _flag(keys[key]) else "masks=true" if is_asked else ""
        if said and ENTRIES[model].family != "mask_rcnn":
            raise UsageError(f"{said} asks for masks, and {model} has none; choose a Mask R-CNN, such as {_WITH_MASKS}")
    elif is_asked and (without := _has_no_masks(overrides, given)):
        asks = f"masks=true asks for masks, and {without} has none; give {key}=True"
        raise UsageError(asks if config else f"{asks} as well, for a mask head that starts fresh, or leave masks out")


def _has_no_masks(overrides: Mapping[str, str], given: Mapping[str, Any]) -> str:
    """Return the file, or the earlier model, of a network that has no mask head; empty where it has one."""
    key, config, weights = "MODEL.MASK_ON", given.get("config"), given.get("weights")
    if overrides.get(key) == "True":
        return ""
    if config is not None:
        return str(config)
    is_without = earlier.is_model(weights) and (key in overrides or not earlier.has_masks(str(weights)))
    return str(weights) if is_without else ""


def _meaning(model: str, key: str, text: str, origin: str = "") -> Meaning:
    name, convert = MEANINGS[key]
    try:
        if key == "MODEL.WEIGHTS":
            return Meaning(key, name, releases.word(model, text), origin)
        return Meaning(key, name, convert(_decoded(text)), origin)
    except (ValueError, TypeError) as error:
        raise InvalidValue(key, text, f"expected {error}", origin) from None


def _decoded(text: str) -> Any:
    """Return a value the way yacs reads it: a literal of Python, else the text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _refuse(key: str, text: str, given: Mapping[str, Any]) -> None:
    why = _why_refused(key)
    if why is not None:
        raise UsageError(f"{key}={text} cannot be given: {why}")
    known = sources.defaults()
    if known is not None and key not in known and given.get("add_config") is None:
        raise unknown(key, known)
    rival = RIVALS.get(key)
    if rival is not None and given.get(rival) not in (None, "auto", ()):
        raise UsageError(f"{key}={text} and {rival}={given[rival]} set the same; give one of them")


def unknown(key: str, known: Iterable[str]) -> UnknownName:
    """Return the error for a key that is none of those known; it lists those of its section, and the closest."""
    known = list(known)
    section = [one for one in known if one.rpartition(".")[0] == key.rpartition(".")[0]]
    hint = "keys of your own code are added by the function that add_config=module:function names"
    return UnknownName("key of Detectron2", key, {*section, *difflib.get_close_matches(key, known)}, hint)


def _why_refused(key: str) -> str | None:
    return next((why for start, why in REFUSED.items() if key == start or key.startswith(f"{start}.")), None)


def _choose_steps(meanings: list[Meaning], given: Mapping[str, Any]) -> None:
    """Let steps choose the schedule that has steps, as Detectron2's own does unless it is told another.

    Raises `UsageError` for steps that are given beside another schedule; those of a file give way to what is given.
    """
    said = {one.name: one for one in meanings}
    steps, schedule = said.get("lr_scheduler_iterations"), said.get("lr_scheduler")
    if steps is None:
        return
    if schedule is not None and schedule.origin and not steps.origin:
        meanings.remove(schedule)
        schedule = None
    chosen = given.get("lr_scheduler", schedule.value if schedule else "step")
    if chosen != "step" and not steps.origin:
        other = f"{schedule.key}, which is " if schedule and "lr_scheduler" not in given else ""
        raise UsageError(f"{steps.key} is for lr_scheduler=step and contradicts {other}lr_scheduler={chosen}; give one")
    if chosen != "step" or (steps.origin and given.get("lr_scheduler_step") not in (None, ())):
        meanings.remove(steps)
    if schedule is None and "lr_scheduler" not in given:
        meanings.append(Meaning(steps.key, "lr_scheduler", "step", steps.origin))
