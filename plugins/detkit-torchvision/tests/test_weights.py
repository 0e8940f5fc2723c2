"""``weights=``: the cache, a file, an earlier run; nothing is fetched unasked, nothing unsafe is opened."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.models import detection, get_model
from torchvision.models.vgg import cfgs, make_layers

import detkit
from detkit.data import Dataset
from detkit.errors import InvalidValue, RunFailed, UnknownName, UsageError, WeightsMissing
from detkit.job import Job, Workspace
from detkit_torchvision.architecture import OWN_BACKBONES, Architecture
from detkit_torchvision.copying import coco_weights, head_rows
from detkit_torchvision.models import build
from detkit_torchvision.params import COCO_FILES, MODELS, suggest, weights_cache
from detkit_torchvision.weights import imagenet_weights, initialise, read_state_dict

MODEL = "ssdlite320_mobilenet_v3_large"


def fill_cache(model: str = MODEL) -> Path:
    """Put a state dict of torchvision's own 91-class network where torch keeps what it fetched."""
    torch.manual_seed(5)
    network = getattr(detection, model)(weights=None, weights_backbone=None, num_classes=91)
    path = weights_cache() / COCO_FILES[model]
    path.parent.mkdir(parents=True)
    torch.save(network.state_dict(), path)
    return path


def quick(tiny: Dataset, **settings: object) -> detkit.Run:
    trainer = detkit.Trainer(model=f"torchvision/{MODEL}", iterations=1, batch_size=2, device="cpu", name="quick")
    return trainer.fit(tiny, tiny, quiet=True, **settings)


def test_coco_weights_from_the_cache(tiny: Dataset, tmp_path: Path) -> None:
    """Classes that COCO knows keep their outputs, by name; the others start fresh; the manifest says which."""
    path = fill_cache()
    renamed = detkit.Dataset.from_samples(["cat", "square"], [_rename(sample, {"disc": "cat"}) for sample in tiny])
    run = quick(renamed, weights="coco")
    origin = run.model.manifest.weights
    assert (origin.source, origin.kept, origin.new) == ("coco", ["cat"], ["square"])
    assert "BSD-3-Clause" in origin.licence
    assert len(origin.sha256) == 64
    assert path.is_file()


def classifier(model: str, backbone: str | None) -> dict[str, torch.Tensor]:
    """Return the state dict of the classifier behind a detector; of VGG only the part that counts, as it is large."""
    if "vgg16" in model:
        layers = make_layers(cfgs["D"]).state_dict()
        return {f"features.{name}": value for name, value in layers.items()} | {"classifier.0.bias": torch.zeros(9)}
    return get_model(backbone or OWN_BACKBONES[model], weights=None).state_dict()


@pytest.mark.parametrize(
    ("model", "backbone"),
    [
        *((model, None) for model in sorted({*OWN_BACKBONES, "ssd300_vgg16"})),
        ("fasterrcnn_resnet50_fpn_v2", "resnet18"),
        ("maskrcnn_resnet50_fpn", "mobilenet_v2"),
        ("retinanet_resnet50_fpn", "mobilenet_v3_small"),
    ],
)
def test_imagenet_weights_fill_the_backbone(model: str, backbone: str | None, tmp_path: Path) -> None:
    torch.manual_seed(6)
    theirs = classifier(model, backbone)
    path = weights_cache() / imagenet_weights(model, backbone).url.rpartition("/")[2]
    path.parent.mkdir(parents=True)
    torch.save(theirs, path)
    network = build(model, 2, image_size=300 if "300" in model else 64, architecture=Architecture(backbone))
    job = Job(
        backend="torchvision",
        engine="",
        model=model,
        params={"weights": "imagenet", "backbone": backbone},
        options={},
        classes=["a", "b"],
    )
    origin = initialise(network, job, Workspace(tmp_path / "run"))
    assert (origin.source, origin.new) == ("imagenet", ["a", "b"])
    assert "imagenet" in MODELS[model].weights
    convolutions = [value for name, value in network.backbone.state_dict().items() if value.ndim == 4]
    expected = [value for value in theirs.values() if value.ndim == 4]
    assert len(expected) > 12
    assert all(torch.equal(ours, value) for ours, value in zip(convolutions, expected, strict=False))


def test_auto_never_fetches(tiny: Dataset) -> None:
    with pytest.raises(WeightsMissing, match=r"weights=coco would fetch them.*put the file at .*weights=none"):
        quick(tiny)  # the default of a stock model is weights=auto
    assert not Path("runs").exists()


def test_weights_that_cannot_be_fetched(tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")  # nothing listens there, whatever the network
    with pytest.raises(RunFailed, match=r"cannot be fetched .*put the file at .*ssdlite320"):
        quick(tiny, weights="coco")


def test_unknown_word_for_weights(tiny: Dataset) -> None:
    with pytest.raises(UnknownName, match="did you mean 'coco'"):
        quick(tiny, weights="cocoo")


def test_a_file_of_the_same_network(tiny: Dataset, tmp_path: Path) -> None:
    """A bare state dict has no class names, so its outputs are not used; the rest is."""
    network = build(MODEL, 7, image_size=320)
    torch.save({"model": network.state_dict()}, tmp_path / "mine.pth")
    origin = quick(tiny, weights=str(tmp_path / "mine.pth")).model.manifest.weights
    assert origin.source.endswith("mine.pth")
    assert (origin.kept, origin.new) == ([], list(tiny.classes))


def test_a_file_of_another_network(tiny: Dataset, tmp_path: Path) -> None:
    torch.save(build("ssd_tiny", 2, image_size=64).state_dict(), tmp_path / "other.pth")
    with pytest.raises(RunFailed, match="another network"):
        quick(tiny, weights=str(tmp_path / "other.pth"))


class Exploit:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("pwned"),))


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Exploit()))
    torch.save({"model": {"weight": torch.zeros(1), "more": Exploit()}}, tmp_path / "zipped.pth")
    for name in ("evil.pth", "zipped.pth"):
        with pytest.raises(UsageError, match=f"{name} is no state dict that can be read safely"):
            read_state_dict(tmp_path / name)
    assert not Path("pwned").exists()
    torch.load(tmp_path / "zipped.pth", weights_only=False)
    assert Path("pwned").exists(), "the file is harmless"


@pytest.mark.parametrize("wrapping", ["model", "module."])
def test_a_file_with_the_heads_of_other_classes(wrapping: str, tmp_path: Path) -> None:
    """Five nameless classes and a background, as in models of PubLayNet: all but the heads is kept, and told."""
    torch.manual_seed(8)
    theirs = {
        name: torch.randn_like(v) if v.is_floating_point() else v for name, v in _mask_rcnn(5).state_dict().items()
    }
    wrapped = {"model": theirs} if wrapping == "model" else {f"module.{name}": v for name, v in theirs.items()}
    torch.save(wrapped, tmp_path / "layout.pth")
    network = _mask_rcnn(2)
    fresh = {name: value.clone() for name, value in network.state_dict().items()}
    params = {"weights": str(tmp_path / "layout.pth")}
    job = Job(
        backend="torchvision",
        engine="",
        model="maskrcnn_resnet50_fpn",
        params=params,
        options={},
        classes=["text", "table"],
    )
    origin = initialise(network, job, Workspace(tmp_path / "run"))
    heads = head_rows(network)
    assert len(heads) == 6
    assert any("mask_predictor" in name for name in heads)
    assert origin.skipped == sorted(heads)
    assert (origin.kept, origin.new, origin.dropped) == ([], ["text", "table"], [])
    for name, value in network.state_dict().items():
        assert torch.equal(value, fresh[name] if name in heads else theirs[name]), name


def _mask_rcnn(num_classes: int) -> Any:
    return build("maskrcnn_resnet50_fpn", num_classes, image_size=64, architecture=Architecture("resnet18"))


def test_from_an_earlier_run_by_class_name(tiny: Dataset) -> None:
    """The parent's classes come in another order and one is new."""
    parent = detkit.Trainer(model="torchvision/fcos_tiny", iterations=2, image_size=64, device="cpu", name="old").fit(
        tiny, tiny, quiet=True
    )
    names = ["square", "triangle", "disc"]
    more = detkit.Dataset.from_samples(names, list(tiny))
    child = detkit.Trainer(
        model="torchvision/fcos_tiny", iterations=1, image_size=64, device="cpu", name="new", weights=parent
    ).fit(more, more, quiet=True)
    origin = child.model.manifest.weights
    assert (origin.kept, origin.new) == (["square", "disc"], ["triangle"])
    assert child.model.manifest.parent


def test_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    """``auto`` starts from scratch with nothing in the cache, and fine-tunes what is there."""
    monkeypatch.setenv("PATH", "")  # no nvidia-smi: as on a machine without a GPU
    assert suggest().model == "fcos_small"
    assert "weights=coco" in suggest().reason
    fill_cache()
    assert suggest().model == MODEL
    assert coco_weights("fcos_tiny") is None


def _rename(sample: detkit.Sample, names: dict[str, str]) -> detkit.Sample:
    from dataclasses import replace

    return replace(sample, names=tuple(names.get(name, name) for name in sample.names))


@pytest.mark.parametrize(
    "settings",
    [{"image_size": -3}, {"warmup_iterations": -4}, {"validate_every": "0 epochs"}, {"augmentations": "blur"}],
)
def test_values_out_of_range(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidValue, match=next(iter(settings))):
        detkit.Trainer(model="torchvision/fcos_tiny").explain(**settings)


def test_on_a_machine_without_a_gpu(tiny: Dataset) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(RunFailed, match=r"device='cuda'.*0 CUDA device.*device=cpu"):
        detkit.Trainer(model="torchvision/fcos_tiny", iterations=1, device="cuda").fit(tiny, tiny, quiet=True)


@pytest.mark.parametrize(
    ("theirs", "expected"),
    [
        ({"backbone": "mobilenet_v3_small"}, "another backbone; give backbone=mobilenet_v3_small"),
        ({"anchor_sizes": (4.0, 6, 8, 11, 14)}, "another anchor_sizes; give anchor_sizes=4,6,8,11,14"),
    ],
)
def test_weights_of_another_architecture(
    theirs: dict[str, Any], expected: str, tiny: detkit.Dataset, tmp_path: Path
) -> None:
    """Their shapes may fit in part, or whole: the outputs would be of other anchors."""
    quick = {"model": "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", "iterations": 1, "image_size": 64}
    settings = {**quick, "device": "cpu", "batch_size": 2, "weights": "none"}
    parent = detkit.Trainer(**settings, **theirs).fit(tiny[:2], tiny[:2], quiet=True)
    with pytest.raises(RunFailed, match=expected):
        detkit.Trainer(**{**settings, "weights": parent}).fit(tiny[:2], tiny[:2], quiet=True)
