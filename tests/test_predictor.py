"""What `Predictor` takes, and what it says about images that it cannot read."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
from PIL import Image

from detkit import Dataset, Detections, Model, Predictor, Run, Trainer
from detkit.errors import ImageError, Unsupported, UsageError
from detkit.files import file_sha256, write_json
from detkit.predictor import DEFAULT_SCORE_THRESHOLD
from detkit.testing import tiny_dataset

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(scope="module")
def run(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("predictor")
    return Trainer(model="echo/memory", epochs=8).fit(tiny, tiny, name=str(folder / "run"), quiet=True)


@pytest.fixture(scope="module")
def predictor(run: Run) -> Iterator[Predictor]:
    with Predictor(run) as opened:
        yield opened


def same(a: Detections, b: Detections) -> bool:
    return a.names == b.names and np.array_equal(a.boxes, b.boxes) and np.array_equal(a.scores, b.scores)


def test_a_call_takes_one_image(predictor: Predictor, tiny: Dataset) -> None:
    path = tiny.paths[0]
    by_path = predictor(path)
    assert by_path.path == path
    assert by_path.names == tiny[0].names
    np.testing.assert_allclose(by_path.boxes, tiny[0].boxes, atol=1e-9)
    for image in (Path(path), tiny[0].image(), Image.open(path)):
        found = predictor(image)
        assert same(found, by_path)
        assert found.path == (path if isinstance(image, Path) else "")


def test_sources(predictor: Predictor, tiny: Dataset) -> None:
    folder = Path(tiny.paths[0]).parent
    expected = [predictor(path) for path in tiny.paths]

    def matches(source: object, rows: list[int]) -> bool:
        found = list(predictor.predict(source))  # type: ignore[arg-type]
        assert len(found) == len(rows)
        return all(same(one, expected[i]) for one, i in zip(found, rows, strict=True))

    everything = list(range(8))
    assert matches(folder, everything)
    assert matches(str(folder), everything)
    assert matches(f"{folder}/*.jpg", [0, 2, 4, 6])
    assert matches(f"{folder.parent}/**/*.png", [1, 3, 5, 7])
    assert matches(tiny, everything)
    assert matches(tiny.take([3, 1]), [3, 1])
    assert matches(tiny.paths[2], [2])
    assert matches([tiny.paths[1], Path(tiny.paths[0])], [1, 0])
    assert matches((sample.image() for sample in tiny), everything)
    assert matches(tiny[4].image(), [4])
    assert matches([], [])
    assert [found.path for found in predictor.predict(folder)] == sorted(tiny.paths)


def test_batches_give_the_same(run: Run, tiny: Dataset) -> None:
    found = {}
    for batch_size in (1, 3, 64):
        with Predictor(run, batch_size=batch_size) as predictor:
            found[batch_size] = list(predictor.predict(tiny))
    for size in (3, 64):
        assert all(same(a, b) for a, b in zip(found[1], found[size], strict=True))


def test_images_are_read_as_they_are_needed(predictor: Predictor, tiny: Dataset) -> None:
    """A stream without end is no problem: at most a few batches are read ahead."""
    taken = 0

    def endless() -> Iterator[str]:
        nonlocal taken
        while True:
            taken += 1
            yield tiny.paths[0]

    stream = predictor.predict(endless())
    for _ in range(20):
        next(stream)
    assert taken <= 20 + 3 * predictor.batch_size
    stream.close()  # type: ignore[attr-defined]


def test_no_image_there(predictor: Predictor, tmp_path: Path) -> None:
    for source in (tmp_path, f"{tmp_path}/*.jpg"):
        with pytest.raises(UsageError, match=r"no image in .*looked for \.bmp"):
            list(predictor.predict(source))
    with pytest.raises(ImageError, match=r"nowhere.jpg: there is no such file"):
        predictor("nowhere.jpg")
    with pytest.raises(ImageError, match=r"nowhere.jpg: there is no such file"):
        list(predictor.predict("nowhere.jpg"))


@pytest.mark.parametrize(
    ("name", "cut", "why"),
    [("b.jpg", 0.5, "truncated"), ("b.jpg", 0.0, "no image that Pillow knows, or it is empty"), ("b.png", 0.5, "")],
)
def test_broken_image_in_a_folder_is_named(  # noqa: PLR0917 - pytest gives them by name
    name: str, cut: float, why: str, predictor: Predictor, tiny: Dataset, tmp_path: Path
) -> None:
    for letter in "ac":
        Image.fromarray(tiny[0].image()).save(tmp_path / f"{letter}.png")
    Image.fromarray(tiny[0].image()).save(tmp_path / name)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(len(content) * cut)])
    with pytest.raises(ImageError, match=rf"cannot read image {tmp_path}/{name}: .*{why}") as caught:
        list(predictor.predict(tmp_path))
    assert caught.value.path == str(tmp_path / name)
    assert caught.value.exit_code == 1


def test_arrays_of_another_kind(predictor: Predictor) -> None:
    for wrong in (np.zeros((4, 4, 3)), np.zeros((4, 4), dtype=np.uint8), np.zeros((4, 4, 4), dtype=np.uint8)):
        with pytest.raises(UsageError, match=r"expected uint8 \(height, width, 3\), RGB"):
            predictor(wrong)  # type: ignore[arg-type]


def test_exif_orientation_is_applied(predictor: Predictor, tiny: Dataset, tmp_path: Path) -> None:
    """The same picture stored lying on its side, with the tag that sets it upright."""
    upright = Image.fromarray(tiny[0].image()).crop((0, 0, 96, 60))
    upright.save(tmp_path / "upright.png")
    for orientation, turn in (
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ):
        stored = upright.transpose(turn)
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"turned{orientation}.png"
        stored.save(file, exif=exif)
        turned, expected = predictor(file), predictor(tmp_path / "upright.png")
        assert (turned.width, turned.height) == (96, 60)
        assert same(turned, expected)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_other_pixels_become_rgb(mode: str, predictor: Predictor, tiny: Dataset, tmp_path: Path) -> None:
    grey = Image.fromarray(tiny[0].image()).convert("L")
    if mode == "I;16":
        image = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        assert image.mode == "I;16"
    else:
        image = grey.convert(mode) if mode in {"P", "1"} else grey.convert("RGB").convert(mode)
    file = tmp_path / f"image.{'tif' if mode == 'CMYK' else 'png'}"
    image.save(file)
    found = predictor(file)
    assert (found.width, found.height) == (96, 96)
    if mode != "1":
        assert same(found, predictor(np.repeat(np.asarray(grey)[:, :, None], 3, axis=2)))


def test_training_on_other_pixels(tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "images", num_images=4)
    for path, mode in zip(data.paths, ("CMYK", "L", "L", "RGBA"), strict=True):
        Image.open(path).convert(mode).save(path)
    trained = Trainer(model="echo/memory", epochs=6).fit(data, data, quiet=True)
    with Predictor(trained) as predictor:
        assert [found.names for found in predictor.predict(data)][:3] == [sample.names for sample in data][:3]


def test_thresholds(run: Run, tiny: Dataset) -> None:
    known = run.model.manifest.score_threshold
    assert known is not None
    assert Predictor(run).score_threshold == known
    assert Predictor(run, score_threshold=0.9).score_threshold == 0.9
    with Predictor(run, score_threshold=1.1) as predictor:
        assert all(len(found) == 0 for found in predictor.predict(tiny))
    two = next(i for i, count in enumerate(tiny.boxes_per_image()) if count == 2)
    with Predictor(run, max_detections=1) as predictor:
        assert len(predictor(tiny.paths[two])) == 1


def test_threshold_where_none_is_known(tiny: Dataset) -> None:
    blind = Trainer(model="echo/memory", epochs=1).fit(tiny, test=tiny, quiet=True)
    with pytest.warns(UserWarning, match="the best one of echo/memory is not known"):
        assert Predictor(blind).score_threshold == DEFAULT_SCORE_THRESHOLD


def test_ways_to_name_a_model(run: Run, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_RUNS", str(run.path.parent))
    expected = Predictor(run)(tiny.paths[0])
    for name in (run.model, run.path, str(run.path), run.path / "model", run.name, "last", "best"):
        assert same(Predictor(name)(tiny.paths[0]), expected)
    with pytest.raises(UsageError, match="holds no run"):
        Predictor(run.path / "input")


def test_model_folder_can_move(run: Run, tiny: Dataset, tmp_path: Path) -> None:
    moved = shutil.copytree(run.path / "model", tmp_path / "elsewhere")
    assert same(Predictor(moved)(tiny.paths[0]), Predictor(run)(tiny.paths[0]))


def test_unfinished_run(run: Run, tiny: Dataset) -> None:
    going = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.05).start(tiny, tiny, leash=True)
    with pytest.raises(UsageError, match="is running and has no model yet"):
        Predictor(going)
    going.stop()
    with pytest.raises(UsageError, match="is stopped and has no model yet"):
        Predictor(going)


def test_device_that_is_not_there(run: Run) -> None:
    with pytest.raises(Unsupported, match="device='cuda'"):
        Predictor(run, device="cuda")


def test_isolated_worker_goes_with_the_predictor(run: Run, tiny: Dataset) -> None:
    before = set(psutil.Process().children())
    with Predictor(run, isolate=True) as predictor:
        (worker,) = set(psutil.Process().children()) - before
        assert [found.path for found in predictor.predict(tiny)] == list(tiny.paths)
    assert not worker.is_running()


def test_kill_9_of_the_controller_leaves_no_prediction_worker(run: Run) -> None:
    script = (
        "import sys, psutil; from detkit import Predictor; predictor = Predictor(sys.argv[1], isolate=True);"
        "print(psutil.Process().children()[0].pid, flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(run.path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as controller:
        assert controller.stdout is not None
        worker = psutil.Process(int(controller.stdout.readline()))
        controller.kill()
        psutil.wait_procs([worker], timeout=15)
        assert not worker.is_running()


def test_backend_that_is_not_installed(run: Run, tmp_path: Path) -> None:
    moved = shutil.copytree(run.path / "model", tmp_path / "elsewhere")
    manifest = Model(moved).manifest
    write_json(moved / "detkit.json", msgspec.structs.replace(manifest, backend="ecco"))
    with pytest.raises(UsageError, match="no backend 'ecco'; did you mean 'echo'"):
        Predictor(moved)
    assert file_sha256(run.path / "model/memory.npz") == file_sha256(moved / "memory.npz")


def test_detections_as_plain_values(predictor: Predictor, tiny: Dataset) -> None:
    found = predictor(tiny.paths[0])
    record = found.to_dict()
    assert set(record) == {"path", "width", "height", "detections"}
    assert set(record["detections"][0]) == {"name", "score", "box"}
    assert same(Detections.from_dict(record, found.classes), found)
    assert len(found.above(2.0)) == 0
    assert same(replace(found, path="x"), found)
