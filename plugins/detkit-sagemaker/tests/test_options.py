"""Options are typed, and durations, tags and addresses are read from text as from Python."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detkit.durations import duration, seconds
from detkit.errors import InvalidValue
from detkit.params import describe, set_fields
from detkit_sagemaker.models import SagemakerModels
from detkit_sagemaker.options import DeployOptions, SagemakerOptions, TransformOptions

KINDS = (SagemakerOptions, TransformOptions, DeployOptions)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4h", 14400), ("90m", 5400), ("1h30m", 5400), ("2d", 172800), ("45s", 45), ("3600", 3600), (" 1.5 H ", 5400)],
)
def test_a_duration_is_read(text: str, expected: int) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "4 hours", "h", "4h soon", "-3", "1e3", "4w"])
def test_what_is_no_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidValue, match="4h, 90m, 1h30m"):
        set_fields(SagemakerOptions(), {"max_runtime": text}, kind="option")


@given(st.integers(min_value=1, max_value=10**7))
def test_a_written_duration_is_read_again_to_within_its_last_unit(value: int) -> None:
    assert value * 0.9 < seconds(duration(value)) <= value


def test_text_becomes_what_the_fields_are() -> None:
    given_text = {
        "max_runtime": "4h",
        "max_wait": "none",
        "tags": "team=vision, cost-center=17,formula=a=b",
        "subnets": "subnet-1,subnet-2",
        "spot": "true",
        "max_cost": "12.5",
        "input_mode": "fastfile",
    }
    options = set_fields(SagemakerOptions(), given_text, kind="option")
    assert options.max_runtime == 14400
    assert options.max_wait is None
    assert options.tags == {"team": "vision", "cost-center": "17", "formula": "a=b"}
    assert options.subnets == ("subnet-1", "subnet-2")
    assert options.spot is True
    assert options.max_cost == 12.5
    assert options == set_fields(SagemakerOptions(), msgspec.to_builtins(options), kind="option")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"tags": "team"}, "team=vision"),
        ({"max_runtime": 0}, ">= 1"),
        ({"instance_type": "g4dn.xlarge"}, "regex"),
        ({"output": "/data"}, "regex"),
        ({"max_cost": "0"}, "> 0"),
        ({"input_mode": "stream"}, "'file', 'fastfile', 'pipe'"),
        ({"instance_count": "none"}, "int"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InvalidValue, match=told):
        set_fields(SagemakerOptions(), values, kind="option")


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_is_described_and_survives_json(kind: type[Any]) -> None:
    assert [name for name, text in describe(kind).items() if not text] == []
    assert msgspec.convert(msgspec.to_builtins(kind()), kind) == kind()


def test_no_option_has_the_name_of_a_parameter_of_any_model() -> None:
    models = SagemakerModels()
    params = {name for model in models for name in models[model].params.__struct_fields__}
    assert "epochs" in params
    for kind in KINDS:
        assert not params & set(kind.__struct_fields__)
