"""Where weights come from before training: nowhere, Detectron2's zoo, a file, or an earlier run; by class name."""

from __future__ import annotations

import logging
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import torch
from detectron2.checkpoint.c2_model_loading import align_and_update_state_dicts
from safetensors.torch import load_file
from torch import Tensor

from detkit.errors import UsageError, WeightsMissing
from detkit.files import atomic_write, file_sha256
from detkit.job import Job, Model, WeightsOrigin, Workspace
from detkit_detectron2 import releases
from detkit_detectron2.pickles import read_pickle
from detkit_detectron2.yamls import flatten, read
from detkit_detectron2.zoo import FROM_CONFIG

ARTIFACT = "weights.safetensors"
"""The state dict of a finished model, in its folder."""

CONFIG = "config.yaml"
"""The whole configuration of a finished model, beside it."""

_PARALLEL = "module."
"""What torch's ``DataParallel`` puts before each name."""

_NOT_LEARNED = ("num_batches_tracked", "pixel_mean", "pixel_std")
"""Ends of the names of what is counted or configured; old files have some of them."""

_STATISTICS = ("running_mean", "running_var")
"""Caffe2's files have them within the scale and shift of a norm."""

_BACKBONE = "backbone."

_ANCHORS = ("MODEL.ANCHOR_GENERATOR.SIZES", "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS")


class _State(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    matching: str = ""
    """Whether names have to be matched by Detectron2's rules: ``suffix``, or ``caffe2``."""


def initialise(network: Any, job: Job, workspace: Workspace, cfg: Any) -> WeightsOrigin:
    """Fill a fresh network, built of the whole ``cfg``, as ``weights=`` says and return where that came from.

    Raises `WeightsMissing`, and `UsageError` for weights of another network, or of other anchors.
    """
    wanted = job.params["weights"]
    if (workspace.parent_model / "detkit.json").is_file():
        parent = Model(workspace.parent_model)
        _refuse_other_anchors(parent, cfg)
        tensors = load_file(parent.path / ARTIFACT)
        path = Path(wanted or parent.path)
        return _copy(network, cfg, job, state=tensors, old_classes=list(parent.classes), path=path)
    if wanted is None:
        return WeightsOrigin()
    if wanted in {"coco", "auto"}:
        address = releases.coco_file(job.model)
        if job.model == FROM_CONFIG and releases.is_coco(cfg.MODEL.WEIGHTS):
            address = cfg.MODEL.WEIGHTS
        if address is None:
            raise WeightsMissing(wanted, job.model, "weights=PATH", "nobody has released any")
        path = _fetch(job.model, wanted, address)
        state = read_state_dict(path, network)
        origin = _copy(network, cfg, job, state=state, old_classes=coco_classes(), path=path)
        licence = f"{releases.LICENCE}; trained on COCO 2017, whose own terms may apply"
        return msgspec.structs.replace(origin, source="coco", licence=licence)
    if wanted == "imagenet":
        return _load_backbone(network, job, cfg)
    path = Path(wanted)
    state = read_state_dict(path, network)
    return _copy(
        network, cfg, job, state=state, old_classes=_classes_of(network, cfg, job, state=state, path=path), path=path
    )


def coco_classes() -> list[str | None]:
    """Return the class names of the zoo's COCO models, in their order."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    return [category["name"] for category in COCO_CATEGORIES if category["isthing"]]


def read_state_dict(path: Path, network: Any) -> dict[str, Tensor]:
    """Read a ``.safetensors``, ``.pth`` or ``.pkl`` file, with the names of ``network``'s parameters.

    Of pickles, nothing but tensors, arrays and plain containers is built. Raises `UsageError`.
    """
    state = _read_file(path)
    tensors = state.tensors
    if tensors and all(name.startswith(_PARALLEL) for name in tensors):
        tensors = {name.removeprefix(_PARALLEL): value for name, value in tensors.items()}
    if not state.matching:
        return tensors
    log = logging.getLogger("detectron2.checkpoint.c2_model_loading")
    level = log.level
    log.setLevel(logging.ERROR)  # it prints a table of hundreds of lines, and what `WeightsOrigin` says
    try:
        matched: dict[str, Tensor] = align_and_update_state_dicts(
            network.state_dict(), dict(tensors), c2_conversion=state.matching == "caffe2"
        )
    except (AssertionError, ValueError, IndexError) as error:
        raise UsageError(f"the names in {path} cannot be matched with those of the model: {error}") from None
    finally:
        log.setLevel(level)
    return matched


def _read_file(path: Path) -> _State:
    if path.suffix == ".safetensors":
        return _State(load_file(path))
    if path.suffix == ".pkl":
        return _of_pickle(read_pickle(path), path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UsageError(f"{path} is no state dict that can be read safely: {error}") from None
    for key in ("model", "state_dict", "model_state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    return _State(_tensors(content, path))


def _of_pickle(content: Any, path: Path) -> _State:
    """Return what a pickle of the zoo, or of Detectron in Caffe2, holds (Detectron2's ``DetectionCheckpointer``)."""
    if isinstance(content, dict) and "model" in content:
        return _State(_tensors(content["model"], path), "suffix" if content.get("matching_heuristics") else "")
    blobs = content.get("blobs", content) if isinstance(content, dict) else content
    if isinstance(blobs, dict):
        blobs = {name: value for name, value in blobs.items() if not str(name).endswith("_momentum")}
    return _State(_tensors(blobs, path), "caffe2")


def _tensors(content: Any, path: Path) -> dict[str, Tensor]:
    if isinstance(content, dict):
        # A number by itself is no parameter but a counter, of which nothing depends.
        content = {name: _tensor(value) for name, value in content.items() if not isinstance(value, int | float)}
    if not isinstance(content, dict) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise UsageError(f"{path} holds no state dict: expected a mapping of parameter names to tensors")
    return content


def _tensor(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))


def _fetch(model: str, wanted: str, address: str) -> Path:
    """Return a released file from the cache, or fetch it; ``weights=auto`` comes here only when it is there."""
    path, url = releases.cached(address), releases.url(address)
    if path.is_file():
        return path
    if wanted == "auto":
        releases.require(model, wanted)
    try:
        with urllib.request.urlopen(url, timeout=60) as answer, atomic_write(path) as target:  # noqa: S310 - https
            expected = int(answer.headers.get("Content-Length") or 0)
            written = 0
            while block := answer.read(1 << 20):
                written += target.write(block)
            if expected and written != expected:
                raise OSError(f"it broke off after {written} of {expected} bytes")
            target.flush()
            _of_pickle(read_pickle(Path(target.name)), path)  # a page in its place would stay in the cache
    except UsageError as error:
        raise WeightsMissing(wanted, model, path, f"what {url} answers is no file of weights ({error})") from None
    except (urllib.error.URLError, OSError) as error:
        raise WeightsMissing(wanted, model, path, f"{url} cannot be fetched ({error})") from None
    return path


def _refuse_other_anchors(parent: Model, cfg: Any) -> None:
    """Raise `UsageError` where an earlier model has other anchors: its outputs fit, and mean something else."""
    file = parent.path / CONFIG
    if not file.is_file():
        return
    theirs, ours = flatten(read(file).values), flatten(cfg)
    for key in _ANCHORS:
        if key in theirs and _plain(theirs[key]) != _plain(ours[key]):
            raise UsageError(
                f"the weights are of a {parent.name} with other anchors: {key} is {_plain(theirs[key])} there and "
                f"{_plain(ours[key])} here; give the same anchor_sizes and anchor_ratios, or choose other weights"
            )


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else float(value)


def _classes_of(network: Any, cfg: Any, job: Job, *, state: dict[str, Tensor], path: Path) -> list[str | None]:
    """Return the class names behind a file's outputs: its manifest's, or COCO's, else unknown."""
    if path.name in {address.rpartition("/")[2] for address in releases.COCO.values()}:
        return coco_classes()
    if (path.parent / "detkit.json").is_file():
        return list(Model(path.parent).classes)
    own = network.state_dict()
    for key, (rows, background) in head_rows(own, cfg).items():
        if key in state:
            anchors = len(own[key]) // (rows * (len(job.classes) + background))
            return [None] * (len(state[key]) // (rows * anchors) - background)
    return [None] * len(job.classes)


def head_rows(own: dict[str, Tensor], cfg: Any) -> dict[str, tuple[int, int]]:
    """Return the parameters that depend on the classes: rows per class of each, and 1 where it has a background.

    Rows are laid out as anchors x classes x rows per class, and the background comes after the classes.
    """
    layers: dict[str, tuple[int, int]] = {"head.cls_score": (1, 0)}
    heads = {name.partition(".cls_score")[0] for name in own if name.startswith("roi_heads.") and ".cls_score." in name}
    for head in heads:  # a cascade has three of them
        layers[f"{head}.cls_score"] = (1, 1)
        if not cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG:
            layers[f"{head}.bbox_pred"] = (4, 0)
    if not cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK:
        layers["roi_heads.mask_head.predictor"] = (1, 0)
    found = {f"{layer}.{part}": rows for layer, rows in layers.items() for part in ("weight", "bias")}
    return {key: rows for key, rows in found.items() if key in own}


@torch.no_grad()
def _copy(
    network: Any, cfg: Any, job: Job, *, state: dict[str, Tensor], old_classes: Sequence[str | None], path: Path
) -> WeightsOrigin:
    """Copy the weights of the same network trained with ``old_classes``; outputs follow the name of their class.

    Where no name is known, no output is copied, not even the background's.
    """
    kept = [name for name in job.classes if name in old_classes]
    own = network.state_dict()
    rows = head_rows(own, cfg)
    skipped = [key for key in own.keys() ^ state.keys() if not _is_configured(key)]
    for key in own.keys() & state.keys():
        fresh, earlier = own[key], state[key]
        if key not in rows:
            if fresh.shape == earlier.shape:
                fresh.copy_(earlier)
            elif not _is_configured(key):
                skipped.append(key)
            continue
        per_class, background = rows[key]
        num_new, num_old = len(job.classes) + background, len(old_classes) + background
        fits = len(fresh) * num_old == len(earlier) * num_new and fresh.shape[1:] == earlier.shape[1:]
        if not any(old_classes) or not fits:
            skipped.append(key)
            continue
        last = [num_old - 1] if background else []
        source = [*(old_classes.index(name) for name in kept), *last]
        target = [*(job.classes.index(name) for name in kept), *([num_new - 1] if background else [])]
        by_class = earlier.view(-1, num_old, per_class, *earlier.shape[1:])[:, source]
        fresh.view(-1, num_new, per_class, *fresh.shape[1:])[:, target] = by_class.to(fresh)
    if len(skipped) > len(own) // 2:
        raise UsageError(
            f"{path} is of another network than {job.model}: {len(skipped)} parameters do not fit, "
            f"for example {', '.join(sorted(skipped)[:3])}"
        )
    if rows and rows.keys() <= set(skipped):
        kept = []
    return WeightsOrigin(
        source=str(path),
        sha256=file_sha256(path if path.is_file() else path / ARTIFACT),
        kept=kept,
        new=[name for name in job.classes if name not in kept],
        dropped=[name for name in old_classes if name is not None and name not in kept],
        skipped=sorted(skipped),
    )


def _is_configured(key: str) -> bool:
    return key.endswith(_NOT_LEARNED) or ".cell_anchors." in key


@torch.no_grad()
def _load_backbone(network: Any, job: Job, cfg: Any) -> WeightsOrigin:
    """Load a classifier's weights into the backbone. Raises `UsageError` where they do not fit."""
    resnets = cfg.MODEL.RESNETS
    address = releases.imagenet(resnets.DEPTH, resnets.NUM_GROUPS)
    if job.model == FROM_CONFIG and releases.is_imagenet(cfg.MODEL.WEIGHTS):
        address = cfg.MODEL.WEIGHTS
    if address is None:
        raise UsageError(
            f"weights=imagenet: Detectron2 has released none for a ResNet of depth {resnets.DEPTH}; give "
            "weights=PATH or weights=none"
        )
    path = _fetch(job.model, "imagenet", address)
    own = network.state_dict()
    state = {
        key: value for key, value in read_state_dict(path, network).items() if key in own and key.startswith(_BACKBONE)
    }
    expected = [key for key in own if ".bottom_up." in key or (key.startswith(_BACKBONE) and ".fpn_" not in key)]
    expected = [key for key in expected if not key.endswith((*_NOT_LEARNED, *_STATISTICS)) and ".top_block." not in key]
    missing = [key for key in expected if key not in state or state[key].shape != own[key].shape]
    if len(missing) > len(expected) // 2:
        raise UsageError(
            f"weights=imagenet do not fit the backbone of {job.model}: {len(missing)} of its {len(expected)} "
            f"parameters are not in {path}, for example {missing[0]}; choose weights=none"
        )
    for key, value in state.items():
        if own[key].shape == value.shape:
            own[key].copy_(value)
    return WeightsOrigin(
        source="imagenet",
        sha256=file_sha256(path),
        licence=f"{releases.LICENCE}; trained on ImageNet-1K, whose own terms may apply",
        new=list(job.classes),
        skipped=sorted(missing),
    )
