"""RecordIO frames: what is written is read, damage has a place, packs are read by many at once."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from detkit.errors import BrokenRecord, ImageError, InvalidData
from detkit.images import file_of, read_bytes, read_header, read_image
from detkit.recordio import (
    MAGIC,
    RecordFile,
    RecordWriter,
    open_pack,
    pack,
    packed,
    read_index,
    read_labels,
    unpack,
)
from detkit.testing import tiny_dataset

PAYLOADS = [b"", b"a", b"abcd", MAGIC, b"abcd" + MAGIC, MAGIC + b"x", b"ab" + MAGIC + b"cd", MAGIC * 3, b"1234" * 100]


def write(path: Path, payloads: list[bytes]) -> list[int]:
    """Write records and their index; returns the offsets."""
    with path.open("wb") as file, path.with_suffix(".idx").open("wb") as index:
        writer = RecordWriter(file, index)
        return [writer.write(i, payload) for i, payload in enumerate(payloads)]


def test_every_way_to_read(tmp_path: Path) -> None:
    path = tmp_path / "a.rec"
    offsets = write(path, PAYLOADS)
    records = RecordFile(path)
    assert [(at, bytes(payload)) for at, payload in records] == list(zip(offsets, PAYLOADS, strict=True))
    assert [bytes(records.read(at)) for at in reversed(offsets)] == PAYLOADS[::-1]
    assert records.offsets() == offsets
    assert read_index(path.with_suffix(".idx")) == dict(enumerate(offsets))


def test_a_frame_of_each_kind(tmp_path: Path) -> None:
    """The bytes that dmlc-core's description of the format gives."""
    write(tmp_path / "a.rec", [b"abcde", b"1234" + MAGIC + MAGIC + b"5"])
    word = struct.Struct("<I").pack
    assert (tmp_path / "a.rec").read_bytes() == b"".join(
        (
            *(MAGIC, word(5), b"abcde\0\0\0"),
            *(MAGIC, word(1 << 29 | 4), b"1234"),
            *(MAGIC, word(2 << 29 | 0)),
            *(MAGIC, word(3 << 29 | 1), b"5\0\0\0"),
        )
    )
    assert (tmp_path / "a.idx").read_bytes() == b"0\t0\n1\t16\n"


@given(st.lists(st.lists(st.sampled_from([MAGIC, b"\0", b"ab", b"\xce", b"\n#\xd7"]), max_size=12).map(b"".join)))
def test_any_payload_comes_back(payloads: list[bytes]) -> None:
    file = io.BytesIO()
    writer = RecordWriter(file)
    offsets = [writer.write(i, payload) for i, payload in enumerate(payloads)]
    records = records_of(file.getvalue())
    assert [(at, bytes(payload)) for at, payload in records] == list(zip(offsets, payloads, strict=True))


def records_of(content: bytes) -> RecordFile:
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        return RecordFile(file.name)


def labels_agree(content: bytes) -> None:
    """Reading labels alone finds the records, and the errors, that reading everything finds."""
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        expected: list[object] = []
        try:
            for at, payload in RecordFile(file.name):
                header, image = unpack(payload)
                expected.append((at, header.id, np.asarray(header.label).tobytes(), bytes(image[:8])))
        except BrokenRecord as error:
            expected.append(str(error))
        except InvalidData as error:
            expected.append(error.__class__)
        found: list[object] = []
        try:
            for at, number, label, beginning in read_labels(file.name):
                found.append((at, number, np.asarray(label).tobytes(), beginning))
        except BrokenRecord as error:
            found.append(InvalidData if expected[-1] is InvalidData else str(error))
        assert found == expected


def test_a_view_is_no_copy(tmp_path: Path) -> None:
    write(tmp_path / "a.rec", [b"abcdefgh", b"abcd" + MAGIC])
    whole, parts = (payload for _, payload in RecordFile(tmp_path / "a.rec"))
    assert isinstance(whole, memoryview)
    assert isinstance(parts, bytes)


def cut(content: bytearray) -> None:
    del content[-4:]


def cut_in_a_frame(content: bytearray) -> None:
    content += MAGIC


def wrong_magic(content: bytearray) -> None:
    content[24] ^= 1


def too_long(content: bytearray) -> None:
    content[28:32] = struct.pack("<I", 2**29 - 1)


def begins_in_the_middle(content: bytearray) -> None:
    content[28:32] = struct.pack("<I", 2 << 29 | 8)


def parts_do_not_end(content: bytearray) -> None:
    content[28:32] = struct.pack("<I", 1 << 29 | 8)


def ends_amid_parts(content: bytearray) -> None:
    del content[40:]
    content[28:32] = struct.pack("<I", 1 << 29 | 8)


@pytest.mark.parametrize(
    ("damage", "record", "offset", "why"),
    [
        (cut, 2, 40, "8 bytes are announced at byte 40 and 4 are left; the file is cut off"),
        (cut_in_a_frame, 3, 56, "the file ends at byte 60, amid a frame; it is cut off"),
        (wrong_magic, 1, 24, "expected the magic word 0a23d7ce at byte 24, found 0b23d7ce"),
        (too_long, 1, 24, "536870911 bytes are announced at byte 24 and 24 are left"),
        (begins_in_the_middle, 1, 24, "expected the beginning of a record at byte 24, found flag 2"),
        (parts_do_not_end, 1, 24, "expected the next part of the record at byte 40, found flag 0"),
        (ends_amid_parts, 1, 24, "the file ends at byte 40, amid a frame"),
    ],
)
def test_damage_has_a_place(
    tmp_path: Path, damage: Callable[[bytearray], None], record: int, offset: int, why: str
) -> None:
    """Good records come first; then file, record and byte."""
    path = tmp_path / "a.rec"
    write(path, [b"x" * 13, b"y" * 8, b"z" * 8])
    content = bytearray(path.read_bytes())
    assert len(content) == 56
    damage(content)
    path.write_bytes(content)
    records = RecordFile(path)
    seen = []
    with pytest.raises(BrokenRecord) as caught:
        for _, payload in records:
            seen.append(bytes(payload))
    assert str(caught.value).startswith(f"{path}: record {record} at byte {offset}: {why}")
    assert seen == [b"x" * 13, b"y" * 8, b"z" * 8][:record]
    with pytest.raises(BrokenRecord, match=f"record at byte {offset}: "):
        records.read(offset)


@given(st.binary(max_size=200), st.integers(0, 250))
@example(b"", 0)
@example(MAGIC + struct.pack("<I", 1 << 29) * 20, 0)
def test_noise_is_an_error_with_a_place(content: bytes, offset: int) -> None:
    for head in (b"", MAGIC, MAGIC + b"\x04\0\0\0abcd" + MAGIC):
        records = records_of(head + content)
        try:
            assert sum(len(payload) + 8 for _, payload in records) <= len(head + content)
        except BrokenRecord as error:
            assert 0 <= error.offset <= len(head + content)
        labels_agree(head + content)
        try:
            records.read(offset)
        except BrokenRecord as error:
            assert error.offset == offset


def test_an_index_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.idx").write_bytes(b"0\t0\n\n1 16\n2\n")
    with pytest.raises(InvalidData, match=r"a.idx: line 4: expected a key and a byte offset, found '2'"):
        read_index(tmp_path / "a.idx")


def test_headers(tmp_path: Path) -> None:
    label = np.array([2, 5, 0, 0.1, 0.2, 0.3, 0.4], dtype=np.float32)
    header, image = unpack(pack(label, 2**63, b"image"))
    assert (header.flag, header.id, header.id2, bytes(image)) == (7, 2**63, 0, b"image")
    np.testing.assert_array_equal(header.label, label)
    assert unpack(pack(3.0, 1, b""))[0] == (0, 3.0, 1, 0)
    announced = struct.pack("<IfQQ", 1, 0, 0, 0)
    for payload, why in ((b"x" * 23, "23 bytes are too few"), (announced, "a label of 1 numbers")):
        with pytest.raises(InvalidData, match=why):
            unpack(payload)


@pytest.mark.parametrize("objects", [0, 1, 22, 23, 24, 25, 500])
def test_labels_without_images(tmp_path: Path, objects: int) -> None:
    """Of any length; the first bytes of the image come along."""
    label = np.arange(2 + 5 * objects, dtype=np.float32)
    images = [b"\xff\xd8\xff" + b"x" * 5000, b"", b"\x89PNG", b"1234" + MAGIC * 3]
    write(tmp_path / "a.rec", [pack(label, i, image) for i, image in enumerate(images)])
    whole = [(at, *unpack(payload)) for at, payload in RecordFile(tmp_path / "a.rec")]
    for i, (at, number, found, beginning) in enumerate(read_labels(tmp_path / "a.rec")):
        assert (at, number) == (whole[i][0], i)
        np.testing.assert_array_equal(found, label)
        np.testing.assert_array_equal(whole[i][1].label, label)
        assert beginning == images[i][:8] == bytes(whole[i][2][:8])


def test_a_record_too_large(tmp_path: Path) -> None:
    class Large(bytes):
        def __len__(self) -> int:
            return 2**29

    with pytest.raises(InvalidData, match="record 3 has 536870912 bytes"):
        RecordWriter(io.BytesIO()).write(3, Large())


@pytest.fixture
def images(tmp_path: Path) -> list[tuple[str, Path]]:
    """Pictures as places in a pack, with the files they are from."""
    data = tiny_dataset(tmp_path / "pictures")
    files = [Path(path) for path in data.paths]
    path = tmp_path / "train.rec"
    offsets = write(path, [pack([2.0, 5.0], i, file.read_bytes()) for i, file in enumerate(files)])
    return [(f"{path}#{offset}", file) for offset, file in zip(offsets, files, strict=True)]


def test_an_image_has_a_path(images: list[tuple[str, Path]]) -> None:
    for place, file in images:
        assert read_bytes(place) == file.read_bytes()
        assert read_header(place) == read_header(Path(place)) == read_header(file)
        assert np.array_equal(read_image(place), read_image(file))
        assert file_of(place) == place.partition("#")[0]


def test_paths_that_are_no_place_in_a_pack(tmp_path: Path) -> None:
    names = ("a.rec", "a.jpg#5", "a.rec#", "a.rec#x", "a.rec#-1", "a.rec#1.jpg", "a.rec#\u0663", "rec#5")
    for name in (*names, "a.rec#" + "9" * 19):
        assert packed(tmp_path / name) is None, name
        assert file_of(f"{tmp_path}/{name}") == f"{tmp_path}/{name}"
    assert packed(tmp_path / "a.rec#17") == (f"{tmp_path}/a.rec", 17)
    (tmp_path / "a.rec#17").write_bytes(b"an image of that name")
    assert packed(tmp_path / "a.rec#17") is None
    assert read_bytes(tmp_path / "a.rec#17") == b"an image of that name"


def test_what_is_wrong_with_a_packed_image(tmp_path: Path, images: list[tuple[str, Path]]) -> None:
    path = Path(images[0][0].partition("#")[0])
    with pytest.raises(ImageError, match=r"train.rec#2: expected the magic word"):
        read_image(f"{path}#2")
    with pytest.raises(ImageError, match=r"train.rec#99999999: the file ends at byte"):
        read_header(f"{path}#99999999")
    with pytest.raises(ImageError, match="there is no such file"):
        read_image(tmp_path / "nowhere.rec#0")
    write(path, [b"short", pack([2.0, 5.0], 0, b"no image")])
    with pytest.raises(BrokenRecord, match="train.rec: record 0 at byte 0: 5 bytes are too few for the header"):
        list(read_labels(path))
    with pytest.raises(ImageError, match="5 bytes are too few for the header"):
        read_image(f"{path}#0")
    with pytest.raises(ImageError, match="no image that Pillow knows"):
        read_image(f"{path}#16")


def test_a_pack_that_is_written_anew(tmp_path: Path, images: list[tuple[str, Path]]) -> None:
    """A map is kept open as long as the file is the same."""
    path = images[0][0].partition("#")[0]
    assert open_pack(path) is open_pack(path)
    before = read_bytes(images[0][0])
    write(tmp_path / "new.rec", [pack(0.0, 0, b"other")])
    os.replace(tmp_path / "new.rec", path)
    assert read_bytes(images[0][0]) == b"other" != before


def test_threads(images: list[tuple[str, Path]]) -> None:
    expected = {place: file.read_bytes() for place, file in images}
    wrong: list[str] = []

    def read_all() -> None:
        wrong.extend(place for _ in range(50) for place, content in expected.items() if read_bytes(place) != content)

    threads = [threading.Thread(target=read_all) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_forks(images: list[tuple[str, Path]]) -> None:
    """A map opened before a fork serves the child; in an interpreter of its own, as this one may have threads."""
    script = """
import os, sys
from detkit.images import read_bytes
place, size = sys.argv[1], int(sys.argv[2])
assert len(read_bytes(place)) == size
child = os.fork()
if not child:
    os._exit(0 if len(read_bytes(place)) == size else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    place, file = images[3]
    subprocess.run([sys.executable, "-c", script, place, str(file.stat().st_size)], check=True)
