"""Videos: their frames as players show them, what they are called, and what is wrong with those that break off."""

from __future__ import annotations

import struct
import sys
from collections.abc import Sequence
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import pytest

from detkit import Dataset, Predictor, Run, Trainer, draw
from detkit.errors import DetkitWarning, ImageError, StorageError, UsageError
from detkit.images import Image, read_image
from detkit.testing import tiny_dataset
from detkit.videos import frame_rate, frames, is_video, num_frames, numbered, read_frame, writing

av = pytest.importorskip("av", reason="needs PyAV: pip install 'detkit-sdk[video]'")

ONE, LAST = 1 << 16, 1 << 30


def write_video(
    path: Path,
    pictures: Sequence[Image],
    codec: str = "mpeg4",
    *,
    options: dict[str, str] | None = None,
    step: int = 1,
) -> Path:
    """Write pictures, ten in a second; with a ``step``, each stays for so many of their times."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = pictures[0].shape[:2]
    with av.open(str(path), "w", options=options or {}) as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.bit_rate = 4_000_000
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts, frame.time_base = i * step, Fraction(1, 10)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Set the matrix of a video's track header (ISO/IEC 14496-12, 8.3.2)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 4
    at += 40 if content[at] == 0 else 52
    content[at : at + 36] = struct.pack(">9i", a * ONE, b * ONE, 0, c * ONE, d * ONE, 0, 0, 0, LAST)
    path.write_bytes(content)


def numbers(count: int) -> list[Image]:
    """Return pictures that are all grey, each brighter than the one before."""
    return [np.full((48, 64, 3), 20 + 200 * i // count, dtype=np.uint8) for i in range(count)]


def quarters() -> Image:
    """Return a picture whose quarters are red, green, blue and white."""
    picture = np.zeros((32, 64, 3), dtype=np.uint8)
    picture[:16, :32, 0], picture[:16, 32:, 1], picture[16:, :32, 2], picture[16:, 32:] = 255, 255, 255, 255
    return picture


def corners(picture: Image) -> str:
    """Name the colours of the four corners, row by row."""
    names = {(1, 0, 0): "r", (0, 1, 0): "g", (0, 0, 1): "b", (1, 1, 1): "w"}
    inner = picture[[4, 4, -5, -5], [4, -5, 4, -5]] > 127
    return "".join(names[tuple(map(int, one))] for one in inner)  # type: ignore[index]


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.MKV", "a.mov"])
def test_every_frame_in_order(name: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / name, numbers(12))
    found = list(frames(path))
    assert [frame.path for frame in found] == [f"{path}#{i}" for i in range(12)]
    levels = [frame.image().mean() for frame in found]
    assert levels == pytest.approx([20 + 200 * i // 12 for i in range(12)], abs=4)
    assert [frame.path for frame in frames(path, 5)] == [f"{path}#{i}" for i in (0, 5, 10)]
    assert num_frames(path) in {12, None}
    assert read_frame(path, 7).tolist() == read_image(f"{path}#7").tolist() == found[7].image().tolist()
    with pytest.raises(ImageError, match=rf"{name}#12: the video has 12 frames, counted from 0"):
        read_image(f"{path}#12")


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((1, 0, 0, 1), "rgbw"),
        ((0, 1, -1, 0), "brwg"),  # a quarter turn clockwise
        ((-1, 0, 0, -1), "wbgr"),
        ((0, -1, 1, 0), "gwrb"),
        ((-1, 0, 0, 1), "grwb"),  # a mirror
        ((1, 0, 0, -1), "bwrg"),
        ((0, 1, 1, 0), "rbgw"),
        ((0, -1, -1, 0), "wgbr"),
    ],
)
def test_frames_are_turned_as_players_show_them(matrix: tuple[int, ...], shown: str, tmp_path: Path) -> None:
    path = write_video(tmp_path / "held.mp4", [quarters()] * 2)
    turn(path, *matrix)
    picture = next(frames(path)).image()
    assert corners(picture) == shown
    assert picture.shape == ((32, 64, 3) if matrix[0] else (64, 32, 3))
    assert picture.flags.c_contiguous


@pytest.mark.parametrize("name", ["b.mp4", "b.avi", "b.mkv", "b.webm", "b.mpg"])
def test_what_is_written_is_read(name: str, tmp_path: Path) -> None:
    pictures = [picture[:47, :61] for picture in numbers(5)]
    with writing(tmp_path / "deep" / name, Fraction(25)) as append:
        for picture in pictures:
            append(picture)
        assert not (tmp_path / "deep" / name).exists()
    assert [path.name for path in (tmp_path / "deep").iterdir()] == [name]
    found = [frame.image() for frame in frames(tmp_path / "deep" / name)]
    assert {picture.shape for picture in found} == {(48, 62, 3)}
    assert [picture.mean() for picture in found] == pytest.approx([picture.mean() for picture in pictures], abs=5)
    assert frame_rate(tmp_path / "deep" / name) == 25


def test_a_video_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def broken_off(path: Path) -> None:
        with writing(path, Fraction(10)) as append:
            append(quarters())
            raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        broken_off(tmp_path / "b.mp4")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match=r"cannot write .*b.mp4"):
        broken_off(tmp_path / "file" / "b.mp4")


@pytest.mark.parametrize("name", ["a.mp4", "a.avi", "a.webm"])
def test_a_video_without_a_picture_is_not_written(name: str, tmp_path: Path) -> None:
    with (
        pytest.raises(UsageError, match=rf"{name} is not written: there is no frame to write"),
        writing(tmp_path / name, Fraction(10)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_what_is_a_video() -> None:
    assert is_video("a/B.MP4") and is_video(Path("a.webm")) and not is_video("a.jpg") and not is_video("mp4")
    assert numbered(Path("a.mp4#3")) == ("a.mp4", 3)
    for path in ("a.mp4", "a.mp4#", "a.mp4#x", "a.rec#3", "a.mp4#-1", "a.mp4#" + "9" * 19):
        assert numbered(path) is None


def test_a_file_that_is_called_like_a_frame(tmp_path: Path) -> None:
    (tmp_path / "a.mp4#1").touch()
    assert numbered(tmp_path / "a.mp4#1") is None


@pytest.mark.parametrize(
    ("content", "why"), [(None, "there is no such file"), (b"", "Invalid data|End of file"), (b"words" * 99, "Invalid")]
)
def test_no_video(content: bytes | None, why: str, tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError, match=rf"cannot read image {path}: .*({why})") as caught:
        list(frames(path))
    assert caught.value.path == str(path)
    assert num_frames(path) is None


def test_sound_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    with pytest.raises(ImageError, match=r"a.mp4: it holds no pictures, only sound"):
        list(frames(path))


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(UsageError, match=r"videos need a package.*pip install 'detkit-sdk\[video\]'"):
        list(frames("a.mp4"))


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Dataset]:
    folder = tmp_path_factory.mktemp("videos")
    data = tiny_dataset(folder / "images", num_images=8)
    return Trainer(model="echo/memory", epochs=8).fit(data, data, name=str(folder / "run"), quiet=True), data


@pytest.fixture(scope="module")
def video(memory: tuple[Run, Dataset], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "some.mp4", [one.image() for one in memory[1]])


def test_a_video_is_a_source(memory: tuple[Run, Dataset], video: Path) -> None:
    run, data = memory
    with Predictor(run, batch_size=3) as predictor:
        found = list(predictor.predict(video))
        assert [one.path for one in found] == [f"{video}#{i}" for i in range(8)]
        assert [one.names for one in found] == [sample.names for sample in data]
        assert [(one.width, one.height) for one in found] == [(96, 96)] * 8
        with pytest.raises(UsageError, match=r"some.mp4 is a video; predict\(...\) yields"):
            predictor(video)
        again = predictor(found[3].path)
        assert again.to_dict() == found[3].to_dict()
        assert draw(found[3].path, found[3]).size == (96, 96)
        mixed = list(predictor.predict([data.paths[0], f"{video.parent}/*.mp4", data[1].image(), data], every=4))
        assert [one.path for one in mixed] == [data.paths[0], f"{video}#0", f"{video}#4", "", *data.paths]
        seen = list(predictor.predict_with_images(video, every=7))
        assert [one.path for _, one in seen] == [f"{video}#0", f"{video}#7"]
        assert (seen[1][0] == read_frame(video, 7)).all()


def test_a_video_that_breaks_off(
    memory: tuple[Run, Dataset], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of a stream of JPEGs the packets stay whole, but one of them is no picture; the codec says so."""
    run, data = memory
    path = write_video(tmp_path / "cut.avi", [one.image() for one in data], "mjpeg")
    spoil(path, 5)
    with Predictor(run, batch_size=4) as predictor:
        stream = predictor.predict([path, data.paths[0]])
        before = list(islice(stream, 5))
        assert [one.path for one in before] == [f"{path}#{i}" for i in range(5)]
        with pytest.raises(ImageError, match=r"cannot read image .*cut.avi#5: "):
            next(stream)
        with pytest.warns(DetkitWarning, match=r"left out: cannot read image .*cut.avi#5"):
            kept = list(predictor.predict([path, data.paths[0]], on_invalid="warn"))
        assert [one.path for one in kept] == [*(f"{path}#{i}" for i in range(5)), data.paths[0]]
        assert predictor.num_invalid == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [("a.avi", {}), ("a.mp4", {"movflags": "faststart"}), ("a.mov", {"movflags": "faststart"})],
)
def test_a_video_that_was_cut_off(
    name: str, options: dict[str, str], memory: tuple[Run, Dataset], tmp_path: Path
) -> None:
    path = write_video(tmp_path / name, [one.image() for one in memory[1]] * 3, options=options)
    content = path.read_bytes()
    assert len(list(frames(path))) == 24
    path.write_bytes(content[: len(content) // 2])
    seen = []
    with pytest.raises(ImageError) as caught:
        for frame in frames(path, 2):
            seen.append(frame.path)
    assert 4 <= len(seen) <= 8
    count = int(caught.value.path.rpartition("#")[2])
    assert len(seen) == -(-count // 2)
    assert str(caught.value) == f"cannot read image {path}#{count}: the video ends after {count} of 24 frames"
    with Predictor(memory[0]) as predictor:
        with pytest.warns(DetkitWarning, match=rf"{name}#{count}: the video ends after {count} of 24 frames"):
            assert len(list(predictor.predict(path, on_invalid="warn"))) == count
        assert predictor.num_invalid == 1


@pytest.mark.parametrize(
    ("name", "codec"),
    [("a.avi", "mpeg4"), ("a.mp4", "mpeg4"), ("a.mov", "mpeg4"), ("a.mkv", "mpeg4"), ("a.webm", "libvpx")]
    + [(f"b.{ending}", "libx264") for ending in ("avi", "mp4", "mov", "mkv")],
)
@pytest.mark.parametrize("step", [1, 3])
def test_whole_videos_end_well(name: str, codec: str, step: int, tmp_path: Path) -> None:
    """An AVI counts the ticks between pictures, too."""
    if codec not in av.codecs_available:
        pytest.skip(f"this PyAV has no {codec}")
    path = write_video(tmp_path / name, numbers(20), codec, step=step)
    assert len(list(frames(path))) == 20


def test_what_an_edit_list_leaves_out_is_not_missing(tmp_path: Path) -> None:
    """ISO/IEC 14496-12, 8.6.6: phones shorten a video so, and its frames are still counted."""
    path = write_video(tmp_path / "a.mp4", numbers(20))
    content = bytearray(path.read_bytes())
    at = content.index(b"elst") + 4
    content[at + 8 : at + 12] = struct.pack(">I", struct.unpack_from(">I", content, at + 8)[0] // 2)
    path.write_bytes(content)
    assert num_frames(path) == 20
    assert len(list(frames(path))) == 10


def spoil(path: Path, number: int) -> None:
    """Overwrite one of the JPEGs in a video."""
    content = bytearray(path.read_bytes())
    starts = positions(content, b"\xff\xd8\xff")
    content[starts[number] : starts[number] + 600] = bytes(600)
    path.write_bytes(content)


def positions(content: bytearray, mark: bytes) -> list[int]:
    found, at = [], content.find(mark)
    while at >= 0:
        found.append(at)
        at = content.find(mark, at + 1)
    return found


def test_a_stream_that_is_left_closes_the_file(memory: tuple[Run, Dataset], video: Path) -> None:
    with Predictor(memory[0], batch_size=2) as predictor:
        stream = predictor.predict(video)
        assert next(stream).path == f"{video}#0"
        assert str(video) in {file.path for file in psutil.Process().open_files()}
        stream.close()
    assert str(video) not in {file.path for file in psutil.Process().open_files()}
