"""RecordIO and .lst against MXNet's own: the same bytes, read by its iterators, and what its im2rec makes of ours."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import sys
import types
import unittest
import warnings
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from workspaces import draw, folder

from detkit import read_dataset, write_dataset
from detkit.data import Dataset
from detkit.errors import InvalidData
from detkit.files import file_sha256
from detkit.formats.checks import prepare
from detkit.images import read_bytes
from detkit.recordio import MAGIC, RecordFile, RecordWriter, pack, read_index, read_labels, unpack
from detkit_gluoncv.engine import set_threads

set_threads(1)

from detkit_gluoncv.runtime import mx  # noqa: E402

REAL = Path(os.environ.get("DETKIT_DATA", Path(__file__).parents[5] / "shared/data"))


def payloads() -> list[bytes]:
    """Return payloads of all lengths, many with magic words, at multiples of four bytes and elsewhere."""
    rng = np.random.default_rng(0)
    pieces = [MAGIC, b"\0", b"ab", b"abcd", MAGIC[:2], MAGIC * 2]
    mixed = [b"".join(pieces[i] for i in rng.integers(0, len(pieces), rng.integers(0, 12))) for _ in range(400)]
    return [b"a", MAGIC, b"x" * 70_001, *(payload for payload in mixed if payload)]


def im2rec(*words: str | Path) -> None:
    """Run MXNet's own program; it imports OpenCV, which it does not need to pass images through."""
    arguments = ["im2rec", *map(str, words), "--no-shuffle"]
    with (
        mock.patch.dict(sys.modules, {"cv2": types.ModuleType("cv2")}),
        mock.patch.object(sys, "argv", arguments),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        runpy.run_module("mxnet.tools.im2rec", run_name="__main__")["record"].close()


def write(data: Dataset, format: str, **options: Any) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return write_dataset(data, folder() / "data", format, **options)


class Frames(unittest.TestCase):
    def test_the_same_bytes(self) -> None:
        root = folder()
        theirs = mx.recordio.MXIndexedRecordIO(str(root / "theirs.idx"), str(root / "theirs.rec"), "w")
        with (root / "ours.rec").open("wb") as file, (root / "ours.idx").open("wb") as index:
            ours = RecordWriter(file, index)
            for i, payload in enumerate(payloads()):
                theirs.write_idx(3 * i, payload)
                ours.write(3 * i, payload)
        theirs.close()
        for kind in ("rec", "idx"):
            self.assertEqual((root / f"ours.{kind}").read_bytes(), (root / f"theirs.{kind}").read_bytes())
        self.assertGreater(sum(payload.find(MAGIC) >= 0 for payload in payloads()), 100)

        self.assertEqual([bytes(payload) for _, payload in RecordFile(root / "theirs.rec")], payloads())
        offsets = read_index(root / "theirs.idx")
        reader = mx.recordio.MXIndexedRecordIO(str(root / "ours.idx"), str(root / "ours.rec"), "r")
        records = RecordFile(root / "theirs.rec")
        for i in reversed(range(len(payloads()))):
            self.assertEqual(reader.read_idx(3 * i), payloads()[i])
            self.assertEqual(bytes(records.read(offsets[3 * i])), payloads()[i])
        reader.close()

    def test_headers(self) -> None:
        for label in (3.0, [2, 5, 0, 0.1, 0.2, 0.3, 0.4]):
            ours = pack(label, 2**63, b"image")
            self.assertEqual(ours, mx.recordio.pack(mx.recordio.IRHeader(0, label, 2**63, 0), b"image"))
            header, image = unpack(ours)
            theirs, content = mx.recordio.unpack(ours)
            self.assertEqual((header.flag, header.id, header.id2), (theirs.flag, theirs.id, theirs.id2))
            np.testing.assert_array_equal(header.label, theirs.label)
            self.assertEqual(bytes(image), content)


class Readers(unittest.TestCase):
    """MXNet's readers of what we write."""

    @classmethod
    def setUpClass(cls) -> None:
        cls.data = draw(6).take(range(5))
        cls.folder = write(cls.data, "recordio")

    def test_record_file_detection(self) -> None:
        from gluoncv.data import RecordFileDetection

        opened = RecordFileDetection(str(self.folder / "train.rec"))
        self.assertEqual(len(opened), len(self.data))
        for (image, label), sample in zip(opened, self.data, strict=True):
            np.testing.assert_array_equal(image.asnumpy(), sample.image())
            np.testing.assert_allclose(label[:, :4], sample.boxes, atol=1e-4)
            self.assertEqual([self.data.classes[int(i)] for i in label[:, 4]], list(sample.names))

    def test_image_det_iter(self) -> None:
        found = mx.image.ImageDetIter(
            batch_size=1, data_shape=(3, 120, 160), path_imgrec=str(self.folder / "train.rec"),
            path_imgidx=str(self.folder / "train.idx"), aug_list=[],
        )  # fmt: skip
        sides = np.array([160, 120, 160, 120])
        for batch, sample in zip(found, self.data, strict=True):
            label = batch.label[0].asnumpy()[0, 0]
            self.assertEqual(self.data.classes[int(label[0])], sample.names[0])
            np.testing.assert_allclose(label[1:5] * sides, sample.boxes[0], atol=1e-4)

    def test_image_det_record_iter(self) -> None:
        """Also an image without objects, where it has a dummy."""
        data = draw(6)
        path = write(data, "recordio", negatives="dummy") / "train.rec"
        found = mx.io.ImageDetRecordIter(
            path_imgrec=str(path), batch_size=1, data_shape=(3, 120, 160), shuffle=False, preprocess_threads=1
        )
        counts = []
        for batch in found:
            label = batch.label[0].asnumpy()[0]
            header, width, given = int(label[4]), int(label[5]), int(label[3])
            objects = label[4 + header : 4 + given].reshape(-1, width)
            sample = data[len(counts)]
            counts.append(len(objects))
            np.testing.assert_allclose(objects[:, 1:5] * np.array([160, 120, 160, 120]), sample.boxes, atol=1e-4)
        self.assertEqual(counts, [1, 1, 1, 1, 1, 0])

    def test_lst_detection(self) -> None:
        from gluoncv.data import LstDetection

        root = write(self.data, "lst")
        opened = LstDetection(str(root / "train.lst"), root=str(root / "images"))
        for (image, label), sample in zip(opened, self.data, strict=True):
            np.testing.assert_array_equal(image.asnumpy(), sample.image())
            np.testing.assert_allclose(label[:, :4], sample.boxes, atol=1e-9)


class Im2rec(unittest.TestCase):
    def both_ways(self, data: Dataset) -> None:
        """Let im2rec pack our list: byte for byte our own pack, with our boxes and our images."""
        listed, packed = write(data, "lst"), write(data, "recordio")
        im2rec(listed / "train", listed / "images", "--pack-label", "--pass-through")
        for kind in ("rec", "idx"):
            self.assertEqual(file_sha256(listed / f"train.{kind}"), file_sha256(packed / f"train.{kind}"))
        back = read_dataset(listed, "recordio")
        for read in (back, read_dataset(listed, "lst")):
            self.assertEqual(read.classes, data.classes)
            for column in ("boxes", "labels", "offsets", "sizes"):
                np.testing.assert_array_equal(getattr(read, column), getattr(data, column))
        for path, original in zip(back.paths, data.paths, strict=True):
            self.assertEqual(read_bytes(path), Path(original).read_bytes())
        theirs = mx.recordio.MXIndexedRecordIO(str(packed / "train.idx"), str(packed / "train.rec"), "r")
        labels = [label for _, _, label, _ in read_labels(listed / "train.rec")]
        for i, sample in enumerate(data):
            header, image = mx.recordio.unpack(theirs.read_idx(i))
            np.testing.assert_array_equal(header.label, labels[i])
            self.assertEqual(image, Path(sample.path).read_bytes())
        theirs.close()

    def test_drawn(self) -> None:
        self.both_ways(draw(6).take(range(5)))

    @unittest.skipUnless((REAL / "neu-det").is_dir(), "the real data lie beside a checkout only")
    def test_neu_det(self) -> None:
        data = read_dataset(REAL / "neu-det")
        self.assertEqual(len(data.boxes), 4189)
        self.both_ways(data)

    @unittest.skipUnless((REAL / "bccd").is_dir(), "the real data lie beside a checkout only")
    def test_bccd(self) -> None:
        """Two of its boxes have no area, which our pack refuses."""
        data = read_dataset(REAL / "bccd")
        data = data.take(range(len(data)))
        with self.assertRaisesRegex(InvalidData, "zero-area 2"):
            write(data, "recordio")
        sound = prepare(data, on_invalid="drop")
        self.assertEqual(sound.dropped, {"zero-area": 2})
        self.both_ways(sound.data)
        packed = read_dataset(write(data, "recordio", on_invalid="drop"))
        np.testing.assert_array_equal(packed.boxes, sound.data.boxes)

    def test_without_pack_label(self) -> None:
        listed = write(draw(6).take(range(5)), "lst")
        im2rec(listed / "train", listed / "images", "--pass-through")
        with self.assertRaisesRegex(InvalidData, r"5 record\(s\).*here 2; .*--pack-label"):
            read_dataset(listed, "recordio")


if __name__ == "__main__":
    unittest.main()
