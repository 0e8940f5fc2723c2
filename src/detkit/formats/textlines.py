"""Annotations as lines of text, and the files that such lines name."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from detkit.formats.findings import Finding
from detkit.formats.imagefiles import is_file, leaves

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_DEEPEST = 64
"""Folders above a file that a path may name."""


def line_error(code: str, file: Path | str, line: int, message: str) -> Finding:
    """Return an error at a line of a file, counted from 1."""
    return Finding(
        code=code,
        severity="error",
        message=message,
        file=str(file),
        line=line,
        record=line - 1,
        place=f"line {line}",
    )


def file_error(code: str, file: Path | str, message: str) -> Finding:
    """Return an error that is about a file as a whole."""
    return Finding(code=code, severity="error", message=message, file=str(file))


def read_text(file: Path, findings: list[Finding]) -> str:
    """Return a file's UTF-8 text with ``\\n`` between its lines; nothing where it is none, which is a finding."""
    try:
        content = file.read_bytes()
    except OSError as error:
        findings.append(file_error("unreadable-file", file, error.strerror or str(error)))
        return ""
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        findings.append(line_error("not-text", file, line, "the line is no UTF-8 text; save the file as UTF-8"))
        return ""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(file: Path, findings: list[Finding]) -> list[tuple[int, str]]:
    """Return the lines that hold anything, without blanks around them, and their numbers from 1."""
    lines = enumerate(map(str.strip, read_text(file, findings).split("\n")), start=1)
    return [(number, line) for number, line in lines if line]


def read_number(text: str) -> float:
    """Return a finite number; NaN where the text is none."""
    try:
        value = math.nan if "_" in text else float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def find_below(folder: Path, name: str, exists: Callable[[Path], bool] = is_file) -> str | None:
    """Return what a path found in a file means below a folder, relative to it; None where there is no such thing.

    Of an absolute path, which was right on another machine, the longest end that exists counts. One with ``..`` means
    nothing.
    """
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
    if ".." in parts:
        return None
    starts = range(max(0, len(parts) - _DEEPEST), len(parts)) if leaves(name) else range(1)
    return next((end for i in starts if exists(folder / (end := "/".join(parts[i:])))), None)


def number_text(value: float) -> str:
    """Return a number with all its digits, a whole one without a point, as people write it."""
    return str(int(value)) if value.is_integer() else repr(value)
