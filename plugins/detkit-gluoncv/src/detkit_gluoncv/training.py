"""Training an SSD with Gluon, step by step."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np

from detkit.data import Dataset
from detkit.files import atomic_write
from detkit.images import Image
from detkit.job import Job, Trained, Workspace
from detkit.loading import load_ahead, loading_threads
from detkit.loop import Counters, TrainingLoop
from detkit.scores import SCORE_FLOOR, Scores, score
from detkit_gluoncv.batches import Batch, Targets, change, normalise, shrink, target
from detkit_gluoncv.detector import SsdDetector
from detkit_gluoncv.networks import (
    ARTIFACT,
    Net,
    anchors,
    build,
    freeze,
    initialise,
    parameters,
    set_state,
    settle,
    state,
)
from detkit_gluoncv.params import NETWORKS
from detkit_gluoncv.runtime import SSDMultiBoxLoss, choose_context, mx, versions

SCORING_BATCH = 16


class Training(TrainingLoop[Batch]):
    """One training run, from the job to the artifact; `run` reads top to bottom."""

    def __init__(self, job: Job, workspace: Workspace) -> None:
        super().__init__(job, workspace)
        self.context = choose_context(job.options["device"])
        network = NETWORKS[job.model]
        self.image_size = network.size if self.params["image_size"] == "auto" else int(self.params["image_size"])
        self.validation, self.test = self._readable("validation"), self._readable("test")
        self.loss = SSDMultiBoxLoss(min_hard_negatives=self.params["min_hard_negatives"])

    def run(self) -> Trained:
        self.prepare()
        for _ in self.steps():
            pass
        return self._finish()

    def prepare(self) -> None:
        """Put the network, its weights and the optimizer where training begins, or where a checkpoint left them."""
        mx.random.seed(self.params["seed"] % 2**31)
        if self.resumes:
            self.net: Net = build(self.job.model, self.job.classes)
        else:
            self.net, self.origin = initialise(self.job, self.workspace)
            self.tell_origin()
        self.net.collect_params().reset_ctx(self.context)
        if self.params["freeze"] is not None:
            frozen = freeze(self.net, self.params["freeze"])
            self.say(f"{len(frozen)} parameters stay as they are: {frozen[0]} ... {frozen[-1]}")
        self.trainer = self._make_trainer()
        self._rate_at_first = float(self.trainer.learning_rate)
        if self.resumes:
            self.resume()
        self.targets = Targets(anchors(self.net, self.image_size, self.context))
        self.net.hybridize(static_alloc=True, static_shape=True)

    def batches(self) -> Iterator[Batch]:
        def load(index: int) -> Image:
            return shrink(self.data[index].image(), self.image_size)

        steps = range(self.step, self.total_steps)
        order = (index for step in steps for index in self.batch_indices(step))
        # Threads decode, one image each; the changes draw from generators of the whole process and stay in this thread.
        images = load_ahead(load, order, loading_threads(self.job.options["num_workers"]))
        for step in steps:
            indices = self.batch_indices(step)
            pixels, boxes = [], []
            for index in indices:
                self.workspace.raise_if_stopped()
                image, rows = next(images), target(self.data, index)
                rows[:, :4] *= np.tile(image.shape[1::-1] / self.data.sizes[index], 2)
                seed = self.image_seed(step, index)
                image, rows = change(image, rows, self.image_size, self.params["augmentations"], seed)
                pixels.append(image)
                boxes.append(rows)
            classes, offsets = self.targets(boxes)
            yield Batch(
                normalise(pixels, self.context),
                classes.as_in_context(self.context),
                offsets.as_in_context(self.context),
                indices,
            )

    def train_step(self, batch: Batch) -> dict[str, float]:
        with mx.autograd.record():
            class_scores, offsets, _ = self.net(batch.images)
            totals, classification, regression = self.loss(
                class_scores, offsets, batch.class_targets, batch.box_targets
            )
            total = totals[0].sum()
        losses = {
            "loss": float(total.asscalar()),
            "classification": float(classification[0].sum().asscalar()),
            "bbox_regression": float(regression[0].sum().asscalar()),
        }
        self.check_finite(losses, batch.indices)
        total.backward()
        trained = [p for p in self.net.collect_params().values() if p.grad_req != "null"]
        if self.params["gradient_clip"]:
            gradients = [parameter.grad(self.context) for parameter in trained]
            mx.gluon.utils.clip_global_norm(gradients, self.params["gradient_clip"], check_isfinite=False)
        self.trainer.set_learning_rate(self.learning_rate(self.step))
        self.trainer.step(1)  # the loss is divided by the number of matched anchors already
        return losses

    def validate(self) -> Scores | None:
        return None if self.validation is None else self._score(self.validation)

    def snapshot(self) -> dict[str, np.ndarray]:
        return state(self.net)

    def write_state(self, file: IO[bytes], counters: Counters) -> None:
        arrays = {
            "counters": np.frombuffer(msgspec.json.encode(counters), dtype=np.uint8),
            **{f"network/{name}": value for name, value in state(self.net).items()},
            **{f"best/{name}": value for name, value in (self.best.state or {}).items()},
            **{f"optimizer/{name}": value for name, value in self._optimizer_state().items()},
        }
        np.savez(file, **arrays)

    def read_state(self, file: Path) -> tuple[Counters, dict[str, np.ndarray] | None]:
        with np.load(file, allow_pickle=False) as saved:
            arrays = {name: saved[name] for name in saved.files}
        counters = msgspec.json.decode(arrays.pop("counters").tobytes(), type=Counters)

        def part(prefix: str) -> dict[str, np.ndarray]:
            return {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}

        set_state(self.net, part("network/"))
        self._set_optimizer_state(part("optimizer/"), counters.step)
        return counters, part("best/") or None

    def _make_trainer(self) -> Any:
        for name, parameter in parameters(self.net).items():
            if name.endswith(("bias", "gamma", "beta", "scale")):
                parameter.wd_mult = 0.0
        options = {"learning_rate": self.peak_learning_rate, "wd": self.params["weight_decay"]}
        if self.params["optimizer"] == "sgd":
            options["momentum"] = self.params["momentum"]
        return mx.gluon.Trainer(self.net.collect_params(), self.params["optimizer"], options, kvstore=None)

    def _optimizer_state(self) -> dict[str, np.ndarray]:
        """Return what the optimizer remembers of each parameter, by ``name/number``.

        Gluon's own ``save_states`` writes a pickle.
        """
        states = self.trainer._updaters[0].states
        return {
            name: array.asnumpy()
            for index, memory in states.items()
            for name, array in self._arrays(self.trainer._params[index], memory)
        }

    def _set_optimizer_state(self, saved: dict[str, np.ndarray], step: int) -> None:
        updater, optimizer = self.trainer._updaters[0], self.trainer._optimizer
        optimizer._set_current_context(self.context.device_id)  # steps are counted for each device
        for index, parameter in enumerate(self.trainer._params):
            if parameter.grad_req == "null":
                continue
            memory = optimizer.create_state_multi_precision(index, parameter.data(self.context))
            for name, array in self._arrays(parameter, memory):
                array[:] = mx.nd.array(saved[name], ctx=self.context)
            updater.states[index], updater.states_synced[index] = memory, True
            optimizer._index_update_count[index] = step
        optimizer.num_update = step

    def _arrays(self, parameter: Any, memory: Any) -> Iterator[tuple[str, Any]]:
        """Yield the arrays of an optimizer's memory of one parameter, and a name for each."""
        place = next(name for name, known in parameters(self.net).items() if known is parameter)
        for number, array in enumerate(memory if isinstance(memory, (tuple, list)) else [memory]):
            if array is not None:
                yield f"{place}/{number}", array

    def _score(self, data: Dataset) -> Scores:
        detector = SsdDetector(
            self.net,
            self.job.classes,
            image_size=self.image_size,
            num_anchors=self.targets.num_anchors,
            context=self.context,
            score_threshold=SCORE_FLOOR,
            nms_threshold=self.params["nms_threshold"],
            nms_topk=self.params["nms_topk"],
            max_detections=self.params["max_detections"],
        )
        found = []
        for start in range(0, len(data), SCORING_BATCH):
            self.workspace.raise_if_stopped()
            images = [data[index].image() for index in range(start, min(start + SCORING_BATCH, len(data)))]
            found += detector.detect(images)
        self.net.hybridize(static_alloc=True, static_shape=True)  # trace anew: the graph now is one for prediction
        return score(data, found, max_detections=self.params["max_detections"], score_floor=SCORE_FLOOR)

    def _finish(self) -> Trained:
        if self.best.state is not None:
            set_state(self.net, self.best.state)
        settle()
        with atomic_write(self.workspace.model / ARTIFACT) as file:
            self.net.save_parameters(file.name)
        metrics = self.final_metrics(None if self.test is None else self._score(self.test))
        return Trained(
            native={
                "image_size": self.image_size,
                "batch_size": self.params["batch_size"],
                "learning_rate": self._rate_at_first / self.learning_rate_scale,
                "steps": self.step,
                "total_steps": self.total_steps,
                "steps_per_epoch": self.steps_per_epoch,
                "warmup_steps": self.warmup_steps,
                "anchors": self.targets.num_anchors,
                "optimizer": type(self.trainer._optimizer).__name__,
                "weight_decay": self.trainer._optimizer.wd,
            },
            weights=self.origin,
            metrics=metrics,
            score_threshold=self.best.score_threshold,
            max_detections=self.params["max_detections"],
            versions=versions(),
            hardware={"device": self._device_name(), "threads": os.environ["OMP_NUM_THREADS"]},
        )

    def _device_name(self) -> str:
        return f"cpu ({platform.processor() or platform.machine()})" if self.context == mx.cpu() else str(self.context)

    def _readable(self, channel: str) -> Dataset | None:
        """Return a channel that is only scored. Every image is decoded once now, not after hours of training."""
        data = self.workspace.dataset(channel)
        if data is None or len(data) == 0:
            return None
        for sample in data:
            self.workspace.raise_if_stopped()
            sample.image()
        return data
