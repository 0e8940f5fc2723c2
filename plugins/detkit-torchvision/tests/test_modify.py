"""``modify=``: networks that the user's own code has changed, in training, prediction and with earlier weights."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import nn

import detkit
from detkit import usercode
from detkit.data import Dataset
from detkit.errors import InvalidValue, RunFailed, UnknownName, UsageError, UserCodeFailed
from detkit.files import write_json
from detkit_torchvision.copying import copy_by_name, head_rows
from detkit_torchvision.models import build
from detkit_torchvision.modify import modified

HEADS = '''
import torch
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor


def light(network, num_outputs):
    """The towers of an FCOS, one separable convolution each; the last layers stay."""
    for branch in (network.head.classification_head, network.head.regression_head):
        channels = branch.conv[0].in_channels
        branch.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.Conv2d(channels, channels, 1), nn.ReLU()
        )
    return network


class Agnostic(nn.Module):
    """Box regression that no class has to itself."""

    def __init__(self, channels, num_outputs):
        super().__init__()
        self.num_outputs = num_outputs
        self.cls_score, self.bbox_pred = nn.Linear(channels, num_outputs), nn.Linear(channels, 4)

    def forward(self, x):
        return self.cls_score(x), self.bbox_pred(x).repeat(1, self.num_outputs)


def agnostic(network, num_outputs):
    network.roi_heads.box_predictor = Agnostic(1024, num_outputs)
    return network


class Renamed(nn.Module):
    """FCOS's classification by layers of other names."""

    def __init__(self, channels, num_outputs):
        super().__init__()
        self.num_outputs, self.outputs = num_outputs, nn.Conv2d(channels, num_outputs, 1)

    def forward(self, features):
        return torch.cat([self.outputs(x).permute(0, 2, 3, 1).flatten(1, 2) for x in features], dim=1)

    def compute_loss(self, *args):
        raise NotImplementedError


def renamed(network, num_outputs):
    network.head.classification_head = Renamed(network.backbone.out_channels, num_outputs)
    return network


def forgets(network, num_outputs):
    network.head = None


def wraps(network, num_outputs):
    return nn.Sequential(network)


def fails(network, num_outputs):
    return network.head.no_such_head
'''

Modules = Any


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "src").mkdir()
    (tmp_path / "src/my_heads.py").write_text(HEADS)
    return tmp_path / "src"


@pytest.fixture
def heads(code: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Modules]:
    """The module, imported as an installed one is."""
    monkeypatch.syspath_prepend(code)
    import my_heads  # type: ignore[import-not-found]

    yield my_heads
    del sys.modules["my_heads"]


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    finders = list(sys.meta_path)
    yield
    sys.meta_path[:], usercode._finder.code = finders, None
    sys.modules.pop("my_heads", None)


def trainer(code: Path | None, **settings: Any) -> detkit.Trainer:
    quick: dict[str, Any] = {"iterations": 4, "batch_size": 4, "image_size": 64, "device": "cpu", "threads": 1}
    modify = {"code": code, "modify": "my_heads:light"} if code is not None else {}
    return detkit.Trainer(model="torchvision/fcos_tiny", **{**quick, **modify, **settings})


def boxes(predictor: detkit.Predictor, tiny: Dataset) -> list[list[float]]:
    with predictor:
        return [box for found in predictor.predict(tiny) for box in found.boxes.tolist()]


def weights(run: detkit.Run) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(run.model.path / "weights.safetensors")


def test_trained_stopped_resumed_and_opened(tiny: Dataset, code: Path, tmp_path: Path) -> None:
    """A run that was stopped ends as one that was not; its model is opened here, in a worker, and as a bare folder."""
    longer = trainer(code, iterations=12, checkpoint_every="2 iterations", validate_every="2 iterations")
    whole = longer.fit(tiny, tiny, quiet=True)
    run = longer.start(tiny, tiny, leash=True)
    for event in run.events():
        if event.kind == "metric" and (event.step or 0) >= 2:
            break
    run.stop()
    (code / "my_heads.py").write_text("raise AssertionError('the run has its own')\n")
    resumed = run if run.status == "finished" else longer.resume(run, quiet=True)
    (code / "my_heads.py").write_text(HEADS)
    ours, theirs = weights(resumed), weights(whole)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert "head.regression_head.conv.1.weight" in ours
    assert ours["head.regression_head.conv.0.weight"].shape == (64, 1, 3, 3)

    here = boxes(detkit.Predictor(resumed, score_threshold=0.01), tiny)
    assert here
    assert boxes(detkit.Predictor(resumed, score_threshold=0.01, isolate=True), tiny) == here
    bare = shutil.copytree(resumed.path / "model", tmp_path / "bare")
    with pytest.raises(UsageError, match="was trained with code of its own"):
        detkit.Predictor(bare)
    assert boxes(detkit.Predictor(bare, score_threshold=0.01, code=code), tiny) == here


def test_weights_of_a_run_without_it(tiny: Dataset, code: Path) -> None:
    """What has the same name and shape is taken over, the new towers start fresh and are listed."""
    first = trainer(None).fit(tiny, quiet=True)
    second = trainer(code, weights=first, iterations=1, learning_rate=1e-9).fit(tiny, quiet=True)
    origin = second.model.manifest.weights
    assert origin.kept == list(tiny.classes)
    assert {name.partition(".conv.")[0] for name in origin.skipped} == {
        "head.classification_head",
        "head.regression_head",
    }
    before, after = weights(first), weights(second)
    for name in ("backbone.stem.0.0.weight", "head.classification_head.cls_logits.weight"):
        assert torch.allclose(before[name], after[name], atol=1e-6)


def test_an_installed_module(tiny: Dataset, heads: Modules) -> None:
    """Without code=, what can be imported is; the folder of the user's script is none of the worker's."""
    with pytest.raises(RunFailed, match="no module 'my_heads' in the run's code, nor in .*code="):
        trainer(None, modify="my_heads:light").fit(tiny, quiet=True)
    network = build("fcos_tiny", 2, image_size=64)
    assert modified(network, "my_heads:light", "fcos_tiny", 2) is network
    run = trainer(None, modify="torch.nn.utils:fuse_conv_bn_eval")
    with pytest.raises(RunFailed, match="modify=torch.nn.utils:fuse_conv_bn_eval, given a fcos_tiny, failed at"):
        run.fit(tiny, quiet=True)


def test_a_function_that_came_with_a_model(tiny: Dataset, tmp_path: Path) -> None:
    """It is opened where Python would find the module."""
    run = trainer(None, iterations=1).fit(tiny, quiet=True)
    model = Path(shutil.copytree(run.path / "model", tmp_path / "archive/model"))
    manifest = msgspec.structs.replace(run.model.manifest, params={**run.model.manifest.params, "modify": "evil:f"})
    write_json(model / "detkit.json", manifest)
    ran = tmp_path / "ran"
    (model.parent / "evil.py").write_text(f"open({str(ran)!r}, 'w')\n")
    program = [sys.executable, "-c", "import detkit; detkit.Predictor('model')"]
    done = subprocess.run(program, cwd=model.parent, capture_output=True, text=True, check=False)
    assert not ran.exists()
    assert "'evil' would be imported from" in done.stderr


def test_batch_size_auto_measures_the_modified_network(tiny: Dataset, code: Path) -> None:
    run = trainer(code, batch_size="auto", iterations=1).fit(tiny, quiet=True)
    assert run.model.manifest.native["batch_size"] == 1


@pytest.mark.parametrize(
    ("modify", "error", "words"),
    [
        ("my_heads:lite", UnknownName, "function .*my_heads:lite.* did you mean 'light'"),
        ("my_heads", InvalidValue, "module:function"),
        ("my_head:light", UserCodeFailed, "no module 'my_head'"),
        (
            "my_heads:forgets",
            UserCodeFailed,
            "modify=my_heads:forgets returned NoneType for a fcos_tiny.*return network",
        ),
        ("my_heads:wraps", UserCodeFailed, "without the `transform`"),
        ("my_heads:fails", UserCodeFailed, r"modify=my_heads:fails, given a fcos_tiny, failed at .*line \d+: Attribut"),
    ],
)
def test_what_a_function_may_not_do(modify: str, error: type[Exception], words: str, heads: Modules) -> None:
    with pytest.raises(error, match=words):
        modified(build("fcos_tiny", 2, image_size=64), modify, "fcos_tiny", 2)


def test_failure_names_the_line_of_the_copy(tiny: Dataset, code: Path) -> None:
    line = HEADS.splitlines().index("    return network.head.no_such_head") + 1
    with pytest.raises(RunFailed, match=rf"failed at my_heads.py, line {line}: AttributeError"):
        trainer(code, modify="my_heads:fails").fit(tiny, quiet=True)


def test_number_of_outputs(heads: Modules) -> None:
    """It counts background where the family has an output for it."""
    heads.seen = lambda network, num_outputs: seen.append(num_outputs) or network
    seen: list[int] = []
    for model in ("fcos_tiny", "ssd_tiny"):
        modified(build(model, 3, image_size=64), "my_heads:seen", model, 3)
    assert seen == [3, 4]


def test_class_agnostic_boxes_are_copied_whole(heads: Modules) -> None:
    """The scores follow the names of the classes, the boxes are of no class."""
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    old, new = (modified(build(name, 3, image_size=64), "my_heads:agnostic", name, 3) for _ in range(2))
    report = copy_by_name(name, new, old.state_dict(), ["a", "b", "c"], ["c", "a", "d"])
    assert (report.kept, report.new, report.dropped) == (["c", "a"], ["d"], ["b"])
    assert report.skipped == []
    ours, theirs = new.roi_heads.box_predictor, old.roi_heads.box_predictor
    assert torch.equal(ours.bbox_pred.weight, theirs.bbox_pred.weight)
    assert torch.equal(ours.cls_score.weight[[0, 1, 2]], theirs.cls_score.weight[[0, 3, 1]])


@pytest.mark.parametrize(("classes", "taken"), [(["a", "b"], True), (["b", "a"], False), (["a", "c"], False)])
def test_a_head_that_nobody_knows(classes: list[str], taken: bool, heads: Modules) -> None:
    """Which of its outputs is of which class is not known, so it is only taken over for the very same classes."""
    old, new = (modified(build("fcos_tiny", 2, image_size=64), "my_heads:renamed", "fcos_tiny", 2) for _ in range(2))
    assert head_rows(new) == {}
    report = copy_by_name("fcos_tiny", new, old.state_dict(), ["a", "b"], classes)
    assert torch.equal(new.backbone.stem[0][0].weight, old.backbone.stem[0][0].weight)
    same = torch.equal(new.head.classification_head.outputs.weight, old.head.classification_head.outputs.weight)
    assert same == taken
    assert report.kept == (classes if taken else [])
    assert ("head.classification_head.outputs.weight" in report.skipped) != taken
    assert isinstance(new, nn.Module)
