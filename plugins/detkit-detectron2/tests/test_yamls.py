"""Detectron2's configuration files, read safely: what its own loader reads of the zoo, and nothing that runs."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from detkit import plugins
from detkit.errors import UsageError
from detkit_detectron2 import sources, yamls


def write(folder: Path, **files: str) -> Path:
    """Write ``.yaml`` files and return the path of the first."""
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return folder / f"{next(iter(files))}.yaml"


def test_the_whole_zoo_is_read_as_detectron2_reads_it() -> None:
    if plugins.backend("detectron2").missing():  # type: ignore[attr-defined]
        pytest.skip("needs Detectron2 in this interpreter, see docs/how-to/detectron2.md")
    from fvcore.common.config import CfgNode

    files = sorted(sources.configs().rglob("*.yaml"))
    assert len(files) > 80
    for file in files:
        assert yamls.read(file).values == CfgNode.load_yaml_with_base(str(file), allow_unsafe=True), file


def test_inheritance(tmp_path: Path) -> None:
    """The file itself wins, then the last base; every value says where it is from."""
    (tmp_path / "base").mkdir()
    write(tmp_path / "base", grand="MODEL: {DEPTH: 50, MASK_ON: false}\nSOLVER: {BASE_LR: 0.1}\n")
    write(tmp_path / "base", base="_BASE_: grand.yaml\nSOLVER: {BASE_LR: 0.02, STEPS: '(1, 2)'}\n")
    write(tmp_path, other="SOLVER: {MAX_ITER: 7}\nMODEL: {DEPTH: 101}\n")
    mine = write(tmp_path, mine="_BASE_: [base/base.yaml, other.yaml]\nSOLVER: {MAX_ITER: 9}\n")
    config = yamls.read(mine)
    assert config.values == {
        "MODEL": {"DEPTH": 101, "MASK_ON": False},
        "SOLVER": {"BASE_LR": 0.02, "STEPS": "(1, 2)", "MAX_ITER": 9},
    }
    assert {key: file.name for key, file in config.origins.items()} == {
        "MODEL.DEPTH": "other.yaml",
        "MODEL.MASK_ON": "grand.yaml",
        "SOLVER.BASE_LR": "base.yaml",
        "SOLVER.STEPS": "base.yaml",
        "SOLVER.MAX_ITER": "mine.yaml",
    }
    assert [file.name for file in config.files] == ["mine.yaml", "base.yaml", "grand.yaml", "other.yaml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A: !!python/object/apply:os.system ['touch ran']", r"line 1: !!python/object/apply:os\.system would run"),
        ("A: !!python/object/new:os.PathLike {}", "would run Python code or build an object"),
        ("A: !!python/name:os.system", "would run Python code"),
        ('A: !!python/object/apply:eval [\'__import__("os").system("touch ran")\']', "neither a number, nor a list"),
        ("A: !!python/object/apply:eval ['[x for x in (1).__class__.__bases__]']", "neither a number"),
        ("A: !!python/object/apply:eval ['9**9**9']", "too large|calculates with"),
        ("A: !!python/object/apply:eval ['[[y for y in [1,2,3,4,5,6,7,8]] for x in [%s]]']", "more than 4096 numbers"),
        ("A: !!python/object/apply:eval [1, 2]", "an expression is one text"),
        ("A: 1\nA: 2\n", "line 2: A is there twice"),
        ("A: [1\n", "cannot be read"),
        ("- 1\n", "holds no configuration"),
        ("_BASE_: https://example.org/base.yaml\n", "expected the path of a file"),
        ("_BASE_: nowhere.yaml\n", "nowhere.yaml, which .* names as its _BASE_"),
        ("_BASE_: mine.yaml\n", "inherits from itself"),
        ("? [1, 2]\n: 3\n", "a key is no word"),
        ("A: &a [1]\nB: [*a, *b]\n", "cannot be read"),
        ("A: " + "[" * 3000, "cannot be read"),
    ],
    ids=lambda text: text[:40],
)
def test_refused(text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        yamls.read(write(tmp_path, mine=text.replace("%s", ",".join("1" * 600))))
    assert not (tmp_path / "ran").exists()


def test_sections_and_values_do_not_mix(tmp_path: Path) -> None:
    write(tmp_path, base="MODEL: {NAME: a}\n")
    with pytest.raises(UsageError, match="MODEL is a section in one file and a value in the other"):
        yamls.read(write(tmp_path, mine="_BASE_: base.yaml\nMODEL: fast\n"))


def test_aliases_are_counted_as_they_are_written_out(tmp_path: Path) -> None:
    lines = ["A0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"A{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    with pytest.raises(UsageError, match="more than 50000 values"):
        yamls.read(write(tmp_path, mine="\n".join(lines)))


def test_expressions() -> None:
    assert yamls.evaluate("[[x, x * 2**(1.0/3)] for x in [32, 64]]") == [
        [32, 32 * 2 ** (1 / 3)],
        [64, 64 * 2 ** (1 / 3)],
    ]
    assert yamls.evaluate("-3 // 2 + 7 % 4 / 2") == -0.5
    assert yamls.evaluate("(1, 2.5)") == (1, 2.5)


def test_an_expression_ends_after_so_many_steps() -> None:
    """However little comes of it: these keep no number at all."""
    empty = "[" + ",".join(["[]"] * 400) + "]"
    begun = time.monotonic()
    with pytest.raises(ValueError, match="more than 50000 steps"):
        yamls.evaluate(f"[[[[] for a in {empty}] for b in {empty}] for c in {empty}]")
    assert time.monotonic() - begun < 5


def test_a_large_file_is_not_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has at most 1048576"):
        yamls.read(write(tmp_path, mine="#" * (1 << 20) + "\nA: 1\n"))
