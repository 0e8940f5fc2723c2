"""Comparing entries: one protocol, paired differences, refusals, tables."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from detkit import Dataset, Detections, Run, Trainer, compare, evaluate, score, write_predictions
from detkit.comparison import name_entrants
from detkit.errors import ClassMismatch, InvalidValue, ProtocolMismatch, SeenImages, UnknownName, UsageError
from detkit.testing import tiny_dataset

pytestmark = pytest.mark.usefixtures("clean")


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Forty small pictures."""
    return tiny_dataset(tmp_path_factory.mktemp("many") / "images", num_images=40)


@pytest.fixture(scope="module")
def runs(many: Dataset, tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Two runs of the same split: 20 images for training, 8 for validation, 12 kept aside."""
    folder = tmp_path_factory.mktemp("runs")
    found = []
    for epochs in (1, 8):
        trainer = Trainer(model="echo/memory", epochs=epochs)
        name = str(folder / f"epochs{epochs}")
        found.append(trainer.fit(many[:20], many[20:28], many[28:], name=name, quiet=True))
    return found


def detected(data: Dataset, noise: float, seed: int, classes: tuple[str, ...] | None = None) -> list[Detections]:
    """Return the objects of a data set as a model would find them that is off by ``noise`` pixels."""
    rng = np.random.default_rng(seed)
    names = classes or data.classes
    found = []
    for sample in data:
        n = len(sample.names)
        scores = np.sort(rng.uniform(0.3, 1, n))[::-1]
        found.append(
            Detections(
                path=sample.path,
                width=sample.width,
                height=sample.height,
                classes=names,
                boxes=sample.boxes + rng.normal(0, noise, (n, 4)),
                labels=np.array([data.classes.index(name) for name in sample.names], dtype=np.int64),
                scores=scores,
            )
        )
    return found


def test_the_better_one_wins_and_equal_ones_do_not(many: Dataset) -> None:
    good, same, bad = (score(many, detected(many, noise, seed)) for noise, seed in ((0.5, 1), (0.5, 2), (6.0, 3)))
    found = compare({"good": good, "same": same, "bad": bad})
    verdicts = {(one.first, one.second): one for one in found.differences}
    assert verdicts["good", "bad"].winner == "good" and verdicts["same", "bad"].winner == "same"
    assert verdicts["good", "same"].winner is None
    assert "good beats bad by" in str(found) and "no difference shown" in str(found)
    value = verdicts["good", "bad"].interval
    assert value.value == pytest.approx(good["AP"] - bad["AP"])
    assert value.low < value.value < value.high and value.low > 0
    assert all(one.corrected_p_value >= one.p_value for one in found.differences)
    # The other way round the verdict is the same.
    turned = compare({"bad": bad, "good": good}).differences[0]
    assert turned.winner == "good"
    assert turned.interval.low == pytest.approx(-value.high) and turned.interval.high == pytest.approx(-value.low)


def test_runs_are_compared_on_what_they_kept_aside(runs: list[Run]) -> None:
    found = compare(runs)
    assert [entry.name for entry in found.entries] == ["epochs1", "epochs8"]
    for entry, run in zip(found.entries, runs, strict=True):
        assert dict(entry.scores) == dict(evaluate(run))
        assert entry.seconds_per_image is not None and entry.seconds_per_image > 0
        assert entry.scores.protocol.num_images == 12
    assert found.entries[0].scores.protocol == found.entries[1].scores.protocol
    assert "scratch" in str(found)


def test_models_files_arrays_and_scores_side_by_side(runs: list[Run], many: Dataset, tmp_path: Path) -> None:
    test = many[28:]
    theirs = detected(test, 1.0, 5)
    write_predictions(tmp_path / "theirs.json", test, theirs)
    found = compare([runs[1], tmp_path / "theirs.json", theirs, score(test, theirs, score_floor=0.001)], test)
    assert [entry.name for entry in found.entries] == ["epochs8", "theirs", "predictions 3", "scores 4"]
    assert found["theirs"]["AP"] == pytest.approx(found["predictions 3"]["AP"], abs=1e-6)
    assert found["predictions 3"]["AP"] == found["scores 4"]["AP"]
    with pytest.raises(UnknownName, match="epochs8"):
        found["epochs9"]


def test_scores_of_other_data_or_limits_are_refused(many: Dataset) -> None:
    a = score(many, detected(many, 1, 0))
    with pytest.raises(ProtocolMismatch, match="max_detections: 100 and 300") as caught:
        compare({"a": a, "b": score(many, detected(many, 1, 0), max_detections=300)})
    assert set(caught.value.differing) == {"max_detections"}
    other = many[:39]
    with pytest.raises(ProtocolMismatch, match=r"num_images: 40 and 39; .*data: "):
        compare({"a": a, "b": score(other, detected(other, 1, 0))})


def test_runs_that_kept_different_images_are_refused(runs: list[Run], many: Dataset, tmp_path: Path) -> None:
    other = Trainer(model="echo/memory", epochs=1).fit(
        many[:20], many[20:28], many[30:], name=str(tmp_path / "other"), quiet=True
    )
    with pytest.raises(UsageError, match=r"epochs1 and other kept different test images aside \(12 and 10 images\)"):
        compare([runs[0], other])
    assert len(compare([runs[0], other], many[30:])) == 2


def test_seen_images_are_refused_or_marked_everywhere(runs: list[Run], many: Dataset) -> None:
    with pytest.raises(SeenImages, match="20 of 40 images were used in training"):
        compare(runs, many)
    found = compare(runs, many, allow_seen=True)
    assert str(found).count("SEEN IN TRAINING") == 3
    assert "SEEN IN TRAINING" in found.to_markdown() and "SEEN IN TRAINING" in found._repr_html_()
    assert [row["seen_in"] for row in found.rows()] == ["training", "training"]
    assert str(found.differences[0]).endswith("(SEEN IN TRAINING)")


def test_other_class_names_need_a_map(many: Dataset) -> None:
    known = ("Disc", *many.classes[1:])
    theirs = detected(many, 1, 0, known)
    with pytest.raises(ClassMismatch, match=repr(many.classes[0])):
        compare({"theirs": theirs}, many)
    mapped = compare({"theirs": theirs}, many, class_map={"Disc": many.classes[0]})
    assert mapped["theirs"]["AP"] == score(many, detected(many, 1, 0), score_floor=0.001)["AP"]


def test_tables(many: Dataset, tmp_path: Path) -> None:
    found = compare({"a|b": score(many, detected(many, 1, 0)), "<i>": score(many, detected(many, 3, 1))})
    rows = list(csv.DictReader(io.StringIO(found.save(tmp_path / "t.csv").read_text())))
    assert [row["name"] for row in rows] == ["a|b", "<i>"]
    assert float(rows[0]["AP"]) == found["a|b"]["AP"]
    assert float(rows[0]["AP_low"]) < float(rows[0]["AP"]) < float(rows[0]["AP_high"])
    text = found.save(tmp_path / "t.md").read_text()
    assert r"| a\|b |" in text and "COCO protocol" in text
    plain = json.loads(found.save(tmp_path / "t.json").read_text())
    assert plain["entries"][1]["scores"]["scores"]["AP"] == found["<i>"]["AP"]
    assert plain["differences"][0]["winner"] == "a|b"
    assert "<i>" not in found._repr_html_() and "&lt;i&gt;" in found._repr_html_()
    page = found.save(tmp_path / "page.html").read_text()
    assert page.lower().startswith("<!doctype html>")
    with pytest.raises(InvalidValue, match=r"ends in \.html"):
        found.save(tmp_path / "t.xlsx")
    assert not (tmp_path / "t.xlsx").exists()


def test_the_metric_that_decides(many: Dataset) -> None:
    entries = {"a": score(many, detected(many, 1, 0)), "b": score(many, detected(many, 2, 1))}
    found = compare(entries, metric="AP50")
    assert found.intervals["a"].value == entries["a"]["AP50"]
    with pytest.raises(InvalidValue, match="AP or AP50 or AP75"):
        compare(entries, metric="AR100")
    with pytest.raises(UsageError, match="nothing to compare"):
        compare([])


def test_few_images_have_no_interval_and_no_winner(many: Dataset) -> None:
    few = many[:9]
    found = compare({"a": score(few, detected(few, 0.2, 0)), "b": score(few, detected(few, 6, 0))})
    assert math.isnan(found.intervals["a"].low)
    assert found.differences[0].winner is None
    assert "9 image(s) are too few" in found.warnings[-1]
    assert json.loads(json.dumps(found.to_dict()))["differences"][0]["winner"] is None
    ten = many[:10]
    more = compare({"a": score(ten, detected(ten, 0.2, 0)), "b": score(ten, detected(ten, 6, 0))})
    assert more.differences[0].winner == "a" and not more.warnings


def test_the_limit_is_one_for_each_class_whoever_found_it(runs: list[Run], many: Dataset) -> None:
    """A model's own limit holds for an image; the protocol's, which counts, for each class of it."""
    from detkit import Predictor

    test = many[28:]
    with Predictor(runs[1], score_threshold=0.001) as predictor:
        listed = list(predictor.predict(test))
    found = compare({"model": runs[1], "list": listed}, test, max_detections=1)
    assert dict(found["model"]) == dict(found["list"])
    with pytest.raises(InvalidValue, match="whole number from 1"):
        compare([runs[1]], test, max_detections=0)


def test_an_opened_model(runs: list[Run], many: Dataset) -> None:
    """Whatever runs the model: what a `Predictor` finds is scored like what its run would."""
    from detkit import Predictor

    test = many[28:]
    with Predictor(runs[1], score_threshold=0.001, isolate=True) as predictor:
        found = compare([runs[1], predictor], test)
        with pytest.raises(SeenImages):
            compare([predictor], many)
    assert [entry.name for entry in found.entries] == ["epochs8", "epochs8 (2)"]
    assert dict(found.entries[0].scores) == dict(found.entries[1].scores)
    assert found.entries[1].seconds_per_image is not None
    with Predictor(runs[1]) as sure, pytest.raises(UsageError, match=r"score_threshold=0\.001"):
        compare([sure], test)


def test_a_class_map_for_each_entry(many: Dataset, tmp_path: Path) -> None:
    first, second = many.classes[:2]
    right = detected(many, 1, 0)
    swapped = detected(many, 1, 0, (second, first, *many.classes[2:]))
    mixed_up = compare({"right": right, "swapped": swapped}, many)
    assert mixed_up["swapped"]["AP"] < 0.5 * mixed_up["right"]["AP"]
    class_map = {"swapped": {first: second, second: first}}
    mended = compare({"right": right, "swapped": swapped}, many, class_map=class_map)
    assert mended["swapped"]["AP"] == mended["right"]["AP"] == mixed_up["right"]["AP"]
    write_predictions(tmp_path / "swapped.json", many, swapped)
    from_file = compare({"swapped": tmp_path / "swapped.json"}, many, class_map={first: second, second: first})
    assert from_file["swapped"]["AP"] == pytest.approx(mended["swapped"]["AP"], abs=1e-6)
    with pytest.raises(UnknownName, match=f"did you mean {first!r}"):
        compare({"right": right}, many, class_map={f"{first}s": first})
    with pytest.raises(UsageError, match="mixes names and maps"):
        compare({"right": right}, many, class_map={"right": {}, first: second})  # type: ignore[dict-item]


def test_detections_of_other_images_are_refused(many: Dataset) -> None:
    with pytest.raises(UsageError, match="in the order of the data"):
        compare([detected(many, 1, 0)[::-1]], many)
    with pytest.raises(UsageError, match="item 0 is a dict; expected Detections"):
        compare([[{"boxes": []}] * len(many)], many)  # type: ignore[list-item]


def test_detections_with_the_names_they_have(many: Dataset) -> None:
    """Other tools say the names of what they found, and no list of classes."""
    bare = [
        Detections.from_arrays(one.boxes, one.scores, names=one.names, path=one.path) for one in detected(many, 1, 0)
    ]
    assert compare([bare], many)["predictions 1"]["AP"] == score(many, bare, score_floor=0.001)["AP"] > 0
    only = [one.above(2) if many.classes[0] in one.names else one for one in bare]  # it never found the first class
    assert compare([only], many)["predictions 1"].per_class[many.classes[0]]["AP"] == 0


def test_kept_images_with_other_annotations_are_refused(runs: list[Run], many: Dataset, tmp_path: Path) -> None:
    moved = replace(many, boxes=many.boxes + 0.5)
    other = Trainer(model="echo/memory", epochs=1).fit(
        many[:20], many[20:28], moved[28:], name=str(tmp_path / "other"), quiet=True
    )
    for pair in ([runs[0], other], [other, runs[0]]):
        with pytest.raises(UsageError, match="kept different annotations of their test images"):
            compare(pair)


def test_names_are_told_apart(runs: list[Run]) -> None:
    assert name_entrants([runs[0], runs[0], runs[1], runs[0]]) == ["epochs1", "epochs1 (2)", "epochs8", "epochs1 (3)"]


class Broken:
    """Nothing that can be compared."""


def test_a_word_is_no_list(many: Dataset) -> None:
    with pytest.raises(UsageError, match=r"write detkit.compare\(\['first', ...\]\)"):
        compare("first", many)


def test_what_is_none_of_these(many: Dataset) -> None:
    nothing: Any = Broken()
    with pytest.raises(UsageError, match="cannot be scored"):
        compare([nothing], many)
