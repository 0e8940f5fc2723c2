"""Training and prediction with torch, in the worker."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
import torch
import torchvision
from safetensors.torch import load_file, save
from torch import Tensor, nn

from detkit.backends import Engine, PredictOptions
from detkit.data import Dataset
from detkit.detections import Detections
from detkit.files import atomic_write
from detkit.images import Image
from detkit.job import Job, Model, Trained, WeightsOrigin, Workspace
from detkit.loop import Best, TrainingLoop, load_ahead, loading_threads
from detkit.scores import SCORE_FLOOR, Scores, score
from detkit_torchvision.batches import Batch, Inputs, cache_budget, load_batch, resize
from detkit_torchvision.devices import choose_device, describe_device, keep_freed_memory, to_device, use_threads
from detkit_torchvision.models import MODELS, build, final_size
from detkit_torchvision.weights import ARTIFACT, initialise

PREDICT_BATCH = 16

MOSAIC_UNTIL = 0.75
"""Share of the steps after which pictures are no longer put together of four, so that training ends on real ones."""

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
}
"""Those without momentum of their own choosing."""


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


class Training(TrainingLoop[Batch]):
    """One training run, from the job to the artifact; `run` reads top to bottom."""

    def __init__(self, job: Job, workspace: Workspace) -> None:
        super().__init__(job, workspace)
        self.device = choose_device(job.options["device"])
        if self.device.type == "cpu":
            if (warning := use_threads(job.options["threads"])) is not None:
                self.say(warning)
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # costs 4 times the step, changes no result
        self.spec = MODELS[job.model]
        self.image_size = input_size(self.params["image_size"], job.model, self.data)
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
        self.inputs = Inputs(self.data, job.model, self.image_size, budget)
        budget -= self.inputs.num_bytes
        self.validation = self._inputs("validation", budget)
        self.test = self._inputs("test", budget - (self.validation.num_bytes if self.validation else 0))
        self.origin = WeightsOrigin()

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
                self.say(f"weights from {self.origin.source}: kept {kept}; fresh {new}")
        to_device(self.network, self.device)
        self.optimizer = self._make_optimizer()
        self.average = copy.deepcopy(self.network) if self.params["ema_decay"] else None
        """The moving average of the weights, which is what is scored and kept; None where there is none."""
        if resumed:
            self._restore()

    @property
    def scored(self) -> Any:
        """The network that is validated and kept."""
        return self.network if self.average is None else self.average

    def batches(self) -> Iterator[Batch]:
        def load(step: int) -> Batch:
            indices = self.batch_indices(step)
            return load_batch(
                self.inputs,
                indices,
                seeds=[self.image_seed(step, index) for index in indices],
                label_offset=self.spec.label_offset,
                augmentations=[name for name in self.params["augmentations"] if name != "mosaic" or step < late],
            )

        late = MOSAIC_UNTIL * self.total_steps

        num_workers = loading_threads(self.job.options["num_workers"])
        return load_ahead(load, range(self.step, self.total_steps), num_workers)

    def train_step(self, batch: Batch) -> dict[str, float]:
        torch.manual_seed(self.step_seed())
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.network.train()
        targets = [{name: value.to(self.device) for name, value in target.items()} for target in batch.targets]
        losses = self.network(batch.images, targets)
        total = torch.stack(list(losses.values())).sum()
        parts = {"loss": total.item(), **{name: value.item() for name, value in losses.items()}}
        self.check_finite(parts, batch.indices)
        self.optimizer.zero_grad()
        total.backward()
        if self.params["gradient_clip"]:
            nn.utils.clip_grad_norm_(self.network.parameters(), self.params["gradient_clip"])
        self.optimizer.step()
        self._update_average()
        return parts

    @torch.no_grad()
    def _update_average(self) -> None:
        """Move the average towards the weights: at first fast, as it began with weights that had learned nothing."""
        if self.average is None:
            return
        decay = min(self.params["ema_decay"], (1 + self.step) / (10 + self.step))
        own = self.network.state_dict()
        for name, kept in self.average.state_dict().items():
            if kept.dtype.is_floating_point:
                kept.lerp_(own[name], 1 - decay)
            else:
                kept.copy_(own[name])

    def validate(self) -> Scores | None:
        return None if self.validation is None else self._score(self.validation)

    def snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.scored.state_dict().items()}

    def _score(self, inputs: Inputs) -> Scores:
        detector = TorchvisionDetector(self.scored, self.job.model, self.job.classes, self.image_size)
        found: list[Detections] = []
        for start in range(0, len(inputs.data), PREDICT_BATCH):
            self.workspace.raise_if_stopped()
            chosen = range(start, min(start + PREDICT_BATCH, len(inputs.data)))
            sizes = [(int(w), int(h)) for w, h in inputs.data.sizes[chosen.start : chosen.stop]]
            found += detector.detect_inputs([inputs.image(i) for i in chosen], sizes)
        return score(inputs.data, found, max_detections=self.params["max_detections"], score_floor=SCORE_FLOOR)

    def _finish(self) -> Trained:
        if self.best.state is not None:
            self.scored.load_state_dict(self.best.state)
        state = {name: value.detach().cpu().contiguous() for name, value in self.scored.state_dict().items()}
        with atomic_write(self.workspace.model / ARTIFACT) as file:
            file.write(save(state))
        metrics = self.final_metrics(None if self.test is None else self._score(self.test))
        return Trained(
            native={
                "image_size": self.image_size,
                "steps": self.step,
                "total_steps": self.total_steps,
                "steps_per_epoch": self.steps_per_epoch,
                "warmup_steps": self.warmup_steps,
                "optimizer": type(self.optimizer).__name__,
            },
            weights=self.origin,
            metrics=metrics,
            score_threshold=self.best.score_threshold,
            max_detections=self.params["max_detections"],
            versions={"torch": str(torch.__version__), "torchvision": torchvision.__version__},
            hardware={"device": describe_device(self.device), "threads": str(torch.get_num_threads())},
        )

    @property
    def _checkpoint_file(self) -> Any:
        return self.workspace.checkpoints / "last.pt"

    def save_checkpoint(self) -> None:
        content = io.BytesIO()
        torch.save(
            {
                "step": self.step,
                "network": self.network.state_dict(),
                "average": None if self.average is None else self.average.state_dict(),
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
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.best = Best(**saved["best"])
        self.step = int(saved["step"])
        self.log("state", {"state": "resumed"})
        self.say(f"resumed after step {self.step} of {self.total_steps}")
        self.origin = msgspec.convert(saved["origin"], WeightsOrigin)

    def _make_optimizer(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": self.params["weight_decay"]},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        rate, name = self.params["learning_rate"], self.params["optimizer"]
        if name == "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=self.params["momentum"])
        return OPTIMIZERS[name](groups, lr=rate)

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
