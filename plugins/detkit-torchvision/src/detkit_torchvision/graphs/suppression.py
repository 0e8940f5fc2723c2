"""Non-maximum suppression of many lists of boxes at once, in each way a network is exported."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def suppress(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    """Return ``scores (g, n)`` with 0 for what is suppressed within its list, and for all but the best ``most`` of it.

    ``boxes`` are ``(g, n, 4)``. What scores 0 or less takes no part.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        kept: Tensor = _scripted(boxes, scores, threshold, most)
    else:
        kept = suppress_lists(boxes, scores, threshold, most)
    return kept


def _each_list(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    kept = torch.zeros_like(scores)
    for row in range(scores.shape[0]):
        candidates = (scores[row] > 0).nonzero()[:, 0]
        chosen = torch.ops.torchvision.nms(boxes[row][candidates], scores[row][candidates], threshold)[:most]
        places = candidates[chosen]
        kept[row, places] = scores[row][places]
    return kept


_scripted: Any = torch.jit.script_if_tracing(_each_list)  # type: ignore[no-untyped-call]

# One node to `torch.export`, so that it can become the one node that ONNX has for this.
suppress_lists = torch.library.custom_op("detkit_torchvision::suppress_lists", _each_list, mutates_args=())


@suppress_lists.register_fake
def _(boxes: Tensor, scores: Tensor, threshold: float, most: int) -> Tensor:
    return torch.empty_like(scores)


def onnx_translations() -> dict[Any, Any]:
    """Return what ``torch.onnx.export`` has to be told of `suppress_lists`. Imports onnxscript."""
    from onnxscript import opset18

    op: Any = opset18

    def translate(boxes: Any, scores: Any, threshold: float, most: int) -> Any:
        chosen = op.NonMaxSuppression(
            boxes,
            op.Unsqueeze(scores, op.Constant(value_ints=[1])),
            op.Constant(value_ints=[most]),
            op.Constant(value_floats=[threshold]),
            op.Constant(value_floats=[0.0]),
        )
        places = op.Gather(chosen, op.Constant(value_ints=[0, 2]), axis=1)
        nothing = op.Mul(scores, op.Constant(value_float=0.0))
        return op.ScatterND(nothing, places, op.GatherND(scores, places))

    return {torch.ops.detkit_torchvision.suppress_lists.default: translate}
