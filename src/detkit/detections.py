"""What a model found on one image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from detkit.boxes import Boxes
from detkit.data import Indices


@dataclass(frozen=True, eq=False, kw_only=True)
class Detections:
    """What a model found on one image, best score first."""

    path: str
    """The image; empty where it never was a file."""
    width: int
    height: int
    classes: tuple[str, ...]
    """The model's class names; a label is an index into them."""
    boxes: Boxes
    """``(n, 4)``, xyxy, absolute pixels of the original image, 0-based, half-open."""
    labels: Indices
    """``(n,)`` indices into `classes`."""
    scores: NDArray[np.float64]
    """``(n,)`` in 0..1, not rising."""

    def __post_init__(self) -> None:
        n = len(self.scores)
        if self.boxes.shape != (n, 4) or self.labels.shape != (n,):
            raise ValueError(f"boxes {self.boxes.shape}, labels {self.labels.shape}, scores {self.scores.shape}")

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each detection."""
        return tuple(self.classes[label] for label in self.labels)

    def above(self, score_threshold: float) -> Detections:
        """Return only the detections with at least this score."""
        keep = self.scores >= score_threshold
        return replace(self, boxes=self.boxes[keep], labels=self.labels[keep], scores=self.scores[keep])

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: path, width, height, and one record of name, score, box for each detection."""
        return {
            "path": self.path,
            "width": self.width,
            "height": self.height,
            "detections": [
                {"name": name, "score": score, "box": box}
                for name, score, box in zip(self.names, self.scores.tolist(), self.boxes.tolist(), strict=True)
            ],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any], classes: Sequence[str]) -> Detections:
        """Read what `to_dict` wrote."""
        index = {name: i for i, name in enumerate(classes)}
        found = record["detections"]
        return cls(
            path=record["path"],
            width=record["width"],
            height=record["height"],
            classes=tuple(classes),
            boxes=np.array([d["box"] for d in found], dtype=np.float64).reshape(-1, 4),
            labels=np.array([index[d["name"]] for d in found], dtype=np.int64),
            scores=np.array([d["score"] for d in found], dtype=np.float64),
        )
