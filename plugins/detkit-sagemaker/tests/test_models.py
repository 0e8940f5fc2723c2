"""The models that can be trained in SageMaker: AWS's own and everything that is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from detkit import plugins
from detkit.backends import LocalBackend
from detkit.errors import UsageError
from detkit.params import set_fields
from detkit_sagemaker.builtin import ObjectDetectionParams
from detkit_sagemaker.models import (
    FINE_TUNABLE,
    JumpstartParams,
    SagemakerModels,
    jumpstart_id,
    local_backend,
    refuse_without_weights,
)

SOURCE = Path(__file__).parents[1] / "src"


def test_all_three_ways_are_listed() -> None:
    names = list(SagemakerModels())
    assert names[0] == "object-detection"
    assert {f"jumpstart/{one}" for one in FINE_TUNABLE} < set(names)
    assert len(FINE_TUNABLE) == 9
    local = {f"{b.name}/{m}" for b in plugins.backends().values() if isinstance(b, LocalBackend) for m in b.models}
    assert "echo/memory" in local
    assert local < set(names)
    assert len(names) == len(set(names)) == len(SagemakerModels())


def test_a_model_of_a_backend_keeps_its_own_parameters() -> None:
    echo = plugins.backend("echo").models["memory"]
    assert SagemakerModels()["echo/memory"].params == echo.params
    found = local_backend("echo/memory")
    assert found is not None
    assert (found[0].name, found[1]) == ("echo", "memory")
    assert isinstance(SagemakerModels()["object-detection"].params, ObjectDetectionParams)


@pytest.mark.parametrize(
    "name", ["echo/no-such", "nobody/x", "echo", "object-detection/x", "jumpstart/", "jumpstart/a b"]
)
def test_other_names_are_no_models(name: str) -> None:
    assert name not in SagemakerModels()


def test_any_other_jumpstart_id_is_looked_up_later() -> None:
    models = SagemakerModels()
    assert "jumpstart/tensorflow-od1-something-new" not in list(models)
    assert models["jumpstart/tensorflow-od1-something-new"].params == JumpstartParams()
    assert jumpstart_id("jumpstart/pytorch-od1-x") == "pytorch-od1-x"
    assert jumpstart_id("object-detection") is None


def test_retired_frameworks_are_called_legacy() -> None:
    models = SagemakerModels()
    assert "legacy" in models["object-detection"].summary
    assert "legacy" in models[f"jumpstart/{FINE_TUNABLE[0]}"].summary
    assert "legacy" not in models["jumpstart/pytorch-od1-fasterrcnn-resnet50-fpn"].summary


def test_jumpstart_parameters_are_read_from_text() -> None:
    given = {"epochs": "7", "learning_rate": "1e-4", "hyperparameters": "early-stopping=True,adam-beta=0.9"}
    params = set_fields(JumpstartParams(), given, kind="parameter")
    assert (params.epochs, params.learning_rate, params.batch_size) == (7, 1e-4, None)
    assert params.hyperparameters == {"early-stopping": "True", "adam-beta": "0.9"}
    with pytest.raises(UsageError, match="always starts from its own weights"):
        refuse_without_weights("x", set_fields(params, {"weights": None}, kind="parameter"))


def test_listing_models_imports_neither_boto3_nor_a_framework() -> None:
    code = (
        "import sys; from detkit_sagemaker.models import SagemakerModels; list(SagemakerModels().values()); "
        "import detkit_sagemaker.preflight, detkit_sagemaker.jumpstart, detkit_sagemaker.requests; "
        "import detkit_sagemaker.pricing, detkit_sagemaker.defaults; "
        "print([m for m in ('boto3', 'botocore', 'torch', 'mxnet', 'moto') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.strip() == "[]"
