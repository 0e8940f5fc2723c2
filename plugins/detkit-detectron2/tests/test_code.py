"""The user's own modules in a training by Detectron2: keys that they add to its configuration, and dataset mappers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import detkit
from detkit import Dataset, Run, Trainer
from detkit.errors import RunFailed, UnknownName
from detkit_detectron2 import sources, yamls

pytestmark = [pytest.mark.usefixtures("worker_python"), pytest.mark.filterwarnings("ignore:torch.meshgrid")]

HEADS = """
import torch
from detectron2.config import CfgNode
from detectron2.modeling import ROI_HEADS_REGISTRY, StandardROIHeads


def add_my_config(cfg):
    cfg.MODEL.MYHEAD = CfgNode()
    cfg.MODEL.MYHEAD.SIZE = 2
    cfg.MODEL.MYHEAD.INNER = CfgNode({"WORDS": ("a",)})


def add_broken_config(cfg):
    cfg.MODEL.NO_SUCH_SECTION.SIZE = 2


@ROI_HEADS_REGISTRY.register()
class MyHeads(StandardROIHeads):
    def __init__(self, cfg, input_shape):
        super().__init__(cfg, input_shape)
        assert isinstance(cfg.MODEL.MYHEAD.INNER.WORDS, tuple)
        self.register_buffer("own", torch.zeros(cfg.MODEL.MYHEAD.SIZE))
"""

MAPPERS = '''
import random

import numpy as np
import torch
from detectron2.data import DatasetMapper, detection_utils
from detectron2.structures import Boxes, Instances


class Plain(DatasetMapper):
    """Detectron2's own, as a class of ours."""


def dimmed(record):
    """One image at its own size, in a random light, and one of its boxes."""
    assert set(record) == {"file_name", "image_id", "width", "height", "annotations"}
    image = detection_utils.read_image(record["file_name"], format="BGR")
    assert image.shape == (record["height"], record["width"], 3)
    image = image * (0.5 + 0.5 * np.random.rand())
    kept = record["annotations"]
    kept = kept and [random.choice(kept)]
    found = Instances(image.shape[:2])
    found.gt_boxes = Boxes(torch.tensor([one["bbox"] for one in kept]).reshape(-1, 4))
    found.gt_classes = torch.tensor([one["category_id"] for one in kept], dtype=torch.int64)
    return {"image": torch.as_tensor(image.transpose(2, 0, 1).astype("float32")), "instances": found}


def nothing(record):
    return None


def bare(record):
    return {"image": torch.zeros(3, 32, 32), "instances": Instances((32, 32))}


def broken(record):
    return record["no such key"]
'''

QUICK: dict[str, Any] = {
    "image_size": 64,
    "batch_size": 4,
    "iterations": 3,
    "device": "cpu",
    "threads": 1,
    "warmup_iterations": 0,
    "validate_every": "1000 epochs",
}
PLAIN = {"INPUT.RANDOM_FLIP": "none"}


@pytest.fixture
def code(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "my_heads.py").write_text(HEADS)
    (folder / "my_mappers.py").write_text(MAPPERS)
    return folder


def train(data: Dataset, code: Path | None, model: str = "faster_rcnn_tiny", **settings: Any) -> Run:
    trainer = Trainer(model=f"detectron2/{model}", code=code, **{**QUICK, **settings})
    return trainer.fit(data, data, quiet=True)


def losses(run: Run) -> list[float]:
    return [row["train/loss"] for row in run.history if "train/loss" in row]


def own_heads(**keys: Any) -> dict[str, Any]:
    return {"add_config": "my_heads:add_my_config", "imports": ["my_heads"], "MODEL.ROI_HEADS.NAME": "MyHeads", **keys}


def test_keys_that_the_code_adds_reach_its_heads(tiny: Dataset, code: Path) -> None:
    """In training, when the model is opened, and in a child, which may give them anew."""
    run = train(tiny, code, **own_heads(**{"MODEL.MYHEAD.SIZE": 3, "MODEL.MYHEAD.INNER.WORDS": ["b", "c"]}))
    assert load_file(run.model.path / "weights.safetensors")["roi_heads.own"].shape == (3,)
    written = yamls.flatten(yamls.read(run.model.path / "config.yaml").values)
    assert (written["MODEL.MYHEAD.SIZE"], written["MODEL.MYHEAD.INNER.WORDS"]) == (3, ["b", "c"])
    with detkit.Predictor(run, score_threshold=0.001, isolate=True) as predictor:
        assert predictor.classes == tiny.classes
    child = train(tiny, code, weights=run, **own_heads(**{"MODEL.MYHEAD.INNER.WORDS": ["d"]}))
    written = yamls.flatten(yamls.read(child.model.path / "config.yaml").values)
    assert (written["MODEL.MYHEAD.SIZE"], written["MODEL.MYHEAD.INNER.WORDS"]) == (3, ["d"])
    with pytest.raises(RunFailed, match=r"no key of Detectron2 'MODEL\.MYHEAD.*add_config=module:function"):
        train(tiny, code, weights=run, imports=["my_heads"])


@pytest.mark.skipif(sources.package() is None, reason="the file inherits from one of a Detectron2 that is here")
def test_keys_that_the_code_adds_in_a_configuration_file(tiny: Dataset, code: Path, tmp_path: Path) -> None:
    zoo = sources.configs() / "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
    file = tmp_path / "mine.yaml"
    file.write_text(
        f'_BASE_: "{zoo}"\nMODEL: {{MYHEAD: {{SIZE: 4}}, ROI_HEADS: {{NAME: MyHeads}}, RESNETS: {{DEPTH: 18, '
        "RES2_OUT_CHANNELS: 64}}\n"
    )
    given = {"config": str(file), "weights": None, "imports": ["my_heads"], "iterations": 1, "learning_rate": 1e-6}
    run = train(tiny, code, "config", add_config="my_heads:add_my_config", **given)
    assert load_file(run.model.path / "weights.safetensors")["roi_heads.own"].shape == (4,)
    with pytest.raises(RunFailed, match=r"no key of Detectron2 'MODEL\.MYHEAD\.SIZE'.*add_config=module:function"):
        train(tiny, code, "config", **given)


def test_a_project_of_detectron2s_own_by_its_configuration_file(tiny: Dataset) -> None:
    """TridentNet, as it lies in a checkout: it brings a backbone, heads, proposals and keys of its own."""
    found = sources.package()
    project = found.parent / "projects" / "TridentNet" if found is not None else Path("TridentNet")
    if not project.is_dir():
        pytest.skip("there is no checkout of Detectron2 here, which has its projects")
    run = train(
        tiny,
        project,
        "config",
        config=str(project / "configs" / "tridentnet_fast_R_50_C4_1x.yaml"),
        add_config="tridentnet:add_tridentnet_config",
        imports=["tridentnet"],
        **{"MODEL.TRIDENT.BRANCH_DILATIONS": [1, 2, 4], "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20},
        **{"weights": None, "iterations": 1, "batch_size": 2, "learning_rate": 1e-5},
    )
    written = yamls.flatten(yamls.read(run.model.path / "config.yaml").values)
    assert written["MODEL.TRIDENT.BRANCH_DILATIONS"] == [1, 2, 4]
    assert written["MODEL.PROPOSAL_GENERATOR.NAME"] == "TridentRPN"
    assert {"train/loss_rpn_cls", "val/AP50"} <= set(run.metrics)


def test_a_key_that_not_even_the_code_adds_is_refused_before_any_step(tiny: Dataset, code: Path) -> None:
    with pytest.raises(RunFailed, match=r"no key of Detectron2 'MODEL\.MYHEAD\.SISE'; did you mean 'MODEL\.MYHEAD\.SI"):
        train(tiny, code, **own_heads(**{"MODEL.MYHEAD.SISE": 3}))
    with pytest.raises(RunFailed, match=r"MODEL\.MYHEAD\.SIZE='big' is not valid: expected a int such as 2"):
        train(tiny, code, **own_heads(**{"MODEL.MYHEAD.SIZE": "big"}))


def test_a_function_that_adds_no_keys_is_named(tiny: Dataset, code: Path) -> None:
    with pytest.raises(RunFailed, match=r"add_broken_config.* failed at my_heads\.py, line 14: AttributeError"):
        train(tiny, code, add_config="my_heads:add_broken_config")
    with pytest.raises(RunFailed, match=r"no function \(add_config=my_heads:add_our_config\)"):
        train(tiny, code, add_config="my_heads:add_our_config")


@pytest.mark.skipif(sources.defaults() is None, reason="there is no Detectron2 here whose keys are known")
def test_without_the_function_its_keys_are_unknown_at_once(tiny: Dataset, code: Path) -> None:
    with pytest.raises(UnknownName, match=r"MODEL\.MYHEAD\.SIZE.*add_config=module:function"):
        train(tiny, code, **{"MODEL.MYHEAD.SIZE": 3})


def test_detectron2s_own_mapper_gives_what_training_without_gives(tiny: Dataset, code: Path) -> None:
    """The records, their boxes and labels, and the images that it reads are those of detkit's own batches."""
    mapped = train(tiny, code, mapper="my_mappers:Plain", **PLAIN)
    assert losses(mapped) == pytest.approx(losses(train(tiny, None, **PLAIN)), rel=1e-6)


def test_what_a_mapper_draws_belongs_to_the_image(tiny: Dataset, code: Path) -> None:
    """Whichever thread makes it ready; and a run that is stopped and resumed draws the same."""
    given = {"mapper": "my_mappers:dimmed", "code": code, "checkpoint_every": "1 iterations", "iterations": 8}
    ahead, now = (Trainer(model="detectron2/faster_rcnn_tiny", **{**QUICK, **given}, num_workers=n) for n in (3, 0))
    whole = ahead.fit(tiny, tiny, quiet=True)
    cut = now.start(tiny, tiny, leash=True)
    next(event for event in cut.events() if event.kind == "metric" and (event.step or 0) >= 3)
    cut.stop()
    assert losses(cut.resume(leash=True).wait()) == losses(whole)


@pytest.mark.parametrize("compressed", [True, False], ids=["polygons", "lengths"])
def test_a_mapper_learns_masks(tiny: Dataset, code: Path, compressed: bool) -> None:
    """Polygons, and run lengths as lists, which Detectron2 does not read itself."""

    def mask(box: list[float], width: int, height: int) -> Any:
        x0, y0, x1, y1 = (round(side) for side in box)
        if compressed:
            return [[x0, y0, x1, y0, x1, y1, x0, y1]]
        before, inside = height * x0 + y0, y1 - y0
        counts = [before, inside, *([height - inside, inside] * (x1 - x0 - 1))]
        return {"size": [height, width], "counts": [*counts, height * width - sum(counts)]}

    samples = [
        replace(one, masks=tuple(mask(box, one.width, one.height) for box in one.boxes.tolist())) for one in tiny
    ]
    data = Dataset.from_samples(tiny.classes, samples)
    mapped = train(data, code, "mask_rcnn_tiny", mapper="my_mappers:Plain", **PLAIN)
    plain = train(data, None, "mask_rcnn_tiny", **PLAIN)
    assert losses(mapped) == pytest.approx(losses(plain), rel=0.05), "pixels at a mask's rim may differ"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("nothing", r"mapper=my_mappers:nothing, given .*, returned NoneType; expected a dict with image"),
        ("bare", r"returned instances without gt_boxes, gt_classes; expected"),
        ("broken", r"mapper=my_mappers:broken, given .* failed at my_mappers\.py, line \d+: KeyError"),
        ("gone", r"no function \(mapper=my_mappers:gone\)"),
    ],
)
def test_what_is_no_mapper_is_named(name: str, says: str, tiny: Dataset, code: Path) -> None:
    with pytest.raises(RunFailed, match=says):
        train(tiny, code, mapper=f"my_mappers:{name}")


@pytest.mark.filterwarnings("ignore:.*does not carry")
def test_images_that_are_no_files_cannot_be_given_to_a_mapper(tiny: Dataset, code: Path, tmp_path: Path) -> None:
    packed = detkit.read_dataset(detkit.write_dataset(tiny.take(range(7)), tmp_path / "packed", format="recordio"))
    with pytest.raises(RunFailed, match="reads image files by itself, and .* is none on this machine"):
        train(packed, code, mapper="my_mappers:Plain")
