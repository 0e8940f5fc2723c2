"""Which words are data, which are settings."""

from __future__ import annotations

import pytest

from detkit.cli.words import sort_words
from detkit.errors import UsageError


def test_data_options_and_parameters_in_any_order() -> None:
    words = ["a/b=c", "epochs=3", "--num-workers", "2", "val:small", "--device=cpu", "SOLVER.BASE_LR=0.1", "note=x=y"]
    given = sort_words(words, {"model"})
    assert given.positions == ["a/b=c", "val:small"]
    assert given.settings == {
        "epochs": "3",
        "num_workers": "2",
        "device": "cpu",
        "SOLVER.BASE_LR": "0.1",
        "note": "x=y",
    }


def test_a_value_may_begin_with_a_minus() -> None:
    assert sort_words(["--offset", "-1"], set()).settings == {"offset": "-1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["model=x"], "write `--model x`"),
        (["on_invalid=drop"], "write `--on-invalid drop`"),
        (["--device"], "--device needs a value"),
        (["--amp", "--device", "cpu"], "--amp needs a value"),
        (["epochs=1", "--epochs", "2"], "epochs is given twice: '1' and '2'"),
        (["val=x"], "data is given by position"),
        (["-x"], "no option '-x'"),
        (["leash=1"], "no parameter or option 'leash'"),
    ],
)
def test_wrong_words(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        sort_words(words, {"model", "on-invalid"})
