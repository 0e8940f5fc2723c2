"""JumpStart's models as the hub describes them: every default, limit, image and address is the document's."""

from __future__ import annotations

import json
from typing import Any

import pytest

from detkit.errors import InvalidValue, UnknownName, Unsupported, UsageError
from detkit_sagemaker.aws import AccessDenied, Aws
from detkit_sagemaker.jumpstart import MODEL_CONTENT, HubModel, list_models
from detkit_sagemaker.models import FINE_TUNABLE, JumpstartParams
from detkit_sagemaker.options import SagemakerOptions
from detkit_sagemaker.requests import check_request, training_request
from detkit_sagemaker.testing import Simulator

DOCUMENT: dict[str, Any] = {
    "TrainingSupported": True,
    "IncrementalTrainingSupported": True,
    "TrainingEcrUri": "1.dkr.ecr.eu-west-1.amazonaws.com/train:cpu",
    "TrainingArtifactUri": "s3://cache/train-m.tar.gz",
    "TrainingScriptUri": "s3://cache/source/sourcedir.tar.gz",
    "TrainingInstanceTypeVariants": {
        "Aliases": {"gpu": "1.dkr.ecr.eu-west-1.amazonaws.com/train:gpu"},
        "Variants": {
            "g4dn": {"Properties": {"ImageUri": "$gpu"}},
            "p3": {"RegionalProperties": {"ImageUri": "$gpu"}},
            "ml.g5.xlarge": {"Properties": {"ImageUri": "1.dkr.ecr.eu-west-1.amazonaws.com/train:g5"}},
            "g5": {"Properties": {"ImageUri": "$gpu"}},
            "m5": {"Properties": {"ImageUri": "$unknown"}},
        },
    },
    "Hyperparameters": [
        {"Name": "epochs", "Type": "int", "Default": 5, "Min": 1, "Max": 1000, "Scope": "algorithm"},
        {"Name": "adam-learning-rate", "Type": "float", "Default": "0.05", "Min": "1e-08", "Max": "1"},
        {"Name": "batch-size", "Type": "int", "Default": 4, "Min": 1, "Max": 1024},
        {"Name": "augment", "Type": "text", "Default": "flip", "Options": ["flip", "none"]},
        {"Name": "freeze", "Type": "bool", "Default": "False"},
        {"Name": "dropout", "Type": "float", "Default": 0.5, "ExclusiveMin": 0, "ExclusiveMax": 1},
        {"Name": "sagemaker_program", "Type": "text", "Default": "train_it.py", "Scope": "container"},
    ],
    "TrainingMetrics": [{"Name": "val_loss", "Regex": "val_loss: ([0-9\\.]+)"}],
    "DefaultTrainingInstanceType": "ml.g4dn.xlarge",
    "SupportedTrainingInstanceTypes": ["ml.g4dn.xlarge", "ml.p3.2xlarge", "ml.g5.xlarge"],
    "HostingEcrUri": "1.dkr.ecr.eu-west-1.amazonaws.com/infer:1",
    "HostingScriptUri": "s3://cache/infer/sourcedir.tar.gz",
    "HostingUseScriptUri": True,
    "InferenceEnvironmentVariables": [{"Name": "SAGEMAKER_PROGRAM", "Default": "inference.py"}],
    "FieldOfTheFuture": {"a": 1},
}


def hub(**changes: Any) -> HubModel:
    return HubModel.decode(json.dumps({**DOCUMENT, **changes}), "m", version="1.2.3", region="eu-west-1")


def test_null_is_as_good_as_nothing() -> None:
    known = [*HubModel.__struct_encode_fields__]
    nulls = {name: None for name in known if name not in DOCUMENT and not name.startswith("detkit:")}
    assert len(nulls) > 5
    assert hub(**nulls, TrainingMetrics=None).training_metrics == []
    assert hub(**nulls).hosting_image("ml.m5.large").endswith("infer:1")


def wire(params: JumpstartParams, *, isolated: bool = False) -> dict[str, str]:
    return hub().wire(params, job_name="job", region="eu-west-1", isolated=isolated)


def test_everything_is_sent_as_the_json_of_a_text_with_the_documents_defaults() -> None:
    assert wire(JumpstartParams(epochs=7, batch_size=16, hyperparameters={"augment": "none"})) == {
        "epochs": '"7"',
        "adam-learning-rate": '"0.05"',
        "batch-size": '"16"',
        "augment": '"none"',
        "freeze": '"False"',
        "dropout": '"0.5"',
        "sagemaker_program": '"train_it.py"',
        "sagemaker_container_log_level": "20",
        "sagemaker_submit_directory": '"s3://cache/source/sourcedir.tar.gz"',
        "sagemaker_job_name": '"job"',
        "sagemaker_region": '"eu-west-1"',
    }


def test_in_isolation_the_script_comes_by_a_channel() -> None:
    sent = wire(JumpstartParams(), isolated=True)
    assert sent["sagemaker_submit_directory"] == '"/opt/ml/input/data/code/sourcedir.tar.gz"'
    channels = hub().channels("s3://bucket/data", isolated=True)
    assert [(c.name, c.s3_uri, c.content_type) for c in channels] == [
        ("training", "s3://bucket/data/", None),
        ("model", "s3://cache/train-m.tar.gz", MODEL_CONTENT),
        ("code", "s3://cache/source/sourcedir.tar.gz", None),
    ]
    assert [c.name for c in hub().channels("s3://bucket/data/", isolated=False)] == ["training", "model"]


def test_a_job_goes_on_from_an_earlier_model_where_the_hub_allows_it() -> None:
    channels = hub().channels("s3://b/d/", parent_uri="s3://b/model.tar.gz", isolated=False)
    assert channels[1].s3_uri == "s3://b/model.tar.gz"
    with pytest.raises(Unsupported, match="leave weights= out"):
        hub(IncrementalTrainingSupported=False).channels("s3://b/d/", parent_uri="s3://b/m.tar.gz", isolated=False)


@pytest.mark.parametrize(
    ("params", "error", "told"),
    [
        (JumpstartParams(epochs=1001), InvalidValue, "at most 1000, as the hub says"),
        (JumpstartParams(learning_rate=2.0), InvalidValue, "at most 1"),
        (JumpstartParams(learning_rate=1e-9), InvalidValue, "at least 1e-08"),
        (JumpstartParams(hyperparameters={"augment": "rotate"}), InvalidValue, "one of flip, none"),
        (JumpstartParams(hyperparameters={"freeze": "maybe"}), InvalidValue, "true or false"),
        (JumpstartParams(hyperparameters={"dropout": "1"}), InvalidValue, "less than 1"),
        (JumpstartParams(hyperparameters={"dropout": "0"}), InvalidValue, "more than 0"),
        (JumpstartParams(hyperparameters={"dropout": "much"}), InvalidValue, "a number"),
        (JumpstartParams(hyperparameters={"batch-size": "1.5"}), InvalidValue, "a whole number"),
        (JumpstartParams(hyperparameters={"agument": "flip"}), UnknownName, "did you mean 'augment'"),
        (JumpstartParams(hyperparameters={"sagemaker_program": "x.py"}), UnknownName, "sagemaker_program"),
        (JumpstartParams(epochs=2, hyperparameters={"epochs": "3"}), UsageError, "given twice"),
        (JumpstartParams(weights=None), UsageError, "leave weights= out"),
    ],
)
def test_what_the_document_does_not_allow_is_refused(
    params: JumpstartParams, error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        wire(params)


def test_a_parameter_that_the_model_does_not_have_is_refused() -> None:
    bare = hub(Hyperparameters=[{"Name": "steps", "Type": "int", "Default": 1}])
    with pytest.raises(UsageError, match="no hyperparameter for learning_rate; it lists steps"):
        bare.chosen(JumpstartParams(learning_rate=0.1))


@pytest.mark.parametrize(
    ("instance_type", "tag"),
    [("ml.g4dn.xlarge", "gpu"), ("ml.p3.2xlarge", "gpu"), ("ml.g5.xlarge", "g5"), ("ml.m5.large", "cpu")],
)
def test_the_image_is_that_of_the_machine_else_of_its_family_else_the_models(instance_type: str, tag: str) -> None:
    assert hub().training_image(instance_type).endswith(f"train:{tag}")


def test_a_machine_is_the_hubs_default_or_one_that_it_supports() -> None:
    assert hub().training_instance(None) == "ml.g4dn.xlarge"
    assert hub().training_instance("ml.p3.2xlarge") == "ml.p3.2xlarge"
    with pytest.raises(InvalidValue, match="one of ml.g4dn.xlarge, ml.p3.2xlarge"):
        hub().training_instance("ml.m5.large")
    with pytest.raises(Unsupported, match="names no image"):
        hub(TrainingEcrUri=None).training_image("ml.m5.large")
    with pytest.raises(Unsupported, match="names no image"):
        hub(HostingEcrUri="").hosting_image("ml.m5.large")


def test_what_cannot_be_trained_is_refused() -> None:
    hub().require_training()
    with pytest.raises(Unsupported, match="can be used but not trained"):
        hub(TrainingSupported=False).require_training()
    with pytest.raises(Unsupported, match="accept its licence"):
        hub(GatedBucket=True).require_training()
    with pytest.raises(Unsupported, match="cannot be read"):
        HubModel.decode('{"Hyperparameters": 3}', "m")


def test_the_answering_container_is_told_where_its_script_lies() -> None:
    assert hub().hosting_environment() == {
        "SAGEMAKER_PROGRAM": "inference.py",
        "SAGEMAKER_SUBMIT_DIRECTORY": "s3://cache/infer/sourcedir.tar.gz",
        "SAGEMAKER_REGION": "eu-west-1",
    }
    assert "SAGEMAKER_SUBMIT_DIRECTORY" not in hub(HostingUseScriptUri=False).hosting_environment()


@pytest.mark.parametrize("model_id", FINE_TUNABLE)
def test_a_job_of_every_listed_model_is_one_that_aws_takes(model_id: str, simulator: Simulator) -> None:
    model = HubModel.read(Aws(), model_id)
    model.require_training()
    instance_type = model.training_instance(None)
    request = training_request(
        name="detkit-a",
        image=model.training_image(instance_type),
        role=simulator.role,
        output="s3://bucket/out",
        channels=model.channels("s3://bucket/data", isolated=True),
        options=SagemakerOptions(),
        instance_type=instance_type,
        hyperparameters=model.wire(JumpstartParams(epochs=3), job_name="a", region=simulator.region, isolated=True),
        metrics=model.metrics,
        tags=model.tags,
        encrypted=model.encrypt_inter_container_traffic,
        volume_size=model.training_volume_size,
    )
    assert check_request("CreateTrainingJob", request) == []
    assert {"Key": "sagemaker-sdk:jumpstart-model-id", "Value": model_id} in request["Tags"]
    assert request["HyperParameters"]["epochs"] == '"3"'
    assert simulator.region in request["AlgorithmSpecification"]["TrainingImage"]


def test_an_unknown_id_is_refused_with_close_ones_and_the_hub_is_listed_only_then(simulator: Simulator) -> None:
    aws = Aws()
    with pytest.raises(UnknownName, match="did you mean 'mxnet-od-ssd-512-resnet50-v1-coco'"):
        HubModel.read(aws, "mxnet-od-ssd-512-resnet50-v1-cocoo")
    assert set(FINE_TUNABLE) < set(list_models(aws))
    simulator.faults.refuse("ListHubContents", code="AccessDeniedException")
    HubModel.read(aws, FINE_TUNABLE[0])
    with pytest.raises(UnknownName, match="refused"):
        HubModel.read(aws, "nothing-like-it")


def test_a_refused_call_is_no_unknown_id(simulator: Simulator) -> None:
    simulator.faults.refuse("DescribeHubContent", code="AccessDeniedException")
    with pytest.raises(AccessDenied, match="sagemaker:DescribeHubContent"):
        HubModel.read(Aws(), FINE_TUNABLE[0])


def test_a_model_that_is_only_for_prediction_says_so(simulator: Simulator) -> None:
    with pytest.raises(Unsupported, match="can be used but not trained"):
        HubModel.read(Aws(), "mxnet-od-yolo3-darknet53-coco").require_training()
