"""Training with torch, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import torch
import torchvision
from safetensors.torch import save
from torch import Tensor, nn

from detkit.detections import Detections
from detkit.errors import OutOfMemory, UsageError
from detkit.files import atomic_write
from detkit.job import Job, Trained, Workspace
from detkit.loop import Counters, TrainingLoop, load_ahead, loading_threads
from detkit.scores import SCORE_FLOOR, Scores, score
from detkit_torchvision.batches import Batch, Inputs, cache_budget, load_batch
from detkit_torchvision.detector import TorchvisionDetector
from detkit_torchvision.devices import choose_device, describe_device, to_device, use_threads
from detkit_torchvision.freezing import Frozen
from detkit_torchvision.memory import images_that_fit, is_out_of_memory
from detkit_torchvision.models import MODELS, build, input_size
from detkit_torchvision.weights import ARTIFACT, initialise

PREDICT_BATCH = 16

MOSAIC_UNTIL = 0.75
"""Share of the steps after which pictures are no longer put together of four, so that training ends on real ones."""

_SIZE_STEP = 32
"""Pixels between two sizes that ``multi_scale`` trains at."""

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "rmsprop": torch.optim.RMSprop,
    "adadelta": torch.optim.Adadelta,
}
"""Those without momentum of their own choosing."""


class Training(TrainingLoop[Batch]):
    """One training run, from the job to the artifact; `run` reads top to bottom."""

    def __init__(self, job: Job, workspace: Workspace) -> None:
        super().__init__(job, workspace)
        self.device = choose_device(job.options["device"])
        if self.device.type == "cpu":
            if (warning := use_threads(job.options["threads"])) is not None:
                self.say(warning)
            torch.use_deterministic_algorithms(True, warn_only=True)
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # costs 4 times the step, changes no result
        if self.params["amp"] == "fp16" and self.device.type == "cpu":
            raise UsageError("amp=fp16 needs a GPU; on a CPU choose amp=bf16 or none")
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

    def run(self) -> Trained:
        self.prepare()
        for _ in self.steps():
            pass
        return self._finish()

    def prepare(self) -> None:
        """Put the network, its weights and the optimizer where training begins, or where a checkpoint left them."""
        if not self.resumes:
            self.origin = initialise(self.network, self.job, self.workspace)
            self.tell_origin()
        to_device(self.network, self.device)
        self.frozen = Frozen(self.network, num_stages=self.params["frozen_stages"], norms=self._freezes_norms())
        self.optimizer = self._make_optimizer()
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.params["amp"] == "fp16")
        self.average = copy.deepcopy(self.network) if self.params["ema_decay"] else None
        """The moving average of the weights, which is what is scored and kept; None where there is none."""
        if self.resumes:
            self.resume()

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
                scale=self._scale(step),
            )

        late = MOSAIC_UNTIL * self.total_steps

        num_workers = loading_threads(self.job.options["num_workers"])
        return load_ahead(load, range(self.step, self.total_steps), num_workers)

    def train_step(self, batch: Batch) -> dict[str, float]:
        torch.manual_seed(self.step_seed())
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.network.train()
        self.frozen.keep()
        self.optimizer.zero_grad()
        passes = np.array_split(
            np.arange(len(batch.indices)), min(self.params["grad_accumulation"], len(batch.indices))
        )
        sums: dict[str, float] = {}
        try:
            for rows in passes:
                losses = self._losses(self.network, batch, rows)
                share = len(rows) / len(batch.indices)
                total = torch.stack(list(losses.values())).sum() * share
                parts = {"loss": total.item(), **{name: value.item() * share for name, value in losses.items()}}
                sums = {name: sums.get(name, 0.0) + value for name, value in parts.items()}
                self.check_finite(sums, batch.indices)
                self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):
                raise self._out_of_memory(len(passes[0])) from error
            raise
        if self.params["gradient_clip"]:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.network.parameters(), self.params["gradient_clip"])
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self._update_average()
        return sums

    def _losses(self, network: Any, batch: Batch, rows: Any) -> dict[str, Tensor]:
        """Return the parts of the loss of some of a batch's images, as one mean over them."""
        images = [batch.images[row] for row in rows]
        targets = [{name: value.to(self.device) for name, value in batch.targets[row].items()} for row in rows]
        dtype = AMP_DTYPES.get(self.params["amp"])
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            losses: dict[str, Tensor] = network(images, targets)
        return {name: value.float() for name, value in losses.items()}

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

    @torch.no_grad()
    def validation_losses(self) -> dict[str, float]:
        """Return the loss and its parts of the network that is kept: as it is trained, with the norms' statistics."""
        if self.validation is None:
            return {}
        network, inputs = self.scored, self.validation
        network.train()
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):
                part.eval()
        torch.manual_seed(self.params["seed"])  # two-stage detectors sample what they are judged by
        sums: dict[str, float] = {}
        for start in range(0, len(inputs.data), self.params["batch_size"]):
            self.workspace.raise_if_stopped()
            chosen = range(start, min(start + self.params["batch_size"], len(inputs.data)))
            seeds = [[0]] * len(chosen)
            batch = load_batch(inputs, chosen, seeds=seeds, label_offset=self.spec.label_offset, augmentations=())
            for name, value in self._losses(network, batch, range(len(chosen))).items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(chosen) / len(inputs.data)
        return {"loss": sum(sums.values()), **sums}

    def snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.scored.state_dict().items()}

    def write_state(self, file: IO[bytes], counters: Counters) -> None:
        state = {
            "counters": msgspec.to_builtins(counters),
            "network": self.network.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best.state,
        }
        torch.save(state, file)

    def read_state(self, file: Path) -> tuple[Counters, Any]:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        self.network.load_state_dict(saved["network"])
        if self.average is not None:
            self.average.load_state_dict(saved["average"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        return msgspec.convert(saved["counters"], Counters), saved["best"]

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
                "batch_size": self.params["batch_size"],
                "peak_learning_rate": self.peak_learning_rate,
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

    def _make_optimizer(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.network.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in trainable if p.ndim > 1], "weight_decay": self.params["weight_decay"]},
            {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
        ]
        rate, name = self.peak_learning_rate, self.params["optimizer"]
        if name == "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=self.params["momentum"])
        return OPTIMIZERS[name](groups, lr=rate)

    def _freezes_norms(self) -> bool:
        """Whether batch norms keep their statistics; by default where torchvision's own recipe for the model does."""
        if self.params["batch_norm"] == "auto":
            return self.spec.frozen_norms and self.params["weights"] is not None
        return bool(self.params["batch_norm"] == "frozen")

    def _scale(self, step: int) -> float:
        """Return how much larger than ``image_size`` the images of a step are."""
        if not self.params["multi_scale"]:
            return 1.0
        reach = int(self.params["multi_scale"] * self.image_size / _SIZE_STEP)
        shift = int(np.random.default_rng([self.params["seed"], step]).integers(-reach, reach + 1))
        return max(_SIZE_STEP, self.image_size + shift * _SIZE_STEP) / self.image_size

    def _out_of_memory(self, num_images: int) -> OutOfMemory:
        """Say what would fit, which can be measured only where one image does."""
        self.optimizer.zero_grad()
        try:
            fits = images_that_fit(self.network, self.inputs, self.spec.label_offset, self.device)
        except (RuntimeError, MemoryError):
            fits = 0
        passes = -(-self.params["batch_size"] // max(1, fits))
        advice = (
            f"about {fits} would fit: batch_size={fits} changes what is learned, grad_accumulation={passes} does not"
            if 0 < fits < num_images
            else f"choose an image_size below {self.image_size}, a lighter model, or free memory"
        )
        return OutOfMemory(num_images, self.image_size, describe_device(self.device), advice)

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
