"""Ranges as objects and as text, and what is refused before anything starts."""

from __future__ import annotations

import msgspec
import pytest

from detkit import Choice, Float, Int, plugins
from detkit.backends import LocalBackend
from detkit.errors import InvalidValue, UnknownName, UsageError
from detkit.params import (
    BatchSize,
    Epochs,
    Iterations,
    LearningRate,
    Momentum,
    Optimizer,
    Params,
    WeightDecay,
)
from detkit.spaces import Range, check_space, chosen, fitted, in_order, read_range, steps_of, suggested


class Some(Params, frozen=True, kw_only=True):
    epochs: Epochs | None = 4
    iterations: Iterations | None = None
    learning_rate: LearningRate = 1e-3
    batch_size: BatchSize = 8
    optimizer: Optimizer = "sgd"
    momentum: Momentum = 0.9
    weight_decay: WeightDecay = 5e-4
    augmentations: tuple[str, ...] = ("hflip",)


@pytest.mark.parametrize(
    ("text", "range_"),
    [
        ("1e-5..1e-2:log", Float(1e-5, 1e-2, log=True)),
        ("0.1..0.5:step=0.1", Float(0.1, 0.5, step=0.1)),
        ("4..32", Int(4, 32)),
        ("4..32:step=4", Int(4, 32, step=4)),
        ("4..64:log", Int(4, 64, log=True)),
        ("4..4.5", Float(4, 4.5)),
        (".5...9", Float(0.5, 0.9)),
        ("-1..1", Int(-1, 1)),
        ("sgd|adamw", Choice(("sgd", "adamw"))),
        ("hflip,zoom|none", Choice(("hflip,zoom", "none"))),
        ("0.8..0.99:if:optimizer=sgd", Float(0.8, 0.99, when={"optimizer": ("sgd",)})),
        ("a|b:if:x=1|2:if:y=z", Choice(("a", "b"), when={"x": ("1", "2"), "y": ("z",)})),
        ("1e-3", None),
        ("sgd", None),
        ("../runs/parent/model", None),
        ("a..b", None),
        ("1..", None),
        ("1..2..3", None),
    ],
)
def test_read(text: str, range_: Range | None) -> None:
    found = read_range("x", text)
    assert found == range_
    if found is not None:
        assert read_range("x", str(found)) == found


@pytest.mark.parametrize("text", ["1..2:lg", "1..2:step=x", "1..2:if:", "5:if:x=1", "1..2:if:x"])
def test_neither_a_range_nor_a_value(text: str) -> None:
    with pytest.raises(InvalidValue, match="a range: 1e-5"):
        read_range("learning_rate", text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Float(2, 1), "a first number below the second"),
        (lambda: Float(0, 1, log=True), "above 0"),
        (lambda: Float(1, 2, log=True, step=0.1), "either log or step"),
        (lambda: Int(1, 8, step=0), "a step above 0"),
        (lambda: Choice(("a",)), "two values or more"),
        (lambda: Choice(("a", "a")), "each once"),
    ],
)
def test_no_range(make: object, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        make()  # type: ignore[operator]


def test_ranges_are_kept_as_json() -> None:
    space = {"a": Float(1, 2, when={"o": "sgd"}), "b": Int(1, 5), "c": Choice(("x", None, True, ["y", "z"]))}  # type: ignore[dict-item,arg-type]
    assert msgspec.json.decode(msgspec.json.encode(space), type=dict[str, Range]) == space


@pytest.mark.parametrize(
    ("space", "error", "message"),
    [
        ({"learning_rat": Float(1e-4, 1)}, UnknownName, "did you mean 'learning_rate'"),
        ({"device": Choice(("cpu", "cuda"))}, UnknownName, "options are not searched"),
        ({"learning_rate": Float(-1, 1)}, InvalidValue, "learning_rate=-1"),
        ({"optimizer": Choice(("sgd", "lion"))}, InvalidValue, "'lion'"),
        ({"momentum": Float(0.5, 1.0)}, InvalidValue, "momentum=1"),
        ({"epochs": Int(1, 4), "iterations": Int(10, 40)}, UsageError, "mean the same"),
        ({"momentum": Float(0.5, 0.9, when={"optimizer": "adam"})}, UsageError, "optimizer is sgd in every trial"),
        ({"momentum": Float(0.5, 0.9, when={"optimiser": "adam"})}, UnknownName, "did you mean 'optimizer'"),
        (
            {"momentum": Float(0.5, 0.9, when={"batch_size": 4}), "batch_size": Int(2, 8)},
            UsageError,
            "not a choice of values",
        ),
        (
            {
                "momentum": Choice((0.5, 0.9), when={"weight_decay": 0.1}),
                "weight_decay": Choice((0.1, 0.2), when={"momentum": 0.5}),
            },
            UsageError,
            "depend on each other",
        ),
        ({}, UsageError, "the space is empty"),
    ],
)
def test_refused(space: dict[str, Range], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_space(space, Some(), "some/model")


def test_steps() -> None:
    assert steps_of(Float(0.1, 0.3, step=0.1)) == [0.1, 0.2, 0.3]
    assert steps_of(Int(4, 12, step=4)) == [4, 8, 12]
    with pytest.raises(UsageError, match=r"has no steps; write its values one by one, 0.1\|0.3"):
        steps_of(Float(0.1, 0.3))
    hint = LearningRate
    assert fitted("learning_rate", Float(0.1, 0.3, step=0.1), 0.30000000000000004, hint) == 0.3
    assert fitted("learning_rate", Choice(("1e-3", "0.1")), 0.001, hint) == "1e-3"
    with pytest.raises(InvalidValue, match="one of the space"):
        fitted("learning_rate", Float(0.1, 0.3, step=0.1), 0.25, hint)


def test_conditions() -> None:
    space: dict[str, Range] = {
        "momentum": Float(0.5, 0.9, when={"optimizer": ("sgd", "rmsprop")}),
        "optimizer": Choice(("sgd", "adamw", "rmsprop")),
    }
    check_space(space, Some(), "some/model")
    assert in_order(space) == ["optimizer", "momentum"]
    assert chosen(space["momentum"], {"optimizer": "sgd"}, Some())
    assert not chosen(space["momentum"], {"optimizer": "adamw"}, Some())
    assert chosen(space["momentum"], {}, Some())  # as the default is


def test_suggested_spaces_fit_every_installed_model() -> None:
    found = suggested(Some())
    assert set(found) == {"learning_rate", "weight_decay", "batch_size"}
    here = [backend for backend in plugins.backends().values() if isinstance(backend, LocalBackend)]
    for backend in here:
        for model, spec in backend.models.items():
            check_space(backend.space(model), spec.params, model)
    assert here
