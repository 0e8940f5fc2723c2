"""Small data sets to mutate, and a guard around whatever reads them."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit import plugins, read_dataset, write_dataset
from detkit.testing.formats import _watching

MEMORY = 512 << 20
"""Bytes of address space that reading or writing a few kilobytes may take."""
SECONDS = 5.0
"""Of the processor, for the same; a hundred times what it takes."""


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return a folder for each format: three images of a few pixels, four boxes. VOC has splits."""
    root = tmp_path_factory.mktemp("seeds")
    (root / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 12), (80 * i, 5, 200)).save(root / f"pictures/{i}.png")
    boxes = [[[1, 2, 5, 6], [0, 0, 16, 12]], [[2, 2, 9, 11]], [[7, 1, 8, 12]]]
    content = {
        "images": [{"id": i, "file_name": f"{i}.png", "width": 16, "height": 12} for i in range(3)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [
            {"id": 10 * i + k, "image_id": i, "category_id": 1 + k, "bbox": [x, y, a - x, b - y], "pose": "left"}
            for i, of_image in enumerate(boxes)
            for k, (x, y, a, b) in enumerate(of_image)
        ],
    }
    (root / "pictures/annotations.json").write_text(json.dumps(content))
    data = read_dataset(root / "pictures", "coco")
    split = replace(data, split_indices={"train": np.array([0, 1]), "val": np.array([2])})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {
            name: write_dataset(split if name == "voc" else data, root / name, name, images="copy")
            for name in plugins.formats()
        }


@pytest.fixture(scope="session", autouse=True)
def _no_cache() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETKIT_CACHE", "off")
        yield


@pytest.fixture
def guarded() -> Any:
    """Return the guard."""
    return _guarded


@contextlib.contextmanager
def _guarded(*folders: Path) -> Iterator[None]:
    """Limit memory and time within the block, and fail where Python opens a file that is not in these folders."""

    def too_long(_signal: int, _frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {SECONDS:g} seconds of the processor")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    old = signal.signal(signal.SIGVTALRM, too_long)
    with _watching() as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
        resource.setrlimit(resource.RLIMIT_AS, (before + MEMORY, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, old)
    code = (".py", ".pyc", ".so", ".txt.gz")
    outside = [path for path in opened if not path.name.endswith(code) and not any(map(path.is_relative_to, folders))]
    assert not outside, f"opened outside of the data set: {sorted(set(map(str, outside)))}"
