"""What the built-in algorithm is told, and what its log says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from detkit.errors import InvalidValue
from detkit.params import set_fields
from detkit_sagemaker.builtin import (
    METRICS,
    TUNABLE,
    ObjectDetectionParams,
    hyperparameters,
    needed_label_width,
    notes,
    read_line,
)
from detkit_sagemaker.requests import check_request

DATA = {"num_classes": 2, "num_training_samples": 300, "label_width": 52}


def params(**values: object) -> ObjectDetectionParams:
    return set_fields(ObjectDetectionParams(), values, kind="parameter")


def test_defaults_are_sent_as_the_documentation_writes_them() -> None:
    assert hyperparameters(params(), **DATA) == {
        "num_classes": "2",
        "num_training_samples": "300",
        "base_network": "vgg-16",
        "use_pretrained_model": "1",
        "early_stopping": "False",
        "epochs": "30",
        "image_shape": "300",
        "label_width": "350",
        "learning_rate": "0.001",
        "lr_scheduler_factor": "0.1",
        "mini_batch_size": "32",
        "momentum": "0.9",
        "nms_threshold": "0.45",
        "optimizer": "sgd",
        "overlap_threshold": "0.5",
        "weight_decay": "0.0005",
    }


def test_everything_that_is_said_is_sent() -> None:
    said = params(
        use_pretrained_model="0",
        early_stopping="true",
        early_stopping_patience=3,
        lr_scheduler_step="10,20",
        freeze_layer_pattern="^conv1_",
        kv_store="dist_async",
        weights="some/run",
    )
    sent = hyperparameters(said, **DATA)
    assert sent["use_pretrained_model"] == "0"
    assert sent["early_stopping"] == "True"
    assert (sent["early_stopping_patience"], sent["early_stopping_min_epochs"]) == ("3", "10")
    assert sent["lr_scheduler_step"] == "10,20"
    assert sent["freeze_layer_pattern"] == "^conv1_"
    assert sent["kv_store"] == "dist_async"
    assert "weights" not in sent


def test_several_machines_exchange_weights_in_step_unless_told() -> None:
    assert "kv_store" not in hyperparameters(params(), **DATA)
    assert hyperparameters(params(), **DATA, instance_count=2)["kv_store"] == "dist_sync"
    assert hyperparameters(params(kv_store="dist_async"), **DATA, instance_count=2)["kv_store"] == "dist_async"
    told = notes(params(), num_training_samples=300, label_width=52, instance_count=2)
    assert any("64 images" in note and "dist_sync" in note for note in told)


@pytest.mark.parametrize(("name", "given_value"), [("num_classes", 3), ("num_training_samples", 299)])
def test_numbers_that_are_not_those_of_the_data_are_refused(name: str, given_value: int) -> None:
    with pytest.raises(InvalidValue, match=f"{name}={given_value}.*{DATA[name]}, counted in the data"):
        hyperparameters(params(**{name: given_value}), **DATA)
    assert hyperparameters(params(**{name: DATA[name]}), **DATA)[name] == str(DATA[name])


def test_the_width_of_labels_grows_with_the_busiest_image_and_a_users_own_is_checked() -> None:
    busy = {**DATA, "label_width": needed_label_width(147)}
    assert busy["label_width"] == 737
    assert hyperparameters(params(), **busy)["label_width"] == "750"
    assert any(
        "label_width=750" in note and "737" in note for note in notes(params(), num_training_samples=1, label_width=737)
    )
    assert hyperparameters(params(label_width=737), **busy)["label_width"] == "737"
    with pytest.raises(InvalidValue, match=r"label_width=736.*at least 737.*147 boxes"):
        hyperparameters(params(label_width=736), **busy)
    assert not any("label_width" in note for note in notes(params(), num_training_samples=1, label_width=350))


@given(st.integers(min_value=0, max_value=500))
def test_the_width_that_is_chosen_is_always_enough(busiest: int) -> None:
    needed = needed_label_width(busiest)
    assert int(hyperparameters(params(), **{**DATA, "label_width": needed})["label_width"]) >= needed


def test_aws_takes_them() -> None:
    sent = hyperparameters(params(lr_scheduler_step="10,20"), **DATA)
    problems = check_request("CreateTrainingJob", {"HyperParameters": sent})
    assert not [problem for problem in problems if "HyperParameters" in problem]


def test_ranges_for_tuning_lie_within_what_training_takes_but_for_two_zeros() -> None:
    for name, tunable in TUNABLE.items():
        for value in tunable.values or (tunable.low, tunable.high):
            if (name, value) in {("momentum", 0.0), ("weight_decay", 0.0)}:
                continue
            params(**{name: int(value) if tunable.kind == "Integer" else value})


@pytest.mark.parametrize(
    ("line", "values", "epoch"),
    [
        (
            "[05/21/2019 08:01:02 INFO 140] #quality_metric: host=algo-1, epoch=3, validation mAP <score>=(0.4375)",
            {"aws/validation:mAP": 0.4375},
            3,
        ),
        (
            "#quality_metric: host=algo-1, epoch=0, batch=25 train cross_entropy <loss>=(1.25)",
            {"aws/train:cross_entropy": 1.25},
            0,
        ),
        ("#quality_metric: host=algo-1, epoch=7, batch=5 train smooth_l1 <loss>=0.5", {"aws/train:smooth_l1": 0.5}, 7),
        ("[x] #progress_metric: host=algo-1, completed 10 % of epochs", {"aws/train:progress": 10.0}, None),
        (
            "#throughput_metric: host=algo-1, train throughput=29.5 records/second",
            {"aws/train:throughput": 29.5},
            None,
        ),
    ],
)
def test_a_line_of_the_log_is_read(line: str, values: dict[str, float], epoch: int | None) -> None:
    reading = read_line(line)
    assert reading is not None
    assert (reading.values, reading.epoch) == (values, epoch)


@pytest.mark.parametrize("line", ["", "INFO reading data", "#progress_metric: host=algo-1, completed all %"])
def test_other_lines_say_nothing(line: str) -> None:
    assert read_line(line) is None


def test_other_definitions_are_read_alike() -> None:
    reading = read_line("[Epoch 2] Val_CrossEntropy=0.75", {"val_cross_entropy": r"Val_CrossEntropy=([0-9\.]+)"})
    assert reading is not None
    assert reading.values == {"aws/val_cross_entropy": 0.75}
    assert len(METRICS) == 5
