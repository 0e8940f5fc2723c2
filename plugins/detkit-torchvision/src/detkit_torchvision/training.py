"""Training with torch, step by step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec
import numpy as np
import torch
import torchvision
from safetensors.torch import save
from torch import Tensor, nn

from detkit.checkpoints import BATCH_SIZE
from detkit.detections import Detections
from detkit.errors import InvalidValue, OutOfMemory, UsageError
from detkit.files import atomic_write, write_json
from detkit.job import Job, Trained, Workspace
from detkit.loop import Counters, TrainingLoop, load_ahead, loading_threads
from detkit.scores import SCORE_FLOOR, Scores, score
from detkit_torchvision.batches import Batch, Inputs, cache_budget, load_batch
from detkit_torchvision.detector import TorchvisionDetector
from detkit_torchvision.devices import choose_device, describe_device, to_device, use_threads
from detkit_torchvision.freezing import Frozen, train_without_statistics
from detkit_torchvision.memory import how_many, is_out_of_memory, kept_for_backward
from detkit_torchvision.models import MODELS, build, chosen_architecture, input_size
from detkit_torchvision.modify import modified
from detkit_torchvision.weights import ARTIFACT, initialise

ResultT = TypeVar("ResultT")

PREDICT_BATCH = 16

MOSAIC_UNTIL = 0.75
"""Share of the steps after which pictures are no longer put together of four, so that training ends on real ones."""

_SIZE_STEP = 32
"""Pixels between two sizes that ``multi_scale`` trains at."""

LARGEST_AUTO_BATCH = 64
"""What ``batch_size=auto`` chooses at most."""

_LEAST_STEPS = 8
"""Steps of an epoch that it leaves at least."""

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
            # Costs 4 times the step and changes no result.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        if self.params["amp"] == "fp16" and self.device.type == "cpu":
            raise UsageError("amp=fp16 needs a GPU; on a CPU choose amp=bf16 or none")
        self.spec = MODELS[job.model]
        self.image_size = input_size(self.params["image_size"], job.model, self.data)
        if 0 < self.params["multi_scale"] * self.image_size < _SIZE_STEP:
            least = f"at least {_SIZE_STEP / self.image_size:.2f}, as sizes are {_SIZE_STEP} pixels apart"
            raise InvalidValue("multi_scale", self.params["multi_scale"], least)
        self.architecture = chosen_architecture(job.model, self.params, self.image_size, self.data)
        torch.manual_seed(self.params["seed"])
        self.network: Any = build(
            job.model,
            len(job.classes),
            image_size=self.image_size,
            score_threshold=SCORE_FLOOR,
            nms_threshold=self.params["nms_threshold"],
            max_detections=self.params["max_detections"],
            architecture=self.architecture,
        )
        self.network = modified(self.network, self.params.get("modify"), job.model, len(job.classes))
        self.inputs = Inputs(self.data, job.model, self.image_size, cache_budget())
        self.steps_left_out = 0
        """Steps of this process that were not taken, as half precision gave no gradients."""

    def run(self) -> Trained:
        self.prepare()
        for _ in self.steps():
            pass
        return self._finish()

    def prepare(self) -> None:
        """Put the network, its weights and the optimizer where training begins, or where a checkpoint left them."""
        budget = cache_budget() - self.inputs.num_bytes
        self.validation = self._inputs("validation", budget)
        self.test = self._inputs("test", budget - (self.validation.num_bytes if self.validation else 0))
        if not self.resumes:
            self.origin = initialise(self.network, self.job, self.workspace, self.architecture)
            self.tell_origin()
            self._tell_architecture()
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
        parts = self._explained(lambda: self._backward(batch))
        self._explained(self._optimize)
        self._update_average()
        return parts

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Leave the gradients of a batch, taken in one or more passes; return the loss and its parts."""
        self.optimizer.zero_grad()
        num_passes = min(self.params["grad_accumulation"], len(batch.indices))
        sums: dict[str, float] = {}
        for rows in np.array_split(np.arange(len(batch.indices)), num_passes):
            losses = self._losses(self.network, batch, rows)
            parts = torch.stack(list(losses.values())) * (len(rows) / len(batch.indices))
            total = parts.sum()
            for name, value in zip(["loss", *losses], torch.cat([total[None], parts]).tolist(), strict=True):
                sums[name] = sums.get(name, 0.0) + value
            self.check_finite(sums, batch.indices)
            self.scaler.scale(total).backward()  # type: ignore[no-untyped-call]
        return sums

    def _optimize(self) -> None:
        """Take a step along the gradients.

        In half precision it is left out where they are not finite: `torch.amp.GradScaler` does so for fp16, and on CPUs
        torch's own kernels now and then return gradients of bf16 that are none.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.params["gradient_clip"] or float("inf"))
        if self.params["amp"] == "bf16" and not norm.isfinite():
            self.steps_left_out += 1
            self.say(f"step {self.step + 1} was left out, as bf16 gave gradients that are not finite")
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()

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
        if self.validation is None:
            return None
        inputs = self.validation
        return self._explained(lambda: self._score(inputs))

    @torch.no_grad()
    def validation_losses(self) -> dict[str, float]:
        """Return the loss and its parts of the network that is kept: as it is trained, with the norms' statistics."""
        if self.validation is None:
            return {}
        network, inputs = self.scored, self.validation
        train_without_statistics(network)
        torch.manual_seed(self.params["seed"])  # two-stage detectors sample what they are judged by
        sums: dict[str, float] = {}
        for chosen in self._passes(inputs):
            seeds = [[0]] * len(chosen)
            batch = load_batch(inputs, chosen, seeds=seeds, label_offset=self.spec.label_offset, augmentations=())
            losses = self._explained(functools.partial(self._losses, network, batch, range(len(chosen))))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(chosen) / len(inputs.data)
        return {"loss": sum(sums.values()), **sums}

    def _passes(self, inputs: Inputs) -> Iterator[range]:
        """Yield the images of each pass over a channel: no more at once than one of training has."""
        size = min(PREDICT_BATCH, self.images_per_pass)
        for start in range(0, len(inputs.data), size):
            self.workspace.raise_if_stopped()
            yield range(start, min(start + size, len(inputs.data)))

    @property
    def images_per_pass(self) -> int:
        """The most images that are on the device at once."""
        return -(-int(self.params["batch_size"]) // int(self.params["grad_accumulation"]))

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
        for chosen in self._passes(inputs):
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
                **self.architecture.native(),
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

    def _tell_architecture(self) -> None:
        """Say which numbers ``auto`` chose."""
        chosen = [name for name, value in self.architecture.native().items() if self.params[name] == "auto"]
        if chosen:
            values = (
                f"{name}={','.join(f'{one:g}' for one in np.ravel(getattr(self.architecture, name)))}"
                for name in chosen
            )
            self.say(f"chosen from the training boxes: {' '.join(values)}")

    def _scale(self, step: int) -> float:
        """Return how much larger than ``image_size`` the images of a step are."""
        if not self.params["multi_scale"]:
            return 1.0
        reach = int(self.params["multi_scale"] * self.image_size / _SIZE_STEP)
        shift = int(np.random.default_rng([self.params["seed"], step]).integers(-reach, reach + 1))
        return max(_SIZE_STEP, self.image_size + shift * _SIZE_STEP) / self.image_size

    def _explained(self, do: Callable[[], ResultT]) -> ResultT:
        """Do it; raise `OutOfMemory`, which says what would fit, in place of what torch raises."""
        try:
            return do()
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            cause = str(error)
        # Here the failed pass is gone, whose tensors its traceback held.
        self.optimizer.zero_grad()
        fits, asked = self.images_that_fit(), self.images_per_pass
        advice = (
            f"about {fits} would fit: with grad_accumulation={-(-self.params['batch_size'] // fits)} the batch stays "
            f"as it is, with batch_size={fits} it gets smaller"
            if 0 < fits < asked
            else f"choose an image_size below {self.image_size}, a lighter model, or free memory"
        )
        raise OutOfMemory(asked, self.image_size, describe_device(self.device), f"{advice} ({cause.splitlines()[0]})")

    def images_that_fit(self) -> int:
        """Return about how many images a pass has memory for, 0 where not even one fits. Trains nothing."""
        sizes = self.inputs.sizes
        largest = max(range(len(sizes)), key=lambda index: sizes[index][0] * sizes[index][1])
        batch = load_batch(self.inputs, [largest], seeds=[[0]], label_offset=self.spec.label_offset, augmentations=())
        kept = kept_for_backward(self.network, lambda: self._losses(self.network, batch, [0]))
        # A batch is as wide as its widest image and as high as its highest, and may be scaled up.
        padding = max(width for width, _ in sizes) * max(height for _, height in sizes) / np.prod(sizes[largest])
        return how_many(kept * float(padding) * (1 + self.params["multi_scale"]) ** 2, self.device)

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


def with_batch_size(job: Job, workspace: Workspace) -> Job:
    """Return the job with a number where ``batch_size`` is ``auto``; the same one again where the run goes on.

    It is a power of two, of which an epoch has at least 8. Raises `OutOfMemory` where not one image fits.
    """
    if job.params["batch_size"] != "auto":
        return job
    chosen = workspace.checkpoints / BATCH_SIZE
    if chosen.is_file():
        return _with_batches_of(job, msgspec.json.decode(chosen.read_bytes(), type=int))
    probe = Training(_with_batches_of(job, 1), workspace)
    to_device(probe.network, probe.device)
    fits, device = probe.images_that_fit(), describe_device(probe.device)
    if not fits:
        advice = f"choose an image_size below {probe.image_size}, a lighter model, or free memory"
        raise OutOfMemory(1, probe.image_size, device, advice)
    most = max(1, min(fits * job.params["grad_accumulation"], LARGEST_AUTO_BATCH, len(probe.data) // _LEAST_STEPS))
    size = 1 << (most.bit_length() - 1)
    write_json(chosen, size)
    message = f"batch_size {size}: about {fits} images of {probe.image_size} pixels fit on {device}"
    workspace.log("log", {"message": message})
    return _with_batches_of(job, size)


def _with_batches_of(job: Job, size: int) -> Job:
    return msgspec.structs.replace(job, params={**job.params, "batch_size": size})
