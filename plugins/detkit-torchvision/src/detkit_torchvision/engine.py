"""What the worker calls: train with torch, open what was trained, and export it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from detkit.backends import Detector, Engine, PredictOptions
from detkit.errors import Unsupported
from detkit.job import Job, Model, Trained, Workspace
from detkit.scores import SCORE_FLOOR
from detkit_torchvision import exporting
from detkit_torchvision.architecture import Architecture
from detkit_torchvision.batch_sizes import with_batch_size
from detkit_torchvision.detector import TorchvisionDetector
from detkit_torchvision.devices import choose_device, keep_freed_memory, to_device
from detkit_torchvision.distributed import device_of, join
from detkit_torchvision.models import build
from detkit_torchvision.modify import modified
from detkit_torchvision.training import Training
from detkit_torchvision.weights import ARTIFACT


class TorchvisionEngine(Engine):
    """The worker's side."""

    def train(self, job: Job, workspace: Workspace) -> Trained:
        keep_freed_memory()
        ranks = join(device_of(job))
        trained = Training(with_batch_size(job, workspace, ranks), workspace, ranks).run()
        ranks.leave()
        return trained

    def load(self, model: Model, options: PredictOptions) -> Detector:
        if "graph" in model.manifest.native:
            return exporting.open_torchscript(model, options)
        network = _network(model, options)
        to_device(network, choose_device(options.device))
        manifest = model.manifest
        return TorchvisionDetector(network, manifest.model, model.classes, int(manifest.native["image_size"]))

    def export(self, model: Model, format: str, to: Path) -> Path:
        if "graph" in model.manifest.native:
            raise Unsupported(f"{model.path} is an export itself; export the model that it was made of")
        return exporting.export(_network(model, PredictOptions(score_threshold=SCORE_FLOOR)), model, format, to)


def _network(model: Model, options: PredictOptions) -> Any:
    """Return the network of a model, on the CPU."""
    manifest = model.manifest
    network = build(
        manifest.model,
        len(manifest.classes),
        image_size=int(manifest.native["image_size"]),
        score_threshold=options.score_threshold,
        nms_threshold=options.nms_threshold or manifest.params["nms_threshold"],
        max_detections=options.max_detections or manifest.max_detections,
        architecture=Architecture.from_native(manifest.native),
    )
    network = modified(network, manifest.params.get("modify"), manifest.model, len(manifest.classes))
    network.load_state_dict(load_file(model.path / ARTIFACT))
    return network
