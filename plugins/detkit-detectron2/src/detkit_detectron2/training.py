"""Training a network of Detectron2's, step by step."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

import detectron2
import msgspec
import torch
import torchvision
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer
from detectron2.solver.build import get_default_optimizer_params, maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from safetensors.torch import load, save
from torch import Tensor, nn

from detkit.detections import Detections
from detkit.errors import OutOfMemory, UsageError
from detkit.files import atomic_write
from detkit.job import Job, Trained, Workspace
from detkit.loading import load_ahead, loading_threads
from detkit.loop import Counters, TrainingLoop
from detkit.ranks import Ranks
from detkit.scores import SCORE_FLOOR, Scores, score
from detkit_detectron2.batches import Batch, Inputs
from detkit_detectron2.configs import FROM_SCRATCH, build_cfg, starts_from_scratch
from detkit_detectron2.detector import Detectron2Detector
from detkit_detectron2.weights import ARTIFACT, CONFIG, initialise
from detkit_torchvision.batches import cache_budget
from detkit_torchvision.devices import describe_device, use_threads
from detkit_torchvision.distributed import Shared, average_statistics, device_of, merged, summed, threads_of
from detkit_torchvision.freezing import train_without_statistics
from detkit_torchvision.memory import how_many, is_out_of_memory, kept_for_backward
from detkit_torchvision.optimizers import OPTIMIZERS, load_optimizer

ResultT = TypeVar("ResultT")

PREDICT_BATCH = 16

_AMP_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}

_NORMALIZER = "loss_normalizer"
"""The one number that Detectron2's one-stage networks learn which is no tensor: a moving average of their positives."""

_PASS_SEEDS = 1 << 40
"""How far the seeds of two passes over parts of a batch lie apart."""


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
            if self.params["amp"] == "fp16":
                raise UsageError("amp=fp16 needs a GPU; on a CPU choose amp=bf16 or none")
        self.cfg = build_cfg(job, workspace, self.data)
        self.cfg.SOLVER.BASE_LR, self.cfg.SOLVER.MAX_ITER = self.peak_learning_rate, self.total_steps
        self.cfg.SOLVER.WARMUP_ITERS = self.warmup_steps
        self._loss_names: Sequence[str] | None = None
        torch.manual_seed(self.params["seed"])
        self.network: Any = build_model(self.cfg)
        mapper = self.params.get("mapper")
        self.inputs = Inputs(self.data, self.cfg, cache_budget(), self.ranks, trains=True, mapper=mapper)

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
            for first in (True, False):  # which may fetch weights for all
                if first == (self.ranks.rank == 0):
                    self.origin = initialise(self.network, self.job, self.workspace, self.cfg)
                self.ranks.sum([0.0])
            self.tell_origin()
            if starts_from_scratch(self.job, self.workspace):
                changed = ", ".join(f"{key} {value}" for key, value in FROM_SCRATCH.items())
                self.say(
                    f"from scratch Detectron2's own settings diverge at once, so unless given otherwise: {changed}"
                )
        # A step takes 7 to 13 % less time so, on a CPU.
        self.network.to(self.device, memory_format=torch.channels_last)
        self.optimizer = self._optimizer()
        self._rate_factors = [group["lr"] / self.cfg.SOLVER.BASE_LR for group in self.optimizer.param_groups]
        self._learned = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.params["amp"] == "fp16")
        if self.resumes:
            self.resume()
        self.shared = Shared(self.network, self.ranks, self.job.options["compress_gradients"], may_be_unused=False)

    def learning_rate(self, step: int, total_steps: int | None = None) -> float:
        rate = super().learning_rate(step, total_steps)
        if self.params["lr_scheduler"] != "step":
            return rate
        passed = sum(step >= milestone for milestone in self.params["lr_scheduler_iterations"])
        return float(rate * self.params["lr_scheduler_factor"] ** passed)

    def batches(self) -> Iterator[Batch]:
        def load(step: int) -> Batch:
            batch = self.batch_indices(step)
            indices = [batch[row] for rows, _ in self._shares(step) for row in rows]
            return [self.inputs.example(index, self.image_seed(step, index)) for index in indices]

        num_workers = loading_threads(self.job.options["num_workers"])
        return load_ahead(load, range(self.step, self.total_steps), num_workers)

    def train_step(self, batch: Batch) -> dict[str, float]:
        rate = self.learning_rate(self.step)
        for group, factor in zip(self.optimizer.param_groups, self._rate_factors, strict=True):
            group["lr"] = rate * factor
        self.network.train()
        parts = self._explained(lambda: self._backward(batch))
        with self.clock.part("optimizer", on_device=True):
            self._explained(self._optimize)
        return parts

    def _shares(self, step: int) -> list[tuple[list[int], float]]:
        """Return the rows of a step's batch that this process has in each pass, and their share of the batch."""
        num_images = len(self.batch_indices(step))
        return self.ranks.shares(num_images, min(self.params["grad_accumulation"], num_images))

    def _backward(self, batch: Batch) -> dict[str, float]:
        """Leave the gradients of a batch, taken in one or more passes; return the loss and its parts."""
        self.optimizer.zero_grad()
        shares = self._shares(self.step)
        sums: dict[str, float] = {}
        start = 0
        for number, (own, share) in enumerate(shares, 1):
            rows = batch[start : start + len(own)]
            start += len(own)
            # What is sampled of the proposals belongs to the images of the pass, whichever process takes it.
            torch.manual_seed(self.params["seed"] * 1_000_003 + self.step + own[0] * _PASS_SEEDS)
            with self.shared.last_pass(number == len(shares)):
                with self.clock.part("forward", on_device=True):
                    total, found = self._weighed(rows, share)
                for name, value in self.agree(found).items():
                    sums[name] = sums.get(name, 0.0) + value
                self.check_finite(sums, self.batch_indices(self.step))
                assert total is not None  # else nothing was finite
                with self.clock.part("backward", on_device=True):
                    # Of several processes' gradients the mean is taken.
                    self.scaler.scale(total * self.ranks.size).backward()  # type: ignore[no-untyped-call]
        if self.ranks.size > 1 and hasattr(self.network, _NORMALIZER):  # which a checkpoint has once for all of them
            with self.clock.part("communication"):
                total_normalizer = self.ranks.sum([getattr(self.network, _NORMALIZER)])[0]
            setattr(self.network, _NORMALIZER, total_normalizer / self.ranks.size)
        return sums

    def _weighed(self, rows: Batch, share: float) -> tuple[Tensor | None, dict[str, float]]:
        """Return a pass's part of the loss, and its numbers; not a number where the network found such itself."""
        losses: Mapping[str, Tensor] | None = None
        with contextlib.suppress(FloatingPointError):
            losses = self._losses(self.shared, rows)
        if self._loss_names is None:
            self._loss_names = self._common_names(losses)
        if losses is None:
            return None, dict.fromkeys(("loss", *self._loss_names), float("nan"))
        parts = torch.stack(list(losses.values())) * share
        total = parts.sum()
        return total, dict(zip(["loss", *losses], torch.cat([total[None], parts]).tolist(), strict=True))

    def _common_names(self, losses: Mapping[str, Tensor] | None) -> list[str]:
        """Return how the parts of the loss are called, of which one whose first pass was not finite knows nothing."""
        told = [json.loads(part) for part in self.ranks.gather(json.dumps(list(losses or ())).encode())]
        names: list[str] = json.loads(self.ranks.broadcast(json.dumps(max(told, key=len, default=[])).encode()))
        return names

    def _optimize(self) -> None:
        """Take a step along the gradients; in fp16 `torch.amp.GradScaler` leaves it out where they are not finite."""
        self.scaler.unscale_(self.optimizer)
        if self.params["gradient_clip"] is not None:
            nn.utils.clip_grad_norm_(self._learned, self.params["gradient_clip"])
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _losses(self, network: Any, rows: Batch) -> dict[str, Tensor]:
        """Return the parts of the loss of some of a batch's images, as one mean over them."""
        dtype = _AMP_DTYPES.get(self.params["amp"] or "none")
        with (
            EventStorage(self.step),
            # Its focal loss is compiled at the third call, which rounds otherwise: a resumed run would differ.
            torch.jit.optimized_execution(False),  # type: ignore[attr-defined]
            torch.autocast(self.device.type, dtype, enabled=dtype is not None),
        ):
            losses: dict[str, Tensor] = network(rows)
        return {name: value.float() for name, value in losses.items()}

    def _optimizer(self) -> torch.optim.Optimizer:
        """Return Detectron2's own SGD, or another optimizer of the groups of weights that it would have."""
        name, solver = self.params["optimizer"], self.cfg.SOLVER
        if name == "sgd":
            made: torch.optim.Optimizer = build_optimizer(self.cfg, self.network)
            return made
        groups = get_default_optimizer_params(
            self.network,
            base_lr=solver.BASE_LR,
            weight_decay=solver.WEIGHT_DECAY,
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        )
        other: torch.optim.Optimizer = maybe_add_gradient_clipping(
            self.cfg, OPTIMIZERS[name](groups, lr=solver.BASE_LR)
        )
        return other

    def validate(self) -> Scores | None:
        if self.validation is None:
            return None
        inputs = self.validation
        return self._explained(lambda: self._score(inputs))

    @torch.no_grad()
    def validation_losses(self) -> dict[str, float]:
        """Return the loss and its parts as the network is trained, with the norms' statistics."""
        if self.validation is None:
            return {}
        inputs, kept = self.validation, getattr(self.network, _NORMALIZER, None)
        train_without_statistics(self.network)
        torch.manual_seed(self.params["seed"])  # two-stage detectors sample what they are judged by
        sums: dict[str, float] = {}
        for chosen in self._passes(inputs):
            rows = [inputs.example(index) for index in chosen]
            for name, value in self._explained(functools.partial(self._losses, self.network, rows)).items():
                sums[name] = sums.get(name, 0.0) + value.item() * len(chosen) / len(inputs.data)
        if kept is not None:
            setattr(self.network, _NORMALIZER, kept)
        sums = summed(sums, self.ranks)
        return {"loss": sum(sums.values()), **sums}

    def _passes(self, inputs: Inputs) -> Iterator[range]:
        """Yield the images of each pass over a channel that is this process's: no more at once than one of training."""
        num_images, size = len(inputs.data), min(PREDICT_BATCH, self.images_per_pass)
        passes = [range(start, min(start + size, num_images)) for start in range(0, num_images, size)]
        for number in self.ranks.mine(len(passes)):
            if self.ranks.size == 1:  # others would wait for this one's part
                self.workspace.raise_if_stopped()
            yield passes[number]

    @property
    def images_per_pass(self) -> int:
        """The most images that are on the device at once."""
        return -(-int(self.params["batch_size"]) // (int(self.params["grad_accumulation"]) * self.ranks.size))

    def snapshot(self) -> dict[str, Tensor]:
        return {name: value.detach().cpu().clone() for name, value in self.network.state_dict().items()}

    def write_state(self, file: IO[bytes], counters: Counters) -> None:
        state = {
            "counters": msgspec.to_builtins(counters),
            "network": self.network.state_dict(),
            _NORMALIZER: getattr(self.network, _NORMALIZER, None),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "best": self.best.state,
        }
        torch.save(state, file)

    def read_state(self, file: Path) -> tuple[Counters, Any]:
        saved = torch.load(file, map_location="cpu", weights_only=True)
        self.network.load_state_dict(saved["network"])
        if saved[_NORMALIZER] is not None:
            setattr(self.network, _NORMALIZER, saved[_NORMALIZER])
        load_optimizer(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        return msgspec.convert(saved["counters"], Counters), saved["best"]

    def share_statistics(self) -> None:
        average_statistics([self.network], self.ranks)

    def _score(self, inputs: Inputs) -> Scores | None:
        """Score a channel, of which each process looks at its own images; the first has the scores."""
        detector = Detectron2Detector(self.network, self.cfg, self.job.classes)
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
            cfg = self.cfg.clone()
            cfg.MODEL.WEIGHTS = ""
            with atomic_write(self.workspace.model / CONFIG) as file:
                file.write(cfg.dump().encode())
            with atomic_write(self.workspace.model / ARTIFACT) as file:
                file.write(save(_contiguous(self.network.state_dict())))
        metrics = self.final_metrics(None if self.test is None else self._score(self.test))
        return Trained(
            native={
                "config": CONFIG,
                "batch_size": self.params["batch_size"],
                "peak_learning_rate": self.peak_learning_rate,
                "learning_rate": self.optimizer.defaults["lr"] / self.learning_rate_scale,
                "weight_decay": max(group["weight_decay"] for group in self.optimizer.param_groups),
                "steps": self.step,
                "total_steps": self.total_steps,
                "steps_per_epoch": self.steps_per_epoch,
                "warmup_steps": self.warmup_steps,
                "optimizer": type(self.optimizer).__name__,
                "image_size": self.cfg.INPUT.MIN_SIZE_TEST,
                "max_image_size": self.cfg.INPUT.MAX_SIZE_TEST,
            },
            weights=self.origin,
            metrics=metrics,
            score_threshold=self.best.score_threshold,
            max_detections=self.params["max_detections"],
            versions={
                "detectron2": detectron2.__version__,
                "torch": str(torch.__version__),
                "torchvision": torchvision.__version__,
            },
            hardware={
                "device": describe_device(self.device),
                "threads": str(torch.get_num_threads()),
                "processes": str(self.ranks.size),
            },
            timings=self._timings(),
        )

    def _take_best(self) -> None:
        """Put the best weights into the network; the first process knows them."""
        best = self.best.state
        if self.ranks.size > 1:
            if not self.ranks.sum([float(best is not None)])[0]:
                return
            best = load(self.ranks.broadcast(save(_contiguous(best)) if self.ranks.rank == 0 else b""))
        if best is not None:
            self.network.load_state_dict(best)

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
        fits, asked, size = self.images_that_fit(), self.images_per_pass, self.cfg.INPUT.MIN_SIZE_TEST
        advice = (
            f"about {fits} would fit: with grad_accumulation={-(-self.params['batch_size'] // fits)} the batch stays "
            f"as it is, with batch_size={fits} it gets smaller"
            if 0 < fits < asked
            else f"choose an image_size below {size}, a lighter model, or free memory"
        )
        raise OutOfMemory(asked, size, describe_device(self.device), f"{advice} ({cause.splitlines()[0]})")

    def images_that_fit(self) -> int:
        """Return about how many images a pass has memory for, 0 where not even one fits. Trains nothing."""
        areas = self.data.sizes.prod(axis=1)
        rows = [self.inputs.example(int(areas.argmax()), [0])]
        kept = kept_for_backward(self.network, lambda: self._losses(self.network, rows))
        return how_many(kept, self.device)

    def _inputs(self, channel: str, budget: int) -> Inputs | None:
        """Return a channel that is only scored. Every image is decoded once now, not after hours of training."""
        data = self.workspace.dataset(channel)
        if data is None or len(data) == 0:
            return None
        inputs = Inputs(data, self.cfg, budget, self.ranks)
        for index in (index for chosen in self._passes(inputs) for index in chosen):
            inputs.image(index)
        return inputs

    def _timings(self) -> dict[str, float]:
        self.clock.move("backward", "communication", self.shared.waited_s(self.clock.steps))
        return self.report_times(self.shared.bytes_per_step)


def _contiguous(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights as `save` takes them."""
    return {name: value.detach().cpu().contiguous() for name, value in state.items()}
