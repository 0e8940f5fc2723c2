"""What notebooks show: tables whose every text is escaped."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from detkit import Dataset, Trainer, score
from detkit.detections import Detections
from detkit.tables import html_table


class Cells(HTMLParser):
    """Collect the texts of a table's cells, row by row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_texts_are_escaped() -> None:
    html = html_table(["<b>", "n"], [["<script>", None], ["a & b", 2]])
    assert "<script>" not in html
    assert Cells(html).rows == [["<b>", "n"], ["<script>", "-"], ["a & b", "2"]]


def test_a_data_set_with_splits(tiny: Dataset) -> None:
    data = replace(tiny, split_indices={"train": np.arange(5), "<val>": np.arange(5, 8)})
    rows = Cells(data._repr_html_()).rows
    assert rows[0] == ["boxes of", "all", "train", "<val>"]
    assert rows[1] == ["images", "8", "5", "3"]
    for name, total, *parts in rows[2:]:
        assert int(total) == tiny.boxes_per_class()[name] == sum(map(int, parts))


def test_scores(tiny: Dataset) -> None:
    perfect = [
        Detections.from_arrays(sample.boxes, np.ones(len(sample.names)), names=sample.names, classes=tiny.classes)
        for sample in tiny
    ]
    scores = score(tiny, perfect)
    rows = Cells(scores._repr_html_()).rows
    assert rows[0][0] == "AP" and rows[1][0].strip() == "1.000"
    assert [row[0] for row in rows[3:]] == list(tiny.classes)
    assert "SEEN IN TRAINING" in replace(scores, seen_in="training")._repr_html_()


@pytest.mark.usefixtures("clean")
def test_a_run(tiny: Dataset, tmp_path: Path) -> None:
    run = Trainer(model="echo/memory", epochs=2).fit(tiny, name=str(tmp_path / "run"), quiet=True)
    rows = dict(Cells(run._repr_html_()).rows[1:])
    assert rows["model"] == "echo/memory" and rows["status"] == "finished"
    assert "val/AP" in rows
