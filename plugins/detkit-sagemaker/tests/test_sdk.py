"""The SageMaker Python SDK, as it is, drives the simulator: it is AWS's protocol that is simulated, not our idea of it.

The SDK cannot share an environment with detkit's other dependencies, and weighs a gigabyte. `tox -e sdk` gives it one;
``DETKIT_SAGEMAKER_SDK_PYTHON`` names the Python there.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import boto3
import pytest

import detkit
from detkit.testing import tiny_dataset
from detkit_sagemaker.images import builtin_image
from detkit_sagemaker.testing import Simulator
from detkit_sagemaker.testing.containers import can_mount

VARIABLE = "DETKIT_SAGEMAKER_SDK_PYTHON"
NUM_IMAGES = 8


@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("ignore:.*left behind:detkit.errors.DetkitWarning")
@pytest.mark.skipif(VARIABLE not in os.environ, reason=f"{VARIABLE} names no Python that has the SageMaker SDK")
def test_the_sdk_trains_tunes_deploys_and_transforms(simulator: Simulator, tmp_path: Path) -> None:
    data = tiny_dataset(tmp_path / "data", num_images=NUM_IMAGES)
    data = data.take([position for position, boxes in enumerate(data.boxes_per_image()) if boxes])
    detkit.write_dataset(data, tmp_path / "records", "recordio")
    detkit.write_dataset(data, tmp_path / "jumpstart", "jumpstart")
    upload(simulator, tmp_path / "records", "records", ".rec")
    upload(simulator, tmp_path / "jumpstart", "jumpstart")
    upload(simulator, tmp_path / "jumpstart/images", "pictures")

    facts = {"picture": data.paths[0], "num_images": len(data), "num_classes": len(data.classes)}
    seen = session(simulator, tmp_path, opt_ml=can_mount(), **facts)

    assert seen["image"] == builtin_image(simulator.region)
    assert seen["trained"] == ["Completed", "Completed"]
    assert {"train:progress", "validation:mAP"} <= set(seen["metrics"])
    assert seen["trained on"] == "Completed"
    assert {"training", "model", "code"} <= set(seen["jumpstart"])
    if can_mount():
        assert seen["jumpstart status"] == "Completed"
    assert seen["tuned"] == "Completed"
    assert len(seen["objectives"]) == 3
    assert seen["objectives"][seen["best"]] == max(seen["objectives"].values())
    assert seen["endpoints"] == ["birds"]
    assert all(len(one) == 6 for one in seen["answered"])
    assert seen["answered"]
    assert seen["answers"] == sorted(f"answers/{Path(path).name}.out" for path in data.paths)
    simulator.wait()
    assert not simulator.live()


def session(simulator: Simulator, folder: Path, **told: object) -> dict[str, Any]:
    """Let the SDK's Python run `sdk_session.py`; return what it saw."""
    settings = folder / "config.yaml"
    settings.write_text("SchemaVersion: '1.0'\nSageMaker:\n  PythonSDK:\n    Modules:\n      TelemetryOptOut: true\n")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "DETKIT_"))}
    done = subprocess.run(
        [os.environ[VARIABLE], Path(__file__).with_name("sdk_session.py")],
        input=json.dumps({"role": simulator.role, "bucket": simulator.bucket, **told}),
        env={
            **kept,
            "HOME": str(folder),
            "SAGEMAKER_USER_CONFIG_OVERRIDE": str(settings),
            # It would ask IAM to simulate policies, which moto does not have.
            "SAGEMAKER_VALIDATE_ROLE": "false",
        },
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=540,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-12000:]}"
    seen: dict[str, Any] = json.loads((folder / "seen.json").read_bytes())
    return seen


def upload(simulator: Simulator, folder: Path, prefix: str, ending: str = "") -> None:
    """Copy a folder's files to the account's bucket."""
    for path in sorted(folder.rglob(f"*{ending}")):
        if path.is_file():
            boto3.client("s3").upload_file(str(path), simulator.bucket, f"{prefix}/{path.relative_to(folder)}")
