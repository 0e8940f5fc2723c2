"""What the worker calls: train with torch, and open what was trained."""

from __future__ import annotations

from safetensors.torch import load_file

from detkit.backends import Engine, PredictOptions
from detkit.job import Job, Model, Trained, Workspace
from detkit_torchvision.architecture import Architecture
from detkit_torchvision.detector import TorchvisionDetector
from detkit_torchvision.devices import choose_device, keep_freed_memory, to_device
from detkit_torchvision.models import build
from detkit_torchvision.modify import modified
from detkit_torchvision.training import Training, with_batch_size
from detkit_torchvision.weights import ARTIFACT


class TorchvisionEngine(Engine):
    """The worker's side."""

    def train(self, job: Job, workspace: Workspace) -> Trained:
        keep_freed_memory()
        return Training(with_batch_size(job, workspace), workspace).run()

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
            architecture=Architecture.from_native(manifest.native),
        )
        network = modified(network, manifest.params.get("modify"), manifest.model, len(manifest.classes))
        network.load_state_dict(load_file(model.path / ARTIFACT))
        to_device(network, device)
        return TorchvisionDetector(network, manifest.model, model.classes, image_size)
