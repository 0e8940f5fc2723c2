"""Pascal VOC's XML files as columns of one set, with a finding for everything that cannot be used."""

from __future__ import annotations

import os
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from detkit.formats.findings import Finding
from detkit.formats.imagefiles import LARGEST_SIDE
from detkit.formats.vocscan import scan_all

if TYPE_CHECKING:
    from collections.abc import Sequence

    from detkit.boxes import Boxes
    from detkit.data import Extra, Flags, Indices


def xml_error(code: str, file: str, message: str, place: str = "", record: int | None = None) -> Finding:
    """Return an error about one XML file."""
    return Finding(code=code, severity="error", message=message, file=file, place=place, record=record)


class Objects:
    """The objects of all XML files, as columns; what cannot be used is a finding."""

    def __init__(self, files: Sequence[str]) -> None:
        scans = scan_all(files, processes())
        self.files = list(files)
        self.filenames: list[str] = [name for scan in scans for name in scan.filenames]
        sides = np.concatenate([np.asarray(scan.sides) for scan in scans]).reshape(-1, 2)
        with np.errstate(invalid="ignore"):
            self.sizes: Indices = np.where((sides >= 1) & (sides <= LARGEST_SIDE), sides, 0).astype(np.int64)
        """Width and height of each file's image, 0 where the file does not say."""
        self.counts: Indices = np.concatenate([np.asarray(scan.counts) for scan in scans])
        self.vocabulary: list[str] = list(dict.fromkeys(chain.from_iterable(scan.vocabulary for scan in scans)))
        """Every name that occurs, in the order of its first object."""
        number = {name: i for i, name in enumerate(self.vocabulary)}
        self.names: Indices = np.concatenate(
            [np.array([number[name] for name in scan.vocabulary], np.int64)[np.asarray(scan.names)] for scan in scans]
        )
        """Index of each object's name in the vocabulary."""
        self.corners: Boxes = np.concatenate([np.asarray(scan.corners) for scan in scans]).reshape(-1, 4)
        self.difficult: Flags = np.concatenate([np.array(scan.difficult, np.uint8).view(np.bool_) for scan in scans])
        self.records: Indices = np.concatenate([np.asarray(scan.records) for scan in scans])
        self.extra: list[Extra] = []
        """The further children of each object; objects with the same share one."""
        known: dict[tuple[tuple[str, str], ...], Extra] = {}
        for scan in scans:
            extras = [known.setdefault(key, dict(key)) for key in scan.extras]
            self.extra += [extras[i] for i in scan.extra]
        begins = np.cumsum([0, *(len(scan.counts) for scan in scans)]).tolist()
        self.findings = [
            xml_error(fault.code, self.files[begin + fault.file], fault.message, fault.place, fault.record)
            for begin, scan in zip(begins, scans, strict=False)
            for fault in scan.faults
        ]


def processes() -> int:
    """Return how many processes may read at a time: ``DETKIT_WORKERS``, else the cores this process may use."""
    given = os.environ.get("DETKIT_WORKERS", "")
    if given.isdecimal() and int(given):
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
