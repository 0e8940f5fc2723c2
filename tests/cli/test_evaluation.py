"""``detkit evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path


def test_kept_test_images_with_protocol(cli: Any, trained: Path) -> None:
    done = cli("evaluate", "last", cwd=trained)
    assert done.code == 0, done.err
    assert "AP50" in done.out and "disc" in done.out
    assert "COCO protocol" in done.out and "4 images" in done.out


def test_json_shape(cli: Any, trained: Path) -> None:
    found = cli("evaluate", "last", "--json", "--max-detections", "7", cwd=trained).json
    assert set(found) == {
        *("scores", "per_class", "score_threshold", "best_f1", "voc", "error_types", "confusion", "warnings"),
        *("seen_in", "lower_is_better", "protocol", "interval", "failed"),
    }
    assert found["interval"]["value"] == found["scores"]["AP"]
    assert found["interval"]["low"] is None  # of four images
    assert {"AP", "AP50", "AR7"} <= set(found["scores"])
    assert found["protocol"]["max_detections"] == 7
    assert found["failed"] == {}


def test_seen_images_are_refused_or_marked(cli: Any, data: Path, trained: Path) -> None:
    refused = cli("evaluate", "last", data, "--json", cwd=trained)
    assert (refused.code, refused.json["code"]) == (1, 1)
    assert "were used in training" in refused.err
    allowed = cli("evaluate", "last", data, "--allow-seen", "--format", "coco", cwd=trained)
    assert allowed.code == 0, allowed.err
    assert "SEEN IN TRAINING" in allowed.out


def test_thresholds(cli: Any, data: Path, trained: Path) -> None:
    words = ("evaluate", "last", data, "--allow-seen", "--fail-under", "AP50=0.01", "--fail-under", "AP=1.01")
    done = cli(*words, "--json", cwd=trained)
    assert done.code == 1
    assert done.json["failed"] == {"AP": 1.01}
    assert "failed: AP " in done.err and "failed: AP50" not in done.err


def test_a_number_that_cannot_be_measured_fails(cli: Any, trained: Path) -> None:
    assert cli("evaluate", "last", "--fail-under", "APl=0", cwd=trained).code == 1


def test_recall_at_the_limit(cli: Any, trained: Path) -> None:
    assert cli("evaluate", "last", "--fail-under", "AR7=0", "--max-detections", "7", cwd=trained).code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fail-under", "AP"], "for example AP=0.3"),
        (["--fail-under", "mAP=0.3"], "did you mean 'AP'"),
        (["--fail-under", "AR100=0.3", "--max-detections", "7"], "did you mean 'AR10'"),
        (["--format", "coco"], "name the data set, too"),
    ],
)
def test_wrong_use(words: list[str], message: str, cli: Any, trained: Path) -> None:
    done = cli("evaluate", "last", *words, cwd=trained)
    assert done.code == 2
    assert message in done.err
