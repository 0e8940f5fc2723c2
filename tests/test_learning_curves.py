"""Learning curves of real runs of the echo backend, and of runs whose events are written here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import detkit
from detkit import Dataset, Trainer
from detkit.errors import UnknownName, UsageError
from detkit.files import write_json
from detkit.job import Job, Workspace
from detkit.learning_curves import LearningCurves
from detkit.runs import LocalRun, RunRecord

pytestmark = pytest.mark.usefixtures("clean")

SVG = "{http://www.w3.org/2000/svg}"


def written(path: Path, *rows: dict[str, float], params: dict[str, Any] | None = None) -> LocalRun:
    """Make a run that has logged these numbers, with ``step`` and ``epoch``, and whose worker is gone."""
    workspace = Workspace(path)
    workspace.create(Job(backend="echo", engine="-", model="memory", params=params or {}, options={}, classes=[]))
    write_json(workspace.run_file, RunRecord(backend="echo", model="memory", created=0, pid=1, pid_created=0))
    for row in rows:
        numbers = {name: value for name, value in row.items() if name not in {"step", "epoch"}}
        workspace.log("metric", numbers, step=int(row["step"]), epoch=row.get("epoch"))
    return LocalRun(workspace)


def texts(curves: LearningCurves) -> list[str]:
    """Return what a reader of the picture reads."""
    pytest.importorskip("matplotlib")
    root = ElementTree.parse(curves.save(Path("texts.svg"))).getroot()
    return ["".join(one.itertext()).strip() for one in root.iter(f"{SVG}text")]


def drawn(curves: LearningCurves) -> dict[str, list[list[tuple[float, float]]]]:
    """Return the points of each line of each panel."""
    pytest.importorskip("matplotlib")
    panels = {axis.get_title("left"): axis.get_lines() for axis in curves.figure().axes if axis.get_visible()}
    return {title: [list(map(tuple, line.get_xydata().tolist())) for line in lines] for title, lines in panels.items()}


def test_curves_of_a_run(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=3, name="mine").fit(tiny, tiny, tiny, quiet=True)
    curves = detkit.plot(run)
    assert curves.panels == {"loss": ["train/loss"], "AP": ["val/AP"], "AP50": ["val/AP50"]}
    rows = [row for row in run.history if "val/AP" in row]
    found = drawn(curves)
    assert found["AP"][0] == [(row["epoch"], row["val/AP"]) for row in rows]
    assert found["Loss"] == [[(row["epoch"], row["train/loss"]) for row in run.history if "train/loss" in row]]
    best = max(rows, key=lambda row: row["val/AP"])
    assert curves.runs[0].best == (best["epoch"], best["val/AP"])
    assert found["AP"][1:] == [[curves.runs[0].best]]
    assert found["AP50"][1:] == [[(best["epoch"], best["val/AP50"])]]
    assert f"mine: best AP {best['val/AP']:.3f} at epoch {best['epoch']:g}" in texts(curves)


def test_training_and_validation_losses_share_a_panel(tmp_path: Path) -> None:
    run = written(
        tmp_path / "r",
        {
            "step": 10,
            "epoch": 0.5,
            "train/loss": 3,
            "train/classifier": 1,
            "train/loss_box": 2,
            "train/learning_rate": 1,
        },
        {"step": 20, "epoch": 1, "val/loss": 2.5, "val/loss_classifier": 1, "val/loss_box": 1.5, "val/mask_AP": 0.1},
        params={"best_metric": "mask_AP"},
    )
    curves = detkit.plot(run)
    assert curves.panels == {
        "loss": ["train/loss", "val/loss"],
        "mask_AP": ["val/mask_AP"],
        "learning_rate": ["train/learning_rate"],
        "classifier": ["train/classifier", "val/loss_classifier"],
        "box": ["train/loss_box", "val/loss_box"],
    }
    assert curves.runs[0].best == (1, 0.1)
    assert {"training", "validation", "r (interrupted): best mask_AP 0.100 at epoch 1"} <= set(texts(curves))


def test_steps_and_chosen_metrics(tmp_path: Path) -> None:
    run = written(tmp_path / "r", *({"step": n, "epoch": n / 5, "train/loss": 1, "val/AP": n / 10} for n in (5, 10)))
    by_step = detkit.plot(run, position="step", metrics=["loss", "val/AP"])
    assert drawn(by_step)["AP"][0] == [(5, 0.5), (10, 1)]
    assert list(detkit.plot(run, metrics=["loss"]).panels) == ["loss"]
    assert detkit.plot(run, metrics=["loss"]).runs[0].best == (2, 1), "it is marked whatever is drawn"
    with pytest.raises(UnknownName, match="no metric 'los'; did you mean 'loss'"):
        detkit.plot(run, metrics=["los"])


def test_no_validation_no_scores(tmp_path: Path) -> None:
    curves = detkit.plot(written(tmp_path / "r", {"step": 1, "epoch": 1, "train/loss": 1}))
    assert list(curves.panels) == ["loss"]
    assert "r (interrupted)" in texts(curves)


@pytest.mark.parametrize("name", ["train/loss", "val/loss", "val/AP"])
def test_one_point_is_seen(name: str, tmp_path: Path) -> None:
    """A line of one point has no ink; a marker has."""
    pytest.importorskip("matplotlib")
    curves = detkit.plot(written(tmp_path / "r", {"step": 1, "epoch": 1, name: 0.5}), "one.png")
    pixels = np.asarray(Image.open("one.png").convert("RGB")).astype(int)
    below_the_legend = pixels[len(pixels) // 5 :]
    blue = (np.abs(below_the_legend - (0x00, 0x72, 0xB2)).sum(axis=2) < 30).sum()
    assert blue > 20
    assert curves.runs[0].series == {name: ([1.0], [0.5])}


def test_run_that_goes_on(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=1000, seconds_per_step=0.02, name="r").start(tiny, tiny, leash=True)
    next(event for event in run.events() if event.kind == "metric")
    assert detkit.plot("r").runs[0].status == "running"
    run.stop()


def test_nothing_to_draw_yet(tmp_path: Path) -> None:
    run = written(tmp_path / "r")
    with pytest.raises(UsageError, match="r: no numbers are logged over epochs yet; look at `detkit runs show r`"):
        detkit.plot(run)
    with pytest.raises(UsageError, match="no run to plot"):
        detkit.plot([])
    only_steps = written(tmp_path / "s", {"step": 1, "train/loss": 1})
    with pytest.raises(UsageError, match="over epochs"):
        detkit.plot(only_steps)
    assert detkit.plot(only_steps, position="step").panels


def test_names_are_untrusted(tmp_path: Path) -> None:
    """They come from folders: no mathematics, no markup, none left out of the legend."""
    names = ["_hidden", "$x^{", "<script>alert(1)<", "same", "same"]
    folders = [tmp_path / str(i) / name for i, name in enumerate(names)]
    runs = [written(folder, {"step": 1, "epoch": 1, "train/loss": 1}) for folder in folders]
    curves = detkit.plot(runs)
    assert {f"{folder} (interrupted)" for folder in folders} <= set(texts(curves))
    assert [run.name for run in detkit.plot(runs[:3]).runs] == names[:3]
    page = curves.save("page.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page
    assert "default-src 'none'" in page


def test_more_runs_than_colours(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    runs = [written(tmp_path / f"r{i}", {"step": 1, "epoch": 1, "train/loss": i + 1}) for i in range(11)]
    (axis,) = detkit.plot(runs).figure().axes
    assert len({str(line.get_color()) for line in axis.get_lines()}) == 11


@pytest.mark.parametrize(
    ("ending", "begin"), [("html", b"<!doctype"), ("svg", b"<?xml"), ("png", b"\x89PNG"), ("pdf", b"%PDF")]
)
def test_files_are_the_same_each_time(ending: str, begin: bytes, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = written(tmp_path / "r", *({"step": n, "epoch": n, "train/loss": 1 / n, "val/AP": 0.1} for n in range(1, 99)))
    one, two = (detkit.plot(run).save(f"{i}.{ending}").read_bytes() for i in range(2))
    assert one == two
    assert one.startswith(begin)


def test_page_has_the_numbers_of_the_best_epoch(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        {"step": n, "epoch": n, "val/AP": ap, "val/AP50": 0.7 + n / 100} for n, ap in ((1, 0.25), (2, 0.5), (3, 0.4))
    ]
    curves = detkit.plot(written(tmp_path / "r", *rows), "page.html")
    page = Path("page.html").read_text()
    assert "<td>0.500</td><td>0.720</td>" in page
    assert curves._repr_html_().startswith("<svg") and "<svg" in page


def test_kinds_of_files_that_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"curves\.gif: curves are written to a file that ends in \.html, \.svg"):
        detkit.plot(tmp_path / "not even looked for", "curves.gif")


def test_without_matplotlib(tmp_path: Path) -> None:
    written(tmp_path / "r", {"step": 1, "epoch": 1, "train/loss": 1})
    code = (
        "import sys; sys.modules['matplotlib'] = None\nimport detkit\n"
        "curves = detkit.plot('./r')\nprint(list(curves.panels))\ncurves.save('x.png')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "['loss']\n"
    assert "pip install 'detkit-sdk[plot]'" in done.stderr
    assert not Path("x.png").exists()
