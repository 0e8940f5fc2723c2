"""Where weights come from before training: nowhere, torchvision's, a file, or an earlier run; matched by class name."""

from __future__ import annotations

import urllib.error
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models import VGG16_Weights, get_model_weights
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.ssd import SSD

from detkit.errors import UsageError, WeightsMissing
from detkit.files import file_sha256
from detkit.job import Job, Model, WeightsOrigin, Workspace
from detkit_torchvision.architecture import OWN, OWN_BACKBONES, Architecture
from detkit_torchvision.copying import coco_weights, copy_by_name, head_rows
from detkit_torchvision.models import MODELS
from detkit_torchvision.params import weights_cache

ARTIFACT = "weights.safetensors"
"""The state dict of a finished model, in its folder."""

_PARALLEL = "module."
"""What torch's ``DataParallel`` puts before each name."""


def imagenet_weights(model: str, backbone: str | None) -> Any:
    """Return torchvision's first weights of a model's backbone alone, trained on ImageNet-1K, as its enum member."""
    if model == "ssd300_vgg16":
        return VGG16_Weights.IMAGENET1K_FEATURES
    return get_model_weights(backbone or OWN_BACKBONES[model]).IMAGENET1K_V1


def initialise(model: Any, job: Job, workspace: Workspace, architecture: Architecture = OWN) -> WeightsOrigin:
    """Fill a fresh network as ``weights=`` says and return where that came from.

    Raises `WeightsMissing`, and `UsageError` for weights of another network, or another ``architecture``.
    """
    wanted = job.params["weights"]
    if (workspace.parent_model / "detkit.json").is_file():
        parent = Model(workspace.parent_model)
        _refuse_other_architecture(parent, job, architecture)
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
        path = _fetch(job.model, wanted, imagenet_weights(job.model, job.params.get("backbone")).url)
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
    if content and all(name.startswith(_PARALLEL) for name in content):
        content = {name.removeprefix(_PARALLEL): value for name, value in content.items()}
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


def _refuse_other_architecture(parent: Model, job: Job, architecture: Architecture) -> None:
    """Raise `UsageError` where an earlier model of the same name has another backbone, or other anchors."""
    theirs = Architecture.from_native(parent.manifest.native)
    for name, own in (("backbone", OWN_BACKBONES.get(job.model)), ("anchor_sizes", ()), ("anchor_ratios", ())):
        here, there = getattr(architecture, name) or own, getattr(theirs, name) or own
        if here != there:
            said = there if isinstance(there, str) else ",".join(f"{value:g}" for value in there or ())
            raise UsageError(
                f"the weights are of a {job.model} with another {name}; "
                + (f"give {name}={said}" if said else f"leave {name} out")
                + ", or choose other weights"
            )


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
    key = next(iter(head_rows(model)), None)
    if key is None:
        return [None] * len(job.classes)
    offset = MODELS[job.model].label_offset
    per_output = len(model.state_dict()[key]) // (len(job.classes) + offset)
    return [None] * (len(state[key]) // per_output - offset if key in state else len(job.classes))


def _load_backbone(model: Any, state: dict[str, Tensor]) -> None:
    """Load a classifier's weights into a detector's backbone, which lacks only the classifier's last layers."""
    if isinstance(model, SSD):  # VGG's convolutions in two parts, the second before layers of SSD's own
        body = nn.Sequential(*model.backbone.features, *model.backbone.extra[0][:-1])
    elif isinstance(getattr(model, "backbone", None), BackboneWithFPN):
        body = model.backbone.body
    else:
        raise UsageError(
            "weights=imagenet are for torchvision's backbones, and modify= put another one here; choose none"
        )
    renamed = {key.removeprefix("features."): value for key, value in state.items()}
    try:
        missing = body.load_state_dict(renamed, strict=False).missing_keys
    except RuntimeError as error:  # of another shape
        missing = [str(error)]
    if missing:
        raise UsageError(
            f"weights=imagenet do not fit this backbone, for example {missing[0]}; where modify= changed it, choose "
            "weights=none"
        )
