"""A model trained on images that never leave their pack."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import detkit
from detkit import read_dataset, write_dataset
from detkit.errors import DetkitWarning
from detkit.scores import SCORE_FLOOR

SHORT = {"iterations": 4, "batch_size": 4, "validate_every": "2 iterations", "threads": 1, "seed": 3}


def test_a_pack_trains_like_files(worker_python: str, tiny: detkit.Dataset, tmp_path: Path) -> None:
    """The same numbers, from the first loss to the last score; the run directory holds the packs alone."""
    files = replace(tiny.take(range(7)), split_indices={"train": np.arange(4), "val": np.arange(4, 7)})
    with pytest.warns(DetkitWarning, match="file names"):
        packs = read_dataset(write_dataset(files, tmp_path / "packs", "recordio"))
    runs = {
        name: detkit.Trainer(model="gluoncv/ssd_300_mobilenet0.25", **SHORT).fit(
            data, name=str(tmp_path / name), quiet=True
        )
        for name, data in (("files", files), ("packed", packs))
    }
    channel = runs["packed"].workspace.channel("train")
    assert sorted(path.name for path in channel.iterdir()) == [
        "annotations.json",
        "columns.npz",
        "digests.json",
        "images.rec",
    ]
    assert runs["packed"].metrics == runs["files"].metrics
    assert runs["packed"].model.seen() == runs["files"].model.seen()
    found = []
    for name, data in (("files", files), ("packed", packs)):
        with detkit.Predictor(runs[name], score_threshold=SCORE_FLOOR) as predictor:
            found.append(list(predictor.predict(data)))
    for from_file, from_pack, path in zip(*found, packs.paths, strict=True):
        assert from_pack.path == path
        np.testing.assert_array_equal(from_pack.boxes, from_file.boxes)
        np.testing.assert_array_equal(from_pack.scores, from_file.scores)
    scores = detkit.evaluate(runs["packed"], packs.splits["val"], allow_seen=True)
    assert scores["AP"] == pytest.approx(runs["packed"].metrics["val/AP"])
