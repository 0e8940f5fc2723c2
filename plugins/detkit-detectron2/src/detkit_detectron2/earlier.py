"""The earlier model that training starts from, looked at where no torch is needed."""

from __future__ import annotations

from pathlib import Path

from detkit.predictor import find_model
from detkit_detectron2 import yamls

_WORDS = (None, "", "none", "imagenet", "coco", "auto")
"""What ``weights`` says that is no place."""


def is_model(weights: str | None) -> bool:
    """Whether ``weights`` names an earlier run or model, and neither a release nor a file."""
    return weights not in _WORDS and not Path(str(weights)).is_file()


def has_masks(weights: str) -> bool:
    """Whether the network of an earlier model finds masks. Raises `UsageError` where there is no such model."""
    values = yamls.flatten(yamls.read(find_model(weights).path / "config.yaml").values)
    return str(values.get("MODEL.MASK_ON")) == "True"
