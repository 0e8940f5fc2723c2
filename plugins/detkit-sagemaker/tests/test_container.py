"""Our container, run as SageMaker runs it: a process with ``train`` or ``serve``, a folder for /opt/ml, real HTTP."""

from __future__ import annotations

import ast
import contextlib
import http.client
import io
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from PIL import Image

import detkit_sagemaker
from detkit import Dataset, Model, Predictor, plugins
from detkit.errors import ImageError, InvalidData
from detkit.events import from_line, pattern
from detkit.files import file_sha256
from detkit.job import Code, Job, Workspace
from detkit.testing import tiny_dataset
from detkit.usercode import UserCode
from detkit.wire import CONTENT_TYPE, decode_detections, decode_images, encode_images
from detkit_sagemaker.container import archives
from detkit_sagemaker.container.archives import unpack
from detkit_sagemaker.container.training import REASON_LENGTH, Container

SOURCE = Path(detkit_sagemaker.__file__).parents[1]

Train = Callable[..., "subprocess.CompletedProcess[str]"]


def environment(folder: Path, **more: str) -> dict[str, str]:
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SAGEMAKER_", "AWS_"))}
    paths = os.pathsep.join(filter(None, [str(SOURCE), inherited.get("PYTHONPATH", "")]))
    return {**inherited, "PYTHONPATH": paths, "SAGEMAKER_BASE_DIR": str(folder), "DETKIT_CACHE": "off", **more}


def command(action: str) -> list[str]:
    return [sys.executable, "-m", "detkit_sagemaker.container", action]


def train(folder: Path, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command("train"),
        env=environment(folder, **more),
        capture_output=True,
        text=True,
        timeout=60,
        cwd=folder,
        check=False,
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("tiny") / "images")


def lay_out(folder: Path, data: Dataset, *, hyperparameters: Mapping[str, Any] | None = None, **job: Any) -> Path:
    """Write what the platform writes before it starts a container."""
    backend = plugins.backend("echo")
    params = msgspec.to_builtins(backend.spec("memory").params) | {"max_detections": 100}
    given = {"backend": "echo", "engine": "detkit_echo.engine:EchoEngine", "model": "memory", "params": params}
    given |= {"options": msgspec.to_builtins(backend.options()), "classes": list(data.classes), **job}
    workspace = Workspace(folder)
    workspace.create(Job(**given))
    for channel in ("train", "validation"):
        workspace.write_dataset(channel, data, [file_sha256(Path(path)) for path in data.paths])
    for name in ("checkpoints", "model", "output/data"):  # the platform does not make all of these
        (folder / name).rmdir()
    config = folder / "input/config"
    config.mkdir()
    hosts = {"current_host": "algo-1", "hosts": ["algo-1"], "network_interface_name": "eth0"}
    (config / "resourceconfig.json").write_text(json.dumps(hosts))
    (config / "hyperparameters.json").write_text(json.dumps(hyperparameters or {}))
    return folder


@pytest.fixture(scope="module")
def trained(data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished container's folder, and what it printed."""
    folder = lay_out(tmp_path_factory.mktemp("ml") / "ml", data, hyperparameters={"epochs": "5"})
    done = train(folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def failure(folder: Path) -> str:
    return (folder / "output/failure").read_text()


def test_training_leaves_a_model_that_opens_here(trained: tuple[Path, str], data: Dataset) -> None:
    folder, _ = trained
    model = Model(folder / "model")
    assert model.manifest.engine == "detkit_echo.engine:EchoEngine"
    assert model.manifest.params["epochs"] == 5
    assert not (folder / "output/failure").exists()
    with Predictor(model) as predictor:
        assert predictor(data.paths[0]).names == data[0].names


def test_events_are_printed_for_cloudwatch(trained: tuple[Path, str]) -> None:
    folder, printed = trained
    found = re.findall(pattern("val/AP"), printed, re.MULTILINE)
    assert len(found) == 5
    assert float(found[-1]) == pytest.approx(Model(folder / "model").manifest.metrics["val/AP"])
    events = [event for line in printed.splitlines() if (event := from_line(line)) is not None]
    assert [e.values["state"] for e in events if e.kind == "state"] == ["running", "finished"]


def test_hyperparameters_are_strings_of_any_kind(data: Dataset, tmp_path: Path) -> None:
    given = {"iterations": '"12"', "learning_rate": ".5", "seed": "7", "weights": "none"}
    internal = {"_tuning_objective_metric": "val/AP", "sagemaker_program": "x.py"}
    folder = lay_out(tmp_path / "ml", data, hyperparameters=given | internal)
    done = train(folder)
    assert done.returncode == 0, done.stderr
    params = Model(folder / "model").manifest.params
    wanted = {"iterations": 12, "epochs": None, "learning_rate": 0.5, "seed": 7, "weights": None}
    assert {name: params[name] for name in wanted} == wanted
    assert not params.keys() & internal.keys()


@pytest.mark.parametrize(
    ("hyperparameters", "job", "hosts", "told"),
    [
        ({"epoch": "3"}, {}, 1, r"no hyperparameter of echo/memory 'epoch'; did you mean 'epochs'\?"),
        ({"epochs": "many"}, {}, 1, r"epochs='many' \(from hyperparameters.json\) is not valid"),
        ({}, {"params": {"epocs": 3}}, 1, "no hyperparameter of echo/memory 'epocs'; did you mean 'epochs'"),
        ({}, {"model": "memry"}, 1, "no model of backend 'echo' 'memry'; did you mean 'memory'"),
        ({}, {"backend": "detectron9"}, 1, "'detectron9' is not in this image.*build-image --with detectron9"),
        ({}, {"engine": "os:system"}, 1, "'os:system' is asked for.*nothing else is run.*build-image --with echo"),
        ({}, {}, 2, r"the job has 2 machines \(algo-1, algo-2\).*instance_count=1"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said_in_the_failure(  # noqa: PLR0917
    hyperparameters: dict[str, str], job: dict[str, Any], hosts: int, told: str, data: Dataset, tmp_path: Path
) -> None:
    folder = lay_out(tmp_path / "ml", data, hyperparameters=hyperparameters, **job)
    names = [f"algo-{i + 1}" for i in range(hosts)]
    (folder / "input/config/resourceconfig.json").write_text(json.dumps({"current_host": "algo-1", "hosts": names}))
    done = train(folder)
    assert done.returncode in (2, 3)
    first = failure(folder).partition("\n")[0]
    assert re.search(told, first)
    assert first in done.stderr  # the log has it, too
    assert not (folder / "model/detkit.json").exists()


def test_a_folder_without_a_job_is_a_failure(tmp_path: Path) -> None:
    assert train(tmp_path).returncode == 2
    assert "there is no input/data/job/job.json" in failure(tmp_path)


def test_a_bug_keeps_its_traceback(data: Dataset, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "ml", data)
    (folder / "input/config/resourceconfig.json").write_text("{")
    assert train(folder).returncode == 3
    first, _, rest = failure(folder).partition("\n")
    assert first.startswith("JSONDecodeError: ")
    assert "Traceback" in rest


def test_a_long_reason_is_cut_for_the_platform(tmp_path: Path) -> None:
    container = Container(tmp_path)
    container.failure_file.parent.mkdir()
    reason = "all of it " * 400
    container.fail(reason, "Traceback")
    container.shorten_failure()
    first, _, rest = failure(tmp_path).partition("\n")
    assert len(first) == REASON_LENGTH
    assert rest == f"{reason}\nTraceback"
    container.shorten_failure()
    assert failure(tmp_path) == f"{first}\n{rest}"


def test_sigterm_stops_with_a_checkpoint_and_training_goes_on_from_it(data: Dataset, tmp_path: Path) -> None:
    slow = msgspec.to_builtins(plugins.backend("echo").options()) | {"seconds_per_step": 0.02}
    folder = lay_out(tmp_path / "ml", data, hyperparameters={"epochs": "8"}, options=slow)
    process = subprocess.Popen(command("train"), env=environment(folder), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if re.search(pattern("val/AP"), line):
            break
    process.send_signal(signal.SIGTERM)
    rest, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert '"stopped"' in rest
    assert not (folder / "output/failure").exists()
    assert not (folder / "model/detkit.json").exists()
    assert list((folder / "checkpoints").glob("step-*"))
    done = train(folder)
    assert done.returncode == 0
    assert '"resumed"' in done.stdout
    assert (folder / "model/detkit.json").is_file()


@pytest.mark.parametrize("verb", ["train", "serve"])
def test_sigterm_is_heard_before_anything_that_takes_long_is_imported(verb: str, tmp_path: Path) -> None:
    """As process 1 of a container it ignores what it has no handler for; numpy takes a minute here to be imported."""
    (tmp_path / "numpy.py").write_text("import time; print('importing', flush=True); time.sleep(60)")
    variables = environment(tmp_path)
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(tmp_path), variables.get("PYTHONPATH")]))
    ignoring = ["sh", "-c", 'trap "" TERM; exec "$@"', "sh", *command(verb)]
    with subprocess.Popen(ignoring, env=variables, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.terminate()
        try:
            assert process.wait(timeout=20) == 128 + signal.SIGTERM
        finally:
            process.kill()


def tar(archive: Path, *members: tuple[str, bytes] | tarfile.TarInfo) -> Path:
    with tarfile.open(archive, "w:gz") as file:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                file.addfile(member, io.BytesIO(b"x" * member.size) if member.isreg() else None)
            else:
                info = tarfile.TarInfo(member[0])
                info.size = len(member[1])
                file.addfile(info, io.BytesIO(member[1]))
    return archive


def test_a_parent_comes_as_an_archive(trained: tuple[Path, str], data: Dataset, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "ml", data)
    channel = folder / "input/data/model"
    channel.mkdir()
    with tarfile.open(channel / "model.tar.gz", "w:gz") as archive:
        archive.add(trained[0] / "model", ".")
    done = train(folder)
    assert done.returncode == 0, done.stderr
    manifest = Model(folder / "model").manifest
    assert manifest.parent == file_sha256(trained[0] / "model/detkit.json")
    assert manifest.weights.kept == list(data.classes)


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("weights.bin", b"")], "has no detkit.json"),
        ([("../../../../detkit.json", b"{}")], "leads out of the folder"),
    ],
)
def test_a_parent_that_is_none(members: Any, told: str, data: Dataset, tmp_path: Path) -> None:
    folder = lay_out(tmp_path / "ml", data)
    (folder / "input/data/model").mkdir()
    tar(folder / "input/data/model/model.tar.gz", *members)
    assert train(folder).returncode == 1
    assert told in failure(folder)


def linked(kind: bytes, name: str = "a", target: str = "/etc/passwd") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


@pytest.mark.parametrize(
    ("members", "told"),
    [
        ([("../a", b"")], "leads out"),
        ([("/a", b"")], "leads out"),
        ([("b/../../a", b"")], "leads out"),
        ([("..\\a", b"")], "leads out"),
        ([linked(tarfile.SYMTYPE)], "a link or a device"),
        ([linked(tarfile.LNKTYPE)], "a link or a device"),
        ([linked(tarfile.FIFOTYPE)], "a link or a device"),
        ([linked(tarfile.CHRTYPE)], "a link or a device"),
        ([linked(tarfile.SYMTYPE, "d", "/tmp"), ("d/a", b"")], "a link or a device"),
        ([("a", b"1"), ("a", b"2")], "twice"),
        ([("a", b"1"), ("a/b", b"2")], "twice"),
    ],
)
def test_a_hostile_archive_writes_nothing_elsewhere(members: Any, told: str, tmp_path: Path) -> None:
    archive, folder = tar(tmp_path / "model.tar.gz", *members), tmp_path / "to"
    folder.mkdir()
    with pytest.raises(InvalidData, match=told):
        unpack(archive, folder)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.tar.gz", "to"]
    assert not any(path.is_symlink() for path in folder.rglob("*"))


def test_an_archive_has_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    archive = tar(tmp_path / "model.tar.gz", ("a", b"12"), ("b", b"34"))
    monkeypatch.setattr(archives, "MOST_BYTES", 3)
    with pytest.raises(InvalidData, match="holds more than"):
        unpack(archive, tmp_path / "bytes")
    monkeypatch.setattr(archives, "MOST_FILES", 1)
    with pytest.raises(InvalidData, match="holds more than"):
        unpack(archive, tmp_path / "files")


@pytest.mark.parametrize("keep", [0, 5, 60])
def test_a_damaged_archive(keep: int, tmp_path: Path) -> None:
    archive = tar(tmp_path / "model.tar.gz", ("a", os.urandom(1000)))
    archive.write_bytes(archive.read_bytes()[:keep])
    with pytest.raises(InvalidData, match="damaged, or no tar archive"):
        unpack(archive, tmp_path / "to")


@contextlib.contextmanager
def serving(folder: Path, **more: str) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Serve the model of a folder; yields the port once it answers."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    process = subprocess.Popen(
        command("serve"), env=environment(folder, DETKIT_PORT=str(port), **more), stderr=subprocess.PIPE, text=True
    )
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(OSError):
                if ask(port, "GET", "/ping")[0] == 200:
                    break
            time.sleep(0.02)
        yield port, process
    finally:
        process.kill()
        process.communicate()


def ask(port: int, method: str, path: str, body: bytes = b"", **headers: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, path, body or None, {n.replace("_", "-"): v for n, v in headers.items()})
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def port(trained: tuple[Path, str]) -> Iterator[int]:
    with serving(trained[0]) as (port, _):
        yield port


def test_an_image_file_is_answered(port: int, data: Dataset) -> None:
    for path, kind in zip(data.paths[:2], ("image/jpeg", "application/x-image"), strict=True):
        body = Path(path).read_bytes()
        status, answer = ask(port, "POST", "/invocations", body, Content_Type=kind, Accept="application/json")
        assert status == 200
        (found,) = decode_detections(answer)
        wanted = data[data.paths.index(path)]
        assert found.names == wanted.names
        np.testing.assert_allclose(found.boxes, wanted.boxes, atol=1e-6)
        assert (found.width, found.height) == (wanted.width, wanted.height)


def test_a_batch_is_answered_in_order(port: int, data: Dataset) -> None:
    order = [i % 8 for i in range(3, 23)]  # more than the model is given at once
    batch = [data[i].image() for i in order]
    body = b"".join(encode_images(batch, [data.image_ids[i] for i in order]))
    status, answer = ask(port, "POST", "/invocations", body, Content_Type=CONTENT_TYPE)
    found = decode_detections(answer)
    assert status == 200
    assert [one.path for one in found] == [data.image_ids[i] for i in order]
    assert [one.names for one in found] == [data[i].names for i in order]


def bomb() -> bytes:
    file = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(file, "PNG")
    return file.getvalue()


GREY_HEADER = b'{"images": [{"bytes": 1, "shape": [1, 1, 1]}]}'
GREY = struct.pack("<I", len(GREY_HEADER)) + GREY_HEADER + b"x"


def test_a_name_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "model.tar.gz"
    with tarfile.open(archive, "w:gz", format=tarfile.GNU_FORMAT) as packed:
        packed.addfile(tarfile.TarInfo("a" * (4 << 20)))
    with pytest.raises(InvalidData, match="header"):
        unpack(archive, tmp_path / "to")


def test_a_folder_where_a_file_is(tmp_path: Path) -> None:
    archive = tmp_path / "model.tar"
    with tarfile.open(archive, "w") as packed:
        packed.addfile(tarfile.TarInfo("a"))
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        packed.addfile(folder)
    with pytest.raises(InvalidData, match="twice"):
        unpack(archive, tmp_path / "to")


@pytest.mark.parametrize(
    ("body", "headers", "status", "told"),
    [
        (b"no image", {"Content-Type": "image/jpeg"}, 400, "no image that Pillow knows"),
        (b"", {"Content-Type": "image/jpeg"}, 400, "empty"),
        (bomb(), {"Content-Type": "image/png"}, 400, "pixels"),
        (b"\xff\xff\xff\xff{}", {"Content-Type": CONTENT_TYPE}, 400, "malformed"),
        (GREY, {"Content-Type": CONTENT_TYPE}, 400,
         "shape"),
        (b"1,2,3", {"Content-Type": "text/csv"}, 415, "'text/csv'; expected image/jpeg"),
        (b"x", {}, 415, "expected image/jpeg"),
        (b"x", {"Content-Type": "image/png", "Accept": "text/csv"}, 406, "application/json"),
        (b"", {"Content-Type": "image/png", "Content-Length": str(10**9)}, 413, "bytes"),
        (b"", {"Content-Type": "image/png", "Content-Length": "-1"}, 411, "Content-Length"),
        (b"", {"Content-Type": "image/png", "Content-Length": "1" * 5000}, 411, "Content-Length"),
    ],
)  # fmt: skip
def test_a_bad_request_says_why(port: int, body: bytes, headers: dict[str, str], status: int, told: str) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest("POST", "/invocations")
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        connection.putheader(name, value)
    connection.endheaders(body)
    response = connection.getresponse()
    answer = response.read()
    assert response.status == status
    assert told in json.loads(answer)["error"]
    assert ask(port, "GET", "/ping")[0] == 200
    connection.close()


def test_a_body_may_come_in_chunks(port: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (40, 30)).save(file, "PNG")
    content = file.getvalue()
    answers = []
    for chunked in (False, True):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        body = iter([content[:50], content[50:]]) if chunked else content
        connection.request("POST", "/invocations", body, {"Content-Type": "image/png"}, encode_chunked=chunked)
        response = connection.getresponse()
        answers.append((response.status, response.read()))
        connection.close()
    assert answers[0][0] == 200
    assert answers[0] == answers[1]


def test_the_pixels_of_a_request_count_together() -> None:
    file = io.BytesIO()
    Image.new("RGB", (4, 3)).save(file, "PNG")
    header = json.dumps({"images": [{"bytes": len(file.getvalue()), "path": name} for name in ("a.png", "b.png")]})
    body = struct.pack("<I", len(header)) + header.encode() + 2 * file.getvalue()
    assert len(decode_images(body, most_pixels=24)[0]) == 2
    with pytest.raises(ImageError, match=r"b\.png: more than 23 pixels in one request"):
        decode_images(body, most_pixels=23)


def test_other_paths(port: int) -> None:
    assert ask(port, "GET", "/")[0] == 404
    assert ask(port, "POST", "/other", b"x")[0] == 404
    status, answer = ask(port, "GET", "/execution-parameters")
    wanted = {"MaxConcurrentTransforms": 1, "BatchStrategy": "SINGLE_RECORD", "MaxPayloadInMB": 20}
    assert (status, json.loads(answer)) == (200, wanted)


def test_many_at_once_over_kept_connections(port: int, data: Dataset) -> None:
    bodies = [Path(path).read_bytes() for path in data.paths]

    def client(start: int) -> list[tuple[str, ...]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        found = []
        for i in range(start, start + 10):
            connection.request("POST", "/invocations", bodies[i % 8], {"Content-Type": "application/x-image"})
            found.append(decode_detections(connection.getresponse().read())[0].names)
        connection.close()
        return found

    with ThreadPoolExecutor(6) as pool:
        for start, found in enumerate(pool.map(client, range(6))):
            assert found == [data[i % 8].names for i in range(start, start + 10)]


def test_an_answer_is_one_write(port: int) -> None:
    """Two writes wait for one another's acknowledgement, 40 ms, on a connection that is kept."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        for _ in range(10):
            connection.sendall(b"GET /ping HTTP/1.1\r\nHost: here\r\n\r\n")
            head, _, body = connection.recv(65536).partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 ")
            assert body == b"{}", "the head came alone"


def test_settings_and_batch_and_end(trained: tuple[Path, str], data: Dataset) -> None:
    good = Path(data.paths[0]).read_bytes()
    variables = {"SAGEMAKER_BATCH": "true", "DETKIT_SCORE_THRESHOLD": "0.1", "DETKIT_MAX_DETECTIONS": "1"}
    with serving(trained[0], **variables) as (port, process):
        status, answer = ask(port, "POST", "/invocations", b"no image", Content_Type="application/x-image")
        assert status == 200
        row = json.loads(answer)
        assert row["images"] == []
        assert "no image that Pillow knows" in row["error"]
        status, _ = ask(port, "POST", "/invocations", good, Content_Type="text/csv")
        assert status == 415
        status, answer = ask(port, "POST", "/invocations", good, Content_Type="application/x-image")
        assert len(decode_detections(answer)[0]) == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 0


@pytest.mark.parametrize(
    ("variables", "told"),
    [({}, "holds no finished model"), ({"DETKIT_SCORE_THRESHOLD": "high"}, "from DETKIT_SCORE_THRESHOLD")],
)
def test_a_model_that_cannot_be_opened_ends_the_container(
    variables: dict[str, str], told: str, trained: tuple[Path, str], tmp_path: Path
) -> None:
    with serving(trained[0] if variables else tmp_path, **variables) as (_, process):
        assert process.wait(timeout=20) == 2
        assert process.stderr is not None
        assert told in process.stderr.read()


def test_code_travels_with_the_model_and_runs_only_where_it_may(data: Dataset, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "my_heads.py").write_text("print('my head is there')")
    code = UserCode.read(source)
    folder = lay_out(tmp_path / "ml", data, code=Code(digest=code.digest, imports=["my_heads"]))
    code.copy_to(folder / "input/data/code")
    done = train(folder)
    assert done.returncode == 0, done.stderr
    assert "my head is there" in done.stdout
    assert "code/my_heads.py" in Model(folder / "model").manifest.artifacts
    with serving(folder) as (_, process):
        assert process.wait(timeout=20) == 2
        assert process.stderr is not None
        assert f"DETKIT_CODE={code.digest}" in process.stderr.read()
    with serving(folder, DETKIT_CODE=code.digest) as (port, _):
        body = Path(data.paths[0]).read_bytes()
        assert ask(port, "POST", "/invocations", body, Content_Type="image/jpeg")[0] == 200
    (folder / "model/code/my_heads.py").write_text("print('another head')")
    with serving(folder, DETKIT_CODE=code.digest) as (_, process):
        assert process.wait(timeout=20) == 2
        assert process.stderr is not None
        assert "is not that of the training" in process.stderr.read()
    (folder / "model/code/my_heads.py").unlink()
    (folder / "model/code").rmdir()
    with serving(folder, DETKIT_CODE=code.digest) as (_, process):
        assert process.stderr is not None
        assert "there is no folder 'code'" in process.stderr.read()


def test_the_container_needs_no_more_than_the_worker() -> None:
    script = (
        "import sys, json; sys.modules['typing_extensions'] = None; before = set(sys.modules)\n"
        "import detkit_sagemaker.container.__main__, detkit_sagemaker.container.training\n"
        "import detkit_sagemaker.container.serving, detkit_sagemaker.container.engines\n"
        "found = {n: getattr(m, '__file__', None) for n, m in sys.modules.items() if n not in before}\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(Path.cwd()), capture_output=True, text=True, check=True
    )
    loaded: dict[str, str | None] = json.loads(done.stdout)
    others = {name.partition(".")[0] for name in loaded} - set(sys.stdlib_module_names)
    others = {name for name in others if not name.startswith(("__", "detkit"))}
    assert others <= {"numpy", "PIL", "msgspec", "pluggy"}
    own = [Path(file) for name, file in loaded.items() if name.startswith("detkit_sagemaker") and file]
    assert len(own) >= 6
    for file in own:
        ast.parse(file.read_text(), str(file), feature_version=(3, 10))


@pytest.mark.parametrize(("arguments", "code", "told"), [
    (["check", "echo"], 0, "echo: detkit_echo.engine:EchoEngine can be imported"),
    (["check", "detectron9"], 3, "no backend 'detectron9'"),
    (["predict"], 2, "usage: "),
])  # fmt: skip
def test_the_command_line(arguments: list[str], code: int, told: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "detkit_sagemaker.container", *arguments],
        env=environment(tmp_path), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == code
    assert told in done.stdout + done.stderr


def plugin_with_framework(site: Path, framework: str) -> None:
    """Lay out a plugin as it lies when it is installed; its backend needs a framework that nothing has imported yet."""
    (site / "deep_framework.py").write_text(framework)
    (site / "deep_plugin.py").write_text(
        "from dataclasses import replace\n"
        "import detkit_echo\n"
        "from detkit.hookspecs import hookimpl\n"
        "@hookimpl\n"
        "def detkit_backends():\n"
        "    (echo,) = detkit_echo.detkit_backends()\n"
        "    return [replace(echo, name='deep', requires=('deep_framework',))]\n"
    )
    info = site / "deep_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: deep-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[detkit]\ndeep = deep_plugin\n")


@pytest.mark.parametrize(("framework", "code", "told"), [
    ("__version__ = '4.2'", 0, "deep: detkit_echo.engine:EchoEngine, deep_framework 4.2 can be imported"),
    ("raise OSError('libquadmath.so.0: cannot open shared object file')", 3,
     "cannot run the engine of backend 'deep': OSError: libquadmath.so.0: cannot open shared object file"),
])  # fmt: skip
def test_an_image_whose_framework_does_not_load_is_not_built(
    framework: str, code: int, told: str, tmp_path: Path
) -> None:
    """The module is found, and its engine imports it only when it trains."""
    plugin_with_framework(tmp_path, framework)
    variables = environment(tmp_path)
    variables["PYTHONPATH"] = os.pathsep.join([str(tmp_path), variables["PYTHONPATH"]])
    done = subprocess.run([*command("check"), "deep"], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stdout + done.stderr
    assert told in done.stdout + done.stderr
