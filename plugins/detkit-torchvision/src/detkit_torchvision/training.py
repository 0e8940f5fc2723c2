"""Training with torch, step by step."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

import msgspec
import numpy as np
import torch
import torchvision
from safetensors.torch import load, save
from torch import Tensor, nn

from detkit.detections import Detections
from detkit.errors import InvalidValue, OutOfMemory, UsageError
from detkit.files import atomic_write
from detkit.job import Job, Trained, Workspace
from detkit.loading import load_ahead, loading_threads
from detkit.loop import Counters, TrainingLoop
from detkit.ranks import Ranks
from detkit.scores import SCORE_FLOOR, Scores, score
from detkit_torchvision.batches import Batch, Inputs, cache_budget, load_batch
from detkit_torchvision.detector import TorchvisionDetector
from detkit_torchvision.devices import begin_reading, compile_backbone, describe_device, to_device, use_threads
from detkit_torchvision.distributed import Shared, average_statistics, device_of, merged, summed, threads_of
from detkit_torchvision.freezing import Frozen, train_without_statistics
from detkit_torchvision.memory import how_many, is_out_of_memory, kept_for_backward
from detkit_torchvision.models import MODELS, build, chosen_architecture, input_size
from detkit_torchvision.modify import modified
from detkit_torchvision.optimizers import Averaging, load_optimizer, make_optimizer
from detkit_torchvision.probing import Way, choose_processes, choose_way, default_way
from detkit_torchvision.weights import ARTIFACT, initialise

ResultT = TypeVar("ResultT")

PREDICT_BATCH = 16

MOSAIC_UNTIL = 0.75
"""Share of the steps after which pictures are no longer put together of four, so that training ends on real ones."""

_SIZE_STEP = 32
"""Pixels between two sizes that ``multi_scale`` trains at."""

AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Training(TrainingLoop[Batch]):
    """One training run, from the job to the artifact; `run` reads top to bottom."""

    def __init__(self, job: Job, workspace: Workspace, ranks: Ranks | None = None) -> None:
        self.device = device_of(job)
        synchronise = functools.partial(torch.cuda.synchronize, self.device) if self.device.type == "cuda" else None
        super().__init__(job, workspace, ranks, synchronise)
        if self.device.type == "cpu":
            if (warning := use_threads(threads_of(job, self.ranks.place))) is not None:
                self.say(warning)
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Costs 4 times the step and changes no result.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        self.way = default_way(self.params["amp"], self.device)
        if self.way.amp == "fp16" and self.device.type == "cpu":
            raise UsageError("amp=fp16 needs a GPU; on a CPU choose amp=bf16 or none")
        if job.options["compile"] == "graphs" and self.params["grad_accumulation"] > 1:
            passes = self.params["grad_accumulation"]
            raise UsageError(
                f"compile=graphs and grad_accumulation={passes}: gradients of a pass lie where the next one writes its "
                "own; say compile=true"
            )
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
        self.inputs = Inputs(self.data, job.model, self.image_size, cache_budget(), self.ranks)
        self.steps_left_out = 0
        """Steps of this process that were not taken, as half precision gave no gradients."""

    def run(self) -> Trained:
        self.prepare()
        for _ in self.steps():
            pass
        return self._finish()

    def prepare(self) -> None:
        """Put the network, its weights and the optimizer where training begins, or where a checkpoint left them."""
        if not self.resumes:
            for first in (True, False):  # which may fetch weights for all
                if first == (self.ranks.rank == 0):
                    self.origin = initialise(self.network, self.job, self.workspace, self.architecture)
                self.ranks.sum([0.0])
            self.tell_origin()
            self._tell_architecture()
        to_device(self.network, self.device)
        self.frozen = Frozen(self.network, num_stages=self.params["frozen_stages"], norms=self._freezes_norms())
        self.optimizer = make_optimizer(self.network, self.params, self.peak_learning_rate)
        self._explained(lambda: choose_processes(self, self._losses))
        budget = cache_budget() - self.inputs.num_bytes
        self.validation = self._inputs("validation", budget)
        self.test = self._inputs("test", budget - (self.validation.num_bytes if self.validation else 0))
        self.way = choose_way(self, self._losses)
        torch.set_num_threads(self.way.threads)
        to_device(self.network, self.device, self.way.layout)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.way.amp == "fp16")
        self.average = copy.deepcopy(self.network) if self.params["ema_decay"] else None
        """The moving average of the weights, which is what is scored and kept; None where there is none."""
        self._averaging = None if self.average is None else Averaging(self.average, self.network)
        if self.resumes:
            self.resume()
        if self.job.options["compile"]:
            compile_backbone(self.network, self.device, self.job.options["compile"])
        self.shared = Shared(
            self.network,
            self.ranks,
            self.job.options["compress_gradients"],
            may_be_unused=self.params.get("modify") is not None,
        )

    @property
    def scored(self) -> Any:
        """The network that is validated and kept."""
        return self.network if self.average is None else self.average

    def batches(self) -> Iterator[Batch]:
        def load(step: int) -> Batch:
            batch = self.batch_indices(step)
            indices = [batch[row] for rows, _ in self._shares(step) for row in rows]
            return load_batch(
                self.inputs,
                indices,
                seeds=[self.image_seed(step, index) for index in indices],
                label_offset=self.spec.label_offset,
                augmentations=[name for name in self.params["augmentations"] if name != "mosaic" or step < late],
                scale=self._scale(step),
                pin=self.device.type == "cuda",
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
        with self.clock.part("optimizer", on_device=True):
            self._explained(self._optimize)
            self._update_average()
        return parts

    def _shares(self, step: int) -> list[tuple[list[int], float]]:
        """Return the rows of a step's batch that this process has in each pass, and their share of the batch."""
        num_images = len(self.batch_indices(step))
        return self.ranks.shares(num_images, min(self.params["grad_accumulation"], num_images))

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Leave the gradients of a batch, taken in one or more passes; return the loss and its parts.

        They are looked at, and compared with other processes, once the passes back are under way: a GPU then has work,
        and no process waits for the others twice in a step.
        """
        self.optimizer.zero_grad()
        shares = self._shares(self.step)
        found: list[Callable[[], list[float]]] = []
        start = 0
        for number, (own, share) in enumerate(shares, 1):
            rows = range(start, start + len(own))
            start += len(own)
            if self.job.options["compile"] == "graphs":  # what the step before gave is needed no more
                torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            with self.shared.last_pass(number == len(shares)):
                with self.clock.part("forward", on_device=True):
                    losses = self._losses(self.shared, batch, rows)
                    parts = torch.stack(list(losses.values())) * share
                    total = parts.sum()
                    found.append(begin_reading(torch.cat([total[None], parts]).detach()))
                with self.clock.part("backward", on_device=True):
                    # Of several processes' gradients the mean is taken.
                    self.scaler.scale(total * self.ranks.size).backward()  # type: ignore[no-untyped-call]
        sums = (sum(values) for values in zip(*(read() for read in found), strict=True))
        agreed = self.agree(dict(zip(["loss", *losses], sums, strict=True)))
        self.check_finite(agreed, self.batch_indices(self.step))
        return agreed

    def _optimize(self) -> None:
        """Take a step along the gradients.

        In half precision it is left out where they are not finite: `torch.amp.GradScaler` does so for fp16, and on CPUs
        torch's own kernels now and then return gradients of bf16 that are none. Compressed ones may be too large.
        Nothing else is looked at, as a GPU would be waited for.
        """
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), self.params["gradient_clip"] or float("inf"))
        is_half = self.way.amp == "bf16" and self.device.type == "cpu"
        half = "bf16" if is_half else self.job.options["compress_gradients"]
        if half != "none" and not norm.isfinite():
            self.steps_left_out += 1
            self.say(f"step {self.step + 1} was left out, as {half} gave gradients that are not finite")
            return
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _losses(self, network: Any, batch: Batch, rows: Any, way: Way | None = None) -> dict[str, Tensor]:
        """Return the parts of the loss of some of a batch's images, as one mean over them."""
        images = [batch.images[row] for row in rows]
        targets = [
            {name: value.to(self.device, non_blocking=True) for name, value in batch.targets[row].items()}
            for row in rows
        ]
        dtype = AMP_DTYPES.get((way or self.way).amp or "none")
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
            losses: dict[str, Tensor] = network(images, targets)
        return {name: value.float() for name, value in losses.items()}

    def _update_average(self) -> None:
        """Move the average towards the weights: at first fast, as it began with weights that had learned nothing."""
        if self._averaging is not None:
            self._averaging.move(1 - min(self.params["ema_decay"], (1 + self.step) / (10 + self.step)))

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
        sums = summed(sums, self.ranks)
        return {"loss": sum(sums.values()), **sums}

    def _passes(self, inputs: Inputs) -> Iterator[range]:
        """Yield the images of each pass over a channel that is this process's: no more at once than one of training."""
        for chosen in self._own_passes(len(inputs.data)):
            if self.ranks.size == 1:  # others would wait for this one's part
                self.workspace.raise_if_stopped()
            yield chosen

    def _own_passes(self, num_images: int) -> list[range]:
        size = min(PREDICT_BATCH, self.images_per_pass)
        passes = [range(start, min(start + size, num_images)) for start in range(0, num_images, size)]
        return [passes[number] for number in self.ranks.mine(len(passes))]

    @property
    def images_per_pass(self) -> int:
        """The most images that are on the device at once."""
        return -(-int(self.params["batch_size"]) // (int(self.params["grad_accumulation"]) * self.ranks.size))

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
        load_optimizer(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        return msgspec.convert(saved["counters"], Counters), saved["best"]

    def share_statistics(self) -> None:
        average_statistics([self.network, self.average], self.ranks)

    def _score(self, inputs: Inputs) -> Scores | None:
        """Score a channel, of which each process looks at its own images; the first has the scores."""
        detector = TorchvisionDetector(self.scored, self.job.model, self.job.classes, self.image_size)
        own: dict[int, Detections] = {}
        for chosen in self._passes(inputs):
            sizes = [(int(w), int(h)) for w, h in inputs.data.sizes[list(chosen)]]
            own |= zip(chosen, detector.detect_inputs([inputs.image(i) for i in chosen], sizes), strict=True)
        found = merged(own, self.ranks, self.job.classes)
        if self.ranks.rank > 0:
            return None
        return score(inputs.data, found, max_detections=self.params["max_detections"], score_floor=SCORE_FLOOR)

    def _finish(self) -> Trained:
        self._take_best()
        if self.ranks.rank == 0:
            with atomic_write(self.workspace.model / ARTIFACT) as file:
                file.write(save(_contiguous(self.scored.state_dict())))
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
                **self._told_to_optimizer(),
                "step": msgspec.to_builtins(self.way),
            },
            weights=self.origin,
            metrics=metrics,
            score_threshold=self.best.score_threshold,
            max_detections=self.params["max_detections"],
            versions={"torch": str(torch.__version__), "torchvision": torchvision.__version__},
            hardware={
                "device": describe_device(self.device),
                "threads": str(torch.get_num_threads()),
                "processes": str(self.ranks.size),
            },
            timings=self._timings(),
        )

    def _told_to_optimizer(self) -> dict[str, Any]:
        """Return what torch's own object says, under the names of the parameters, for whoever compares the two."""
        told = self.optimizer.defaults | self.optimizer.param_groups[0]
        told["learning_rate"] = self.optimizer.defaults["lr"] / self.learning_rate_scale
        names = ["learning_rate", "weight_decay", *(["momentum"] if self.params["optimizer"] == "sgd" else [])]
        return {"optimizer": type(self.optimizer).__name__, **{name: told[name] for name in names}}

    def _take_best(self) -> None:
        """Put the best weights into the network that is scored; the first process knows them."""
        best = self.best.state
        if self.ranks.size > 1:
            if not self.ranks.sum([float(best is not None)])[0]:
                return
            best = load(self.ranks.broadcast(save(_contiguous(best)) if self.ranks.rank == 0 else b""))
        if best is not None:
            self.scored.load_state_dict(best)

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
            with self.ranks.lost():
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
        inputs = Inputs(data, self.job.model, self.image_size, budget, self.ranks)
        for index in (index for chosen in self._passes(inputs) for index in chosen):
            inputs.image(index)
        return inputs

    def _timings(self) -> dict[str, float]:
        self.clock.move("backward", "communication", self.shared.waited_s(self.clock.steps))
        return self.report_times(self.shared.bytes_per_step)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as `save` takes them."""
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
