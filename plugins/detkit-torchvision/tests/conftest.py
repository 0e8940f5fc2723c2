"""Data that several tests train on; torch keeps to one thread, as several tests run beside each other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import detkit
from detkit.masks import encode
from detkit.testing import tiny_dataset

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> detkit.Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def masked(tiny: detkit.Dataset) -> detkit.Dataset:
    """The same objects with their outlines, in each of COCO's three ways."""
    return detkit.Dataset.from_samples(tiny.classes, [replace(sample, masks=_masks(sample)) for sample in tiny])


def _masks(sample: detkit.Sample) -> tuple[Any, ...]:
    found: list[Any] = []
    for name, (x0, y0, x1, y1) in zip(sample.names, sample.boxes.tolist(), strict=True):
        pixels = np.zeros((sample.height, sample.width), dtype=bool)
        pixels[int(y0) : int(y1), int(x0) : int(x1)] = True
        if name == "disc":
            turns = np.linspace(0, 2 * np.pi, 24, endpoint=False)
            points = [(x0 + x1, y0 + y1) + np.array([np.cos(t), np.sin(t)]) * (x1 - x0, y1 - y0) for t in turns]
            found.append([(np.array(points) / 2).ravel().tolist()])
        elif found:
            found.append(encode(pixels))
        else:
            flat = pixels.ravel(order="F")
            edges = np.flatnonzero(np.diff(flat)) + 1
            found.append({"size": list(pixels.shape), "counts": np.diff([0, *edges, len(flat)]).tolist()})
    return tuple(found)


@pytest.fixture(autouse=True)
def _nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs go to a fresh folder, and torch's cache of weights is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DETKIT_RUNS", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
