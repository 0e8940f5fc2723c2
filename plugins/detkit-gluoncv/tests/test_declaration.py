"""What the plugin declares, which needs no mxnet."""

from __future__ import annotations

from pathlib import Path

import pytest

import detkit
from detkit import plugins
from detkit_gluoncv import ENVIRONMENT
from detkit_gluoncv.params import MODELS, NETWORKS, PUBLISHED, GluoncvParams, cached_word, translate, weights_file

CONSTRAINTS = Path(__file__).parents[3] / "constraints/mxnet.txt"


def test_constraints_are_what_is_installed() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    assert lines == list(ENVIRONMENT.requirements)
    assert all("==" in line for line in lines)


def test_every_network_is_a_model() -> None:
    assert set(MODELS) == set(NETWORKS) == set(plugins.backend("gluoncv").models)
    for name, network in NETWORKS.items():
        assert name == f"ssd_{network.size}_{network.base}"
        assert len(network.sizes) == len(network.steps) + 1
        assert list(network.sizes) == sorted(network.sizes)


def test_auto_takes_the_best_weights_in_the_cache() -> None:
    model = "ssd_512_resnet50_v1"
    assert cached_word(model) is None
    for word in ("imagenet", "voc", "coco"):
        file = weights_file(model, word)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        assert cached_word(model) == word
    assert {word for name, word in PUBLISHED if name == "ssd_300_resnet50_v1"} == {"imagenet"}


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "rmsprop", "adadelta"])
def test_what_mxnet_is_told(optimizer: str) -> None:
    told = translate("ssd_300_mobilenet0.25", GluoncvParams(optimizer=optimizer))  # type: ignore[arg-type]
    assert told["optimizer"] == f"gluon.Trainer({optimizer!r})"
    assert bool(told["momentum"]) == (optimizer != "sgd")
    assert set(told) <= set(GluoncvParams.__struct_fields__)


def test_without_an_interpreter_the_command_is_named(
    tiny: detkit.Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DETKIT_PYTHON_GLUONCV", raising=False)
    monkeypatch.setenv("DETKIT_ENVIRONMENTS", str(tmp_path / "none"))
    with pytest.raises(detkit.DetkitError, match="detkit backends install gluoncv"):
        detkit.Trainer(model="gluoncv/ssd_300_mobilenet0.25").start(tiny)
    assert not (tmp_path / "runs").exists()


def test_an_interpreter_that_is_gone_is_named(tiny: detkit.Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_PYTHON_GLUONCV", "/nowhere/bin/python")
    with pytest.raises(detkit.DetkitError, match=r"DETKIT_PYTHON_GLUONCV.*/nowhere/bin/python"):
        detkit.Trainer(model="gluoncv/ssd_300_mobilenet0.25").start(tiny)
