"""The user's own changes to a network, made by a function that ``modify=`` names."""

from __future__ import annotations

from typing import Any

from torch import nn

from detkit import usercode
from detkit.errors import DetkitError, UserCodeFailed
from detkit_torchvision.models import MODELS


def modified(network: Any, reference: str | None, model: str, num_classes: int) -> Any:
    """Return what ``module:function`` makes of a fresh network; the network itself where nothing is named.

    The function is called as ``function(network, num_outputs)``; ``num_outputs`` counts the classes, and background
    where the model has an output for it. What it returns is trained, scored and saved in place of the network: losses
    by name in training mode, ``boxes``, ``labels`` and ``scores`` of each image in evaluation mode, and the
    ``transform`` of the network it was given. Raises `UserCodeFailed` where it does not, or raises itself.
    """
    if reference is None:
        return network
    function = usercode.find_function(reference, "modify")
    transform = network.transform
    try:
        changed = function(network, num_classes + MODELS[model].label_offset)
    except DetkitError:
        raise
    except Exception as error:
        raise usercode.failure(f"modify={reference}, given a {model},", error) from error
    if not isinstance(changed, nn.Module):
        raise UserCodeFailed(
            f"modify={reference} returned {type(changed).__name__} for a {model}; expected the torch.nn.Module to "
            "train: end the function with `return network`"
        )
    if getattr(changed, "transform", None) is not transform:
        raise UserCodeFailed(
            f"modify={reference} returned a network without the `transform` that the {model} has; keep it: "
            "`changed.transform = network.transform`"
        )
    return changed
