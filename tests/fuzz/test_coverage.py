"""Each parser under atheris, which steers by the code that is reached; a process of its own for each.

It is a script, too: ``python tests/fuzz/test_coverage.py coco FOLDER CORPUS`` goes on until something is found, and
with a file in place of the corpus reads that once; FOLDER is any sound COCO data set in detkit's own layout.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import pytest

TARGETS = {
    "voc": ("voc", "Annotations/0.xml"),
    "voc-split": ("voc", "ImageSets/Main/train.txt"),
    "coco": ("coco", "annotations.json"),
    "lst": ("lst", "train.lst"),
    "recordio": ("recordio", "train.rec"),
    "recordio-index": ("recordio", "train.idx"),
    "manifest": ("manifest", "output.manifest"),
    "sagemaker-json": ("sagemaker-json", "train_annotation/0.json"),
    "jumpstart": ("jumpstart", "annotations.json"),
    "sku110k": ("sku110k", "annotations.csv"),
    "yolo-labels": ("yolo", "labels/0.txt"),
    "yolo-yaml": ("yolo", "data.yaml"),
    "deepdetect": ("deepdetect", "list.txt"),
    "deepdetect-boxes": ("deepdetect", "bboxes/0.txt"),
    "classes": ("deepdetect", "classes.txt"),
}
"""The format, and the file in its folder that is fuzzed."""

SECONDS = int(os.environ.get("DETKIT_FUZZ_SECONDS", "8"))

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("atheris") is None, reason="atheris has no wheel for this Python and system"
    ),
]


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.parametrize("target", TARGETS)
def test_nothing_but_our_errors(target: str, seeds: dict[str, Path], tmp_path: Path) -> None:
    name, file = TARGETS[target]
    seed = seeds[name] / file
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    shutil.copy(seed, corpus)
    words = sorted(set(re.findall(rb"[A-Za-z_-]{2,}|[\d.]+|[^\w\s]", seed.read_bytes()[:4096])))
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in words)
    (tmp_path / "words").write_text("".join(f'"{word}"\n' for word in quoted))
    done = subprocess.run(
        [
            *(sys.executable, __file__, target, str(seeds[name]), str(corpus)),
            *(f"-max_total_time={SECONDS}", f"-dict={tmp_path / 'words'}"),
            *("-timeout=10", "-rss_limit_mb=1024", "-max_len=4096", "-seed=1", f"-artifact_prefix={tmp_path}/found-"),
        ],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    found = [path.read_bytes() for path in tmp_path.glob("found-*")]
    assert done.returncode == 0, f"{target} as {file} = {found}\n{done.stderr[-6000:]}"
    runs = re.search(r"^Done (\d+) ", done.stderr, flags=re.MULTILINE)
    assert runs and int(runs[1]) > 50, done.stderr[-2000:]


def main() -> None:
    """Fuzz one target; the arguments are its name, a sound data set of its format, and libFuzzer's."""
    import atheris

    target, seed, *arguments = sys.argv[1:]
    name, file = TARGETS[target]
    with atheris.instrument_imports(include=["detkit"]):
        from detkit import plugins
        from detkit.errors import DetkitError
        from detkit.io import read_dataset

        assert name in plugins.formats()
    warnings.simplefilter("ignore")
    os.environ["DETKIT_CACHE"] = "off"
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "data"
        shutil.copytree(seed, folder)

        def one(content: bytes) -> None:
            (folder / file).write_bytes(content)
            try:
                read_dataset(folder, name)
            except DetkitError:
                return

        atheris.Setup([sys.argv[0], *arguments], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
