"""Data sets with something wrong in their files: only detkit's own errors come out, and nothing is opened elsewhere.

What is read all the same can be written, and is read back alike; or it is refused, with an error of detkit.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, TypeAlias
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from detkit import Dataset, plugins, read_dataset, write_dataset
from detkit.errors import DetkitError, InvalidData
from detkit.recordio import MAGIC

pytestmark = pytest.mark.slow

FORMATS = sorted(plugins.formats())
EXAMPLES = int(os.environ.get("DETKIT_FUZZ_EXAMPLES", "250"))

FURTHEST = 1e30
"""Pixels; sums of larger numbers overflow, and may be refused at any step."""

Draw: TypeAlias = Callable[[st.SearchStrategy[Any]], Any]

TEXTS = (
    "",
    " ",
    "\t",
    "\n",
    "\0",
    '"',
    ",",
    "#",
    ":",
    "-",
    "../outside.png",
    "..",
    ".",
    "/",
    "/etc/passwd",
    "C:\\x.png",
    "file:///etc/passwd",
    "s3://bucket/key.png",
    "no such file.png",
    "0.png",
    "1.png",
    "images/2.png",
    "a" * 5000,
    "a/" * 200,
    "cat",
    "bird",
    "\ufeff",
    "\u0663",
    "\U0001f600",
    "\u2028",
    "null",
    "true",
    "!!python/object:os.system",
    "&a [*a]",
)
NUMBERS = (
    "0",
    "-0",
    "-1",
    "1",
    "2",
    "3",
    "0.5",
    "1.0000001",
    "2147483648",
    "9223372036854775807",
    "9223372036854775808",
    "-9223372036854775809",
    "1e5",
    "1e308",
    "-1e308",
    "1e400",
    "5e-324",
    "nan",
    "NaN",
    "inf",
    "-Infinity",
    "1_0",
    "0x10",
    "1,5",
    "9" * 400,
    "9" * 5000,
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    -1,
    1,
    2,
    3.5,
    2**31,
    2**53 + 1,
    2**63,
    2**64,
    -(2**70),
    1e308,
    -1e308,
    5e-324,
    float("nan"),
    float("inf"),
    [],
    {},
    [[]],
    [1, 2],
    [1, 2, 3, 4],
    [float("nan")] * 4,
    [True, 0, 1, 1],
    {"a": {"b": [1, {"c": None}]}},
    {"size": [12, 16], "counts": "1"},
    {"size": [2**31, 2**31], "counts": [2**62]},
    "\ud800",
    "@deep list@",
    "@deep object@",
    "@long number@",
    "@beyond all floats@",
    *TEXTS,
)
RAW = {
    '"@deep list@"': "[" * 3000 + "]" * 3000,
    '"@deep object@"': '{"a":' * 3000 + "1" + "}" * 3000,
    '"@long number@"': "9" * 5000,
    '"@beyond all floats@"': "1e400",
}


def mutate_json(content: bytes, draw: Draw) -> bytes:
    root = json.loads(content)
    nodes: list[tuple[Any, Any]] = []
    stack = [root]
    while stack:
        node = stack.pop()
        keys = node if isinstance(node, dict) else range(len(node))
        nodes += [(node, key) for key in keys]
        stack += [node[key] for key in keys if isinstance(node[key], (dict, list))]
    node, key = draw(st.sampled_from(nodes))
    kind = draw(st.sampled_from(("set", "set", "set", "set", "remove", "twice", "add", "copy")))
    if kind == "remove":
        del node[key]
    elif kind == "twice" and isinstance(node, list):
        node.insert(key, node[key])
    elif kind == "add" and isinstance(node, dict):
        node[draw(st.sampled_from(("difficult", "iscrowd", "area", "segmentation", "name", "size", *TEXTS)))] = draw(
            st.sampled_from(VALUES)
        )
    elif kind == "copy":
        other, at = draw(st.sampled_from(nodes))
        node[key] = json.loads(json.dumps(other.get(at) if isinstance(other, dict) else other[at : at + 1]))
    else:
        node[key] = draw(st.sampled_from(VALUES))
    text = json.dumps(root)
    for mark, raw in RAW.items():
        text = text.replace(mark, raw)
    return text.encode()


def mutate_xml(content: bytes, draw: Draw) -> bytes:
    root = ElementTree.fromstring(content)
    parents = [element for element in root.iter() if len(element)]
    parent = draw(st.sampled_from(parents))
    child = draw(st.sampled_from(list(parent)))
    kind = draw(st.sampled_from(("text", "text", "text", "remove", "twice", "tag", "wrap", "deep", "entity")))
    if kind == "text":
        child.text = draw(st.sampled_from((*TEXTS, *NUMBERS)))
    elif kind == "remove":
        parent.remove(child)
    elif kind == "twice":
        parent.append(child)
    elif kind == "tag":
        child.tag = draw(st.sampled_from(("name", "bndbox", "object", "part", "xmin", "difficult", "pose", "a")))
    elif kind == "wrap":
        ElementTree.SubElement(child, draw(st.sampled_from(("name", "bndbox", "part", "a")))).text = "1"
    elif kind == "deep":
        for _ in range(draw(st.sampled_from((10, 5000)))):
            child = ElementTree.SubElement(child, "a")
    if kind == "deep":
        text = b"<annotation>" + b"<a>" * 5000 + b"</a>" * 5000 + b"</annotation>"
    else:
        text = re.sub(rb"[\0]", b"&#1;", ElementTree.tostring(root, "utf-8"))
    if kind == "entity":
        bomb = b'<!DOCTYPE a [<!ENTITY a "cat"><!ENTITY b "' + b"&a;" * 50 + b'"><!ENTITY c "' + b"&b;" * 5000 + b'">'
        bomb += b'<!ENTITY f SYSTEM "file:///etc/passwd">]>'
        which = draw(st.sampled_from((b"&a;", b"&c;" * 50, b"&f;", b"&none;")))
        text = bomb + text[text.index(b"<annotation") :].replace(b"cat", which)
    return text


def mutate_lines(content: bytes, draw: Draw) -> bytes:
    """Of a text whose fields are separated by anything: replace, remove or repeat fields and lines."""
    text = content.decode("utf-8", "surrogateescape")
    kind = draw(st.sampled_from(("field", "field", "field", "field", "no field", "line", "no line", "ends")))
    if kind in {"field", "no field"}:
        fields = re.split(r"([\s,:]+)", text)
        at = draw(st.integers(0, len(fields) - 1))
        fields[at] = "" if kind == "no field" else draw(st.sampled_from((*NUMBERS, *TEXTS)))
        text = "".join(fields)
    elif kind == "ends":
        text = text.replace("\n", draw(st.sampled_from(("\r\n", "\r", "", "\n\n", "\0"))))
    else:
        lines = text.splitlines(keepends=True)
        at = draw(st.integers(0, max(0, len(lines) - 1)))
        lines[at : at + 1] = [] if kind == "no line" else lines[at : at + 1] * 2
        text = "".join(lines)
    return text.encode("utf-8", "surrogateescape")


def mutate_manifest(content: bytes, draw: Draw) -> bytes:
    lines = content.splitlines()
    at = draw(st.integers(0, len(lines) - 1))
    lines[at] = mutate_json(lines[at], draw)
    return b"\n".join(lines) + b"\n"


def mutate_record(content: bytes, draw: Draw) -> bytes:
    """Change a word anywhere in the frames, headers and labels, or leave out, repeat or cut off records."""
    starts = [found.start() for found in re.finditer(re.escape(MAGIC), content)] + [len(content)]
    at = draw(st.integers(0, len(starts) - 2))
    start, stop = starts[at], starts[at + 1]
    kind = draw(st.sampled_from(("word", "word", "word", "float", "float", "no record", "record", "cut")))
    if kind == "word":
        where = start + 4 * draw(st.integers(0, 24))
        word = draw(st.sampled_from((0, 1, 2, 5, 7, 2**29 - 1, 2**29, 3 << 29, 2**32 - 1, 0xCED7230A, 2**31)))
        return content[:where] + struct.pack("<I", word) + content[where + 4 :]
    if kind == "float":
        where = start + 32 + 4 * draw(st.integers(0, 12))
        number = draw(
            st.sampled_from((0.0, -1.0, 1.0, 2.0, 5.0, 0.5, 1e30, -1e30, float("nan"), float("inf"), 2.0**31))
        )
        return content[:where] + struct.pack("<f", number) + content[where + 4 :]
    if kind == "cut":
        return content[: draw(st.integers(0, len(content)))]
    return content[:start] + (content[start:stop] * 2 if kind == "record" else b"") + content[stop:]


def mutate_bytes(content: bytes, draw: Draw) -> bytes:
    at = draw(st.integers(0, len(content)))
    length = draw(st.integers(0, 8))
    new = draw(st.one_of(st.binary(max_size=8), st.sampled_from([text.encode() for text in (*TEXTS, *NUMBERS)])))
    return content[:at] + new + content[at + length :]


STRUCTURED: dict[str, Callable[[bytes, Draw], bytes]] = {
    ".json": mutate_json,
    ".manifest": mutate_manifest,
    ".xml": mutate_xml,
    ".rec": mutate_record,
}
PICTURES = {".png", ".jpg"}


def mutate(folder: Path, outside: Path, draw: Draw) -> None:
    """Change one file of a data set."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    annotations = [path for path in files if path.suffix not in PICTURES]
    if not annotations:
        return
    kind = draw(st.sampled_from(("content",) * 12 + ("bytes",) * 4 + ("file",)))
    if kind == "file":
        path = draw(st.sampled_from(files))
        path.unlink()
        what = draw(st.sampled_from(("gone", "empty", "folder", "nowhere", "self", "noise")))
        if what == "empty":
            path.touch()
        elif what == "folder":
            path.mkdir()
        elif what == "nowhere":
            path.symlink_to(outside / "nothing")
        elif what == "self":
            path.symlink_to(path)
        elif what == "noise":
            path.write_bytes(draw(st.binary(max_size=64)))
        return
    path = draw(st.sampled_from(annotations))
    function = mutate_bytes if kind == "bytes" else STRUCTURED.get(path.suffix, mutate_lines)
    content = path.read_bytes()
    try:
        changed = function(content, draw)
    except (ValueError, LookupError, TypeError, RecursionError, ElementTree.ParseError, DetkitError):
        changed = mutate_bytes(content, draw)  # it was changed before, and has no such structure any more
    path.write_bytes(changed)


def assert_alike(data: Dataset, back: Dataset, *, by_name: bool) -> None:
    """Compare boxes up to the precision of 32-bit shares; images in any order, as splits may stand before others."""
    one, other = ([(s.image_id if by_name else "", s.names, s.boxes.tolist()) for s in d] for d in (data, back))
    assert len(one) == len(other)
    for (name, names, boxes), (name_back, names_back, boxes_back) in zip(sorted(one), sorted(other), strict=True):
        assert (name_back, names_back) == (name, names)
        scale = np.abs(boxes).max(initial=1e3)  # digits get lost where a corner is far from the other
        assert np.allclose(boxes_back, boxes, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("name", FORMATS)
def test_mutated(name: str, seeds: dict[str, Path], guarded: Any, tmp_path: Path) -> None:
    numbers = count()
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.copy(seeds[name].parent / "pictures/0.png", tmp_path / "outside.png")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize="DETKIT_FUZZ_EXAMPLES" not in os.environ,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def survives(data: st.DataObject) -> None:
        root = tmp_path / str(next(numbers))
        folder = root / "data"
        shutil.copytree(seeds[name], folder)
        try:
            for _ in range(data.draw(st.integers(1, 3))):
                mutate(folder, outside, data.draw)
            given_format = data.draw(st.sampled_from((name, None)))
            try:
                with guarded(folder):
                    read = read_dataset(folder, given_format)
            except DetkitError:
                return
            if not len(read):
                return  # an empty file that says so; most formats have no such thing
            if np.abs(read.boxes).max(initial=0) > FURTHEST:
                return
            for other in {name, data.draw(st.sampled_from(FORMATS))}:
                try:
                    with guarded(folder, root / other, root):
                        written = write_dataset(read, root / other, other)
                except DetkitError:
                    continue
                try:
                    with guarded(folder, root / other):
                        back = read_dataset(written, other)
                except InvalidData as error:
                    if {finding.code for finding in error.findings} == {"unreadable-image"}:
                        continue  # its size was told, and the file was never looked into
                    raise
                by_name = "image_ids" in plugins.formats()[other].carries
                if by_name or sum(map(len, read.split_indices.values())) <= len(read):
                    assert_alike(read, back, by_name=by_name)  # else an image of two splits is now two
        finally:
            shutil.rmtree(root)

    survives()
