"""Estimates come of a dated table, say what they are, and an amount becomes a limit on the time."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from detkit.errors import InvalidValue, UsageError
from detkit.plans import Plan
from detkit_sagemaker.images import TRAINING_INSTANCE
from detkit_sagemaker.options import AccountOptions, DeployOptions, SagemakerOptions, TransformOptions
from detkit_sagemaker.pricing import SHORTEST, VARIABLE, estimate, runtime_within, serverless
from detkit_sagemaker.spending import approve

US: dict[str, Any] = {"region": "us-east-1", "use": "training"}


@pytest.fixture(autouse=True)
def no_table_of_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)


def own_table(monkeypatch: pytest.MonkeyPatch, folder: Path, **content: object) -> None:
    file = folder / "prices.json"
    file.write_text(json.dumps({"as_of": "2026-11-01", "source": "our contract", "usd_per_hour": {}, **content}))
    monkeypatch.setenv(VARIABLE, str(file))


def test_the_worst_case_is_machines_times_hours() -> None:
    found = estimate(instance_type="ml.g4dn.xlarge", instance_count=3, seconds=4 * 3600, **US)
    assert found.price_per_hour == pytest.approx(3 * 0.7364)
    assert found.worst_case == pytest.approx(4 * 3 * 0.7364)
    told = str(found)
    assert "estimate" in told
    assert "at most 8.84 USD" in told
    assert "2025" in found.source
    assert "no storage" in found.source


def test_regions_differ_and_one_that_is_not_in_the_table_counts_as_the_dearest() -> None:
    base = estimate(instance_type="ml.m5.xlarge", seconds=3600, **US).worst_case
    frankfurt = estimate(instance_type="ml.m5.xlarge", seconds=3600, region="eu-central-1", use="hosting")
    nowhere = estimate(instance_type="ml.m5.xlarge", seconds=3600, region="xx-new-1", use="hosting")
    assert base is not None
    assert frankfurt.worst_case == pytest.approx(1.25 * base)
    assert "1.25 times as much in eu-central-1" in frankfurt.source
    assert nowhere.worst_case is not None
    assert nowhere.worst_case > 1.5 * base
    assert "xx-new-1 is not in the table" in nowhere.source


def test_spot_is_estimated_at_the_full_price_and_says_so() -> None:
    plain = estimate(instance_type="ml.g5.xlarge", seconds=3600, **US)
    spot = estimate(instance_type="ml.g5.xlarge", seconds=3600, spot=True, **US)
    assert spot.worst_case == plain.worst_case
    assert "without spot" in spot.source


def test_an_unknown_machine_has_an_unknown_price_and_no_limit_by_money() -> None:
    found = estimate(instance_type="ml.z9.huge", seconds=3600, **US)
    assert (found.price_per_hour, found.worst_case) == (None, None)
    assert VARIABLE in str(found)
    with pytest.raises(UsageError, match=r"yes=True \(--yes\)"):
        runtime_within(10, instance_type="ml.z9.huge", **US)


def test_an_amount_becomes_seconds_that_do_not_cost_more() -> None:
    seconds = runtime_within(2.0, instance_type="ml.g5.xlarge", instance_count=2, **US)
    spent = estimate(instance_type="ml.g5.xlarge", instance_count=2, seconds=seconds, **US).worst_case
    assert spent is not None
    assert 1.99 < spent <= 2.0
    with pytest.raises(InvalidValue, match=r"max_cost=0.01.*at least 0.24"):
        runtime_within(0.01, instance_type="ml.g5.xlarge", instance_count=2, **US)


def test_the_users_table_counts_first_and_the_bundled_one_fills_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own_table(monkeypatch, tmp_path, usd_per_hour={"ml.g5.xlarge": 1.0}, training={"ml.g5.xlarge": 0.5})
    assert estimate(instance_type="ml.g5.xlarge", seconds=3600, **US).worst_case == 0.5
    hosting = estimate(instance_type="ml.g5.xlarge", seconds=3600, region="eu-central-1", use="hosting")
    assert hosting.worst_case == 1.0
    assert f"your {VARIABLE}; our contract, 2026-11-01" in hosting.source
    other = estimate(instance_type="ml.m5.xlarge", seconds=3600, **US)
    assert other.worst_case == pytest.approx(0.23)
    assert "your" not in other.source


@pytest.mark.parametrize("content", ["{", "[]", '{"as_of": "x", "source": "y", "usd_per_hour": {"a": "b"}}', None])
def test_a_broken_table_is_refused(content: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "prices.json"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv(VARIABLE, str(file))
    with pytest.raises(InvalidValue, match=VARIABLE):
        estimate(instance_type="ml.g5.xlarge", seconds=3600, **US)


def test_a_serverless_endpoint_is_paid_by_its_memory_while_it_answers() -> None:
    found = serverless(memory_size=4096, concurrency=1, region="us-east-1")
    assert found.price_per_hour == pytest.approx(4 * 0.00002 * 3600)
    assert found.worst_case is None
    assert "while it answers" in found.source
    busy = serverless(memory_size=4096, concurrency=5, region="us-east-1")
    assert busy.price_per_hour == pytest.approx(5 * 4 * 0.00002 * 3600)


@pytest.mark.parametrize("price", [0.23, 0.2346, 0.7364, 1.408 / 3, 1e-5, 3.0])
def test_the_amount_that_is_asked_for_is_enough(price: float) -> None:
    plan = Plan(place="here", requests=(("CreateModel", {}),), worst_case_s=3600, price_per_hour=price)
    with pytest.raises(UsageError) as raised:
        approve(plan, AccountOptions(max_cost=price / 2))
    [asked] = re.findall(r"max_cost=([0-9.]+) \(", str(raised.value))
    approve(plan, AccountOptions(max_cost=float(asked)))
    assert f"at most {asked} USD" in str(plan)


def test_the_least_that_is_asked_for_is_enough() -> None:
    for count in range(1, 9):
        machines: dict[str, Any] = {"instance_type": "ml.g5.xlarge", "instance_count": count, **US}
        with pytest.raises(InvalidValue) as raised:
            runtime_within(0.01, **machines)
        [least] = re.findall(r"at least ([0-9.]+):", str(raised.value))
        assert runtime_within(float(least), **machines) >= SHORTEST


@pytest.mark.parametrize(("seconds", "told"), [(360_000, "100 h"), (5400, "1.5 h"), (14_400, "4 h"), (300, "5 min")])
def test_times_are_plain(seconds: int, told: str) -> None:
    assert f"at most {told}, then" in str(Plan(place="here", worst_case_s=seconds))


def test_what_is_taken_unless_told_has_a_price_and_answering_is_cheaper_than_training() -> None:
    training = estimate(instance_type=TRAINING_INSTANCE, seconds=SagemakerOptions().max_runtime, **US)
    hosting = estimate(instance_type=DeployOptions().instance_type, seconds=None, region="us-east-1", use="hosting")
    transform = estimate(instance_type=TransformOptions().instance_type, seconds=1, region="us-east-1", use="transform")
    assert training.price_per_hour is not None
    assert hosting.price_per_hour is not None
    assert transform.price_per_hour is not None
    assert hosting.price_per_hour < training.price_per_hour
    assert transform.price_per_hour < training.price_per_hour
    assert hosting.worst_case is None
