"""Training and prediction with torch, in the worker."""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn

from detkit.backends import Engine, PredictOptions
from detkit.data import Dataset, Detections
from detkit.errors import NonFiniteLoss
from detkit.files import atomic_write
from detkit.images import Image
from detkit.job import Job, Model, Trained, WeightsOrigin, Workspace
from detkit.params import every_steps
from detkit.scores import SCORE_FLOOR, Scores, score
from detkit_torchvision.batches import Batch, Inputs, batches, cache_budget, num_batches, resize
from detkit_torchvision.devices import choose_device, describe_device, keep_freed_memory, to_device, use_threads
from detkit_torchvision.models import MODELS, build, final_size
from detkit_torchvision.weights import ARTIFACT, initialise

LOG_EVERY = 10
"""Steps between two metric events; the loss is their mean."""

PREDICT_BATCH = 16
_PROGRESS_EVERY_S = 0.5


class TorchvisionEngine(Engine):
    """The worker's side."""

    def train(self, job: Job, workspace: Workspace) -> Trained:
        keep_freed_memory()
        return Training(job, workspace).run()

    def load(self, model: Model, options: PredictOptions) -> TorchvisionDetector:
        manifest = model.manifest
        image_size = int(manifest.native["image_size"])
        device = choose_device(options.device)
        network = build(
            manifest.model,
            len(manifest.classes),
            image_size=image_size,
            score_threshold=options.score_threshold,
            nms_threshold=options.nms_threshold or manifest.params["nms_threshold"],
            max_detections=options.max_detections or manifest.max_detections,
        )
        network.load_state_dict(load_file(model.path / ARTIFACT))
        to_device(network, device)
        return TorchvisionDetector(network, manifest.model, model.classes, image_size)


class TorchvisionDetector:
    """An opened network; also what validation uses while it trains."""

    def __init__(self, network: Any, model: str, classes: Sequence[str], image_size: int) -> None:
        self._network, self._model, self._classes = network, model, tuple(classes)
        self._image_size = image_size

    def detect(self, images: Sequence[Image]) -> list[Detections]:
        sizes = [(image.shape[1], image.shape[0]) for image in images]
        inputs = [
            resize(image, *final_size(self._model, self._image_size, *size))
            for image, size in zip(images, sizes, strict=True)
        ]
        return self.detect_inputs(inputs, sizes)

    @torch.inference_mode()
    def detect_inputs(self, inputs: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detect on uint8 images that have the network's input size; ``sizes`` are the original width and height."""
        self._network.eval()
        offset = MODELS[self._model].label_offset
        found = []
        for result, tensor, (width, height) in zip(self._network(list(inputs)), inputs, sizes, strict=True):
            scale = np.array([width / tensor.shape[-1], height / tensor.shape[-2]] * 2)
            boxes = result["boxes"].double().cpu().numpy() * scale
            scores = result["scores"].double().cpu().numpy()
            order = np.argsort(-scores, kind="stable")
            found.append(
                Detections(
                    path="",
                    width=width,
                    height=height,
                    classes=self._classes,
                    boxes=np.clip(boxes, 0, [width, height, width, height])[order],
                    labels=(result["labels"].cpu().numpy() - offset)[order],
                    scores=scores[order],
                )
            )
        return found

    def close(self) -> None:
        self._network = None


@dataclass
class Best:
    """The weights kept so far: those of the highest ``val/AP``."""

    ap: float = -1.0
    metrics: dict[str, float] | None = None
    score_threshold: float | None = None
    state: dict[str, Tensor] | None = None


class Training:
    """One training run, from the job to the artifact; `run` reads top to bottom."""

    def __init__(self, job: Job, workspace: Workspace) -> None:
        self.job, self.workspace, self.params = job, workspace, job.params
        self.device = choose_device(job.options["device"])
        if self.device.type == "cpu":
            if (warning := use_threads(job.options["threads"])) is not None:
                workspace.log("log", {"message": warning})
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # costs 4 times the step, changes no result
        data = workspace.dataset("train")
        assert data is not None
        self.spec = MODELS[job.model]
        self.image_size = input_size(self.params["image_size"], job.model, data)
        torch.manual_seed(self.params["seed"])
        self.network: Any = build(
            job.model,
            len(job.classes),
            image_size=self.image_size,
            score_threshold=SCORE_FLOOR,
            nms_threshold=self.params["nms_threshold"],
            max_detections=self.params["max_detections"],
        )
        budget = cache_budget()
        self.inputs = Inputs(data, job.model, self.image_size, budget)
        budget -= self.inputs.num_bytes
        self.validation = self._inputs("validation", budget)
        self.test = self._inputs("test", budget - (self.validation.num_bytes if self.validation else 0))
        self.steps_per_epoch = num_batches(len(data), self.params["batch_size"])
        self.total_steps = self.params["iterations"] or self.params["epochs"] * self.steps_per_epoch
        self.warmup_steps = self._warmup_steps()
        self.best = Best()
        self.origin = WeightsOrigin()
        self.step = 0

    def run(self) -> Trained:
        self.prepare()
        for _ in self.steps():
            pass
        return self._finish()

    def prepare(self) -> None:
        """Put the network, its weights and the optimizer where training begins, or where a checkpoint left them."""
        resumed = self._checkpoint_file.is_file()
        if not resumed:
            self.origin = initialise(self.network, self.job, self.workspace)
            if self.origin.kept or self.origin.new:
                kept, new = _names(self.origin.kept), _names(self.origin.new)
                self._say(f"weights from {self.origin.source}: kept {kept}; fresh {new}")
        to_device(self.network, self.device)
        self.optimizer = self._make_optimizer()
        if resumed:
            self._restore()

    def steps(self) -> Iterator[int]:
        """Train, log, validate and save; yield the number of steps done after each."""
        validate_steps = every_steps(self.params["validate_every"], self.steps_per_epoch)
        checkpoint_steps = every_steps(self.params["checkpoint_every"], self.steps_per_epoch)
        window: list[dict[str, float]] = []
        meter = Meter(self.step, self.total_steps)
        for batch in self._batches():
            self.workspace.raise_if_stopped()
            window.append(self._train_step(batch))
            self.step += 1
            ends = self.step == self.total_steps
            if self.step % LOG_EVERY == 0 or self.step % self.steps_per_epoch == 0 or ends:
                means = {f"train/{name}": float(np.mean([w[name] for w in window])) for name in window[0]}
                self._log("metric", {**means, "train/learning_rate": self.learning_rate(self.step - 1)})
                window = []
            if (progress := meter.update(self.step, len(batch.images))) is not None:
                self._log("progress", progress)
            if self.validation is not None and (self.step % validate_steps == 0 or ends):
                self._validate(self.validation)
                meter.restart(self.step)
            if self.step % checkpoint_steps == 0 or ends:
                self._save_checkpoint()
            yield self.step

    def _train_step(self, batch: Batch) -> dict[str, float]:
        # A seed for each step: sampling inside the network is the same after a resume, and whatever ran in between.
        torch.manual_seed(self.params["seed"] * 1_000_003 + self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.network.train()
        targets = [{name: value.to(self.device) for name, value in target.items()} for target in batch.targets]
        losses = self.network(batch.images, targets)
        total = torch.stack(list(losses.values())).sum()
        parts = {"loss": total.item(), **{name: value.item() for name, value in losses.items()}}
        if not math.isfinite(parts["loss"]):
            files = [self.inputs.data.image_ids[index] for index in batch.indices]
            raise NonFiniteLoss(self.step + 1, self.learning_rate(self.step), parts, files)
        self.optimizer.zero_grad()
        total.backward()
        if self.params["gradient_clip"]:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.params["gradient_clip"])
        self.optimizer.step()
        return parts

    def learning_rate(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0: linear warm-up, then the schedule."""
        peak = self.params["learning_rate"]
        if step < self.warmup_steps:
            return float(peak * (step + 1) / self.warmup_steps)
        if self.params["lr_scheduler"] == "constant":
            return float(peak)
        if self.params["lr_scheduler"] == "step":
            passed = sum(step >= epoch * self.steps_per_epoch for epoch in self.params["lr_scheduler_step"])
            return float(peak * self.params["lr_scheduler_factor"] ** passed)
        done = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return float(peak * 0.5 * (1 + math.cos(math.pi * done)))

    def _validate(self, inputs: Inputs) -> None:
        scores = self._score(inputs)
        metrics = {f"val/{name}": scores[name] for name in ("AP", "AP50", "AP75")}
        self._log("metric", {name: value for name, value in metrics.items() if math.isfinite(value)})
        if scores["AP"] > self.best.ap:
            state = {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}
            self.best = Best(scores["AP"], metrics, scores.score_threshold, state)

    def _score(self, inputs: Inputs) -> Scores:
        detector = TorchvisionDetector(self.network, self.job.model, self.job.classes, self.image_size)
        found: list[Detections] = []
        for start in range(0, len(inputs.data), PREDICT_BATCH):
            self.workspace.raise_if_stopped()
            chosen = range(start, min(start + PREDICT_BATCH, len(inputs.data)))
            sizes = [(int(w), int(h)) for w, h in inputs.data.sizes[chosen.start : chosen.stop]]
            found += detector.detect_inputs([inputs.image(i) for i in chosen], sizes)
        return score(inputs.data, found, max_detections=self.params["max_detections"], score_floor=SCORE_FLOOR)

    def _finish(self) -> Trained:
        if self.best.state is not None:
            self.network.load_state_dict(self.best.state)
        metrics = dict(self.best.metrics or {})
        state = {name: value.detach().cpu().contiguous() for name, value in self.network.state_dict().items()}
        with atomic_write(self.workspace.model / ARTIFACT) as file:
            file.write(save(state))
        if self.test is not None:
            scores = self._score(self.test)
            tested = {f"test/{name}": scores[name] for name in ("AP", "AP50", "AP75") if math.isfinite(scores[name])}
            self._log("metric", tested)
            metrics |= tested
        return Trained(
            native={
                "image_size": self.image_size,
                "total_steps": self.total_steps,
                "steps_per_epoch": self.steps_per_epoch,
                "warmup_steps": self.warmup_steps,
                "optimizer": type(self.optimizer).__name__,
            },
            weights=self.origin,
            metrics={name: value for name, value in metrics.items() if math.isfinite(value)},
            score_threshold=self.best.score_threshold,
            max_detections=self.params["max_detections"],
            versions={"torch": str(torch.__version__), "torchvision": torchvision.__version__},
            hardware={"device": describe_device(self.device), "threads": str(torch.get_num_threads())},
        )

    @property
    def _checkpoint_file(self) -> Any:
        return self.workspace.checkpoints / "last.pt"

    def _save_checkpoint(self) -> None:
        content = io.BytesIO()
        torch.save(
            {
                "step": self.step,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": vars(self.best),
                "origin": msgspec.to_builtins(self.origin),
            },
            content,
        )
        with atomic_write(self._checkpoint_file) as file:
            file.write(content.getbuffer())

    def _restore(self) -> None:
        saved = torch.load(self._checkpoint_file, map_location="cpu", weights_only=True)
        self.network.load_state_dict(saved["network"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best = Best(**saved["best"])
        self.step = int(saved["step"])
        self._log("state", {"state": "resumed"})
        self._say(f"resumed after step {self.step} of {self.total_steps}")
        self.origin = msgspec.convert(saved["origin"], WeightsOrigin)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": self.params["weight_decay"]},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        if self.params["optimizer"] == "sgd":
            return torch.optim.SGD(groups, lr=self.params["learning_rate"], momentum=self.params["momentum"])
        return torch.optim.AdamW(groups, lr=self.params["learning_rate"])

    def _warmup_steps(self) -> int:
        epochs, iterations = self.params["warmup_epochs"], self.params["warmup_iterations"]
        if epochs is not None:
            return round(epochs * self.steps_per_epoch)
        return round(0.05 * self.total_steps) if iterations == "auto" else int(iterations or 0)

    def _inputs(self, channel: str, budget: int) -> Inputs | None:
        """Return a channel that is only scored. Every image is decoded once now, not after hours of training."""
        data = self.workspace.dataset(channel)
        if data is None or len(data) == 0:
            return None
        inputs = Inputs(data, self.job.model, self.image_size, budget)
        for index in range(len(data)):
            self.workspace.raise_if_stopped()
            inputs.image(index)
        return inputs

    def _batches(self) -> Any:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        asked = self.job.options["num_workers"]
        return batches(
            self.inputs,
            batch_size=self.params["batch_size"],
            label_offset=self.spec.label_offset,
            augmentations=self.params["augmentations"],
            seed=self.params["seed"],
            first_step=self.step,
            last_step=self.total_steps,
            num_workers=(0 if cores <= 2 else min(8, cores - 1)) if asked == "auto" else asked,
        )

    def _log(self, kind: Any, values: dict[str, Any]) -> None:
        self.workspace.log(kind, values, step=self.step, epoch=round(self.step / self.steps_per_epoch, 4))

    def _say(self, message: str) -> None:
        self._log("log", {"message": message})


class Meter:
    """Images per second and time left, over the steps since the last report."""

    def __init__(self, step: int, total: int) -> None:
        self._total = total
        self.restart(step)

    def restart(self, step: int) -> None:
        """Begin a new interval, after a report or something that is not training."""
        self._images, self._step, self._last = 0, step, time.monotonic()

    def update(self, step: int, num_images: int) -> dict[str, float] | None:
        """Count a step; returns numbers to report at most twice a second, and at the end."""
        self._images += num_images
        elapsed = time.monotonic() - self._last
        if elapsed < _PROGRESS_EVERY_S and step < self._total:
            return None
        numbers = {
            "total_steps": float(self._total),
            "images_per_s": self._images / elapsed if elapsed else 0.0,
            "eta_s": (self._total - step) * elapsed / (step - self._step),
        }
        self.restart(step)
        return numbers


def input_size(wanted: int | str, model: str, data: Dataset) -> int:
    """Return the network's input size; ``auto`` is torchvision's, or for our own models the data's, 160 to 320."""
    if wanted != "auto":
        return int(wanted)
    spec = MODELS[model]
    if spec.coco is not None:
        return spec.image_size
    median = float(np.median(data.sizes.max(axis=1)))
    return int(np.clip(32 * round(median / 32), 160, 320))


def _names(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"
