"""Training with the real Detectron2, through the API: its one-stage and mask networks, its keys, its files."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import detkit
from detkit import Dataset, Run, Trainer, plugins
from detkit.errors import InvalidData, InvalidValue, MissingSettings, RunFailed, UnknownName, UsageError
from detkit_detectron2 import sources, yamls

pytestmark = pytest.mark.filterwarnings("ignore:torch.meshgrid")  # of Detectron2's anchors

needs_detectron2 = pytest.mark.usefixtures("worker_python")

QUICK: dict[str, Any] = {
    "image_size": 64,
    "batch_size": 4,
    "device": "cpu",
    "threads": 1,
    "warmup_iterations": 0,
    "lr_scheduler": "constant",
    "validate_every": "1000 epochs",
    "checkpoint_every": "1000 epochs",
}

CONFIG = """
MODEL:
  BACKBONE: {NAME: build_resnet_fpn_backbone, FREEZE_AT: 0}
  RESNETS: {OUT_FEATURES: [res2, res3, res4, res5], DEPTH: 18, RES2_OUT_CHANNELS: 64, NORM: BN}
  FPN: {IN_FEATURES: [res2, res3, res4, res5], OUT_CHANNELS: 32, NORM: GN}
  ANCHOR_GENERATOR:
    SIZES: !!python/object/apply:eval ["[[x] for x in [16, 32, 64, 128, 256]]"]
  RPN: {IN_FEATURES: [p2, p3, p4, p5, p6], POST_NMS_TOPK_TRAIN: 100, POST_NMS_TOPK_TEST: 50}
  ROI_HEADS: {NAME: StandardROIHeads, IN_FEATURES: [p2, p3, p4, p5], NUM_CLASSES: 20}
  ROI_BOX_HEAD: {NAME: FastRCNNConvFCHead, NUM_FC: 2, FC_DIM: 64, POOLER_RESOLUTION: 7}
DATASETS: {TRAIN: "('coco_2017_train',)"}
SOLVER: {IMS_PER_BATCH: 4, BASE_LR: 0.02, STEPS: "(2, 4)", MAX_ITER: 6, WARMUP_ITERS: 0}
INPUT: {MIN_SIZE_TRAIN: "(64, 96)", MIN_SIZE_TEST: 64}
VERSION: 2
"""


@pytest.fixture
def masked(tiny: Dataset) -> Dataset:
    """The same objects with their boxes as outlines."""
    samples = [
        replace(one, masks=tuple([[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in one.boxes.tolist()))
        for one in tiny
    ]
    return Dataset.from_samples(tiny.classes, samples)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(CONFIG)
    path = tmp_path / "mine.yaml"
    path.write_text('_BASE_: "base.yaml"\nSOLVER: {BASE_LR: 0.01}\n')
    return path


def train(model: str, data: Dataset, **settings: Any) -> Run:
    return Trainer(model=f"detectron2/{model}", **{**QUICK, **settings}).fit(data, data, quiet=True)


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.history if "train/loss" in row]


def rates(run: Run) -> list[float]:
    return [row["train/learning_rate"] for row in run.history if "train/learning_rate" in row]


def written_config(run: Run) -> dict[str, Any]:
    return yamls.flatten(yamls.read(run.model.path / "config.yaml").values)


def messages(run: Run) -> str:
    return "\n".join(str(event.values["message"]) for event in run.events(follow=False) if event.kind == "log")


@needs_detectron2
def test_retinanet_learns_and_resumes_exactly(tiny: Dataset, tmp_path: Path) -> None:
    """Its loss is divided by a moving average of how many anchors had objects, which a checkpoint has to keep."""
    often = {"iterations": 50, "checkpoint_every": "5 iterations"}
    whole = train("retinanet_tiny", tiny, name=str(tmp_path / "whole"), **often)
    assert detkit.evaluate(whole, tiny, allow_seen=True)["AP50"] > 0.5
    cut = Trainer(model="detectron2/retinanet_tiny", **{**QUICK, **often}).start(tiny, tiny, leash=True)
    next(event for event in cut.events() if event.kind == "metric" and (event.step or 0) >= 10)
    cut.stop()
    assert cut.status == "stopped"
    assert losses(cut.resume(leash=True).wait()) == losses(whole)


@needs_detectron2
def test_mask_rcnn_learns_masks(masked: Dataset) -> None:
    run = train("mask_rcnn_tiny", masked, iterations=80)
    scores = detkit.evaluate(run, masked, allow_seen=True)
    assert scores["AP50"] > 0.5
    assert scores["mask_AP50"] > 0.5


def test_mask_rcnn_on_boxes_alone_is_refused(tiny: Dataset) -> None:
    with pytest.raises(InvalidData, match="masks=false trains it without"):
        Trainer(model="detectron2/mask_rcnn_tiny", python=sys.executable).prepare(tiny, tiny)


@needs_detectron2
def test_mask_rcnn_without_masks(tiny: Dataset) -> None:
    run = train("mask_rcnn_tiny", tiny, iterations=2, masks=False)
    assert written_config(run)["MODEL.MASK_ON"] is False
    assert not any("mask" in name for name in load_file(run.model.path / "weights.safetensors"))


@needs_detectron2
def test_a_model_of_the_zoo_from_scratch_does_not_diverge(tiny: Dataset) -> None:
    """With its own settings the first Faster R-CNN is not finite after three steps."""
    run = train("faster_rcnn_R_50_FPN_1x", tiny, weights=None, iterations=6, batch_size=2, learning_rate=1e-3)
    assert written_config(run)["MODEL.RESNETS.NORM"] == "BN"
    assert "from scratch" in messages(run)
    assert max(losses(run)) < 20


@needs_detectron2
def test_what_the_parameters_are_told_as(tiny: Dataset) -> None:
    run = train(
        "faster_rcnn_tiny",
        tiny,
        iterations=1,
        image_size=96,
        max_image_size=128,
        frozen_stages=2,
        anchor_sizes=[8, 16, 32, 64, 128],
        anchor_ratios=[0.5, 1.0, 2.0, 3.0],
        proposals=321,
        max_detections=300,
        nms_threshold=0.4,
    )
    written = written_config(run)
    assert written["INPUT.MIN_SIZE_TRAIN"] == [96]
    assert (written["INPUT.MIN_SIZE_TEST"], written["INPUT.MAX_SIZE_TEST"]) == (96, 128)
    assert written["MODEL.BACKBONE.FREEZE_AT"] == 2
    assert written["MODEL.ANCHOR_GENERATOR.SIZES"] == [[8.0], [16.0], [32.0], [64.0], [128.0]]
    assert written["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [[0.5, 1.0, 2.0, 3.0]]
    assert written["MODEL.RPN.POST_NMS_TOPK_TEST"] == 321
    assert written["MODEL.RPN.POST_NMS_TOPK_TRAIN"] == 321
    assert written["TEST.DETECTIONS_PER_IMAGE"] == 300
    assert written["MODEL.ROI_HEADS.NMS_THRESH_TEST"] == 0.4
    assert written["MODEL.ROI_HEADS.NUM_CLASSES"] == len(tiny.classes)


@needs_detectron2
def test_native_keys_reach_detectron2(tiny: Dataset) -> None:
    keys = {"SOLVER.NESTEROV": True, "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou", "SOLVER.MAX_ITER": 3}
    run = train("faster_rcnn_tiny", tiny, optimizer="sgd", learning_rate=0.01, **keys)
    assert run.model.manifest.params["overrides"] == {
        "SOLVER.NESTEROV": "True",
        "MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE": "giou",
    }
    assert run.model.manifest.params["iterations"] == 3
    written = written_config(run)
    assert written["SOLVER.NESTEROV"] is True
    assert written["MODEL.ROI_BOX_HEAD.BBOX_REG_LOSS_TYPE"] == "giou"


@needs_detectron2
def test_random_crops_and_sizes_are_drawn_anew_and_alike(tiny: Dataset) -> None:
    """What an image is changed by belongs to a seed of its own, whichever thread makes it ready."""
    keys = {"INPUT.MIN_SIZE_TRAIN": (64, 80, 96), "INPUT.CROP.ENABLED": True}
    settings = {"image_size": "auto", "iterations": 4, **keys}
    ahead, now = (train("faster_rcnn_tiny", tiny, num_workers=n, **settings) for n in (3, 0))
    assert losses(ahead) == losses(now)
    assert losses(ahead) != losses(train("faster_rcnn_tiny", tiny, iterations=4))


@needs_detectron2
def test_a_key_of_another_type_is_refused_first_thing(tiny: Dataset) -> None:
    with pytest.raises(RunFailed, match=r"SOLVER\.NESTEROV='maybe' is not valid: expected a bool"):
        train("faster_rcnn_tiny", tiny, iterations=1, **{"SOLVER.NESTEROV": "maybe"})


@needs_detectron2
def test_a_configuration_file_by_path(tiny: Dataset, config: Path) -> None:
    """What it says of the loop is followed, a parameter that is given wins, and the run needs the file no more."""
    given = {"device": "cpu", "threads": 1}
    run = Trainer(model="detectron2/config", config=str(config), **given).start(tiny, tiny, leash=True)
    config.unlink()
    run.wait()
    assert rates(run) == pytest.approx([0.01, 1e-3, 1e-4])
    assert run.model.manifest.params["batch_size"] == 4
    written = written_config(run)
    assert written["MODEL.RPN.POST_NMS_TOPK_TEST"] == 50
    assert written["MODEL.ANCHOR_GENERATOR.SIZES"] == [[16.0], [32.0], [64.0], [128.0], [256.0]]
    assert written["MODEL.ROI_HEADS.NUM_CLASSES"] == 2
    child = Trainer(model="detectron2/config", **given, weights=run, iterations=1).fit(tiny, tiny, quiet=True)
    assert child.model.manifest.weights.kept == list(tiny.classes)
    assert written_config(child)["MODEL.RPN.POST_NMS_TOPK_TEST"] == 50


def test_explain_names_the_file_of_each_setting(config: Path) -> None:
    rows = {
        row.name: row for row in Trainer(model="detectron2/config", config=str(config), batch_size=2).explain().rows
    }
    assert (rows["learning_rate"].value, rows["learning_rate"].origin) == (0.01, str(config))
    assert (rows["iterations"].value, rows["iterations"].origin) == (6, str(config.with_name("base.yaml")))
    assert rows["lr_scheduler"].value == "step"
    assert rows["lr_scheduler_iterations"].value == (2, 4)
    assert (rows["batch_size"].value, rows["batch_size"].origin) == (2, "the constructor")
    assert rows["epochs"].value is None
    assert not any(key.startswith("DATASETS") for key in rows["overrides"].value)


@pytest.mark.parametrize(
    ("settings", "error", "says"),
    [
        ({"SOLVER.BASE_LR": 0.5, "learning_rate": 0.1}, UsageError, r"SOLVER\.BASE_LR .*learning_rate .*contradict"),
        ({"SOLVER.MAX_ITER": 3, "epochs": 3}, UsageError, r"SOLVER\.MAX_ITER .*epochs .*contradict"),
        ({"INPUT.MIN_SIZE_TEST": 300, "image_size": 64}, UsageError, "image_size=64 set the same"),
        ({"MODEL.ROI_HEADS.NUM_CLASSES": 3}, UsageError, "the data says how many classes"),
        ({"OUTPUT_DIR": "x"}, UsageError, "give name, the run's directory"),
        ({"overrides": {"OUTPUT_DIR": "x"}}, UsageError, "give name, the run's directory"),
        ({"VIS_PERIOD": 0}, UsageError, "detkit draw"),
        ({"SEED": 3, "seed": 4}, UsageError, "SEED .*seed .*contradict"),
        ({"MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.5}, UsageError, "give score_threshold where you predict"),
        ({"INPUT.MASK_FORMAT": "polygon"}, UsageError, "learned as bitmasks"),
        ({"SOLVER.AMP.ENABLED": "yes"}, InvalidValue, "expected True or False"),
        ({"SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.1, "gradient_clip": 3}, UsageError, "gradient_clip=3 set the same"),
        ({"SOLVER.NESTEROV": True}, InvalidValue, "for optimizer=sgd, and optimizer is adamw"),
        (
            {"SOLVER.STEPS": "(2, 4)", "lr_scheduler": "cosine"},
            UsageError,
            "SOLVER.STEPS .*contradicts lr_scheduler=cos",
        ),
        ({"lr_scheduler_iterations": [2, 4]}, InvalidValue, "for lr_scheduler=step, and lr_scheduler is cosine"),
        ({"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range", "image_size": 64}, UsageError, "image_size=64 set the same"),
        ({"MODEL.MASK_ON": True}, UsageError, "faster_rcnn_tiny has none; choose a Mask R-CNN"),
        ({"masks": True}, UsageError, "masks=true asks for masks, and faster_rcnn_tiny has none"),
        ({"MODEL.WEIGHTS": "https://example.org/a.pkl"}, InvalidValue, "expected weights=none, or the path of a file"),
        ({"DATASETS.TRAIN": "('mine',)"}, UsageError, "give the data"),
        ({"SOLVER.LR_SCHEDULER_NAME": "Poly"}, InvalidValue, "WarmupCosineLR"),
        ({"TEST.EVAL_PERIOD": 0}, InvalidValue, "from 1"),
        ({"overrides": {"SOLVER.NESTEROV": True}, "SOLVER.NESTEROV": False}, UsageError, "given twice"),
        ({"overrides": "SOLVER.NESTEROV"}, InvalidValue, "native keys by name"),
        ({"config": "x.yaml"}, UsageError, "x.yaml"),
        ({"proposals": 10, "model": "detectron2/retinanet_tiny"}, InvalidValue, "one stage"),
        ({"model": "detectron2/config"}, MissingSettings, "config=my_config.yaml"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_contradictions_are_named(settings: dict[str, Any], error: type[Exception], says: str, tiny: Dataset) -> None:
    trainer = Trainer(**{"model": "detectron2/faster_rcnn_tiny", "python": sys.executable, **settings})
    with pytest.raises(error, match=says):
        trainer.prepare(tiny, tiny)


def test_the_same_said_twice_is_no_contradiction() -> None:
    trainer = Trainer(
        model="detectron2/faster_rcnn_tiny", learning_rate="0.5", **{"SOLVER.BASE_LR": 0.5, "SOLVER.GAMMA": 0.2}
    )
    rows = {row.name: row for row in trainer.explain().rows}
    assert rows["learning_rate"].value == 0.5
    assert (rows["lr_scheduler_factor"].value, rows["overrides"].value) == (0.2, {})
    assert rows["lr_scheduler_factor"].origin == "SOLVER.GAMMA, the constructor"


def test_native_keys_are_for_backends_that_take_them() -> None:
    with pytest.raises(UnknownName, match=r"SOLVER\.BASE_LR"):
        Trainer(model="torchvision/fcos_tiny", **{"SOLVER.BASE_LR": 0.5}).explain()


@pytest.mark.skipif(sources.defaults() is None, reason="there is no Detectron2 here whose keys are known")
def test_an_unknown_key_is_refused_before_any_data_is_read() -> None:
    with pytest.raises(UnknownName, match=r"did you mean 'SOLVER\.BASE_LR'"):
        Trainer(model="detectron2/faster_rcnn_tiny", **{"SOLVER.BAS_LR": 0.5}).fit("nowhere")


def explained(**settings: Any) -> dict[str, Any]:
    return {row.name: row.value for row in Trainer(**settings).explain().rows}


def test_a_flag_is_true_or_false_however_it_is_written() -> None:
    for text, amp in (("false", None), ("False", None), ("true", "fp16"), (True, "fp16"), (False, None)):
        assert explained(model="detectron2/faster_rcnn_tiny", **{"SOLVER.AMP.ENABLED": text})["amp"] == amp


def test_clipping_by_native_keys_takes_the_place_of_the_default() -> None:
    model = "detectron2/faster_rcnn_tiny"
    assert explained(model=model)["gradient_clip"] == 10.0
    found = explained(model=model, **{"SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 0.1})
    assert found["gradient_clip"] is None
    assert found["overrides"] == {
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": "0.1",
        "SOLVER.CLIP_GRADIENTS.ENABLED": "True",
    }


@needs_detectron2
def test_native_clipping_clips_with_any_optimizer(tiny: Dataset) -> None:
    settings = {"optimizer": "sgd", "learning_rate": 1e-3, "iterations": 2}
    keys = {"SOLVER.CLIP_GRADIENTS.CLIP_VALUE": 1e-9, "SOLVER.CLIP_GRADIENTS.ENABLED": True}
    for optimizer in ("sgd", "adamw"):
        run = train("faster_rcnn_tiny", tiny, **{**settings, "optimizer": optimizer}, **keys)
        assert run.model.manifest.native["optimizer"].endswith("WithGradientClip")


def test_masks_by_a_native_key_beside_a_file(masked: Dataset, config: Path, tiny: Dataset) -> None:
    given = {"model": "detectron2/config", "config": str(config)}
    found = explained(**given, **{"MODEL.MASK_ON": "true"})
    assert (found["masks"], found["overrides"]["MODEL.MASK_ON"]) == (True, "True")
    with pytest.raises(InvalidData, match="masks=false trains it without"):
        Trainer(**given, python=sys.executable, **{"MODEL.MASK_ON": True}).prepare(tiny, tiny)
    with pytest.raises(UsageError, match=r"masks=true asks for masks, and .*mine\.yaml has none"):
        Trainer(**given, masks=True).explain()
    assert explained(**given)["masks"] is False


@needs_detectron2
def test_a_child_learns_masks_that_its_parent_did_not(masked: Dataset) -> None:
    parent = train("mask_rcnn_tiny", masked, iterations=1, masks=False)
    child = train("mask_rcnn_tiny", masked, iterations=1, weights=parent)
    assert written_config(child)["MODEL.MASK_ON"] is True
    assert any("mask_head" in key for key in child.model.manifest.weights.skipped)


@needs_detectron2
def test_a_child_of_a_file_with_masks_needs_masks(masked: Dataset, tiny: Dataset, config: Path) -> None:
    head = "{NAME: MaskRCNNConvUpsampleHead, NUM_CONV: 1, CONV_DIM: 16, POOLER_RESOLUTION: 14}"
    config.write_text(f'_BASE_: "base.yaml"\nMODEL: {{MASK_ON: true, ROI_MASK_HEAD: {head}}}\n')
    given = {"model": "detectron2/config", "device": "cpu", "threads": 1, "iterations": 1}
    parent = Trainer(**given, config=str(config)).fit(masked, masked, quiet=True)
    with pytest.raises(InvalidData, match="masks=false trains it without"):
        Trainer(**given, weights=parent).prepare(tiny, tiny)
    child = Trainer(**given, weights=parent, masks=False).fit(tiny, tiny, quiet=True)
    assert written_config(child)["MODEL.MASK_ON"] is False


@needs_detectron2
def test_masks_asked_of_a_child_whose_parent_has_none(masked: Dataset, config: Path) -> None:
    """Silence would train it without; a network that has none gets a mask head where that is said."""
    given = {"model": "detectron2/config", "device": "cpu", "threads": 1, "iterations": 1}
    parent = Trainer(**given, config=str(config)).fit(masked, masked, quiet=True)
    with pytest.raises(UsageError, match=r"masks=true asks for masks, and .* has none; give MODEL\.MASK_ON=True as we"):
        Trainer(**given, weights=parent, masks=True).fit(masked, masked, quiet=True)
    plain = Trainer(**given, weights=parent).fit(masked, masked, quiet=True)
    assert written_config(plain)["MODEL.MASK_ON"] is False
    child = Trainer(**given, weights=parent, masks=True, **{"MODEL.MASK_ON": True}).fit(masked, masked, quiet=True)
    assert written_config(child)["MODEL.MASK_ON"] is True
    assert any("mask_head" in key for key in child.model.manifest.weights.skipped)


def test_steps_of_a_file_give_way_to_what_is_given(config: Path) -> None:
    given = {"model": "detectron2/config", "config": str(config)}
    by_epochs = explained(**given, lr_scheduler_step="8,11")
    assert (by_epochs["lr_scheduler"], by_epochs["lr_scheduler_step"]) == ("step", (8, 11))
    assert by_epochs["lr_scheduler_iterations"] == ()
    cosine = explained(**given, lr_scheduler="cosine")
    assert (cosine["lr_scheduler"], cosine["lr_scheduler_iterations"]) == ("cosine", ())
    config.write_text('_BASE_: "base.yaml"\nSOLVER: {LR_SCHEDULER_NAME: WarmupCosineLR}\n')
    assert explained(**given)["lr_scheduler"] == "cosine"
    assert explained(**given, **{"SOLVER.STEPS": "(3,)"})["lr_scheduler"] == "step"


def test_a_file_that_detectron2_dumped(config: Path, tiny: Dataset) -> None:
    """It has every key, so also thresholds of networks it is not about, and values that stand for none."""
    dumped = """
MODEL: {META_ARCHITECTURE: %s, ROI_HEADS: {NMS_THRESH_TEST: 0.4}, RETINANET: {NMS_THRESH_TEST: 0.6}}
TEST: {EVAL_PERIOD: 0}
SEED: -1
OUTPUT_DIR: ./output
"""
    for network, threshold in (("GeneralizedRCNN", 0.4), ("RetinaNet", 0.6)):
        config.write_text(dumped % network)
        found = explained(model="detectron2/config", config=str(config))
        assert found["nms_threshold"] == threshold
        assert found["seed"] >= 0


@needs_detectron2
def test_a_range_of_sizes_has_two_ends(tiny: Dataset) -> None:
    with pytest.raises(RunFailed, match=r"range with the two ends of it; INPUT\.MIN_SIZE_TRAIN is \(256,\)"):
        train("faster_rcnn_tiny", tiny, image_size="auto", iterations=1, **{"INPUT.MIN_SIZE_TRAIN_SAMPLING": "range"})


@needs_detectron2
def test_proposals_leave_what_a_network_looks_through(tiny: Dataset) -> None:
    run = train("faster_rcnn_tiny", tiny, iterations=1, proposals=50)
    written = written_config(run)
    assert (written["MODEL.RPN.PRE_NMS_TOPK_TEST"], written["MODEL.RPN.POST_NMS_TOPK_TEST"]) == (200, 50)


@needs_detectron2
def test_two_processes_resume_retinanet_exactly(tiny: Dataset, tmp_path: Path) -> None:
    """The average that its loss is divided by is the same on both, so a checkpoint of the first has it for both."""
    settings = {**QUICK, "iterations": 12, "checkpoint_every": "3 iterations", "processes": 2}
    whole = Trainer(model="detectron2/retinanet_tiny", **settings).fit(tiny, tiny, quiet=True)
    cut = Trainer(model="detectron2/retinanet_tiny", **settings).start(tiny, tiny, leash=True)
    next(event for event in cut.events() if event.kind == "metric" and (event.step or 0) >= 5)
    cut.stop()
    assert cut.status == "stopped"
    assert losses(cut.resume(leash=True).wait()) == losses(whole)


@needs_detectron2
def test_a_first_step_that_is_not_finite_names_the_losses_there_are(tiny: Dataset) -> None:
    keys = {"MODEL.PIXEL_STD": [1e-38, 1e-38, 1e-38]}
    with pytest.raises(RunFailed) as caught:
        train("mask_rcnn_tiny", tiny, masks=False, iterations=1, processes=2, **keys)
    assert "loss_mask" not in str(caught.value)
    assert "not finite" in str(caught.value)


@needs_detectron2
def test_validation_has_its_losses_and_ends_what_learns_nothing(tiny: Dataset) -> None:
    settings = {"epochs": 9, "validate_every": "1 epoch", "learning_rate": 1e-12, "early_stopping_patience": 2}
    run = train("retinanet_tiny", tiny, **settings)
    validations = [row for row in run.history if "val/AP" in row]
    scores = [row["val/AP"] for row in validations]
    assert len(scores) < 9
    assert max(scores[-2:]) <= max(scores[:-2])
    parts = {f"val/{name}" for name in plugins.backend("detectron2").spec("retinanet_tiny").losses}
    assert {"val/loss", *parts} <= validations[0].keys()
    assert validations[0]["val/loss"] == pytest.approx(sum(validations[0][name] for name in parts), rel=1e-5)
