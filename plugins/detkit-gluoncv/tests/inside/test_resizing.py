"""`detkit.resizing` is what MXNet does, pixel by pixel: exported models see what they were trained on."""

from __future__ import annotations

import unittest

import numpy as np
from PIL import Image

from detkit.resizing import resize
from detkit_gluoncv.engine import set_threads

set_threads(1)

from detkit_gluoncv.batches import _BEST  # noqa: E402 - the number of threads is read while mxnet is loaded
from detkit_gluoncv.batches import resize as theirs  # noqa: E402
from detkit_gluoncv.runtime import mx  # noqa: E402

SHAPES = ((96, 96), (120, 200), (299, 512), (512, 700), (600, 280), (768, 1024), (1024, 1024), (1500, 1000))


class Resizing(unittest.TestCase):
    def test_as_opencv(self) -> None:
        """Smaller by area, larger by cubic, and by linear where one side shrinks and the other grows."""
        for shape in SHAPES:
            noise = np.random.default_rng(0).integers(0, 256, (shape[0] // 5 + 1, shape[1] // 5 + 1, 3), dtype=np.uint8)
            image = np.asarray(Image.fromarray(noise).resize(shape[::-1]))
            for size in (300, 512):
                with self.subTest(shape=shape, size=size):
                    expected = theirs(mx.nd.array(image, dtype="uint8"), size, _BEST).asnumpy()
                    difference = np.abs(expected.astype(int) - resize(image, size, size, "opencv"))
                    self.assertLessEqual(difference.max(), 1)
                    self.assertLessEqual(np.count_nonzero(difference), 1e-4 * difference.size)


if __name__ == "__main__":
    unittest.main()
