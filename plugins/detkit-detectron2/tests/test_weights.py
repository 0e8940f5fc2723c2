"""``weights=``: Detectron2's cache, a file, an earlier run; nothing is fetched unasked, nothing unsafe is opened."""

from __future__ import annotations

import http.server
import pickle
import re
import threading
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from detkit import plugins
from detkit.errors import UsageError, WeightsMissing
from detkit.job import Job, Workspace
from detkit_detectron2 import releases, sources

if plugins.backend("detectron2").missing():  # type: ignore[attr-defined]
    pytest.skip("needs Detectron2 in this interpreter, see docs/how-to/detectron2.md", allow_module_level=True)

sources.load()

import torch  # noqa: E402
from detectron2.config import CfgNode, get_cfg  # noqa: E402
from detectron2.modeling import build_model  # noqa: E402

from detkit_detectron2 import weights, yamls  # noqa: E402
from detkit_detectron2.zoo import ENTRIES  # noqa: E402

R50 = "faster_rcnn_R_50_FPN_1x"


def config(model: str, num_classes: int, **changes: Any) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_other_cfg(CfgNode(yamls.read(sources.configs() / ENTRIES[model].config).values))
    own = dict(ENTRIES[model].changes)
    cfg.merge_from_list([one for key, value in {**own, **changes}.items() for one in (key, value)])
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.RETINANET.NUM_CLASSES = num_classes
    cfg.MODEL.DEVICE = "cpu"
    return cfg


def network(cfg: CfgNode, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return build_model(cfg)


def job(model: str, classes: list[str], wanted: str | None) -> Job:
    return Job(backend="detectron2", engine="", model=model, params={"weights": wanted}, options={}, classes=classes)


def initialise(
    model: str, classes: list[str], wanted: str | None, folder: Path, **changes: Any
) -> tuple[dict[str, torch.Tensor], Any]:
    cfg = config(model, len(classes), **changes)
    fresh = network(cfg, seed=1)
    origin = weights.initialise(fresh, job(model, classes, wanted), Workspace(folder / "run"), cfg)
    return fresh.state_dict(), origin


def save(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol=2))
    return path


def arrays(state: dict[str, torch.Tensor]) -> dict[str, Any]:
    return OrderedDict((name, value.numpy()) for name, value in state.items())


@pytest.mark.parametrize("model", ["faster_rcnn_tiny", "retinanet_tiny", "mask_rcnn_tiny"])
def test_outputs_follow_the_names_of_classes(model: str, tmp_path: Path) -> None:
    """Also where both sides have equally many; the background stays the last one."""
    earlier = network(config(model, 3), seed=0).state_dict()
    path = tmp_path / "parent/model_final.pth"
    path.parent.mkdir()
    torch.save({"model": earlier, "iteration": 7}, path)
    own, origin = initialise(model, ["disc", "ring", "bar"], str(path), tmp_path)
    heads = weights.head_rows(own, config(model, 3))
    assert set(origin.skipped) == set(heads)  # nobody knows whose its outputs are
    assert (origin.kept, origin.new) == ([], ["disc", "ring", "bar"])
    assert all(torch.equal(own[key], earlier[key]) for key in own.keys() - heads.keys() if not key.endswith("tracked"))

    cfg = config(model, 3)
    fresh = network(cfg, seed=1)
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    asked = job(model, ["ring", "bolt", "disc"], None)
    copied = weights._copy(fresh, cfg, asked, state=earlier, old_classes=["disc", "bar", "ring"], path=path)
    assert (copied.kept, copied.new, copied.dropped, copied.skipped) == (["ring", "disc"], ["bolt"], ["bar"], [])
    for key, (rows, background) in heads.items():
        k = 3 + background
        then, now, random = (
            one[key].view(-1, k, rows, *own[key].shape[1:]) for one in (earlier, fresh.state_dict(), before)
        )
        assert torch.equal(now[:, 0], then[:, 2])
        assert torch.equal(now[:, 2], then[:, 0])
        assert torch.equal(now[:, 1], random[:, 1])
        assert not background or torch.equal(now[:, 3], then[:, 3])


def test_coco_weights_from_the_cache(tmp_path: Path) -> None:
    """As Detectron2 publishes them: numpy arrays, with an author; classes that COCO knows keep their outputs."""
    earlier = network(config(R50, 80)).state_dict()
    published = {"model": arrays(earlier) | {"pixel_mean": earlier["backbone.bottom_up.stem.conv1.norm.bias"].numpy()}}
    path = save(releases.cached(releases.COCO[R50]), {**published, "__author__": "Detectron2 Model Zoo"})
    assert path.is_relative_to(tmp_path / "cache/detectron2/COCO-Detection")
    own, origin = initialise(R50, ["bolt", "person"], "auto", tmp_path)
    assert (origin.source, origin.kept, origin.new) == ("coco", ["person"], ["bolt"])
    assert (len(origin.dropped), origin.skipped) == (79, [])
    assert "CC-BY-SA-3.0" in origin.licence
    key = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(own[key][1:], earlier[key][[0, 80]])
    _, again = initialise(R50, ["person"], str(path), tmp_path)
    assert again.kept == ["person"]


def caffe2_name(key: str) -> str:
    """Return what Caffe2 calls a weight of a ResNet."""
    if ".stem." in key:
        return "conv1_w" if key.endswith("conv1.weight") else f"res_conv1_bn_{'s' if 'weight' in key else 'b'}"
    stage, block, layer, *norm, part = key.removeprefix("backbone.bottom_up.").split(".")
    branch = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}[layer]
    return f"{stage}_{block}_{branch}_" + (f"bn_{'s' if part == 'weight' else 'b'}" if norm else "w")


def test_imagenet_weights_by_the_names_of_caffe2(tmp_path: Path) -> None:
    earlier = network(config(R50, 2)).state_dict()
    own_names = {key for key in earlier if ".bottom_up." in key and not re.search("running", key)}
    blobs = {caffe2_name(key): earlier[key].numpy() for key in own_names}
    blobs |= {
        "pred_w": torch.zeros(1000, 2048).numpy(),
        "conv1_w_momentum": earlier["backbone.fpn_lateral2.bias"].numpy(),
    }
    save(releases.cached(str(releases.imagenet(50, 1))), {"blobs": blobs, "cfg": "a text"})
    own, origin = initialise(R50, ["bolt", "person"], "imagenet", tmp_path)
    assert (origin.source, origin.new, origin.skipped) == ("imagenet", ["bolt", "person"], [])
    assert all(torch.equal(own[key], earlier[key]) for key in own_names)
    assert not torch.equal(own["backbone.fpn_lateral2.weight"], earlier["backbone.fpn_lateral2.weight"])


def test_nothing_is_fetched_unasked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(releases, "_HOST", "http://127.0.0.1:9/")
    with pytest.raises(
        WeightsMissing, match=r"not in the cache; weights=coco would fetch them. put the file at .*\.pkl"
    ):
        releases.require(R50, "auto")
    with pytest.raises(WeightsMissing, match=r"model_final_b275ba\.pkl cannot be fetched .*put the file at .*/cache/"):
        initialise(R50, ["bolt"], "coco", tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(UsageError, match="released none for a ResNet of depth 18"):
        initialise("faster_rcnn_tiny", ["bolt"], "imagenet", tmp_path)


def test_weights_of_something_else(tmp_path: Path) -> None:
    other = save(tmp_path / "other.pkl", {"model": {"layer.weight": torch.zeros(2, 2).numpy()}})
    with pytest.raises(UsageError, match="is of another network than faster_rcnn_tiny"):
        initialise("faster_rcnn_tiny", ["bolt"], str(other), tmp_path)
    with pytest.raises(UsageError, match="holds no state dict"):
        initialise("faster_rcnn_tiny", ["bolt"], str(save(tmp_path / "text.pkl", {"model": {"a": "b"}})), tmp_path)
    torch.save({"model": {"a": Path}}, tmp_path / "code.pth")
    with pytest.raises(UsageError, match="can be read safely"):
        initialise("faster_rcnn_tiny", ["bolt"], str(tmp_path / "code.pth"), tmp_path)


def test_a_page_in_place_of_weights_does_not_stay_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>please log in</html>")

        def log_message(self, *_: Any) -> None:
            """Say nothing."""

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(releases, "_HOST", f"http://127.0.0.1:{server.server_port}/")
        with pytest.raises(WeightsMissing, match="is no file of weights"):
            initialise(R50, ["bolt"], "coco", tmp_path)
        server.shutdown()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_weights_of_another_release_for_a_file(tmp_path: Path) -> None:
    """A configuration file may begin with any release; its COCO outputs are kept by name."""
    address = releases.url(releases.COCO["faster_rcnn_R_50_FPN_3x"])
    earlier = network(config(R50, 80)).state_dict()
    save(releases.cached(address), {"model": arrays(earlier), "__author__": "Detectron2 Model Zoo"})
    cfg = config(R50, 1, **{"MODEL.WEIGHTS": address})
    origin = weights.initialise(network(cfg, seed=1), job("config", ["person"], "coco"), Workspace(tmp_path), cfg)
    assert (origin.source, origin.kept) == ("coco", ["person"])


def test_native_addresses_are_words_here() -> None:
    assert releases.word(R50, "detectron2://ImageNetPretrained/MSRA/R-50.pkl") == "imagenet"
    assert releases.word(R50, releases.COCO[R50]) == releases.word(R50, releases.url(releases.COCO[R50])) == "coco"
    assert (releases.word(R50, ""), releases.word(R50, "mine.pth")) == ("none", "mine.pth")
    torchvision = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"  # of other pixel statistics
    assert releases.word("config", torchvision) == "imagenet"
    assert releases.word("config", releases.url(releases.COCO[R50])) == "coco"
    for model, address in (
        (R50, torchvision),
        (R50, releases.COCO["faster_rcnn_R_50_FPN_3x"]),
        ("faster_rcnn_tiny", "detectron2://ImageNetPretrained/MSRA/R-50.pkl"),
        ("config", "https://example.org/a.pkl"),
        ("config", "catalog://ImageNetPretrained/MSRA/R-50"),
    ):
        with pytest.raises(ValueError, match="or the path of a file"):
            releases.word(model, address)


def test_defaults_are_read_without_importing_them() -> None:
    known, real = sources.defaults(), yamls.flatten(get_cfg())
    assert known is not None
    assert set(known) == set(real)
    assert [key for key, value in real.items() if known[key] != value] == ["MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS"]


def test_addresses_are_those_of_the_zoo() -> None:
    """The table is repeated, as the module that has it imports what new setuptools have not."""
    package = sources.package()
    assert package is not None
    listed = (package / "model_zoo/model_zoo.py").read_text()
    for name, address in releases.COCO.items():
        folder, _, rest = address.removeprefix(releases.PREFIX).partition("/")
        assert f'"{folder}/{name}": "{rest.removeprefix(name + "/")}"' in listed


def test_weights_of_other_anchors(tmp_path: Path) -> None:
    """Their outputs would fit, and mean other boxes."""
    cfg = config("faster_rcnn_tiny", 1)
    (tmp_path / weights.CONFIG).write_text(cfg.dump())
    parent = SimpleNamespace(path=tmp_path, name="detectron2/faster_rcnn_tiny")
    weights._refuse_other_anchors(parent, cfg)
    cfg.merge_from_list(["MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32], [64], [128]]])
    with pytest.raises(UsageError, match=r"with other anchors: MODEL.ANCHOR_GENERATOR.SIZES is \[\[16.0\], "):
        weights._refuse_other_anchors(parent, cfg)
