"""What `Predictor` takes, and what it says about images that it cannot read."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
import psutil
import pytest
from PIL import Image

from detkit import Dataset, Detections, Model, Predictor, Run, Trainer, plugins, write_predictions
from detkit.backends import Detector, Endpoint, PredictOptions
from detkit.errors import DetkitWarning, ImageError, InvalidValue, Unsupported, UsageError
from detkit.files import file_sha256, write_json
from detkit.images import list_images
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
    stream.close()


def test_sources_of_all_kinds_together(predictor: Predictor, tiny: Dataset, tmp_path: Path) -> None:
    """Batches hold whatever comes; entries of a list may be folders, too."""
    for place in ("b/2.jpg", "a.jpg", "b/.hidden.jpg", ".hidden/1.jpg", "b/1.JPG", "b/notes.txt", "c.png/d.jpg"):
        (tmp_path / "folder" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tiny.paths[0], tmp_path / "folder" / place)
    (tmp_path / "folder/b/notes.txt").write_text("no image")
    in_folder = [str(tmp_path / "folder" / name) for name in ("a.jpg", "b/1.JPG", "b/2.jpg", "c.png/d.jpg")]
    everything: list[object] = [
        tiny.paths[1], tmp_path / "folder", tiny[2].image(), tiny.take([3, 4]), Image.open(tiny.paths[5]),
        f"{tmp_path}/folder/b/*.jpg", f"{tmp_path}/**",
    ]  # fmt: skip
    expected = [tiny.paths[1], *in_folder, "", tiny.paths[3], tiny.paths[4], "", in_folder[2]]
    assert [one.path for one in predictor.predict(everything[:-1])] == expected  # type: ignore[arg-type]
    assert [one.path for one in predictor.predict(iter(everything[:-1]))] == expected  # type: ignore[arg-type]
    with pytest.raises(ImageError, match=r"notes.txt: it is no image"):
        list(predictor.predict(everything))  # type: ignore[arg-type]
    rows = [1, 0, 0, 0, 0, 2, 3, 4, 5, 0]
    found = list(predictor.predict(everything[:-1]))  # type: ignore[arg-type]
    assert [one.names for one in found] == [tiny[i].names for i in rows]
    for wrong in (7, [tiny.paths[0], None], b"a.jpg"):
        with pytest.raises(UsageError, match=r"an image is given as <class '(int|NoneType)'>; expected a path"):
            list(predictor.predict(wrong))  # type: ignore[arg-type]


def test_names_are_those_that_were_given(predictor: Predictor, tiny: Dataset, clean: Path) -> None:
    (clean / "a").mkdir()
    shutil.copy(tiny.paths[0], clean / "a/x.jpg")
    for source in (".", "./", Path(), "a", "a/", "a/*.jpg", "a/x.jpg", Path("a/x.jpg")):
        assert [found.path for found in predictor.predict(source)] == ["a/x.jpg"]


def test_images_come_along(predictor: Predictor, tiny: Dataset) -> None:
    pairs = list(predictor.predict_with_images([tiny.paths[0], tiny[1].image()]))
    assert [(image == sample.image()).all() for (image, _), sample in zip(pairs, tiny, strict=False)] == [True] * 2
    assert [found.to_dict() for _, found in pairs] == [
        found.to_dict() for found in predictor.predict([tiny.paths[0], tiny[1].image()])
    ]


@pytest.fixture
def some_broken(tiny: Dataset, tmp_path: Path) -> Path:
    """A folder of fourteen images, of which the fifth, sixth and last cannot be read."""
    for i in range(14):
        shutil.copy(tiny.paths[0], tmp_path / f"{i:02d}.jpg")
    for i in (4, 5, 13):
        (tmp_path / f"{i:02d}.jpg").write_bytes(b"no image")
    return tmp_path


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_results_before_a_broken_image_are_there(batch_size: int, run: Run, some_broken: Path) -> None:
    names = []
    with Predictor(run, batch_size=batch_size) as predictor:
        stream = predictor.predict(some_broken)
        with pytest.raises(ImageError, match=r"04.jpg: it is no image"):
            for found in stream:
                names.append(Path(found.path).name)
        assert next(stream, None) is None
    assert names == ["00.jpg", "01.jpg", "02.jpg", "03.jpg"]


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_broken_images_are_left_out_loudly_where_that_is_asked_for(
    batch_size: int, run: Run, some_broken: Path
) -> None:
    with Predictor(run, batch_size=batch_size) as predictor:
        with pytest.warns(DetkitWarning) as caught:
            found = list(predictor.predict(some_broken, on_invalid="warn"))
        assert [Path(one.path).stem for one in found] == [f"{i:02d}" for i in range(13) if i not in {4, 5}]
        assert (predictor.num_images, predictor.num_invalid) == (11, 3)
    told = [str(warning.message) for warning in caught]
    assert [text.partition(": it is no image")[0] for text in told] == [
        f"left out: cannot read image {some_broken}/{i:02d}.jpg" for i in (4, 5, 13)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("on_invalid", ["raise", "warn"])
def test_results_before_an_error_of_the_stream_are_there(
    batch_size: int, on_invalid: Literal["raise", "warn"], run: Run, tiny: Dataset
) -> None:
    def camera() -> Iterator[Path | np.ndarray]:
        yield from map(Path, tiny.paths[:4])
        yield tiny[4].image()
        raise OSError("camera gone")

    def odd() -> Iterator[Path | np.ndarray]:
        yield from map(Path, tiny.paths[:5])
        yield np.zeros((4, 4))
        yield from map(Path, tiny.paths[:5])

    with Predictor(run, batch_size=batch_size) as predictor:
        for source, kind in ((camera(), OSError), (odd(), UsageError)):
            stream = predictor.predict(source, on_invalid=on_invalid)
            assert [next(stream).names for _ in range(5)] == [sample.names for sample in tiny.take(range(5))]
            with pytest.raises(kind, match=r"^camera gone$|an image array of float64"):
                next(stream)
            assert next(stream, None) is None


def test_a_folder_that_cannot_be_listed(
    run: Run, tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a/x.jpg", "b/x.jpg", "c/x.jpg"):
        (tmp_path / name).parent.mkdir()
        shutil.copy(tiny.paths[0], tmp_path / name)
    listed = os.scandir

    def forbidden(folder: str) -> Any:
        if folder == str(tmp_path / "b"):
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "scandir", forbidden)
    with Predictor(run) as predictor:
        for source in (tmp_path, [tmp_path], iter([tmp_path])):
            stream = predictor.predict(source)
            assert next(stream).path == str(tmp_path / "a/x.jpg")
            with pytest.raises(ImageError, match=rf"{tmp_path}/b: "):
                next(stream)
        for source in (tmp_path, iter([tmp_path])):
            with pytest.warns(DetkitWarning, match=rf"left out: .*{tmp_path}/b: "):
                found = list(predictor.predict(source, on_invalid="warn"))
            assert [one.path for one in found] == [str(tmp_path / "a/x.jpg"), str(tmp_path / "c/x.jpg")]
        assert predictor.num_invalid == 2
    with pytest.raises(ImageError, match=rf"{tmp_path}/b: "):
        list_images(tmp_path)


def test_options_that_cannot_be(run: Run, predictor: Predictor, tiny: Dataset) -> None:
    for options, message in (
        ({"batch_size": 0}, "batch_size=0 is not valid: a whole number from 1"),
        ({"max_detections": 0}, "max_detections=0"),
        ({"nms_threshold": 0}, "nms_threshold=0 is not valid: an IoU above 0, up to 1"),
        ({"nms_threshold": 1.5}, "nms_threshold=1.5"),
        ({"batch_size": 2.0}, "batch_size=2.0 is not valid: a whole number from 1"),
        ({"batch_size": True}, "batch_size=True"),
        ({"max_detections": 1.5}, "max_detections=1.5"),
        ({"max_detections": True}, "max_detections=True"),
        ({"nms_threshold": "0.5"}, "nms_threshold='0.5'"),
        ({"score_threshold": 1.1}, "score_threshold=1.1 is not valid: a number from 0 to 1, or `best`"),
        ({"score_threshold": float("nan")}, "score_threshold=nan"),
        ({"score_threshold": True}, "score_threshold=True"),
        ({"score_threshold": "0.5"}, "score_threshold='0.5'"),
        ({"score_threshold": "bset"}, "score_threshold='bset' is not valid: .* did you mean 'best'?"),
        ({"tile_size": 16}, "tile_size=16 is not valid: a whole number of pixels from 32"),
        ({"tile_size": 64, "tile_overlap": 1.0}, "tile_overlap=1.0"),
    ):
        with pytest.raises(InvalidValue, match=message):
            Predictor(run, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidValue, match="on_invalid='wran' is not valid: `raise` or `warn`. did you mean 'warn'?"):
        predictor.predict(tiny, on_invalid="wran")  # type: ignore[arg-type]
    for every in (0, 1.5, True):
        with pytest.raises(InvalidValue, match=f"every={every} is not valid: a whole number of frames from 1"):
            predictor.predict(tiny, every=every)  # type: ignore[arg-type]


def test_leaving_in_the_middle_ends_the_threads(predictor: Predictor, tiny: Dataset) -> None:
    def decoders() -> int:
        return sum(thread.name.startswith("decode") for thread in threading.enumerate())

    taken = []
    for found in predictor.predict(tiny.paths * 10):
        taken.append(found)
        assert decoders() > 0
        break
    stream = predictor.predict(tiny.paths * 10)
    next(stream)
    stream.close()
    del stream
    assert decoders() == 0
    unstarted = predictor.predict_with_images(tiny)
    unstarted.close()
    with pytest.raises(ZeroDivisionError):
        list(predictor.predict(path if i < 30 else str(1 / 0) for i, path in enumerate(tiny.paths * 10)))
    assert decoders() == 0


class Next(Endpoint):
    """A model that answers from a worker of its own, as one in another place would."""

    name, place, status, expires, price_per_hour = "next", "this machine", "InService", None, None

    def __init__(self, model: Model) -> None:
        self.model = model

    def open(self, options: PredictOptions) -> Detector:
        assert self.model is not None
        return plugins.backend(self.model.manifest.backend).open(self.model, options, isolate=True)

    def delete(self) -> None:
        pass


def test_an_endpoint_is_a_model(run: Run, predictor: Predictor, tiny: Dataset) -> None:
    source = [tiny.paths[0], tiny[1].image(), tiny.take([2, 3])]
    expected = [found.to_dict() for found in predictor.predict(source)]
    with Predictor(Next(run.model)) as there:
        assert [found.to_dict() for found in there.predict(source)] == expected
    with Predictor(Next(run.model), tile_size=48, max_detections=2) as there:
        assert [(one.width, len(one) <= 2) for one in there.predict(source)] == [(96, True)] * 4


def rss() -> int:
    gc.collect()
    return int(psutil.Process().memory_info().rss)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(run: Run, tiny: Dataset, tmp_path: Path) -> None:
    """100,000 arrays and 20,000 files, by predictions that are written as they come: 50 MB at most."""

    def arrays(count: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng(0)
        for _ in range(count):
            yield rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)

    with Predictor(run, score_threshold=0.0) as predictor:
        for ending in (".json", ".jsonl", ".csv"):
            write_predictions(tmp_path / f"warm{ending}", None, predictor.predict(arrays(500)))
        begin, most = rss(), 0
        for i, _ in enumerate(predictor.predict(arrays(100_000))):
            most = max(most, rss()) if i % 10_000 == 0 else most
        assert max(most, rss()) - begin < 50_000_000
        write_predictions(tmp_path / "found.json", None, predictor.predict(tiny.paths * 2_500))
        assert rss() - begin < 50_000_000
        assert predictor.num_images == 121_500


@pytest.mark.slow
def test_a_folder_of_many_images(run: Run, tiny: Dataset, tmp_path: Path) -> None:
    for i in range(20_000):
        os.link(tiny.paths[0], tmp_path / f"an image with a name of some length {i:06d}.jpg")
    with Predictor(run) as predictor:
        list(predictor.predict(tiny))
        begin = rss()
        assert sum(1 for _ in predictor.predict(tmp_path)) == 20_000
        assert rss() - begin < 50_000_000


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
    assert Predictor(run, score_threshold=np.float32(0.5)).score_threshold == 0.5  # type: ignore[arg-type]
    with Predictor(run, score_threshold=1) as predictor:
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
