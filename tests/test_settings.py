"""Where a setting comes from, and which of several wins."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import pytest
from msgspec import Meta

from detkit import Trainer
from detkit.errors import DetkitError, InvalidData, InvalidValue, UnknownName
from detkit.params import INSTEAD, Epochs, Iterations, Params, Weights, coerce, nullable
from detkit.settings import Setting, Settings

pytestmark = pytest.mark.usefixtures("clean")


def rows(trainer: Trainer, **settings: object) -> dict[str, tuple[object, str]]:
    return {row.name: (row.value, row.origin) for row in trainer.explain(**settings).rows}


def test_the_stronger_layer_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rows(Trainer(model="echo/memory"))["seed"] == (0, "default")
    file = tmp_path / "detkit.yaml"
    file.write_text("model: echo/memory\nseed: 1\n")
    assert rows(Trainer())["seed"] == (1, str(file))
    monkeypatch.setenv("DETKIT_SEED", "2")
    assert rows(Trainer())["seed"] == (2, "DETKIT_SEED")
    assert rows(Trainer(seed=3))["seed"] == (3, "the constructor")
    assert rows(Trainer(seed=3), seed=4)["seed"] == (4, "the call")
    assert rows(Trainer(seed=3), seed=None)["seed"] == (3, "the constructor")


def test_none_is_a_value_where_the_parameter_admits_it() -> None:
    class Mine(Params, frozen=True, kw_only=True):
        epochs: Epochs | None = 12
        iterations: Iterations | None = None
        learning_rate: float = 0.1
        weights: Weights = "auto"

    assert nullable(Mine) == {"weights"}, "of epochs and iterations one has a value"
    layers = Settings({"weights": None, "learning_rate": None}, {"weights": "coco", "learning_rate": 0.2})
    chosen = layers.choose(Mine.__struct_fields__, INSTEAD, nullable(Mine))
    assert chosen == {"weights": Setting(None, "the call"), "learning_rate": Setting(0.2, "the constructor")}


def test_file_is_found_upward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "detkit.yaml").write_text("seed: 5")
    (tmp_path / "a/b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a/b")
    assert rows(Trainer(model="echo/memory"))["seed"] == (5, str(tmp_path / "detkit.yaml"))
    (tmp_path / "a/detkit.yaml").write_text("seed: 6")
    assert rows(Trainer(model="echo/memory"))["seed"] == (6, str(tmp_path / "a/detkit.yaml"))


def test_everything_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_BACKEND", "echo")
    monkeypatch.setenv("DETKIT_SECONDS_PER_STEP", "0.5")
    explanation = Trainer(model="memory").explain(learning_rate="1e-2")
    assert (explanation.backend, explanation.model, explanation.reason) == ("echo", "memory", "")
    by_name = {row.name: row for row in explanation.rows}
    assert (by_name["learning_rate"].value, by_name["learning_rate"].kind) == (0.01, "parameter")
    assert by_name["learning_rate"].description.startswith("peak learning rate")
    assert (by_name["seconds_per_step"].value, by_name["seconds_per_step"].kind) == (0.5, "option")
    assert explanation.to_dict()["settings"][0] == {
        "name": "epochs", "value": 4, "origin": "default", "kind": "parameter", "native": "",
        "description": "passes over the training images",
    }  # fmt: skip


@pytest.mark.parametrize("where", ["call", "constructor", "file"])
def test_unknown_setting_in(where: str, tmp_path: Path) -> None:
    if where == "file":
        (tmp_path / "detkit.yaml").write_text("learnign_rate: 0.1")
    given = {"learnign_rate": 0.1}
    with pytest.raises(
        UnknownName, match=f"no setting of echo/memory .given in .*{where}.* did you mean 'learning_rate'"
    ):
        Trainer(model="echo/memory", **(given if where == "constructor" else {})).explain(
            **(given if where == "call" else {})
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "epochs=0 (from the call) is not valid: Expected int >= 1"),
        ({"epochs": "many"}, "epochs='many' (from the call) is not valid: Expected int"),
        ({"learning_rate": -1}, "learning_rate=-1 (from the call) is not valid: Expected float > 0"),
        ({"learning_rate": "nan"}, "learning_rate='nan' (from the call) is not valid"),
        ({"learning_rate": float("inf")}, "expected a finite number"),
        ({"seconds_per_step": "soon"}, "seconds_per_step='soon' (from the call) is not valid: Expected float"),
        ({"max_detections": "all"}, "one of 'auto', an int"),
        ({"max_detections": 0}, "Expected int >= 1"),
        ({"epochs": 3, "iterations": 4}, "give epochs or iterations, not both"),
    ],
)
def test_invalid_value(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidValue) as caught:
        Trainer(model="echo/memory").explain(**settings)
    assert message.lower() in str(caught.value).lower()


def test_invalid_value_names_its_origin(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DETKIT_EPOCHS", "lots")
    with pytest.raises(InvalidValue, match=r"epochs='lots' .from DETKIT_EPOCHS. is not valid"):
        Trainer(model="echo/memory").explain()


def test_epochs_or_iterations(tmp_path: Path) -> None:
    def of(trainer: Trainer, **settings: object) -> tuple[object, object]:
        found = rows(trainer, **settings)
        return found["epochs"][0], found["iterations"][0]

    assert of(Trainer(model="echo/memory")) == (4, None)
    assert of(Trainer(model="echo/memory"), iterations=7) == (None, 7)
    # Of two layers the stronger one is meant.
    assert of(Trainer(model="echo/memory", epochs=3), iterations=7) == (None, 7)
    (tmp_path / "detkit.yaml").write_text("iterations: 9")
    assert of(Trainer(model="echo/memory")) == (None, 9)
    assert of(Trainer(model="echo/memory", epochs=3)) == (3, None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a: [1", "(?s)detkit.yaml is not valid YAML.*line 1"),
        ("- epochs", "one mapping of settings"),
        ("3: 4", "one mapping"),
    ],
)
def test_broken_file(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "detkit.yaml").write_text(content)
    with pytest.raises((InvalidData, InvalidValue), match=message):
        Trainer(model="echo/memory").explain()


def test_empty_file(tmp_path: Path) -> None:
    (tmp_path / "detkit.yaml").write_text("# nothing yet\n")
    assert rows(Trainer(model="echo/memory"))["seed"] == (0, "default")


def test_layers() -> None:
    layers = Settings({"a": 1, "b": None}, {"a": 2, "b": 3})
    assert layers.get("a") == Setting(1, "the call")
    assert layers.get("b") == Setting(3, "the constructor")
    assert layers.get("c") is None
    assert layers.choose(["a", "c"], {}) == {"a": Setting(1, "the call")}
    assert set(layers.written()) == {"a", "b"}
    both = Settings({"iterations": 1}, {"epochs": 2})
    assert set(both.choose(["epochs", "iterations"], INSTEAD)) == {"iterations"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "ecco/memory"}, "no backend 'ecco'; did you mean 'echo'"),
        ({"model": "echo/memroy"}, "no model of backend 'echo' 'memroy'; did you mean 'memory'"),
        ({"model": "memroy"}, "no model 'memroy';.* known: .*echo/memory.* did you mean 'memory'"),
        ({"model": "memory", "backend": "nothing"}, "no backend 'nothing'.*pip install"),
    ],
)
def test_unknown_model(settings: dict[str, str], message: str) -> None:
    with pytest.raises(DetkitError, match=message):
        Trainer(**settings).explain()  # type: ignore[arg-type]


def test_three_ways_to_name_a_model() -> None:
    for settings in ({"model": "echo/memory"}, {"model": "memory", "backend": "echo"}, {"model": "memory"}):
        explanation = Trainer(**settings).explain()  # type: ignore[arg-type]
        assert (explanation.backend, explanation.model) == ("echo", "memory")


def test_a_type_may_read_texts_in_its_own_way() -> None:
    minutes = Annotated[int, Meta(ge=1, extra={"read": lambda text: 60 * int(text.removesuffix("min"))})]
    for hint in (minutes, minutes | None):
        assert coerce("wait", "3min", hint) == coerce("wait", 180, hint) == 180
        with pytest.raises(InvalidValue, match="wait='soon'"):
            coerce("wait", "soon", hint)
        with pytest.raises(InvalidValue, match=">= 1"):
            coerce("wait", "0min", hint)
    assert coerce("wait", "none", minutes | None) is None
