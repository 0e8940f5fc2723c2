"""Pictures of studies of the echo backend."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

import detkit
from detkit import Dataset, Study, Trainer, Tuner
from detkit.errors import UsageError
from detkit.sheets import png_sheet
from detkit.study_plots import StudyPlots, plot_study
from detkit.testing import tiny_dataset

pytest.importorskip("optuna")
pytest.importorskip("matplotlib")
pytestmark = pytest.mark.usefixtures("clean")

ALL = ("History", "Importance", "Parallel coordinates", "Courses")
SPACE = {"learning_rate": "0.01..0.9:log", "max_detections": "1|2|100"}
SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return tiny_dataset(tmp_path_factory.mktemp("pictures") / "images", num_images=48)


@pytest.fixture(scope="module")
def study(pictures: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Nine trials, of which some are pruned. Tests only read it."""
    train, val, test = pictures.split(0.5, 0.25, 0.25, seed=0)
    name = str(tmp_path_factory.mktemp("studies") / "found")
    tuner = Tuner(Trainer(model="echo/memory", epochs=6), SPACE, trials=9)
    study = tuner.fit(train, val, test, name=name, quiet=True)
    assert {trial.state for trial in study.trials} <= {"finished", "pruned"}
    return study


def texts(plots: StudyPlots) -> list[str]:
    """Return what a reader of the pictures reads."""
    root = ElementTree.parse(plots.save(Path("texts.svg"))).getroot()
    return ["".join(one.itertext()).strip() for one in root.iter(f"{SVG}text")]


def test_four_pictures(study: Study) -> None:
    plots = plot_study(study)
    assert (plots.drawn, plots.missing) == (ALL, {})
    read = texts(plots)
    assert {*ALL, *SPACE, "val/AP", "trial", "the best so far", f"the best, trial {study.best_trial.number}"} <= {*read}
    assert read.count("Trial0") == 0, "one colour for each would be larger than the picture"
    pruned = any(trial.state == "pruned" for trial in study.trials)
    assert ("pruned: ended early" in read) == pruned


def test_svg_has_four_pictures_beside_each_other(study: Study) -> None:
    root = ElementTree.parse(plot_study(study, "sheet.svg").save("again.svg")).getroot()
    inner = root.findall(f"{SVG}svg")
    corners = [(float(one.attrib["x"]), float(one.attrib["y"])) for one in inner]
    ends = [
        (x + float(one.attrib["width"]), y + float(one.attrib["height"]))
        for (x, y), one in zip(corners, inner, strict=True)
    ]
    assert len(inner) == 4 and corners[0][1] == corners[1][1] and corners[0][0] == corners[2][0]
    assert ends[0][0] < corners[1][0] and ends[1][1] < corners[3][1]
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert max(x for x, _ in ends) < width and max(y for _, y in ends) < height
    assert Path("sheet.svg").read_bytes() == Path("again.svg").read_bytes()


def test_png_and_pdf(study: Study) -> None:
    plots = plot_study(study, "sheet.png")
    pixels = np.asarray(Image.open("sheet.png").convert("RGB")).astype(int)
    blue = np.abs(pixels - (0x00, 0x72, 0xB2)).sum(axis=2) < 30
    middle = pixels.shape[0] // 2, pixels.shape[1] // 2
    corners = [blue[: middle[0], : middle[1]], blue[: middle[0], middle[1] :], blue[middle[0] :, middle[1] :]]
    assert all(corner.sum() > 20 for corner in corners), "history, importance, the best course"
    document = plots.save("sheet.pdf").read_bytes()
    assert document.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", document)) == 4


def test_pictures_of_other_sizes_do_not_overlap() -> None:
    def picture(width: int, height: int, colour: str) -> bytes:
        stream = io.BytesIO()
        Image.new("RGB", (width, height), colour).save(stream, "PNG")
        return stream.getvalue()

    given = [picture(30, 10, "red"), picture(20, 40, "lime"), picture(50, 20, "blue")]
    pixels = np.asarray(Image.open(io.BytesIO(png_sheet(given, 72)))).astype(int)
    assert [(pixels == colour).all(axis=2).sum() for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))] == [
        300,
        800,
        1000,
    ]


def test_page(study: Study) -> None:
    page = plot_study(study, "page.html").save("page.html").read_text()
    assert page.count("<svg") == 4
    assert "<script" not in page and "<img" not in page
    assert not re.findall(r"(?:src|href|url)\W{1,3}(?!#)\S*:", page), "nothing is fetched"
    best = study.best_trial
    assert f"The best is trial {best.number} with {best.value:.4g}" in page
    rows = re.findall(r"<tr><td>(\*?\d+)</td>", page)
    assert [row.strip("*") for row in rows] == [str(trial.number) for trial in study.trials]
    assert f"*{best.number}" in rows
    for difference in detkit.compare(study.contenders()).differences:
        assert str(difference) in page, "so that nobody takes noise for a gain"


def test_notebook(study: Study) -> None:
    assert plot_study(study)._repr_html_().count("<svg") == 4


def test_nothing_is_left_of_pyplot(study: Study) -> None:
    import matplotlib as mpl
    from matplotlib import pyplot

    before = dict(mpl.rcParams)
    plot_study(study, "sheet.svg")
    assert dict(mpl.rcParams) == before and pyplot.get_fignums() == []


def test_what_cannot_be_drawn_is_said(pictures: Dataset) -> None:
    tuner = Tuner(Trainer(model="echo/memory", iterations=5, epochs=None), {"learning_rate": "0.1|0.5"}, sampler="grid")
    study = tuner.fit(pictures, pictures, name="grid", quiet=True)
    plots = plot_study("grid", "page.html")
    assert plots.missing == {"Importance": "learning_rate is all that is searched"}
    page = Path("page.html").read_text()
    assert page.count("<svg") == 3
    assert "<strong>Importance</strong> is not drawn: learning_rate is all that is searched." in page
    assert "Not compared: no images were kept from the trials." in page
    assert study.best_trial.values


def test_conditions_and_less_is_better(pictures: Dataset) -> None:
    train, val, test = pictures.split(0.5, 0.25, 0.25, seed=0)
    space = {"epochs": "1|2|3", "learning_rate": "0.1..0.9:if:epochs=2|3"}
    tuner = Tuner(Trainer(model="echo/memory"), space, trials=8, sampler="random", pruner="none", mode="min")
    study = tuner.fit(train, val, test, name="conditions", quiet=True)
    assert any("learning_rate" not in trial.values for trial in study.trials)
    assert plot_study(study, "page.html").drawn == ALL
    assert "(less is better)" in Path("page.html").read_text()


def test_study_that_goes_on(study: Study, pictures: Dataset, tmp_path: Path) -> None:
    train, val, test = pictures.split(0.5, 0.25, 0.25, seed=0)
    own = Tuner(Trainer(model="echo/memory"), SPACE, trials=2).fit(train, val, test, name="own", quiet=True)
    running = own.optuna_study.ask()
    running.suggest_float("learning_rate", 0.01, 0.9, log=True)
    running.report(0.5, 25)
    plots = plot_study(own, "page.html")
    assert plots.missing == {"Importance": "it takes 4 finished trials, and there are 2"}
    page = Path("page.html").read_text()
    assert "Not compared yet, as trials are running. Afterwards: <code>detkit studies compare" in page
    assert "running" in texts(plots)


def test_nothing_to_draw_yet(pictures: Dataset) -> None:
    tuner = Tuner(Trainer(model="echo/memory"), SPACE, budget=1e-9)
    study = tuner.fit(pictures, pictures, name="late", quiet=True)
    with pytest.raises(UsageError, match="nothing can be drawn before a trial has been validated"):
        plot_study(study)


def test_kinds_of_files_that_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"ends in \.html, \.svg"):
        plot_study(tmp_path / "not even looked for", "page.gif")


def test_names_are_untrusted(pictures: Dataset) -> None:
    name = "$x^{<script>alert(1)<b>?&%20"
    tuner = Tuner(Trainer(model="echo/memory", epochs=1), {"learning_rate": "0.1|0.5"}, sampler="grid")
    tuner.fit(pictures, pictures, name=name, quiet=True)
    page = plot_study(name, "page.html").save("page.html").read_text()
    assert "<script" not in page and "<b>" not in page and "&lt;script&gt;" in page


def test_without_matplotlib(study: Study) -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\nfrom detkit.study_plots import plot_study\n"
        f"plots = plot_study({str(study.path)!r})\nprint(len(plots.drawn))\nplots.save('x.png')"
    )
    done: Any = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "4\n"
    assert "pip install 'detkit-sdk[plot]'" in done.stderr
    assert not Path("x.png").exists()
