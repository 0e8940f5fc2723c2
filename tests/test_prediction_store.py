"""What a model found is kept, and counts only for the same model, options, code and image."""

from __future__ import annotations

import contextlib
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from detkit import Dataset, Detections, Model, Predictor, Trainer, plugins, prediction_store
from detkit.backends import LocalBackend, PredictOptions
from detkit.errors import DetkitWarning, UnknownName, UsageError
from detkit.files import cache_folder, file_sha256, write_json
from detkit.prediction_store import PredictionStore, predict_all, store_size

OPTIONS = PredictOptions(score_threshold=0.001, max_detections=100)


@pytest.fixture(scope="module")
def trained(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = tmp_path_factory.mktemp("store")
    return Trainer(model="echo/memory", epochs=8).fit(tiny, tiny, name=str(folder / "run"), quiet=True).model


@pytest.fixture
def model(trained: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Model]:
    """A copy of the model, and a cache with nothing in it."""
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "cache"))
    return Model(shutil.copytree(trained.path, tmp_path / "model"))


@pytest.fixture
def digests(tiny: Dataset) -> list[str]:
    return [file_sha256(Path(path)) for path in tiny.paths]


def found(model: Model, n: int = 2, seed: int = 0) -> Detections:
    rng = np.random.default_rng(seed)
    low = rng.random((n, 2))
    return Detections.from_arrays(
        np.hstack([low, low + rng.random((n, 2))]), rng.random(n), rng.integers(0, len(model.classes), n),
        classes=model.classes, width=31, height=17,
    )  # fmt: skip


def same(a: Detections, b: Detections) -> bool:
    texts = (a.classes, a.names, a.width, a.height, a.masks) == (b.classes, b.names, b.width, b.height, b.masks)
    return texts and np.array_equal(a.boxes, b.boxes) and np.array_equal(a.scores, b.scores)


def digest(number: int) -> str:
    return f"{number:064x}"


def test_what_is_put_is_got(model: Model) -> None:
    plain, empty = found(model), found(model, 0)
    masked = replace(plain, masks=({"size": [17, 31], "counts": "abc"}, None))
    with PredictionStore(model, OPTIONS) as store:
        assert store.get([digest(1)]) == [None]
        for i, one in enumerate((plain, empty, masked)):
            store.put(digest(i), replace(one, path="a.jpg"), 0.5 + i, "cpu")
        got = store.get([digest(2), digest(7), digest(0), digest(1), digest(0)])
        assert [kept and kept.seconds for kept in got] == [2.5, None, 0.5, 1.5, 0.5]
    with PredictionStore(model, OPTIONS) as store:
        for kept, one in zip(store.get([digest(i) for i in range(3)]), (plain, empty, masked), strict=True):
            assert kept is not None
            assert same(kept.detections, one)
            assert (kept.detections.path, kept.device) == ("", "cpu")
            assert kept.detections.boxes.dtype == np.float64
            assert kept.detections.boxes.flags.writeable
        store.put(digest(1), plain, 9.0)
        (kept,) = store.get([digest(1)])
        assert kept is not None
        assert same(kept.detections, plain), "the last one counts"
    assert store.path is not None
    assert store_size() == store.path.stat().st_size > 0


def test_many_images(model: Model) -> None:
    with PredictionStore(model, OPTIONS) as store:
        for i in range(1500):
            store.put(digest(i), found(model, i % 3), i)
    with PredictionStore(model, OPTIONS) as store:
        got = store.get([digest(i) for i in range(1501)])
    assert [kept.seconds if kept else None for kept in got] == [*range(1500), None]


def test_it_counts_only_for_the_same(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def known(model: Model = model, options: PredictOptions = OPTIONS) -> bool:
        with PredictionStore(model, options) as store:
            return store.get([digest(1)]) != [None]

    with PredictionStore(model, OPTIONS) as store:
        store.put(digest(1), found(model), 1)
    assert known()
    assert known(options=msgspec.structs.replace(OPTIONS, device="cpu")), "what was found, wherever that was"
    for changed in ({"score_threshold": 0.5}, {"nms_threshold": 0.5}, {"max_detections": 99}):
        assert not known(options=msgspec.structs.replace(OPTIONS, **changed))
    own = msgspec.structs.replace(OPTIONS, max_detections=None)
    assert known(options=own) == (model.manifest.max_detections == OPTIONS.max_detections)
    other = Model(shutil.copytree(model.path, tmp_path / "other"))
    assert known(other), "the same model elsewhere"
    write_json(other.path / "detkit.json", msgspec.structs.replace(other.manifest, started=1.0))
    assert not known(Model(other.path))
    with monkeypatch.context() as patch:
        patch.setattr(plugins, "versions", lambda backend: {"detkit-sdk": "9", "detkit-echo": "0.1.0"})
        assert not known()
    with monkeypatch.context() as patch:
        patch.setattr(prediction_store, "_code", lambda *_: "edited")
        assert not known()
    assert known()


def test_the_code_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_engine/deep").mkdir(parents=True)
    file = tmp_path / "some_engine/deep/part.py"
    digests = set()
    for text in ("a = 1", "a = 2"):
        file.write_text(text)
        prediction_store._code.cache_clear()
        digests.add(prediction_store._code("some_engine"))
    assert len(digests) == 2
    assert prediction_store._code("nowhere_at_all") not in digests
    own = prediction_store._code("detkit", prediction_store._OWN_CODE)
    assert own not in {prediction_store._code("detkit"), prediction_store._code("nowhere_at_all")}
    folder = Path(prediction_store.__file__).parent
    assert {"graphs", "masks", "resizing", "videos"} <= set(prediction_store._OWN_CODE)
    assert all((folder / f"{name}.py").is_file() for name in prediction_store._OWN_CODE)


def test_the_code_of_a_single_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    digests = {prediction_store._code("nowhere_at_all")}
    for text in ("a = 1", "a = 2"):
        (tmp_path / "lone_engine.py").write_text(text)
        prediction_store._code.cache_clear()
        digests.add(prediction_store._code("lone_engine"))
    assert len(digests) == 3
    assert prediction_store._code("itertools") in digests, "built in: nothing to read"


def installed(folder: Path, name: str, version: str) -> None:
    """Put a distribution's metadata into a folder, in place of an earlier version."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.dist-info"):
        shutil.rmtree(old)
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info/METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def test_a_variant_of_what_the_engine_needs(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime comes as onnxruntime-gpu, too; a distribution that merely begins alike is another one."""
    backend = plugins.backend("echo")
    assert isinstance(backend, LocalBackend)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_framework.py").write_text("")
    monkeypatch.setattr(plugins, "backend", {"echo": replace(backend, requires=("some_framework",))}.__getitem__)
    for name, module in (("some_framework_gpu", "some_framework"), ("some_framework_more", "some_framework_more")):
        folder = tmp_path / f"{name}-2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Name: {name}\nVersion: 2.0\n")
        (folder / "top_level.txt").write_text(f"{module}\n")
    assert prediction_store._needs(model) == {"some_framework_gpu": "2.0"}


@pytest.mark.parametrize("own_interpreter", [False, True])
def test_versions_of_what_the_engine_needs(
    own_interpreter: bool, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = plugins.backend("echo")
    assert isinstance(backend, LocalBackend)
    assert prediction_store._needs(model) == {}
    here, there = tmp_path / "here", tmp_path / "venv/lib/python3.9/site-packages"
    monkeypatch.syspath_prepend(here)
    here.mkdir()
    (here / "some_framework.py").write_text("raise AssertionError('imported')")
    needing = replace(backend, requires=("some_framework", "of_no_distribution"))
    (here / "of_no_distribution.py").write_text("")
    monkeypatch.setattr(plugins, "backend", {"echo": needing}.__getitem__)
    installed(here, "some_framework", "1.0")
    installed(there, "some_framework", "7.0")
    python = tmp_path / "venv/bin/python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    if own_interpreter:
        monkeypatch.setenv(backend.variable, str(python))
    assert prediction_store._needs(model) == {"some_framework": "7.0" if own_interpreter else "1.0"}
    with PredictionStore(model, OPTIONS) as store:
        store.put(digest(1), found(model), 1)
    installed(there if own_interpreter else here, "some_framework", "8.0")
    with PredictionStore(model, OPTIONS) as store:
        assert store.get([digest(1)]) == [None]
    monkeypatch.setenv(backend.variable, str(tmp_path / "gone"))
    assert prediction_store._needs(model) == {}, "known predictions need no interpreter"


def test_nothing_is_kept_where_nothing_is_to_be(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_CACHE", "off")
    with PredictionStore(model, OPTIONS) as store:
        assert store.path is None
        store.put(digest(1), found(model), 1)
        assert store.get([digest(1)]) == [None]
    assert store_size() == 0


def test_a_folder_that_cannot_be_written(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DETKIT_CACHE", str(tmp_path / "file/cache"))
    with PredictionStore(model, OPTIONS) as store:
        store.put(digest(1), found(model), 1)
        assert store.get([digest(1)]) == [None]


def filled(model: Model, n: int = 200) -> Path:
    with PredictionStore(model, OPTIONS) as store:
        for i in range(n):
            store.put(digest(i), found(model, 20, seed=i), i)
    assert store.path is not None
    return store.path


@pytest.mark.parametrize("damage", ["no database", "cut", "overwritten"])
def test_a_damaged_file_is_set_aside(damage: str, model: Model) -> None:
    path = filled(model)
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(
        {
            "no database": b"something else entirely" * 500,
            "cut": content[:middle],
            "overwritten": content[:4096] + b"\x5a" * (len(content) - 4096),
        }[damage]
    )
    path.with_name(f"{path.name}-journal").write_bytes(b"")
    with (
        pytest.warns(DetkitWarning, match=r"is damaged \(.*\) and is now called .*\.damaged"),
        PredictionStore(model, OPTIONS) as store,
    ):
        assert store.get([digest(i) for i in range(200)]) == [None] * 200
        store.put(digest(1), found(model), 1)
        assert store.get([digest(1)]) != [None], "a new one"
    assert sorted(file.name for file in path.parent.iterdir()) == [path.with_suffix(".damaged").name, path.name]


def test_columns_of_another_version(model: Model) -> None:
    path = filled(model, 3)
    with sqlite3.connect(path) as database:
        database.execute("alter table found add column more text")
    database.close()
    with (
        pytest.warns(
            DetkitWarning, match=r"has the columns of another version and is now called .*\.other; images are"
        ),
        PredictionStore(model, OPTIONS) as store,
    ):
        assert store.get([digest(0)]) == [None]
        store.put(digest(0), found(model), 1)
    with PredictionStore(model, OPTIONS) as store:
        assert store.get([digest(0)]) != [None]
    with sqlite3.connect(path.with_suffix(".other")) as database:
        assert database.execute("select count(more is null) from found").fetchone() == (3,)
    database.close()


def test_errors_that_are_no_damage(model: Model) -> None:
    """A sound file stays, whatever goes wrong while it is used."""
    path = filled(model, 3)
    with PredictionStore(model, OPTIONS) as store:
        for error in (
            sqlite3.ProgrammingError("wrong thread"), sqlite3.DataError("too big"), sqlite3.IntegrityError("not null"),
            sqlite3.OperationalError("database is locked"), sqlite3.InterfaceError("type"),
        ):  # fmt: skip
            with store._forgiven():
                raise error
        assert None not in store.get([digest(i) for i in range(3)])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_damage_is_known_by_its_message_too(model: Model) -> None:
    """Python 3.10 has no codes."""
    told = [
        sqlite3.DatabaseError(f"{start}") for start in ("database disk image is malformed", "file is not a database")
    ]
    assert not any(hasattr(error, "sqlite_errorcode") for error in told)
    assert all(map(prediction_store._is_damage, told))
    path = filled(model, 1)
    path.write_bytes(b"something else entirely" * 500)
    with contextlib.closing(sqlite3.connect(path)) as database, pytest.raises(sqlite3.DatabaseError) as caught:
        database.execute("select * from found")
    assert prediction_store._is_damage(caught.value)
    assert prediction_store._is_damage(sqlite3.DatabaseError(str(caught.value)))


def test_a_damaged_entry_is_none(model: Model) -> None:
    path = filled(model, 4)
    with sqlite3.connect(path) as database:
        (content,) = database.execute("select found from found where seconds = 1").fetchone()
        flipped = bytearray(content)
        flipped[-5] ^= 1
        database.execute("update found set found = ? where seconds = 1", [bytes(flipped)])
        database.execute("update found set found = 'text' where seconds = 2")
        database.execute("update found set seconds = null where seconds = 3")
    database.close()
    with PredictionStore(model, OPTIONS) as store:
        got = store.get([digest(i) for i in range(4)])
    assert [kept is None for kept in got] == [False, True, True, True]


def test_two_write_at_once(model: Model) -> None:
    with PredictionStore(model, OPTIONS) as one, PredictionStore(model, OPTIONS) as other:
        for i in range(1200):
            (one, other)[i % 2].put(digest(i), found(model, 1), i)
    with PredictionStore(model, OPTIONS) as store:
        assert None not in store.get([digest(i) for i in range(1200)])


def test_kill_9_keeps_what_was_done(model: Model) -> None:
    script = (
        "import sys, time; from detkit import Model; from detkit.detections import Detections\n"
        "from detkit.prediction_store import *\n"
        "model = Model(sys.argv[1]); one = Detections.from_arrays([], [], classes=model.classes)\n"
        "with PredictionStore(model, PredictOptions(score_threshold=0.001, max_detections=100)) as store:\n"
        "    for i in range(10**9):\n"
        "        store.put(f'{i:064x}', one, i); time.sleep(0.01); print(i, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(model.path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        done = 0
        while done < 150:
            done = int(process.stdout.readline())
        process.send_signal(signal.SIGKILL)
    with PredictionStore(model, OPTIONS) as store:
        kept = [one is not None for one in store.get([digest(i) for i in range(done + 50)])]
    count = kept.index(False)
    assert done - 110 < count, "at most a second is lost"
    assert not any(kept[count:])


def test_a_second_evaluation_opens_no_model(
    model: Model, tiny: Dataset, digests: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = predict_all(model, tiny, digests, score_threshold=0.001)
    with Predictor(model, score_threshold=0.001) as predictor:
        expected = list(predictor.predict(tiny))
    assert (first.reused, first.device) == (0, "auto")
    assert first.seconds.shape == (len(tiny),)
    assert (first.seconds > 0).all()
    assert first.seconds_per_image == np.median(first.seconds)
    backend = plugins.backend("echo")
    (model.path / "memory.npz").unlink()  # whoever opens it now, fails
    moved = replace(tiny, paths=tuple(f"{path}-elsewhere" for path in tiny.paths))
    for data in (tiny, moved):
        again = predict_all(model, data, digests, score_threshold=0.001)
        assert again.reused == len(tiny)
        assert [one.path for one in again.detections] == list(data.paths)
        assert all(map(same, again.detections, expected))
        np.testing.assert_array_equal(again.seconds, first.seconds)
    assert backend is not None
    with pytest.raises(FileNotFoundError):
        predict_all(model, tiny, digests, score_threshold=0.001, fresh=True)
    with pytest.raises(FileNotFoundError):
        predict_all(model, tiny, digests, score_threshold=0.5)


def test_only_new_images_are_looked_at(model: Model, tiny: Dataset, digests: list[str]) -> None:
    part = predict_all(model, tiny.take([1, 4]), [digests[1], digests[4]], device="cpu", batch_size=3)
    assert part.device == "cpu"
    whole = predict_all(model, tiny, digests)
    assert (whole.reused, whole.device) == (2, "auto, cpu")
    with Predictor(model, score_threshold=0.001) as predictor:
        assert all(map(same, whole.detections, predictor.predict(tiny)))
    assert whole.seconds[[1, 4]].tolist() == part.seconds.tolist()
    fresh = predict_all(model, tiny, digests, fresh=True)
    assert (fresh.reused, fresh.device) == (0, "auto")
    assert predict_all(model, tiny, digests).seconds.tolist() == fresh.seconds.tolist(), "the new ones are kept"


def test_an_interrupted_evaluation_goes_on(model: Model, tiny: Dataset, digests: list[str]) -> None:
    gone = replace(tiny, paths=(*tiny.paths[:5], "gone.jpg", *tiny.paths[6:]))
    with pytest.raises(Exception, match="cannot read image gone.jpg"):
        predict_all(model, gone, digests, batch_size=1)
    assert predict_all(model, tiny, digests).reused == 5


def test_images_without_a_digest_are_looked_at(model: Model, tiny: Dataset, digests: list[str]) -> None:
    for _ in range(2):
        assert predict_all(model, tiny, ["", *digests[1:-1], "x"]).reused in {0, len(tiny) - 2}
    with pytest.raises(UsageError, match="7 digests for 8 images; expected one for each"):
        predict_all(model, tiny, digests[1:])
    nothing = predict_all(model, tiny.take([]), [])
    assert (nothing.detections, nothing.seconds_per_image, nothing.reused) == ([], None, 0)


def test_the_models_own_time(trained: Model, tiny: Dataset) -> None:
    with Predictor(trained) as predictor:
        assert (predictor.busy_s, predictor.num_images) == (0, 0)
        slow = predictor._detector.detect

        def detect(batch: list[np.ndarray]) -> list[Detections]:
            time.sleep(0.05 * len(batch))
            return slow(batch)

        predictor._detector.detect = detect  # type: ignore[method-assign, assignment]
        predictor(tiny.paths[0])
        assert predictor.num_images == 1
        for _ in predictor.predict(tiny):
            time.sleep(0.05)  # is not the model's
        assert predictor.num_images == 9
        assert 0.45 <= predictor.busy_s < 0.8


def test_unknown_backend(model: Model, tiny: Dataset, digests: list[str]) -> None:
    """What is kept needs a backend no less: the key names its version."""
    write_json(model.path / "detkit.json", msgspec.structs.replace(model.manifest, backend="ecco"))
    with pytest.raises(UnknownName, match="no backend 'ecco'"):
        predict_all(Model(model.path), tiny, digests)


def test_nothing_is_for_others_to_read(model: Model) -> None:
    filled(model, 1)
    folder = cache_folder()
    assert folder is not None
    assert (folder / "predictions").stat().st_mode & 0o077 == 0
