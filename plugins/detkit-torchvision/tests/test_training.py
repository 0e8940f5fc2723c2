"""What a step does: accumulation, mixed precision, what is frozen, sizes, memory, and losses of the validation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from in_process import lay_out, make_job
from torch import nn

import detkit
from detkit.data import Dataset
from detkit.errors import InvalidValue, OutOfMemory, UsageError
from detkit.ranks import Alone
from detkit_torchvision.batch_sizes import with_batch_size
from detkit_torchvision.batches import Batch
from detkit_torchvision.freezing import Frozen, stages
from detkit_torchvision.memory import free_memory, is_out_of_memory
from detkit_torchvision.models import MODELS, build
from detkit_torchvision.training import Training


@pytest.fixture
def begin(tiny: Dataset, tmp_path: Path) -> Any:
    """Return a function that begins training of a small model on eight images."""
    numbers = iter(range(100))

    def begin(model: str = "fcos_tiny", data: Dataset = tiny, **settings: Any) -> Training:
        job = make_job(model, data, **{"iterations": 4, "batch_size": 4, "augmentations": (), **settings})
        training = Training(job, lay_out(tmp_path / f"run{next(numbers)}", job, data))
        training.prepare()
        return training

    return begin


def train(training: Training) -> list[float]:
    losses = []
    for batch in training.batches():
        losses.append(training.train_step(batch)["loss"])
        training.step += 1
    return losses


def test_accumulated_passes_make_the_same_step(begin: Any) -> None:
    """The two passes see the same images here, as the loss of a pass is divided by the objects in it."""
    found = []
    for passes in (1, 2):
        training = begin(optimizer="sgd", batch_norm="frozen", gradient_clip=None, grad_accumulation=passes)
        batch = next(iter(training.batches()))
        losses = training.train_step(Batch(batch.images[:2] * 2, batch.targets[:2] * 2, batch.indices[:2] * 2))
        found.append((losses, training.network.state_dict()))
    (losses, whole), (again, parts) = found
    assert again == pytest.approx(losses)
    assert all(torch.allclose(value, parts[name], atol=1e-6) for name, value in whole.items())


def test_more_passes_than_images(begin: Any) -> None:
    losses = train(begin(grad_accumulation=9, batch_size=3))
    assert len(losses) == 4
    assert np.isfinite(losses).all()


def test_mixed_precision_is_near_and_not_equal(begin: Any) -> None:
    plain, mixed = train(begin()), train(begin(amp="bf16"))
    assert plain[0] != mixed[0]
    assert plain[0] == pytest.approx(mixed[0], rel=0.02)


def test_fp16_needs_a_gpu(begin: Any) -> None:
    with pytest.raises(UsageError, match="amp=fp16 needs a GPU"):
        begin(amp="fp16")


@pytest.mark.parametrize("model", sorted(MODELS))
def test_stages_are_those_of_the_backbone(model: str) -> None:
    """From the image on, they hold every parameter of the backbone once, but for a pyramid and extra layers."""
    network = build(model, 2, image_size=MODELS[model].image_size)
    found = [part for stage in stages(network) for module in stage for part in module.parameters()]
    assert (
        len(stages(network)) == {"fcos": 4, "ssd_": 4}.get(model[:4], 5) if "tiny" in model or "small" in model else 5
    )
    assert len({id(part) for part in found}) == len(found)
    every = {id(part): name for name, part in network.backbone.named_parameters()}
    left = {name for part, name in every.items() if part not in set(map(id, found))}
    assert all(name.startswith(("fpn.", "pyramid.", "extra.", "scale_weight")) for name in left), left


def test_frozen_stages_stay(begin: Any) -> None:
    training = begin(frozen_stages=2, ema_decay=0.5)
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    train(training)
    after = training.network.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.startswith(("backbone.stem.", "backbone.stages.0."))}
    assert frozen
    assert not moved & frozen
    assert any(name.startswith("backbone.stages.1.") for name in moved)
    assert any("running_mean" in name for name in moved), "the norms of other stages learn"
    with pytest.raises(InvalidValue, match="frozen_stages=9.*has 4 stages"):
        begin(frozen_stages=9)


def test_a_network_of_the_users_own_has_no_stages() -> None:
    own = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    Frozen(own, num_stages=0, norms=False).keep()
    with pytest.raises(InvalidValue, match="frozen_stages=1.*has 0 stages"):
        Frozen(own, num_stages=1, norms=False)


def test_frozen_norms_keep_statistics_and_weights(begin: Any) -> None:
    training = begin(batch_norm="frozen")
    before = {name: value.clone() for name, value in training.network.state_dict().items()}
    train(training)
    norms = {name for name, part in training.network.named_modules() if isinstance(part, nn.BatchNorm2d)}
    after = training.network.state_dict()
    for name, value in before.items():
        if name.rpartition(".")[0] in norms:
            assert torch.equal(value, after[name]), name


def test_norms_are_frozen_where_torchvision_does(begin: Any) -> None:
    """Its constructors put frozen norms into first versions that start from weights."""
    for model in ("fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2"):
        training = begin(model)
        assert not training._freezes_norms()
        training.params = {**training.params, "weights": "coco"}
        assert training._freezes_norms() == (not model.endswith("v2"))


def test_validation_losses_change_nothing(begin: Any) -> None:
    training = begin(ema_decay=0.9)
    train(training)
    before = {name: value.clone() for name, value in training.average.state_dict().items()}
    found = training.validation_losses()
    assert found == training.validation_losses()
    assert found["loss"] == pytest.approx(sum(value for name, value in found.items() if name != "loss"))
    assert set(found) == {"loss", "classification", "bbox_regression", "bbox_iou"}
    assert all(torch.equal(value, before[name]) for name, value in training.average.state_dict().items())


def test_validation_losses_are_logged_with_the_scores(tiny: Dataset, tmp_path: Path) -> None:
    run = detkit.Trainer(model="torchvision/ssd_tiny", epochs=2, device="cpu").fit(tiny, tiny, quiet=True)
    rows = [row for row in run.history if "val/loss" in row]
    assert [row["epoch"] for row in rows] == [1, 2]
    for row in rows:
        assert row["val/loss"] == pytest.approx(row["val/loss_bbox_regression"] + row["val/loss_classification"])
    assert "val/loss" in run.model.manifest.metrics


def test_sizes_vary_from_step_to_step(begin: Any) -> None:
    training = begin(multi_scale=0.5, image_size=128, iterations=30)
    sizes = []
    for batch in training.batches():
        assert len({image.shape for image in batch.images}) == 1
        sizes.append(batch.images[0].shape[-1])
        index, side = batch.indices[0], batch.images[0].shape[-1]
        expected = training.data.boxes[training.data.offsets[index] : training.data.offsets[index + 1]]
        scale = side / training.data.sizes[index].astype(float)
        assert np.allclose(batch.targets[0]["boxes"], expected * np.tile(scale, 2), atol=1e-3)
    assert set(sizes) == {64, 96, 128, 160, 192}
    again = begin(multi_scale=0.5, image_size=128, iterations=30)
    assert [batch.images[0].shape[-1] for batch in again.batches()] == sizes


def test_sizes_too_near_to_vary(begin: Any) -> None:
    with pytest.raises(InvalidValue, match="multi_scale=0.1.*at least 0.25, as sizes are 32 pixels apart"):
        begin(multi_scale=0.1, image_size=128)


def test_gradients_that_half_precision_spoils_move_nothing(begin: Any) -> None:
    training = begin(amp="bf16")
    before = {name: value.clone() for name, value in training.network.named_parameters()}
    training.network.head.regression_head.bbox_reg.bias.register_hook(lambda gradient: gradient * float("nan"))
    train(training)
    assert training.steps_left_out == 4
    assert all(torch.equal(value, before[name]) for name, value in training.network.named_parameters())
    told = (training.workspace.metrics_file).read_text()
    assert "step 1 was left out, as bf16 gave gradients that are not finite" in told


def test_one_size_only(tiny: Dataset) -> None:
    trainer = detkit.Trainer(model="torchvision/ssd300_vgg16", weights="none", device="cpu", multi_scale=0.2)
    with pytest.raises(InvalidValue, match="multi_scale=0.2.*300 pixels only"):
        trainer.fit(tiny, tiny, quiet=True)


def test_rare_classes_come_more_often(begin: Any, tiny: Dataset) -> None:
    """One image of a class that others lack is drawn about sqrt(7) times as often as they are."""
    labels = np.zeros(len(tiny.boxes), dtype=np.int64)
    labels[tiny.offsets[2] : tiny.offsets[3]] = 1
    data = Dataset.from_samples(
        ("often", "rarely"),
        [
            detkit.Sample(**{**vars_of(sample), "names": tuple(("often", "rarely")[i] for i in rows)})
            for sample, rows in zip(tiny, np.split(labels, tiny.offsets[1:-1]), strict=True)
        ],
    )
    training = begin(data=data, sampling="class_balanced", batch_size=2, iterations=400)
    seen = np.bincount([i for step in range(400) for i in training.batch_indices(step)], minlength=len(data))
    with_boxes = [i for i in range(len(data)) if i != 2 and data.boxes_per_image()[i]]
    expected = np.sqrt(len(with_boxes))
    assert seen[2] / np.mean(seen[with_boxes]) == pytest.approx(expected, rel=0.1)


def vars_of(sample: Any) -> dict[str, Any]:
    import dataclasses

    return {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}


def test_automatic_batch_size(tiny: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A power of two that leaves eight steps an epoch, and the same one when the run goes on with less memory."""
    many = Dataset.from_samples(
        tiny.classes,
        [detkit.Sample(**{**vars_of(s), "image_id": f"{n}-{s.image_id}"}) for n in range(9) for s in tiny],
    )
    job = make_job("fcos_tiny", many, batch_size="auto")
    workspace = lay_out(tmp_path / "auto", job, many)
    chosen = with_batch_size(job, workspace, Alone())
    assert chosen.params["batch_size"] == 1 << (len(many) // 8).bit_length() - 1
    assert chosen.params | {"batch_size": "auto"} == job.params
    monkeypatch.setattr("detkit_torchvision.memory.free_memory", lambda device: 0)
    assert with_batch_size(job, workspace, Alone()).params == chosen.params
    with pytest.raises(OutOfMemory, match="1 images at once at image_size=64 do not fit on cpu"):
        with_batch_size(job, lay_out(tmp_path / "none", job, many), Alone())


def test_what_fits_grows_with_memory_and_shrinks_with_the_picture(begin: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = free_memory(torch.device("cpu"))
    assert 1 << 20 < free < 1 << 44
    monkeypatch.setattr("detkit_torchvision.memory.free_memory", lambda device: 1 << 30)
    fits = {}
    for size in (64, 128):
        training = begin(image_size=size)
        before = {name: value.clone() for name, value in training.network.state_dict().items()}
        fits[size] = training.images_that_fit()
        assert all(torch.equal(value, before[name]) for name, value in training.network.state_dict().items())
    assert fits[64] / fits[128] == pytest.approx(4, rel=0.15)


OUT_OF_MEMORY = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from in_process import lay_out, make_job
from detkit.testing import tiny_dataset
from detkit_torchvision import memory
from detkit_torchvision.training import Training
memory.free_memory = lambda device: 400 << 20  # malloc keeps what was freed, so the limit below cannot be asked
data = tiny_dataset(Path("tiny"))
job = make_job("fcos_tiny", data, batch_size=8, image_size=640)
training = Training(job, lay_out(Path("run"), job, data))
training.prepare()
batch = next(iter(training.batches()))
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20), -1))
training.train_step(batch)
"""


@pytest.mark.parametrize(
    ("said", "is_so"),
    [
        ("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", True),
        ("could not create a primitive", True),
        ("could not create a primitive descriptor for a convolution forward propagation primitive", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_what_is_said_where_memory_ran_out(said: str, is_so: bool) -> None:
    assert is_out_of_memory(RuntimeError(said)) is is_so


@pytest.mark.skipif(sys.platform != "linux", reason="limits on memory are Linux's")
def test_out_of_memory_says_what_would_fit(tmp_path: Path) -> None:
    """A limit of the system on this process's memory stands for a small GPU."""
    code = OUT_OF_MEMORY.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code], check=False, cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "detkit.errors.OutOfMemory: out of memory: 8 images at once at image_size=640 do not fit" in done.stderr
    assert "would fit: with grad_accumulation=" in done.stderr


def test_one_cycle_is_torchs(begin: Any) -> None:
    training = begin(lr_scheduler="one_cycle", iterations=50, optimizer="sgd")
    optimizer = torch.optim.SGD(training.network.parameters(), lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.peak_learning_rate, total_steps=50)
    expected = []
    for _ in range(50):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step() if len(expected) < 50 else None
    assert [training.learning_rate(step) for step in range(50)] == pytest.approx(expected)


def test_best_by_another_score(tiny: Dataset) -> None:
    run = detkit.Trainer(model="torchvision/ssd_tiny", epochs=2, device="cpu", best_metric="AP50").fit(
        tiny, tiny, quiet=True
    )
    assert run.model.manifest.metrics["val/AP50"] == max(row["val/AP50"] for row in run.history if "val/AP50" in row)
    with pytest.raises(detkit.errors.RunFailed, match="best_metric=mask_AP: the validation has no such score"):
        detkit.Trainer(model="torchvision/ssd_tiny", epochs=1, best_metric="mask_AP").fit(tiny, tiny, quiet=True)
