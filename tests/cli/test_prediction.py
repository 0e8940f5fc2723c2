"""``detkit predict``."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from detkit.images import read_image
from detkit.videos import frame_rate, num_frames


def test_lines_tell_what_is_in_each_image(cli: Any, data: Path, trained: Path) -> None:
    done = cli("predict", "first", data, cwd=trained)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    assert len(lines) == 20
    one = r"(disc|square) [01]\.\d\d"
    assert all(
        re.search(rf"\.(jpg|png): (0 detections|1 detection: {one}|2 detections: {one}, {one})$", line)
        for line in lines
    )
    assert any("1 detection: " in line for line in lines)


def test_json_lines(cli: Any, data: Path, trained: Path) -> None:
    done = cli("predict", "last", data / "images" / "000.jpg", "--json", "--isolate", cwd=trained)
    (line,) = done.out.splitlines()
    found = json.loads(line)
    assert set(found) == {"path", "width", "height", "detections"}
    assert set(found["detections"][0]) == {"name", "score", "box"}


@pytest.mark.parametrize(("threshold", "count"), [("1", 0), ("0", 1), ("best", 1)])
def test_score_threshold(threshold: str, count: int, cli: Any, data: Path, trained: Path) -> None:
    done = cli("predict", "last", data / "images/000.jpg", "--json", "--score-threshold", threshold, cwd=trained)
    assert len(done.json["detections"]) == count, done.err


def test_pictures_keep_folders_and_names(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    for place in ("a/one.jpg", "b/one.jpg", "b/deep/one.jpg"):
        (tmp_path / "in" / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(data / "images/000.jpg", tmp_path / "in" / place)
    Image.open(data / "images/000.jpg").save(tmp_path / "in/a/one.tif")
    run = trained / "runs/first"
    done = cli("predict", run, "in", "--save", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    saved = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert saved == {"a/one.jpg", "b/one.jpg", "b/deep/one.jpg", "a/one.tif.png"}
    with Image.open(tmp_path / "out/a/one.jpg") as drawn, Image.open(tmp_path / "in/a/one.jpg") as plain:
        assert drawn.size == plain.size
        assert drawn.tobytes() != plain.tobytes()
    globbed = cli("predict", run, "in/*/*.jpg", "--save", "globbed", cwd=tmp_path)
    assert globbed.code == 0, globbed.err
    assert {path.relative_to(tmp_path / "globbed").as_posix() for path in (tmp_path / "globbed").rglob("*.jpg")} == {
        "a/one.jpg",
        "b/one.jpg",
    }


def test_no_image_is_replaced(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copy(data / "images/000.jpg", tmp_path / "one.jpg")
    before = (tmp_path / "one.jpg").read_bytes()
    done = cli("predict", trained / "runs/first", ".", "--save", ".", cwd=tmp_path)
    assert done.code == 2
    assert "would replace" in done.err
    assert (tmp_path / "one.jpg").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["last", "nothing.jpg"], 1, "there is no such file"),
        (["last", "*.nothing"], 2, "no image in"),
        (["lost", "a.jpg"], 2, "no run 'lost'"),
        (["last", "a.jpg", "--score-threshold", "often"], 2, "a number from 0 to 1, or `best`"),
        (["last", "a.jpg", "--score-threshold", "bset"], 2, "did you mean 'best'?"),
        (["last", "a.jpg", "--score-threshold", "nan"], 2, "score_threshold=nan is not valid"),
    ],
)
def test_errors(words: list[str], code: int, message: str, cli: Any, trained: Path) -> None:
    done = cli("predict", *words, cwd=trained)
    assert done.code == code
    assert message in done.err and "Traceback" not in done.err


def test_a_split_of_a_data_set(cli: Any, trained: Path, tmp_path: Path) -> None:
    from detkit.data import Dataset
    from detkit.io import write_dataset
    from detkit.testing import tiny_dataset

    drawn = tiny_dataset(tmp_path / "drawn", num_images=6)
    split = Dataset.from_samples(drawn.classes, list(drawn), {"train": [0, 1, 2, 3], "val": [4, 5]})
    write_dataset(split, tmp_path / "voc", "voc")
    done = cli("predict", trained / "runs/first", "voc:val", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [Path(json.loads(line)["path"]).name for line in done.out.splitlines()] == ["004.jpg", "005.png"]


def test_unknown_threshold_is_said_once(cli: Any, data: Path, tmp_path: Path) -> None:
    from detkit import Trainer
    from detkit.io import read_dataset

    images = read_dataset(data)
    Trainer(model="echo/memory", epochs=1).fit(images, test=images, name=str(tmp_path / "blind"), quiet=True)
    done = cli("predict", "blind", data, "--json", cwd=tmp_path)
    assert done.err.count("score threshold 0.25") == 1


def test_several_sources_and_one_file_of_results(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    from detkit.io import read_dataset
    from detkit.predictions import read_predictions

    images = data / "images"
    words = ("predict", trained / "runs/first", images / "003.png", f"{images}/00*.jpg")
    lines = cli(*words, "--json", cwd=tmp_path).out.splitlines()
    names = ["003.png", "000.jpg", "002.jpg", "004.jpg", "006.jpg", "008.jpg"]
    assert [Path(json.loads(line)["path"]).name for line in lines] == names
    for name in ("found.jsonl", "found.json", "found.csv"):
        done = cli(*words, "--to", f"deep/{name}", cwd=tmp_path)
        assert (done.code, done.out) == (0, ""), done.err
        assert re.search(rf"\d+ detections on 6 images in deep/{name}\n", done.err)
        assert re.search(r"^6 images in \d+\.\d s: \d+\.\d images/s; the model took \d+% of the time$", done.err, re.M)
    assert (tmp_path / "deep/found.jsonl").read_text().splitlines() == lines
    rows = list(csv.DictReader((tmp_path / "deep/found.csv").read_text().splitlines()))
    found = [one for line in lines for one in json.loads(line)["detections"]]
    assert [(row["name"], float(row["score"])) for row in rows] == [(one["name"], one["score"]) for one in found]
    content = json.loads((tmp_path / "deep/found.json").read_text())
    assert [Path(image["file_name"]).name for image in content["images"]] == names
    looked_at = read_dataset(data).take([0, 2, 3, 4, 6, 8])
    assert sum(map(len, read_predictions(tmp_path / "deep/found.json", looked_at))) == len(found)


def test_results_of_a_data_set_have_its_ids(cli: Any, trained: Path, tmp_path: Path) -> None:
    from detkit.data import Dataset
    from detkit.io import read_dataset, write_dataset
    from detkit.predictions import read_predictions
    from detkit.testing import tiny_dataset

    drawn = tiny_dataset(tmp_path / "drawn", num_images=6)
    split = Dataset.from_samples(drawn.classes, list(drawn), {"train": [0, 1, 2, 3], "val": [4, 5]})
    write_dataset(split, tmp_path / "voc", "voc")
    done = cli("predict", trained / "runs/first", "voc:val", "--to", "found.json", cwd=tmp_path)
    assert done.code == 0, done.err
    results = json.loads((tmp_path / "found.json").read_text())
    assert {record["image_id"] for record in results} == {1, 2}
    assert len(read_predictions(tmp_path / "found.json", read_dataset(tmp_path / "voc", split="val"))) == 2


def test_pictures_of_urls_stay_in_their_folder(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write((data / "images/000.jpg").read_bytes())

        def log_message(self, *_words: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, contextlib.ExitStack() as closing:
        threading.Thread(target=server.serve_forever).start()
        closing.callback(server.shutdown)
        url = f"http://127.0.0.1:{server.server_port}"
        words = ("predict", trained / "runs/first", "--fetch", "--save", "deep/out")
        for address, name in ((f"{url}/?id=7", "image.png"), (url, "image.png"), (f"{url}/a/..", "...png")):
            done = cli(*words, address, cwd=tmp_path)
            assert done.code == 0, done.err
            saved = [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()]
            assert saved == [f"deep/out/{name}"]
            shutil.rmtree(tmp_path / "deep")
        refused = cli(*words, f"{url}/?id=7", f"{url}/?id=8", cwd=tmp_path)
        assert refused.code == 2 and "several images would be saved as deep/out/image.png" in refused.err


def test_a_broken_image(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    for i in range(3):
        shutil.copy(data / "images/000.jpg", tmp_path / f"{i}.jpg")
    (tmp_path / "1.jpg").write_bytes(b"no image")
    (tmp_path / "found.csv").write_text("before")
    words = ("predict", trained / "runs/first", ".", "--to", "found.csv", "--save", "drawn")
    stopped = cli(*words, cwd=tmp_path)
    assert stopped.code == 1
    assert "error: cannot read image 1.jpg: it is no image" in stopped.err and "Traceback" not in stopped.err
    assert (tmp_path / "found.csv").read_text() == "before"
    shutil.rmtree(tmp_path / "drawn")
    done = cli(*words, "--on-invalid", "warn", cwd=tmp_path)
    assert done.code == 1
    assert "warning: left out: cannot read image 1.jpg: it is no image" in done.err
    assert "1 could not be read and were left out" in done.err
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    assert {row["path"] for row in rows} == {"0.jpg", "2.jpg"}
    assert sorted(path.name for path in (tmp_path / "drawn").iterdir()) == ["0.jpg", "2.jpg"]


def test_tiles(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    """Four pictures in one: in tiles each is what it was, and the whole is like none of them."""
    names = ("000.jpg", "002.jpg", "004.jpg", "006.jpg")
    pictures = [Image.fromarray(read_image(data / f"images/{name}")) for name in names]
    side = pictures[0].width
    whole = Image.new("RGB", (2 * side, 2 * side))
    for i, picture in enumerate(pictures):
        whole.paste(picture, (side * (i % 2), side * (i // 2)))
    whole.save(tmp_path / "whole.png")
    run = trained / "runs/first"
    each = cli("predict", run, *(data / f"images/{name}" for name in names), "--json", cwd=tmp_path).out.splitlines()
    alone = [json.loads(line)["detections"] for line in each]
    words = ("predict", run, "whole.png", "--json", "--tile-size", str(side), "--tile-overlap", "0", "--tiles-only")
    found = cli(*words, cwd=tmp_path).json["detections"]
    moved = [
        (one["name"], [round(v + side * [i % 2, i // 2][at % 2]) for at, v in enumerate(one["box"])])
        for i, some in enumerate(alone)
        for one in some
    ]
    assert sorted((one["name"], [round(v) for v in one["box"]]) for one in found) == sorted(moved)
    assert len(cli(*words, "--max-detections", "2", cwd=tmp_path).json["detections"]) == 2


def test_a_video(cli: Any, data: Path, trained: Path, tmp_path: Path) -> None:
    av = pytest.importorskip("av", reason="needs PyAV: pip install 'detkit-sdk[video]'")
    with av.open(str(tmp_path / "some.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 96
        stream.pix_fmt, stream.bit_rate = "yuv420p", 4_000_000
        for path in sorted((data / "images").iterdir())[:10]:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(read_image(path), "rgb24")))
        container.mux(stream.encode())
    run = trained / "runs/first"
    done = cli("predict", run, "some.mp4", data / "images/000.jpg", "--every", "4", "--save", "out", cwd=tmp_path)
    assert done.code == 0, done.err
    assert [line.partition(": ")[0] for line in done.out.splitlines()] == [
        "some.mp4#0", "some.mp4#4", "some.mp4#8", str(data / "images/000.jpg"),
    ]  # fmt: skip
    assert "4 pictures in out" in done.err
    saved = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert sorted(path.name for path in saved) == ["000.jpg", "some.mp4#0.jpg", "some.mp4#4.jpg", "some.mp4#8.jpg"]
    assert all(read_image(path).shape == (96, 96, 3) for path in saved)
    done = cli(
        "predict", run, "some.mp4", "--save", "drawn/again.mp4", "--to", "found.csv", "--every", "2", cwd=tmp_path
    )
    assert done.code == 0, done.err
    assert "5 pictures in drawn/again.mp4" in done.err
    assert [path.name for path in (tmp_path / "drawn").iterdir()] == ["again.mp4"]
    assert (num_frames(tmp_path / "drawn/again.mp4"), frame_rate(tmp_path / "drawn/again.mp4")) == (5, 5)
    plain, drawn = read_image(tmp_path / "some.mp4#4").astype(int), read_image(tmp_path / "drawn/again.mp4#2")
    assert 1 < np.abs(plain - drawn).mean() < 60
    for words, message in (
        (["some.mp4", "--save", "some.mp4"], "would replace the video itself; choose another file"),
        ([data / "images", "--save", "out.mp4"], "writes a video out of one video; name a folder for pictures"),
    ):
        refused = cli("predict", run, *words, cwd=tmp_path)
        assert refused.code == 2 and message in refused.err


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a.jpg", "--tile-size", "7"], 2, "tile_size=7 is not valid: a whole number of pixels from 32"),
        (
            ["a.jpg", "--tile-overlap", "0.3"],
            2,
            "--tile-overlap and --tiles-only say how tiles are cut; give --tile-",
        ),
        (["a.jpg", "--tile-sise", "640"], 2, "--tile-size"),
        (["a.jpg", "--to", "found.xml"], 2, "a file name that ends in .json, .jsonl, .csv"),
        (["a.jpg", "--to", "found.csv", "--json"], 2, "--json prints what --to writes; give one of them"),
        (["a.jpg", "--on-invalid", "skip"], 2, "on_invalid='skip' is not valid: `raise` or `warn`"),
        (["a.jpg", "--nms-threshold", "3"], 2, "nms_threshold=3.0 is not valid"),
        (["http://127.0.0.1:9/a.jpg"], 2, "is a URL, and nothing is fetched unless you say so: fetch=True (--fetch)"),
        (["http://127.0.0.1:9/a.jpg", "--fetch"], 1, "cannot read image http://127.0.0.1:9/a.jpg: "),
    ],
)
def test_options_that_cannot_be(words: list[str], code: int, message: str, cli: Any, trained: Path) -> None:
    done = cli("predict", "last", *words, cwd=trained)
    assert done.code == code, done.err
    assert message in done.err and "Traceback" not in done.err
