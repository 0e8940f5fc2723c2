"""Where weights come from before training: nowhere, torchvision's, a file, or an earlier run; matched by class name."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import MobileNet_V3_Large_Weights, ResNet50_Weights, VGG16_Weights
from torchvision.models.detection.ssd import SSD

from detkit.errors import UsageError, WeightsMissing
from detkit.files import file_sha256
from detkit.job import Job, Model, WeightsOrigin, Workspace
from detkit_torchvision.copying import coco_weights, copy_by_name, head_rows
from detkit_torchvision.models import MODELS
from detkit_torchvision.params import weights_cache

ARTIFACT = "weights.safetensors"
"""The state dict of a finished model, in its folder."""

IMAGENET = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    "ssd300_vgg16": VGG16_Weights.IMAGENET1K_FEATURES,
    "fasterrcnn_mobilenet_v3_large_fpn": MobileNet_V3_Large_Weights.IMAGENET1K_V1,
    "retinanet_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "fasterrcnn_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "fcos_resnet50_fpn": ResNet50_Weights.IMAGENET1K_V1,
    "retinanet_resnet50_fpn_v2": ResNet50_Weights.IMAGENET1K_V1,
    "fasterrcnn_resnet50_fpn_v2": ResNet50_Weights.IMAGENET1K_V1,
}
"""torchvision's weights of the backbones alone."""


def initialise(model: Any, job: Job, workspace: Workspace) -> WeightsOrigin:
    """Fill a fresh network as ``weights=`` says and return where that came from. Raises `WeightsMissing`."""
    wanted = job.params["weights"]
    if (workspace.parent_model / "detkit.json").is_file():
        parent = Model(workspace.parent_model)
        return _copy(model, job, load_file(parent.path / ARTIFACT), list(parent.classes), Path(wanted or parent.path))
    if wanted is None:
        return WeightsOrigin()
    if wanted in {"coco", "auto"}:
        known = coco_weights(job.model)
        assert known is not None  # the controller checked against ModelSpec.weights
        path = _fetch(job.model, wanted, known.url)
        origin = _copy(model, job, _read_coco(job.model, path), known.classes, path)
        return msgspec.structs.replace(origin, source="coco", licence=known.licence)
    if wanted == "imagenet":
        path = _fetch(job.model, wanted, IMAGENET[job.model].url)
        _load_backbone(model, read_state_dict(path))
        ported = ", ported from github.com/amdegroot/ssd.pytorch" if "amdegroot" in path.name else ""
        licence = f"BSD-3-Clause (torchvision{ported}); trained on ImageNet-1K, whose own terms may apply"
        return WeightsOrigin(source="imagenet", sha256=file_sha256(path), licence=licence, new=job.classes)
    path = Path(wanted)
    known = coco_weights(job.model)
    if known is not None and path.name == known.file_name:
        return _copy(model, job, _read_coco(job.model, path), known.classes, path)
    state = read_state_dict(path)
    return _copy(model, job, state, _classes_of(model, job, state, path), path)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` or ``.pth`` file; a pickle may hold nothing but tensors and plain containers."""
    if path.suffix == ".safetensors":
        return load_file(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} is no state dict that can be read safely: {error}") from None
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(f"{path} holds no state dict: expected a mapping of parameter names to tensors")
    return content


def _read_coco(model: str, path: Path) -> dict[str, Tensor]:
    """Read torchvision's file. Our batch norms add ``eps`` to a variance; where theirs did not, it is taken off."""
    state = read_state_dict(path)
    if MODELS[model].coco_without_eps:
        for name, value in state.items():
            if name.endswith(".running_var"):
                value.sub_(nn.BatchNorm2d(1).eps)
    return state


def _fetch(model: str, wanted: str, url: str) -> Path:
    """Return torchvision's file from the cache, or fetch it; ``weights=auto`` comes here only when it is there."""
    path = weights_cache() / url.rpartition("/")[2]
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=path.stem.rpartition("-")[2], progress=False)
    except (urllib.error.URLError, OSError, RuntimeError) as error:
        raise WeightsMissing(wanted, model, path, f"{url} cannot be fetched ({error})") from None
    return path


def _copy(model: Any, job: Job, state: dict[str, Tensor], classes: list[str | None], path: Path) -> WeightsOrigin:
    report = copy_by_name(job.model, model, state, classes, job.classes)
    own = model.state_dict()
    if len(report.skipped) > len(own) // 2:
        raise UsageError(
            f"{path} is of another network than {job.model}: {len(report.skipped)} parameters do not fit, "
            f"for example {', '.join(report.skipped[:3])}"
        )
    digest = file_sha256(path) if path.is_file() else file_sha256(path / ARTIFACT)
    return WeightsOrigin(source=str(path), sha256=digest, **vars(report))


def _classes_of(model: Any, job: Job, state: dict[str, Tensor], path: Path) -> list[str | None]:
    """Return the class names behind a file's outputs: its manifest's, else unknown."""
    if (path.parent / "detkit.json").is_file():
        return list(Model(path.parent).classes)
    key = next(iter(head_rows(model)))
    offset = MODELS[job.model].label_offset
    per_output = len(model.state_dict()[key]) // (len(job.classes) + offset)
    return [None] * (len(state[key]) // per_output - offset if key in state else len(job.classes))


def _load_backbone(model: Any, state: dict[str, Tensor]) -> None:
    """Load a classifier's weights into a detector's backbone, which lacks only the classifier's last layers."""
    if isinstance(model, SSD):  # VGG's convolutions in two parts, the second before layers of SSD's own
        body = nn.Sequential(*model.backbone.features, *model.backbone.extra[0][:-1])
    else:
        body = model.backbone.body
    renamed = {key.removeprefix("features."): value for key, value in state.items()}
    missing = body.load_state_dict(renamed, strict=False).missing_keys
    assert not missing, missing
