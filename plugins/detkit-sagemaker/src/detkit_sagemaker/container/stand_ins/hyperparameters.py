"""The hyperparameters that AWS's images take, checked on their own: what detkit's controller sends has to pass here."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from detkit_sagemaker.container.stand_ins.service import refuse

Read = Callable[[str], Any]
"""Converts the text of a hyperparameter. Raises `ValueError` with what is expected."""


def _whole(low: int, high: int | None = None) -> Read:
    def read(text: str) -> int:
        if not re.fullmatch(r"\d+", text) or int(text) < low or (high is not None and int(text) > high):
            raise ValueError(f"a whole number from {low}" + ("" if high is None else f" to {high}"))
        return int(text)

    return read


def _real(expected: str, fits: Callable[[float], bool]) -> Read:
    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            raise ValueError(f"a number, {expected}") from None
        if not fits(number):
            raise ValueError(f"a number, {expected}")
        return number

    return read


def _word(*words: str) -> Read:
    def read(text: str) -> str:
        if text not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return text

    return read


def _flag(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise ValueError("True or False")
    return text.lower() == "true"


def _epochs(text: str) -> list[int]:
    if not re.fullmatch(r"\s*(\d+\s*(,\s*\d+\s*)*)?", text):
        raise ValueError("epochs with commas between")
    return [int(part) for part in text.split(",") if part.strip()]


def _pattern(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        raise ValueError(f"a regular expression ({error})") from None
    return text


_SHARE = _real("above 0, at most 1", lambda x: 0 < x <= 1)
_OPEN = _real("above 0, below 1", lambda x: 0 < x < 1)

REQUIRED = ("num_classes", "num_training_samples")

BUILTIN: Mapping[str, tuple[Read, Any]] = {
    "num_classes": (_whole(1), None),
    "num_training_samples": (_whole(1), None),
    "base_network": (_word("vgg-16", "resnet-50"), "vgg-16"),
    "use_pretrained_model": (_whole(0, 1), 1),
    "epochs": (_whole(1), 30),
    "mini_batch_size": (_whole(1), 32),
    "learning_rate": (_SHARE, 0.001),
    "lr_scheduler_factor": (_OPEN, 0.1),
    "lr_scheduler_step": (_epochs, []),
    "optimizer": (_word("sgd", "adam", "rmsprop", "adadelta"), "sgd"),
    "momentum": (_SHARE, 0.9),
    "weight_decay": (_OPEN, 0.0005),
    "image_shape": (_whole(300), 300),
    "label_width": (_whole(1), 350),
    "nms_threshold": (_SHARE, 0.45),
    "overlap_threshold": (_SHARE, 0.5),
    "freeze_layer_pattern": (_pattern, None),
    "kv_store": (_word("dist_sync", "dist_async", "device"), None),
    "early_stopping": (_flag, False),
    "early_stopping_min_epochs": (_whole(1), 10),
    "early_stopping_patience": (_whole(1), 5),
    "early_stopping_tolerance": (_real("from 0 to 1", lambda x: 0 <= x <= 1), 0.0),
    "nms_topk": (_whole(1), 400),
    "_kvstore": (str, "device"),
    "_num_kv_servers": (str, "auto"),
    "_tuning_objective_metric": (str, ""),
}
"""How each is read, and its default. Ranges are those of "Object Detection Hyperparameters"; the last four are in the
log of a job of 2019."""


def read_builtin(given: Mapping[str, str]) -> dict[str, Any]:
    """Return the built-in algorithm's hyperparameters with its defaults. Raises `Failure` for what it refuses."""
    begin = "Unable to initialize the algorithm. Failed to validate hyperparameters. (caused by ValidationError)\n\n"
    unknown = [name for name in given if name not in BUILTIN]
    if unknown:
        names = ", ".join(map(repr, unknown))
        raise refuse(f"{begin}Caused by: Additional properties are not allowed ({names} was unexpected)")
    missing = [name for name in REQUIRED if name not in given]
    if missing:
        raise refuse(f"{begin}Caused by: {missing[0]!r} is a required property")
    values = {name: default for name, (_, default) in BUILTIN.items()}
    for name, text in given.items():
        try:
            values[name] = BUILTIN[name][0](text)
        except ValueError as expected:
            raise refuse(f"{begin}Caused by: {text!r} is not valid for {name}: expected {expected}") from None
    return values


JUMPSTART: Mapping[str, tuple[Read, Any]] = {
    "epochs": (_whole(1, 1000), 3),
    "adam-learning-rate": (_real("1e-8 to 1", lambda x: 1e-8 <= x <= 1), None),
    "batch-size": (_whole(1, 1024), 4),
}
"""Of the script ``transfer_learning.py``. Other names are left to the framework's container."""


def read_jumpstart(given: Mapping[str, str]) -> dict[str, Any]:
    """Return the hyperparameters of JumpStart's script, which come as JSON in strings. Raises `Failure`."""
    plain = {name: _unquoted(text) for name, text in given.items()}
    for name in ("sagemaker_program", "sagemaker_submit_directory"):
        if not plain.get(name):
            raise refuse(f"hyperparameter {name} is missing, so the framework's container knows no script to run")
    return {**read_script_arguments(plain), "sagemaker_submit_directory": plain["sagemaker_submit_directory"]}


def read_script_arguments(given: Mapping[str, str]) -> dict[str, Any]:
    """Return the hyperparameters of JumpStart's script as it is called, by name without dashes. Raises `Failure`."""
    values = {name: default for name, (_, default) in JUMPSTART.items()}
    for name in JUMPSTART.keys() & given.keys():
        try:
            values[name] = JUMPSTART[name][0](given[name])
        except ValueError as expected:
            raise refuse(f"argument --{name}: invalid value {given[name]!r}: expected {expected}") from None
    return values


def _unquoted(text: str) -> str:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, str) else text
