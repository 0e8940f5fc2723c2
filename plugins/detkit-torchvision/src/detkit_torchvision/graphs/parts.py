"""What the graphs of one-stage and two-stage networks are made of.

Everything here holds for any number of images of any size, in ``torch.export`` and in a TorchScript trace: functions
that a trace would bind to one size or device are scripts in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detkit_torchvision.models import Normalize


class Features(nn.Module):
    """Normalises images of 0 to 255 and returns the levels of a backbone."""

    scale: Tensor
    shift: Tensor

    def __init__(self, backbone: nn.Module, normalize: Normalize) -> None:
        super().__init__()
        self.backbone = backbone
        self.register_buffer("scale", normalize.scale.clone())
        self.register_buffer("shift", normalize.shift.clone())

    def forward(self, images: Tensor) -> list[Tensor]:
        found: Any = self.backbone(images.float() * self.scale + self.shift)
        return [found] if isinstance(found, Tensor) else list(found.values())


class GridAnchors(nn.Module):
    """torchvision's ``AnchorGenerator`` for batches whose size is not known before."""

    def __init__(self, cells: Sequence[Tensor]) -> None:
        super().__init__()
        self.counts = [cell.shape[0] for cell in cells]
        for level, cell in enumerate(cells):
            self.register_buffer(f"cell{level}", cell.float().clone())

    def forward(self, level: int, feature: Tensor, images: Tensor) -> Tensor:
        """Return the ``(n, 4)`` anchors of a level."""
        anchors: Tensor = grid_anchors(getattr(self, f"cell{level}"), feature, images)
        return anchors

    def split(self, outputs: Tensor, features: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Split ``(b, n, k)`` outputs for all anchors by level."""
        sizes = [one.shape[-2] * one.shape[-1] * count for one, count in zip(features, self.counts, strict=True)]
        return torch.split(outputs, sizes, dim=1)


@torch.jit.script_if_tracing  # type: ignore[untyped-decorator]
def grid_anchors(cell: Tensor, feature: Tensor, images: Tensor) -> Tensor:
    """Return the anchors of ``cell (a, 4)`` at each place of a feature map, row by row: ``(h * w * a, 4)``."""
    height, width = feature.shape[-2], feature.shape[-1]
    x = torch.arange(width, device=feature.device) * (images.shape[-1] // width)
    y = torch.arange(height, device=feature.device) * (images.shape[-2] // height)
    xs, ys = x[None, :].expand(height, width), y[:, None].expand(height, width)
    shifts = torch.stack([xs, ys, xs, ys], dim=-1).reshape(-1, 1, 4)
    return (shifts + cell).reshape(-1, 4)


@torch.jit.script_if_tracing  # type: ignore[untyped-decorator]
def best(scores: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Return the best along the last axis, ``most`` at most, and where they are."""
    if torch.jit.is_scripting():  # type: ignore[attr-defined]
        return scores.topk(min(most, scores.shape[-1]), dim=-1)
    return scores.topk(torch.sym_min(most, scores.shape[-1]), dim=-1)


@torch.jit.script_if_tracing  # type: ignore[untyped-decorator]
def indices_along(axis: int, like: Tensor) -> Tensor:
    """Return the int64 index along an axis for each place of a tensor."""
    shape = [1] * like.dim()
    shape[axis] = like.shape[axis]
    return torch.arange(like.shape[axis], device=like.device).reshape(shape).expand(like.shape)


@torch.jit.script_if_tracing  # type: ignore[untyped-decorator]
def laid_out(values: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """Return ``(b, n, ...)`` with the values ``(r, ...)`` at their places in ``b * n``, 0 elsewhere.

    ``like`` is of shape ``(b, n)``.
    """
    shape = list(values.shape[1:])
    table = torch.zeros([like.shape[0] * like.shape[1]] + shape, dtype=values.dtype, device=values.device)  # noqa: RUF005
    table[places] = values
    return table.reshape([like.shape[0], like.shape[1]] + shape)  # noqa: RUF005


def rows(table: Tensor, indices: Tensor) -> Tensor:
    """Return rows ``(b, k, c)`` of ``table (b, n, c)`` by ``indices (b, k)``."""
    return table.gather(1, indices[..., None].expand(-1, -1, table.shape[-1]))


def decode(coder: Any, deltas: Tensor, anchors: Tensor) -> Tensor:
    """Return the boxes of torchvision's ``BoxCoder``: ``(..., 4)``, as all three."""
    boxes: Tensor = coder.decode_single(deltas.reshape(-1, 4), anchors.reshape(-1, 4))
    return boxes.reshape(deltas.shape)
