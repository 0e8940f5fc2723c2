"""The page of a comparison: what it says, that it is safe, and what a browser makes of it. Looks were judged by eye."""

from __future__ import annotations

import base64
import datetime
import hashlib
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image

from detkit import read_dataset, report, write_dataset
from detkit.boxes import iou
from detkit.checking.overview import write_overview
from detkit.comparison import Comparison
from detkit.data import Dataset, Sample
from detkit.detections import Detections
from detkit.errors import DetkitWarning
from detkit.evaluation import Evaluated
from detkit.formats.findings import Finding
from detkit.pages import text
from detkit.report import write_page
from detkit.report.charts import line_class
from detkit.report.judging import Judged, one_of_each_class, worst_disagreements
from detkit.scores import score
from detkit.testing import tiny_dataset

EVIL = "</script><script>alert('1')</script>\x07"
SPELLED = EVIL.replace("\x07", "\\x07")
CLASSES = ("bolt", 'nut "M8" & <b>', EVIL)
DAY = datetime.date(2030, 1, 2)


def find(data: Dataset, seed: int, noise: float, lost: float, false: float) -> list[Detections]:
    """Draw detections near the objects, without some of these, and some elsewhere."""
    rng, found = np.random.default_rng(seed), []
    for sample in data:
        keep = rng.random(len(sample.names)) >= lost
        sides = np.tile(sample.boxes[:, 2:] - sample.boxes[:, :2], 2)
        near = (sample.boxes + rng.normal(0, noise, sides.shape) * sides)[keep]
        labels = np.array([data.classes.index(name) for name in sample.names], dtype=np.int64)[keep]
        number = rng.poisson(false)
        corner = rng.uniform(0, 50, (number, 2))
        boxes = np.concatenate([near, np.hstack([corner, corner + rng.uniform(5, 40, (number, 2))])])
        low, high = np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:]) + 0.5
        found.append(
            Detections.from_arrays(
                np.hstack([low, high]),
                np.concatenate([rng.beta(6, 2, len(near)), rng.beta(2, 4, number)]),
                np.concatenate([labels, rng.integers(0, len(data.classes), number)]),
                classes=data.classes,
            )
        )
    return found


def compare(data: Dataset, **found: list[Detections]) -> Comparison:
    entries = [Evaluated(name=name, scores=score(data, one)) for name, one in found.items()]
    return Comparison(entries=tuple(entries))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Thirty pictures with names that would be code, and a few objects that do not count."""
    drawn = tiny_dataset(tmp_path_factory.mktemp("report") / "images", num_images=30, classes=CLASSES)
    difficult, crowd = np.zeros(len(drawn.boxes), dtype=bool), np.zeros(len(drawn.boxes), dtype=bool)
    difficult[3::10], crowd[5::16] = True, True
    names = (f"<img src=x onerror=alert(1)> '{i}\".jpg" for i in range(len(drawn)))
    return replace(drawn, difficult=difficult, crowd=crowd, image_ids=tuple(names))


@pytest.fixture(scope="module")
def three(data: Dataset) -> Comparison:
    good, fair = score(data, find(data, 1, 0.03, 0.05, 0.4)), score(data, find(data, 2, 0.08, 0.2, 0.6))
    bad = replace(score(data, find(data, 3, 0.2, 0.5, 1.5)), seen_in="training")
    return Comparison(
        entries=(
            Evaluated(name="good", scores=good, seconds_per_image=0.0123, device="a <GPU>"),
            Evaluated(name=f"fair {EVIL}", scores=fair),
            Evaluated(name="bad", scores=bad),
        )
    )


@pytest.fixture(scope="module")
def page(three: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(three, tmp_path_factory.mktemp("page") / "page.html", date=DAY, command="detkit compare <a> b")


@dataclass
class Element:
    tag: str
    attributes: dict[str, str | None]
    children: list[Element] = field(default_factory=list)
    parts: list[str] = field(default_factory=list)
    """Text of its own and of what it contains, in order."""

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.parts)).strip()

    @property
    def kinds(self) -> set[str]:
        return set((self.attributes.get("class") or "").split())

    def all(self, tag: str = "", kind: str = "") -> list[Element]:
        """Return what is below it, in order, of a tag or a class."""
        found = []
        for child in self.children:
            if tag in {"", child.tag} and (not kind or kind in child.kinds):
                found.append(child)
            found += child.all(tag, kind)
        return found


class Tree(HTMLParser):
    """HTML that closes what it opens, in order; an assertion fails on any other."""

    VOID = frozenset({"meta", "input", "br", "img", "link", "hr"})

    def __init__(self, content: str) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]
        self.feed(content)
        self.close()
        assert [one.tag for one in self.open] == [""]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        element = Element(tag, dict(attrs))
        self.open[-1].children.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].children.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self.open:
            element.parts.append(data)


def tree(page: Path) -> Element:
    return Tree(page.read_text(encoding="utf-8")).root


def counts_of(tile: Element) -> tuple[int, ...]:
    """Return what a tile says of right, false and missed."""
    return tuple(int(tile.all("span", kind)[0].all("b")[0].text) for kind in ("right", "false", "missed"))


def boxes_of(tile: Element) -> Counter[str]:
    """Return how many boxes of each kind are visible."""
    return Counter((box.kinds - {"box"}).pop() for box in tile.all("rect", "box") if "hidden" not in box.attributes)


def in_tiles(root: Element) -> list[Element]:
    """Return all boxes but those of the legend."""
    return [box for tile in root.all("div", "tile") for box in tile.all("rect", "box")]


def brute_force(data: Dataset, found: Detections, image: int, threshold: float) -> tuple[int, int, int]:
    """Count right, false and missed by the definition: by falling score, each takes the best free object."""
    sample = data[image]
    assert sample.difficult is not None and sample.crowd is not None
    ignored = sample.difficult | sample.crowd
    free, right, false, missed = np.ones(len(ignored), dtype=bool), 0, 0, 0
    above = found.above(threshold)
    for name, box in zip(above.names, above.boxes, strict=True):
        same = np.array([other == name for other in sample.names], dtype=bool)
        overlap = iou(box[None], sample.boxes)[0]
        sides = np.minimum(box[2:], sample.boxes[:, 2:]) - np.maximum(box[:2], sample.boxes[:, :2])
        inside = np.clip(sides, 0, None).prod(axis=1) / (box[2:] - box[:2]).prod()
        overlap = np.where(sample.crowd, inside, overlap)
        fits = [
            (not ignored[g], overlap[g], g)
            for g in np.flatnonzero(same & (overlap >= 0.5))
            if free[g] or sample.crowd[g]
        ]
        if fits:
            counts, _, g = max(fits)
            free[g], right = False, right + bool(counts)
        else:
            false += 1
    missed = int((free & ~ignored).sum())
    return right, false, missed


def test_a_whole_page(page: Path) -> None:
    """Everything opened is closed, every id is there once, every link leads to one."""
    root = tree(page)
    ids = [one.attributes["id"] for one in root.all() if "id" in one.attributes]
    assert len(set(ids)) == len(ids)
    links = [one.attributes["href"] or "" for one in root.all() if one.tag in {"a", "use"}]
    assert links and all(link.startswith("#") and link[1:] in ids for link in links)
    assert [one.text for one in root.all("h2")] == [
        "Numbers",
        "Who beats whom",
        "Classes",
        "Precision, recall and the score threshold",
        "Errors",
        "Pictures",
        "Protocol and origin",
    ]


def test_nothing_is_fetched(page: Path) -> None:
    content = page.read_text(encoding="utf-8")
    assert "://" not in content and "url(" not in content and "@import" not in content
    for element in tree(page).all():
        for name in ("href", "src", "srcset", "action", "data"):
            value = element.attributes.get(name)
            assert value is None or value.startswith(("#", "data:image/jpeg;base64,")), value


def test_the_policy_is_for_exactly_this_style_and_script(page: Path) -> None:
    root = tree(page)
    (policy,) = (one.attributes["content"] or "" for one in root.all("meta") if "http-equiv" in one.attributes)
    assert policy.startswith("default-src 'none'; img-src data:;") and "unsafe" not in policy
    content = page.read_text(encoding="utf-8")
    for tag in ("style", "script"):
        (inside,) = re.findall(rf"<{tag}>(.*?)</{tag}>", content, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert not any(name.startswith("on") or name == "style" for one in root.all() for name in one.attributes)


def test_names_are_text_and_never_markup(page: Path, data: Dataset) -> None:
    root = tree(page)
    assert len(root.all("script")) == 1 and not root.all("img") and "alert" not in root.all("script")[0].text
    assert "\x07" not in page.read_text(encoding="utf-8")
    headings = [one.text for one in root.all("th")]
    assert SPELLED in headings and CLASSES[1] in headings
    assert any(one.text == data.image_ids[0] for one in root.all("span", "file"))
    assert any(f"fair {SPELLED}" in one.text for one in root.all("span", "entry"))


@pytest.mark.parametrize("value", ["a\x00b\x1b[2J", "\ud800lone", "new\nline", "quo\"te's & <tags>"])
def test_text_is_safe_and_can_be_written(value: str) -> None:
    shown = text(value)
    assert not set(shown) & set("<>\"'\x00\x1b\n") and shown.encode()
    assert Tree(f'<p title="{shown}">{shown}</p>').root.all("p")[0].text


def test_same_bytes_but_for_the_date(three: Comparison, page: Path, tmp_path: Path) -> None:
    again = write_page(three, tmp_path / "again.html", date=DAY, command="detkit compare <a> b")
    assert again.read_bytes() == page.read_bytes()
    other = write_page(three, tmp_path / "other.html", date=DAY.replace(year=2031), command="detkit compare <a> b")
    assert other.read_bytes().replace(b"2031-01-02", b"2030-01-02") == page.read_bytes()


def test_the_numbers_are_those_of_the_comparison(three: Comparison, page: Path) -> None:
    table = tree(page).all("table", "numbers")[0]
    columns = [one.text for one in table.all("thead")[0].all("th")]
    assert columns[:4] == ["model", "AP, 95 % interval", columns[2], "AP50"] and "AR100" in columns
    assert columns[-2:] == ["ms per image", "started from"]
    for entry, row in zip(three.entries, table.all("tbody")[0].all("tr"), strict=True):
        cells = dict(zip(columns, (one.text for one in row.children), strict=True))
        ends = three.intervals[entry.name]
        assert cells["AP, 95 % interval"] == f"{ends.value:.3f}{ends.low:.3f} to {ends.high:.3f}"
        assert cells["AP50"] == f"{entry.scores['AP50']:.3f}"
        assert ("seen in training" in cells["model"]) == bool(entry.scores.seen_in)
    assert table.all("tbody")[0].all("tr")[0].children[-2].text == "12.3a <GPU>"
    assert "detkit compare <a> b" in [one.text for one in tree(page).all("pre")]
    protocol = three.entries[0].scores.protocol
    facts = [one.text for one in tree(page).all("table", "facts")[0].all("td")]
    assert protocol.data in facts and protocol.engine in facts and protocol.crowd in facts


def test_seen_images_are_told_loudly(three: Comparison, tmp_path: Path) -> None:
    entries = (
        *three.entries[:2],
        replace(three.entries[2], scores=replace(three.entries[0].scores, seen_in="validation")),
    )
    best_is_seen = Comparison(entries=entries[1:])
    root = tree(write_page(best_is_seen, tmp_path / "page.html"))
    assert "But it has seen images in validation" in root.all("p", "verdict")[0].text
    assert [one.text for one in root.all("p", "alarm")] == [
        "bad has seen some of these images in validation: its numbers say nothing about new images."
    ]


def test_bold_means_beyond_chance(data: Dataset, tmp_path: Path) -> None:
    one, other, far = find(data, 1, 0.05, 0.1, 0.3), find(data, 9, 0.05, 0.1, 0.3), find(data, 3, 0.3, 0.8, 2)
    alike = tree(write_page(compare(data, one=one, other=other), tmp_path / "alike.html"))
    assert not alike.all("td", "ahead") and alike.all("td", "highest")
    assert "is not shown to be ahead of" in alike.all("p", "verdict")[0].text
    assert "no difference shown" in alike.all("table", "forest")[0].text
    apart = tree(write_page(compare(data, one=one, far=far), tmp_path / "apart.html"))
    assert len(apart.all("table", "numbers")[0].all("td", "ahead")) == 3  # AP, AP50 and AP75
    assert apart.all("p", "verdict")[0].text == "one is ahead of the other by AP, beyond chance."
    assert "one beats far" in apart.all("table", "forest")[0].text


def test_warnings_are_shown(data: Dataset, tmp_path: Path) -> None:
    boxes = [replace(one, boxes=one.boxes[:, [1, 0, 3, 2]]) for one in find(data, 1, 0.01, 0, 0)]
    comparison = compare(data, turned=boxes)
    assert comparison.warnings
    root = tree(write_page(comparison, tmp_path / "page.html"))
    assert [one.text for one in root.all("div", "warnings")[0].all("li")] == list(comparison.warnings)


def scenes(root: Element, data: Dataset) -> list[tuple[int, list[Element]]]:
    """Return the images shown, each with the tiles of the entries."""
    files = [text(one) for one in data.image_ids]
    return [
        (files.index(escape(scene.all("span", "file")[0].text)), scene.all("div", "found"))
        for scene in root.all("figure", "scene")
    ]


def test_right_false_and_missed_are_those_of_the_definition(three: Comparison, page: Path, data: Dataset) -> None:
    shown = scenes(tree(page), data)
    assert len(shown) == len(CLASSES) + 12
    seen = Counter[str]()
    for image, tiles in shown:
        for entry, tile in zip(three.entries, tiles, strict=True):
            assert entry.scores.score_threshold is not None
            wanted = brute_force(data, entry.scores.detections[image], image, entry.scores.score_threshold)
            assert counts_of(tile) == wanted
            visible = boxes_of(tile)
            assert (visible["right"], visible["false"], visible["missed"]) == wanted
            seen += visible
            names = [one for one in tile.all("g", "names")[0].children if "hidden" not in one.attributes]
            assert len(names) == visible.total()
    assert all(seen[kind] for kind in ("right", "false", "missed", "ignored"))


def test_worst_disagreements_come_first(three: Comparison, data: Dataset) -> None:
    judged = [Judged(entry.scores) for entry in three.entries]
    for entry, one in zip(three.entries, judged, strict=True):
        expected = [
            sum(brute_force(data, found, i, one.threshold)[1:]) for i, found in enumerate(entry.scores.detections)
        ]
        assert one.mistakes.tolist() == expected
    chosen = worst_disagreements(judged, 8)
    apart = np.ptp(np.stack([one.mistakes for one in judged]), axis=0)
    assert apart[chosen].tolist() == sorted(apart.tolist(), reverse=True)[:8]


def test_the_image_of_a_class_is_a_usual_one() -> None:
    def image(name: str, *names: str) -> Sample:
        boxes = np.tile([0.0, 0.0, 5.0, 5.0], (len(names), 1))
        return Sample(path=name, width=9, height=9, boxes=boxes, names=names, image_id=name)

    data = Dataset.from_samples(
        ["a", "b", "none"],
        [image("0", "a"), image("1", "a", "a", "b"), image("2", *"aa"), image("3", *"aaaaa"), image("4", *"aaa", "b")],
    )
    assert one_of_each_class(data, data.classes) == [(2, "a"), (1, "b")]
    assert one_of_each_class(data, ["b", "a"]) == [(1, "b"), (2, "a")]


def test_an_image_that_cannot_be_read_leaves_its_place(data: Dataset, tmp_path: Path) -> None:
    gone = replace(data, paths=tuple(str(tmp_path / "gone.jpg") for _ in data.paths))
    found = find(data, 1, 0.03, 0.05, 0.4)
    root = tree(write_page(compare(gone, a=found), tmp_path / "page.html", samples=2, disagreements=1))
    assert not root.all("image") and str(tmp_path) not in (tmp_path / "page.html").read_text(encoding="utf-8")
    assert {one.text for one in root.all("text", "unread")} == {"this image cannot be read"}
    assert root.all("div", "tile")[0].all("rect", "box")


def test_images_in_packs(tmp_path: Path) -> None:
    drawn = tiny_dataset(tmp_path / "drawn")[:7]  # the last has no object, and MXNet knows no such image
    with pytest.warns(DetkitWarning, match="file names"):
        packed = read_dataset(write_dataset(drawn, tmp_path / "pack", "recordio"))
    assert any(".rec#" in path for path in packed.paths)
    root = tree(write_page(compare(packed, a=find(packed, 1, 0.03, 0.2, 0.4)), tmp_path / "page.html"))
    assert root.all("image") and not root.all("text", "unread")


def empty(data: Dataset) -> list[Detections]:
    return [Detections.from_arrays(np.zeros((0, 4)), [], [], classes=data.classes) for _ in data]


@pytest.mark.parametrize("case", ["nothing found", "no objects", "no images", "one image", "ten models"])
def test_poor_comparisons(case: str, data: Dataset, tmp_path: Path) -> None:
    if case == "nothing found":
        comparison = compare(data, a=empty(data), b=find(data, 1, 0.03, 0.1, 0.2))
    elif case == "no objects":
        bare = data.take([29])
        assert not len(bare.boxes)
        comparison = compare(bare, a=find(bare, 5, 0, 0, 4), b=empty(bare))
    elif case == "no images":
        comparison = compare(data.take([]), a=[], b=[])
    elif case == "one image":
        one = data.take([1])
        comparison = compare(one, a=find(one, 1, 0.01, 0, 0))
    else:
        comparison = compare(data, **{f"model {i}": find(data, i, 0.02 * i, 0.05 * i, 0.3) for i in range(10)})
    root = tree(write_page(comparison, tmp_path / "page.html", title=case, date=DAY))
    assert root.all("h1")[0].text == case
    assert len(root.all("table", "numbers")[0].all("tbody")[0].all("tr")) == len(comparison)
    assert "nan" not in (one.text.lower() for one in root.all("td"))


def test_many_classes_are_cut_and_said_so(tmp_path: Path) -> None:
    names = [f"class {i}" for i in range(70)]
    boxes = np.array([[5.0, 5.0, 40.0, 40.0]])
    samples = [Sample(path="", width=64, height=64, boxes=boxes, names=(name,), image_id=name) for name in names]
    data = Dataset.from_samples(names, samples)
    root = tree(write_page(compare(data, a=find(data, 1, 0.01, 0, 0)), tmp_path / "page.html"))
    assert len(root.all("table", "classes")[0].all("tbody")[0].all("tr")) == 60
    matrix = root.all("table", "matrix")[0].all("tbody")[0].all("tr")
    assert len(matrix) == 22
    assert sum(int(cell.text) for row in matrix for cell in row.all("td") if cell.text) == 70
    assert "The 60 of 70 classes with most objects." in root.text


def test_a_page_is_light(tmp_path: Path) -> None:
    """Pictures that hardly compress, three models, a hundred detections on each."""
    rng, samples = np.random.default_rng(0), []
    for i in range(48):
        path = tmp_path / f"{i}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (90, 120, 3), dtype=np.uint8))
        coarse.resize((960, 720), Image.Resampling.BICUBIC).save(path)
        boxes = np.array([[10.0 * i, 10.0, 10.0 * i + 50, 90.0]])
        samples.append(Sample(path=str(path), width=960, height=720, boxes=boxes, names=(f"class {i % 12}",)))
    data = Dataset.from_samples([f"class {k}" for k in range(12)], samples)
    models = {name: find(data, seed, 0.1, 0.3, 100) for seed, name in enumerate("abc")}
    written = write_page(compare(data, **models), tmp_path / "page.html")
    assert len(tree(written).all("image")) >= 20
    assert written.stat().st_size < 4_000_000


def test_a_page_of_many_models_and_classes_is_light(tmp_path: Path) -> None:
    """Twelve models of 80 classes, 200 detections on each of 24 pictures."""
    rng, classes, samples = np.random.default_rng(0), [f"class {k}" for k in range(80)], []
    for i in range(24):
        path = tmp_path / f"{i}.jpg"
        coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8))
        coarse.resize((960, 720), Image.Resampling.BICUBIC).save(path)
        corner = rng.uniform(0, 600, (100, 2))
        boxes, names = np.hstack([corner, corner + rng.uniform(10, 100, (100, 2))]), tuple(rng.choice(classes, 100))
        samples.append(Sample(path=str(path), width=960, height=720, boxes=boxes, names=names))
    data = Dataset.from_samples(classes, samples)
    scores = score(data, find(data, 1, 0.1, 0.1, 100))
    page = Comparison(entries=tuple(Evaluated(name=f"model {i}", scores=scores) for i in range(12)))
    written = write_page(page, tmp_path / "page.html")
    root = tree(written)
    assert len(root.all("figure", "scene")) == 24
    assert all(len(tile.all("rect", "box")) == 60 for tile in root.all("div", "found"))
    assert written.stat().st_size < 8_000_000


def dense(folder: Path, number: int = 300) -> Dataset:
    """One picture with objects in rows of 20, of three classes in turn."""
    Image.new("RGB", (600, 600)).save(folder / "dense.png")
    corner = np.array([[i % 20, i // 20] for i in range(number)], dtype=np.float64) * 30
    names = tuple("abc"[i % 3] for i in range(number))
    boxes = np.hstack([corner, corner + 20])
    sample = Sample(path=str(folder / "dense.png"), width=600, height=600, boxes=boxes, names=names, image_id="dense")
    return Dataset.from_samples(["a", "b", "c"], [sample])


def half_found(data: Dataset) -> list[Detections]:
    """Return one detection for each object of `dense`; those with scores below 0.5 are beside theirs."""
    scores = np.random.default_rng(0).uniform(0.1, 0.99, len(data.boxes))
    boxes = data.boxes + 18.0 * (scores < 0.5)[:, None]
    return [Detections.from_arrays(boxes, scores, data.labels, classes=data.classes)]


def test_what_is_not_drawn_is_told(tmp_path: Path) -> None:
    data = dense(tmp_path)
    found = half_found(data)
    root = tree(write_page(compare(data, **dict.fromkeys("abcdefgh", found)), tmp_path / "page.html"))
    for tile in root.all("div", "found"):
        threshold = float(tile.attributes["data-best"] or "")
        assert counts_of(tile) == brute_force(data, found[0], 0, threshold)
        drawn = boxes_of(tile)
        # As many missed objects as detections, and at the threshold there are no others.
        assert drawn == {"right": 45, "missed": 45}
        assert tile.all("span", "more")[0].text == f"{sum(counts_of(tile)) - 90} more not drawn"
    (truth,) = (tile for tile in root.all("figure", "scene")[0].all("div", "tile") if "found" not in tile.kinds)
    assert len(truth.all("rect", "box")) == 300 and not truth.all("span", "more")


def test_scores_near_one_are_told_apart(tmp_path: Path) -> None:
    data = dense(tmp_path, 6)
    scores = 1 - np.array([1, 2, 3, 4, 10, 20]) * 1e-8
    boxes = data.boxes + np.array([0, 0, 0, 0, 25, 25])[:, None]
    comparison = compare(data, a=[Detections.from_arrays(boxes, scores, data.labels, classes=data.classes)])
    tile = tree(write_page(comparison, tmp_path / "page.html")).all("div", "found")[0]
    best = float(tile.attributes["data-best"] or "")
    assert 1 - 1e-7 < best == comparison.entries[0].scores.score_threshold
    assert counts_of(tile) == (4, 0, 2)
    for box in tile.all("rect", "box"):
        at = float(box.attributes["data-s"] or "")
        present = at < best if "missed" in box.kinds else at >= best
        assert present == ("hidden" not in box.attributes)


def test_scores_of_what_is_not_drawn_stay_on_their_side_of_every_threshold(tmp_path: Path) -> None:
    """Written with three digits, but for those that this would take across the best threshold or a step of 0.01."""
    data = dense(tmp_path)
    steps = np.arange(10, 100) / 100
    near = np.concatenate([steps, np.nextafter(steps, 0), steps - 2e-4, [0.123456]])
    found = [Detections.from_arrays(data.boxes[: len(near)], near, data.labels[: len(near)], classes=data.classes)]
    tile = tree(write_page(compare(data, **dict.fromkeys("abcdefgh", found)), tmp_path / "page.html")).all(
        "div", "found"
    )[0]
    written = [float(box.attributes["data-s"] or "") for box in tile.all("rect", "right")]
    rest = [group.split() for group in (tile.attributes["data-rest"] or "").split(";")]
    assert "0.123" in {one for group in rest for one in group}
    written += [float(one) for kind, _, *scores in rest if kind == "right" for one in scores]
    for threshold in (*steps.tolist(), float(tile.attributes["data-best"] or "")):
        assert sum(one >= threshold for one in written) == int((near >= threshold).sum())


def test_lines_of_56_models_are_all_different() -> None:
    style = (Path(report.__file__).parent / "page.css").read_text(encoding="utf-8")
    lines = [line_class(at) for at in range(56)]
    assert len(set(lines)) == 56 and lines[0] == "e0 d0"
    colours, dashes = ({one.split()[part] for one in lines} for part in (0, 1))
    of_colour = [re.findall(rf"\.{one}, [^{{}}]*{{ color: (var\(--e\d\))", style) for one in sorted(colours)]
    of_dash = [re.findall(rf"\.{one} {{ stroke-dasharray: ([\d ]+)", style) for one in sorted(dashes - {"d0"})]
    for found in (of_colour, of_dash):
        assert all(len(one) == 1 for one in found) and len({one[0] for one in found}) == len(found)


def test_what_scrolls_is_reached_by_keys_and_has_a_name(page: Path) -> None:
    root = tree(page)
    areas = root.all("div", "scroll")
    assert all(one.attributes["tabindex"] == "0" and one.attributes["role"] == "region" for one in areas)
    names = [one.attributes["aria-label"] for one in areas]
    assert "Numbers" in names and f"Confusions of fair {SPELLED}" in names and len(set(names)) == len(names) == 10
    assert all(one.attributes["tabindex"] == "0" for one in root.all("pre"))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e308])
@pytest.mark.filterwarnings("ignore::RuntimeWarning:detkit.scores", "ignore::RuntimeWarning:detkit.boxes")
def test_boxes_without_a_place_are_counted_but_not_drawn(bad: float, tmp_path: Path) -> None:
    """Arrays are checked where they come in; what is made by hand must not break the drawing either."""
    data = dense(tmp_path, 6)
    found = Detections.from_arrays(data.boxes, [0.9, 0.8, 0.7, 0.6, 0.5, 0.4], data.labels, classes=data.classes)
    boxes = found.boxes.copy()
    boxes[2, 2] = bad
    page = write_page(compare(data, a=[replace(found, boxes=boxes)]), tmp_path / "page.html")
    tile = tree(page).all("div", "found")[0]
    assert sum(boxes_of(tile).values()) == sum(counts_of(tile)) - (not np.isfinite(bad))
    shapes = [value for one in in_tiles(tree(page)) for name, value in one.attributes.items() if name != "class"]
    assert shapes and not any(word in (value or "") for value in shapes for word in ("nan", "inf"))
    for box in in_tiles(tree(page)):
        assert all(abs(float(box.attributes[name] or "")) < 700 for name in ("x", "y", "width", "height"))


# What a browser makes of it

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
browser = pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH: nothing to open the page with")


@pytest.fixture
def open_page(tmp_path: Path) -> Callable[..., tuple[str, list[str]]]:
    """A function that opens a file and returns what the browser wrote, and what its console said."""

    def run(file: Path, view: str = "", do: Sequence[str] = ("--dump-dom",)) -> tuple[str, list[str]]:
        assert BROWSER is not None
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        quiet = ("--disable-background-networking", "--enable-logging=stderr", "--v=0")
        command = [BROWSER, *flags, *quiet, f"--user-data-dir={tmp_path / 'profile'}", *do, f"{file.as_uri()}{view}"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    return run


@browser
def test_the_script_agrees_with_the_page(
    page: Path, data: Dataset, open_page: Callable[..., tuple[str, list[str]]]
) -> None:
    """At each model's best threshold nothing changes but the controls, which appear."""
    content, console = open_page(page)
    assert console == []
    root, still = Tree(content).root, tree(page)
    assert all("hidden" in one.attributes for one in still.all(kind="controls"))
    assert not any("hidden" in one.attributes for one in root.all(kind="controls"))
    moving, fixed = scenes(root, data), scenes(still, data)
    assert [[counts_of(one) for one in tiles] for _, tiles in moving] == [
        [counts_of(one) for one in tiles] for _, tiles in fixed
    ]
    assert [[boxes_of(one) for one in tiles] for _, tiles in moving] == [
        [boxes_of(one) for one in tiles] for _, tiles in fixed
    ]


@browser
def test_slider_and_filter(
    three: Comparison, page: Path, data: Dataset, open_page: Callable[..., tuple[str, list[str]]]
) -> None:
    """A common threshold and a class, from the address: right, false and missed follow."""
    before = tree(page)
    content, console = open_page(page, f"#score=0.7&class={quote(SPELLED)}")
    assert console == []
    root = Tree(content).root
    label = str(CLASSES.index(EVIL))
    shown = [box for box in in_tiles(root) if "hidden" not in box.attributes]
    assert shown and {box.attributes["data-c"] for box in shown} == {label}
    assert len(shown) < len([box for box in in_tiles(before) if "hidden" not in box.attributes])
    only = only_objects_of(data, EVIL)
    for image, tiles in scenes(root, data):
        for entry, tile in zip(three.entries, tiles, strict=True):
            found = entry.scores.detections[image]
            kept = found.labels == CLASSES.index(EVIL)
            mine = replace(found, boxes=found.boxes[kept], labels=found.labels[kept], scores=found.scores[kept])
            assert counts_of(tile) == brute_force(only, mine, image, 0.7)
            assert tile.all("span", "from")[0].text == "from 0.70"
    hidden = [one for one in root.all("figure", "scene") if "hidden" in one.attributes]
    assert 0 < len(hidden) < len(root.all("figure", "scene"))


@browser
@pytest.mark.parametrize("threshold", [0.2, 0.9])
def test_the_slider_counts_what_is_not_drawn(
    threshold: float, tmp_path: Path, open_page: Callable[..., tuple[str, list[str]]]
) -> None:
    data = dense(tmp_path)
    found = half_found(data)
    page = write_page(compare(data, **dict.fromkeys("abcdefgh", found)), tmp_path / "page.html")
    content, console = open_page(page, f"#score={threshold}")
    assert console == []
    for tile in Tree(content).root.all("div", "found"):
        counts = brute_force(data, found[0], 0, threshold)
        assert counts_of(tile) == counts
        left = sum(counts) - boxes_of(tile).total()
        assert left > 0 and tile.all("span", "more")[0].text == f"{left} more not drawn"
        (boxes,) = tile.all("details")
        assert boxes.all("summary")[0].text == f"list of {sum(counts)} boxes"


@browser
def test_a_list_says_what_the_crowded_picture_does_not(
    tmp_path: Path, open_page: Callable[..., tuple[str, list[str]]]
) -> None:
    """A second script opens all lists, as the keyboard would."""
    data = dense(tmp_path)
    found = half_found(data)
    page = write_page(compare(data, **dict.fromkeys("abcdefgh", found)), tmp_path / "page.html", disagreements=0)
    opened = re.sub("script-src '[^']*'", "script-src 'unsafe-inline'", page.read_text(encoding="utf-8"))
    opened += '<script>for (const one of document.querySelectorAll("details")) one.open = true</script>'
    page.write_text(opened, encoding="utf-8")
    content, console = open_page(page, "#score=0.5", do=("--virtual-time-budget=2000", "--dump-dom"))
    assert console == []
    tile = Tree(content).root.all("div", "found")[0]
    (listed,) = tile.all("ol")
    assert listed.attributes["tabindex"] == "0"
    right, false, missed = counts_of(tile)
    kinds = Counter(one.text.split(", ")[1] for one in listed.all("li"))
    assert kinds == Counter(right=right, false=false, missed=missed)
    best = found[0]
    assert listed.all("li")[0].text == f"{best.names[0]} {best.scores[0]:.3f}, right"
    assert any(one.text.endswith(", not drawn") for one in listed.all("li"))
    few = [one for one in Tree(content).root.all("details") if "hidden" in one.attributes]
    assert not few


def only_objects_of(data: Dataset, name: str) -> Dataset:
    """Return the data with the objects of one class only."""
    samples = []
    for sample in data:
        keep = np.array([one == name for one in sample.names], dtype=bool)
        assert sample.difficult is not None and sample.crowd is not None
        samples.append(
            replace(
                sample,
                boxes=sample.boxes[keep],
                names=(name,) * int(keep.sum()),
                difficult=sample.difficult[keep],
                crowd=sample.crowd[keep],
                area=None,
                records=None,
            )
        )
    return Dataset.from_samples(data.classes, samples)


@browser
def test_a_foreign_script_does_not_run(
    page: Path, tmp_path: Path, open_page: Callable[..., tuple[str, list[str]]]
) -> None:
    """Were anything not escaped, the policy would stop it; the console tells, so the other tests would see it too."""
    foreign = "<script>document.title = 'mine'</script><img src='file:///etc/hostname' onerror='document.title = 1'>"
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text(encoding="utf-8").replace("<main>", f"<main>{foreign}"), encoding="utf-8")
    content, console = open_page(broken)
    assert len(console) >= 2 and all("Content Security Policy" in line for line in console)
    assert "<title>good vs" in content


@browser
def test_it_prints(page: Path, tmp_path: Path, open_page: Callable[..., tuple[str, list[str]]]) -> None:
    paper = tmp_path / "page.pdf"
    _, console = open_page(page, do=("--no-pdf-header-footer", f"--print-to-pdf={paper}"))
    assert console == []
    assert paper.read_bytes().startswith(b"%PDF-") and paper.stat().st_size > 20_000


@browser
def test_the_page_of_a_check_opens(
    data: Dataset, tmp_path: Path, open_page: Callable[..., tuple[str, list[str]]]
) -> None:
    findings = [Finding(severity="warning", code="odd", file="a.xml", place="line 1", message=f"this is odd: {EVIL}")]
    write_overview(data, findings, tmp_path / "check.html", title=EVIL)
    content, console = open_page(tmp_path / "check.html")
    assert console == []
    assert "alert" not in "".join(one.text for one in Tree(content).root.all("script"))
