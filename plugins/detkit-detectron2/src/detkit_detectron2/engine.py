"""What the worker calls: train with Detectron2's networks, open what was trained, and export it."""

from __future__ import annotations

from pathlib import Path

from detkit.backends import Detector, Engine, PredictOptions
from detkit.job import Job, Model, Trained, Workspace
from detkit_detectron2 import sources


class Detectron2Engine(Engine):
    """The worker's side. Its modules import detectron2, which is looked for when this is constructed."""

    def __init__(self) -> None:
        sources.load()

    def train(self, job: Job, workspace: Workspace) -> Trained:
        from detkit_detectron2.training import Training
        from detkit_torchvision.devices import keep_freed_memory
        from detkit_torchvision.distributed import device_of, join

        keep_freed_memory()
        ranks = join(device_of(job))
        trained = Training(job, workspace, ranks).run()
        ranks.leave()
        return trained

    def load(self, model: Model, options: PredictOptions) -> Detector:
        import torch

        from detkit_detectron2.detector import Detectron2Detector, open_network
        from detkit_torchvision.devices import choose_device

        device = choose_device(options.device)
        network, cfg = open_network(model, options)
        return Detectron2Detector(network.to(device, memory_format=torch.channels_last), cfg, model.classes)

    def export(self, model: Model, format: str, to: Path) -> Path:
        from detkit.scores import SCORE_FLOOR
        from detkit_detectron2.detector import open_network
        from detkit_detectron2.exporting import export

        network, cfg = open_network(model, PredictOptions(score_threshold=SCORE_FLOOR))
        return export(network, cfg, model, format, to)
