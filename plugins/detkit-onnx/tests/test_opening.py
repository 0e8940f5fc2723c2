"""Exported models in ONNX Runtime: folders and bare files, batches, devices, and files that are not what they say."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import grids
import msgspec
import numpy as np
import onnx
import pytest
from onnx import external_data_helper

import detkit
from detkit import Dataset, Predictor, plugins
from detkit.errors import DetkitWarning, ExportDiffers, PluginError, SeenImages, UnknownName, UsageError
from detkit.graphs import ONNX, PROPERTY, write_model
from detkit.job import Model
from detkit.loading import count_cores
from detkit.verification import verify
from detkit_onnx.engine import count_threads, providers


def test_it_is_a_backend_that_trains_nothing() -> None:
    backend = plugins.backend("onnx")
    assert backend.models == {} and backend.suggest() is None
    with pytest.raises(UnknownName, match="model of backend 'onnx'"):
        detkit.Trainer(model="onnx/memory").explain()
    listed = {}
    for words in ("models", "backends ls", "doctor"):
        command = [sys.executable, "-m", "detkit.cli", *words.split()]
        listed[words] = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    assert "echo" in listed["models"] and "onnx" not in listed["models"]
    assert re.search(r"onnx +0 ", listed["backends ls"])
    assert "backend   onnx: ready" in listed["doctor"]


def test_finds_the_cells(file: Path, unseen: Dataset) -> None:
    """Of images of two sizes, in one batch."""
    with Predictor(file.parent, score_threshold=0.3) as predictor:
        found = list(predictor.predict(unseen))
    for one, sample in zip(found, unseen, strict=True):
        assert sorted(one.boxes.tolist()) == sorted(sample.boxes.tolist())
        assert (one.width, one.height) == (sample.width, sample.height)
    assert detkit.evaluate(file.parent, unseen)["AP"] == pytest.approx(1)


def test_a_worker_finds_the_same(file: Path, unseen: Dataset) -> None:
    here, there = Predictor(file, score_threshold=0.01), Predictor(file, score_threshold=0.01, isolate=True)
    with here, there:
        for a, b in zip(here.predict(unseen), there.predict(unseen), strict=True):
            np.testing.assert_array_equal(a.boxes, b.boxes)
            np.testing.assert_array_equal(a.scores, b.scores)


def test_the_graphs_file_stands_for_its_folder(file: Path, unseen: Dataset, seen: Dataset) -> None:
    with Predictor(file) as predictor:
        assert predictor.model.path == file.parent
    assert detkit.evaluate(str(file), unseen)["AP"] == pytest.approx(1)
    with pytest.raises(SeenImages):
        detkit.evaluate(file, seen)


@pytest.fixture
def bare(file: Path, tmp_path: Path) -> Path:
    """The file alone, elsewhere and under another name."""
    return Path(shutil.copy(file, tmp_path / "cells.ONNX"))


@pytest.mark.parametrize("cache", ["on", "off"])
def test_a_bare_file_is_a_model(
    bare: Path, run: detkit.Run, unseen: Dataset, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if cache == "off":
        monkeypatch.setenv("DETKIT_CACHE", "off")
    with Predictor(bare) as predictor, Predictor(bare, isolate=True) as isolated:
        assert predictor.classes == ("cell",) == isolated.classes
        assert predictor.score_threshold == run.model.manifest.score_threshold
        image = unseen.paths[0]
        np.testing.assert_array_equal(predictor(image).boxes, isolated(image).boxes)
    with pytest.warns(DetkitWarning, match="which images onnx/memory has seen is not known"):
        assert detkit.evaluate(bare, unseen)["AP"] == pytest.approx(1)
    with pytest.warns(DetkitWarning):
        compared = detkit.compare([bare, run], unseen)
    assert len(compared.entries) == 2


def test_another_file_of_the_same_name_is_another_model(bare: Path, run: detkit.Run, tmp_path: Path) -> None:
    """What is kept is known by the sha256 of the file, so that predictions never come from another one."""
    first = detkit.Predictor(bare).model
    shutil.copy(grids.export_grid(run, tmp_path / "weaker", gain=0.5), bare)
    second = detkit.Predictor(bare).model
    assert first.manifest.artifacts != second.manifest.artifacts and first.path != second.path
    bare.unlink()
    bare.write_bytes(b"")
    with pytest.raises(UsageError, match="no whole ONNX file: it is empty"):
        Predictor(bare)


def test_options_of_the_call(file: Path, unseen: Dataset) -> None:
    image = unseen.paths[3]
    with Predictor(file, score_threshold=0.0, max_detections=3) as predictor:
        assert len(predictor(image)) == 3
    with Predictor(file, score_threshold=0.0) as predictor:
        assert len(predictor(image)) == 16
    with pytest.raises(UsageError, match=r"has no device 'tpu'.*auto, cpu.*CPUExecutionProvider"):
        Predictor(file, device="tpu")


def test_providers_are_those_that_are_there() -> None:
    import onnxruntime

    assert providers("cpu") == [("CPUExecutionProvider", {})]
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert providers("auto") == providers("cpu")
        for device in ("cuda", "cuda:1", "tensorrt"):
            with pytest.raises(UsageError, match=f"no device '{device}'.*onnxruntime-gpu"):
                providers(device)
    else:
        assert providers("cuda:1")[0] == ("CUDAExecutionProvider", {"device_id": "1"})


def test_threads_are_as_many_as_asked_for(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from detkit.graphs import graph_of
    from detkit_onnx.engine import Session

    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    session = Session(file, graph_of(Model(file.parent)), "cpu")
    assert session.options.intra_op_num_threads == 3
    for text, threads in (("4,2", 4), (" 2 ", 2), ("", count_cores()), ("many", count_cores())):
        monkeypatch.setenv("OMP_NUM_THREADS", text)
        assert count_threads() == threads


def test_an_old_onnx_runtime_is_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "__version__", "1.9.0")
    with pytest.raises(
        PluginError, match=r"ONNX Runtime 1\.9\.0 is older than 1\.31.*pip install 'onnxruntime>=1\.31'"
    ):
        Predictor(file)


def test_a_strangers_file(tmp_path: Path) -> None:
    onnx.save(grids.make_network(), str(tmp_path / "theirs.onnx"))
    with pytest.raises(UsageError, match=r"was not written by detkit.*'detkit'.*detkit export RUN onnx"):
        Predictor(tmp_path / "theirs.onnx")


def test_a_file_for_another_engine(tmp_path: Path, run: detkit.Run) -> None:
    network = grids.make_network()
    manifest = msgspec.to_builtins(run.model.manifest)
    for wrong in (b"no json", msgspec.json.encode(manifest), msgspec.json.encode({**manifest, "classes": 3})):
        onnx.helper.set_model_props(network, {PROPERTY: wrong.decode()})
        onnx.save(network, str(tmp_path / "wrong.onnx"))
        with pytest.raises(UsageError, match="written by another version of detkit|not detkit_onnx"):
            Predictor(tmp_path / "wrong.onnx")


def test_a_file_cannot_choose_what_runs(bare: Path, tmp_path: Path, run: detkit.Run) -> None:
    """Interpreters and modules that a lone file names are not looked at."""
    manifest = msgspec.to_builtins(Model(Predictor(bare).model.path).manifest)
    manifest |= {"options": {"python": "/bin/false"}, "code": {"digest": "", "imports": ["antigravity"]}}
    network = onnx.load(str(bare))
    onnx.helper.set_model_props(network, {PROPERTY: msgspec.json.encode(manifest).decode()})
    onnx.save(network, str(tmp_path / "hostile.onnx"))
    with Predictor(tmp_path / "hostile.onnx") as predictor:
        assert predictor.model.manifest.options == {} and predictor.model.manifest.code is None
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("length", [1, 9, 100, 700, -1])
def test_a_file_that_was_cut_off(bare: Path, length: int) -> None:
    bare.write_bytes(bare.read_bytes()[:length])
    with pytest.raises(UsageError, match="no whole ONNX file|not written by detkit|cannot open"):
        Predictor(bare)


def test_bytes_that_are_anything(bare: Path) -> None:
    rng = np.random.default_rng(0)
    for size in (1, 10, 1000, 100_000):
        bare.write_bytes(rng.bytes(size))
        with pytest.raises(UsageError, match="no whole ONNX file|not written by detkit"):
            Predictor(bare)


@pytest.mark.parametrize("content", [bytes(20_000_000), b"\x08\x08" * 10_000_000], ids=["zeros", "numbers"])
def test_a_file_of_nothing_is_refused_at_once(bare: Path, content: bytes) -> None:
    bare.write_bytes(content)
    began = time.perf_counter()
    with pytest.raises(UsageError, match="no whole ONNX file: what is at byte"):
        Predictor(bare)
    assert time.perf_counter() - began < 2, "walking through all of it takes ten"


def test_a_damaged_graph(file: Path, tmp_path: Path) -> None:
    for i, folder in enumerate((tmp_path / "sized", tmp_path / "cut")):
        shutil.copytree(file.parent, folder)
        content = bytearray((folder / "model.onnx").read_bytes())
        content[len(content) // 2] ^= 255
        (folder / "model.onnx").write_bytes(content[: len(content) - i])
        with pytest.raises(UsageError, match="not the file that was exported"):
            Predictor(folder)


@pytest.mark.parametrize("place", ["../weights.bin", "{folder}/weights.bin", "link.bin"])
def test_weights_outside_are_not_read(run: detkit.Run, tmp_path: Path, place: str) -> None:
    """A graph from elsewhere may name any file of this machine as its weights; a lone file has none beside it."""
    file = grids.export_grid(run, tmp_path / "model")
    (file.parent / "link.bin").symlink_to(tmp_path / "weights.bin")
    network = onnx.load(str(file))
    for tensor in network.graph.initializer:
        if tensor.name == "mean":
            (tmp_path / "weights.bin").write_bytes(tensor.raw_data)
            name = place.format(folder=tmp_path)
            external_data_helper.set_external_data(tensor, name, offset=0, length=len(tensor.raw_data))
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
    file.write_bytes(network.SerializeToString())
    write_model(run.model, grids.GRAPH, file.parent, **ONNX)
    with pytest.raises(UsageError, match="cannot open"):
        Predictor(file.parent)
    with pytest.raises(UsageError, match="cannot open"):
        Predictor(shutil.copy(file, tmp_path / "alone.onnx"))


def test_a_description_of_another_graph(run: detkit.Run, tmp_path: Path) -> None:
    graph = msgspec.structs.replace(grids.GRAPH, outputs=["boxes", "scores", "classes"])
    with pytest.raises(
        UsageError, match=r"its description speaks of \['images'\] and \['boxes', 'classes', 'scores'\]"
    ):
        Predictor(grids.export_grid(run, tmp_path / "outputs", graph))
    graph = msgspec.structs.replace(grids.GRAPH, image_size=48)
    with (
        Predictor(grids.export_grid(run, tmp_path / "size", graph), score_threshold=0.5) as predictor,
        pytest.raises(UsageError, match=r"fails on images uint8 \(1, 3, 48, 48\)"),
    ):
        predictor(np.zeros((9, 9, 3), np.uint8))


def test_verifying_tells_a_wrong_graph(file: Path, run: detkit.Run, unseen: Dataset, tmp_path: Path) -> None:
    original = Model(file.parent)
    assert verify(original, original, unseen).disagreeing == 0
    for gain, message in ((1.004, ""), (0.98, "detections disagree"), (0.0, "detections disagree.*AP differs by -1")):
        other = Model(grids.export_grid(run, tmp_path / f"{gain}", gain=gain).parent)
        if not message:
            assert verify(original, other, unseen).scores_max > 0
            continue
        with pytest.raises(ExportDiffers, match=message):
            verify(original, other, unseen)


def test_without_the_plugin(tmp_path: Path) -> None:
    """detkit alone says what to install."""
    (tmp_path / "model.onnx").write_bytes(b"\x08\x09")
    script = (
        "import importlib.metadata as m; found = m.entry_points\n"
        "m.entry_points = lambda **k: [e for e in found(**k) if e.name != 'onnx']\n"
        f"import detkit; detkit.Predictor({str(tmp_path / 'model.onnx')!r})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "pip install 'detkit-sdk[onnx]'" in done.stderr
