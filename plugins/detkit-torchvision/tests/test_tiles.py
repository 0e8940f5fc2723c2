"""Objects that are small in a large picture: a trained model finds them in tiles, and misses them without."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from detkit import Dataset, Predictor, Run, Sample, Trainer, read_dataset, score
from detkit.shapes import CLASSES, draw_scene, write_shapes

SIDE, COLUMNS, PAGES = 160, 4, 3


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("tiles")
    data = read_dataset(write_shapes(folder / "shapes", num_images=200, size=SIDE))
    trainer = Trainer(model="torchvision/ssd_tiny", iterations=400, device="cpu", seed=0)
    return trainer.fit(data, name=str(folder / "run"), quiet=True)


def pages(folder: Path) -> Dataset:
    """Pictures of sixteen scenes each, which the model would see at a quarter of the size that it knows."""
    rng = np.random.default_rng(7)
    samples = []
    for page in range(PAGES):
        picture, boxes, names = Image.new("RGB", (COLUMNS * SIDE, COLUMNS * SIDE)), [], []
        for i in range(COLUMNS * COLUMNS):
            scene, some, kinds = draw_scene(rng, SIDE)
            place = SIDE * (i % COLUMNS), SIDE * (i // COLUMNS)
            picture.paste(scene, place)
            boxes.append(some + np.tile(place, 2))
            names += kinds
        path = folder / f"{page}.png"
        picture.save(path)
        samples.append(
            Sample(
                path=str(path),
                width=picture.width,
                height=picture.height,
                boxes=np.concatenate(boxes),
                names=tuple(names),
            )
        )
    return Dataset.from_samples(CLASSES, samples)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_small_objects_are_found_in_tiles_and_missed_without(run: Run, tmp_path: Path) -> None:
    data = pages(tmp_path)
    reached = {}
    for name, tiles in {
        "none": {},
        "all": {"tile_size": SIDE, "tile_overlap": 0.4},
        "alone": {"tile_size": SIDE, "tile_overlap": 0.4, "tile_whole": False},
    }.items():
        with Predictor(run, score_threshold=0.05, **tiles) as predictor:  # type: ignore[arg-type]
            reached[name] = score(data, list(predictor.predict(data)), max_detections=1000)["AP50"]
    assert reached["none"] < 0.1
    assert reached["all"] > 0.6 and reached["alone"] > 0.6, reached
