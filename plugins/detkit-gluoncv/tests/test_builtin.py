"""The hyperparameters of SageMaker's built-in algorithm: what each becomes here, and what is refused."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from detkit import Trainer, plugins
from detkit.data import Dataset
from detkit.dialects import Note, becomes, text, typed
from detkit.errors import InvalidValue, PluginError, UnknownName, UsageError
from detkit.params import describe, set_fields
from detkit.sagemaker_object_detection import BuiltinParams
from detkit.testing import tiny_dataset
from detkit_gluoncv.builtin import DIALECT, VGG_LAYERS, check, translate
from detkit_gluoncv.params import MODELS, NETWORKS, GluoncvParams, require

LIKE = "sagemaker-object-detection"
PAGE = Path(__file__).parents[3] / "docs/reference/sagemaker-object-detection.md"


@pytest.fixture(autouse=True)
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("DETKIT_") and name not in ("DETKIT_PYTHON_GLUONCV", "DETKIT_ENVIRONMENTS"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Seven small pictures with two classes."""
    return tiny_dataset(tmp_path_factory.mktemp("tiny")).take(range(7))


@pytest.fixture(scope="module")
def with_an_empty_one(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Eight pictures, the last without a box."""
    return tiny_dataset(tmp_path_factory.mktemp("empty"))


def read(words: str) -> BuiltinParams:
    return set_fields(BuiltinParams(), dict(word.split("=", 1) for word in words.split()), kind="hyperparameter")


def notes(words: str = "", **beside: Any) -> dict[str, Note]:
    return {note.name: note for note in translate(read(words), beside)}


EXAMPLES = """
num_classes=3
num_training_samples=200
base_network=vgg-16
base_network=vgg-16 image_shape=512
base_network=resnet-50
base_network=resnet-50 image_shape=512
image_shape=300
image_shape=512
image_shape=400
image_shape=600 base_network=resnet-50
image_shape=1100
use_pretrained_model=1
use_pretrained_model=0
epochs=30
mini_batch_size=32
learning_rate=0.001
learning_rate=0.001 optimizer=adadelta
lr_scheduler_step=
lr_scheduler_step=10,20
lr_scheduler_step=20,10
lr_scheduler_step=10,20 optimizer=adadelta
lr_scheduler_factor=0.1
lr_scheduler_factor=0.1 lr_scheduler_step=10
optimizer=sgd
optimizer=adam
optimizer=rmsprop
optimizer=adadelta
momentum=0.9
momentum=1
momentum=0.9 optimizer=adam
weight_decay=0.0005
weight_decay=0.0005 optimizer=rmsprop
weight_decay=0.0005 optimizer=adadelta
weight_decay=0.0005 base_network=resnet-50
overlap_threshold=0.5
nms_threshold=0.45
label_width=350
early_stopping=false
early_stopping=true
early_stopping_patience=5
early_stopping_patience=5 early_stopping=true
early_stopping_min_epochs=10
early_stopping_min_epochs=10 early_stopping=true
early_stopping_tolerance=0.0
early_stopping_tolerance=0.0 early_stopping=true
freeze_layer_pattern=none
freeze_layer_pattern=^(conv1_).*
freeze_layer_pattern=stage1
freeze_layer_pattern=(
freeze_layer_pattern=conv0 base_network=resnet-50
kv_store=none
kv_store=dist_sync
""".strip().splitlines()
"""The rows of the table: the hyperparameter, and after it others that matter to it."""


def table() -> str:
    """Return what the page says of each hyperparameter."""
    lines = ["| there | here | how | why |", "|---|---|---|---|"]
    for words in EXAMPLES:
        first, *others = words.split()
        note = notes(words)[first.partition("=")[0]]
        there = f"`{first}`" + (f" with `{' '.join(others)}`" if others else "")
        lines.append(_row(there, note))
    lines.append(_row("`use_pretrained_model=1` with `weights=RUN`", notes(weights="RUN")["use_pretrained_model"]))
    lines.append(_row("`base_network=vgg-16` with `weights=RUN`", notes(weights="RUN")["base_network"]))
    lines.append(_row("(always)", notes()[""]))
    return "\n".join(lines) + "\n"


def _row(there: str, note: Note) -> str:
    here = f"`{typed(note.becomes)}`" if note.becomes else ""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in (there, here, note.fidelity, note.why)) + " |"


def ranges() -> str:
    """Return the names, values and defaults as the struct has them."""
    (schema,) = msgspec.json.schema(BuiltinParams)["$defs"].values()
    described = describe(BuiltinParams)
    lines = ["| name | value | default | meaning |", "|---|---|---|---|"]
    for name, about in schema["properties"].items():
        default = text(getattr(BuiltinParams(), name))
        lines.append(f"| `{name}` | {_kind(about)} | {f'`{default}`' if default else 'empty'} | {described[name]} |")
    return "\n".join(lines) + "\n"


def _kind(about: Mapping[str, Any]) -> str:
    if "anyOf" in about:
        return " or ".join(_kind(one) for one in about["anyOf"])
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in about["enum"])
    words = {
        "integer": "whole number",
        "number": "number",
        "string": "text",
        "null": "none",
        "array": "whole numbers",
        "boolean": "`true`, `false`",
    }
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    return " ".join([words[about["type"]], *(f"{word} {about[key]:g}" for key, word in limits.items() if key in about)])


def test_the_page_says_what_the_code_does() -> None:
    page = PAGE.read_text()
    assert table() in page, f"the table should be:\n{table()}"
    assert ranges() in page, f"the table should be:\n{ranges()}"


def test_every_hyperparameter_is_in_the_table() -> None:
    assert {words.partition("=")[0] for words in EXAMPLES} == set(BuiltinParams.__struct_fields__)


@pytest.mark.parametrize("words", ["", *EXAMPLES])
def test_every_hyperparameter_has_one_note(words: str) -> None:
    names = [note.name for note in translate(read(words), {})]
    assert sorted(names) == sorted([*BuiltinParams.__struct_fields__, ""])
    for note in translate(read(words), {}):
        assert note.fidelity in ("exact", "unused") or note.why, note
        assert note.fidelity != "refused" or not note.becomes, note


@st.composite
def hyperparameters(draw: st.DrawFn) -> BuiltinParams:
    """Anything that the service would take."""
    return BuiltinParams(
        base_network=draw(st.sampled_from(["vgg-16", "resnet-50"])),
        image_shape=draw(st.integers(300, 1024)),
        use_pretrained_model=draw(st.sampled_from([0, 1])),  # type: ignore[arg-type]
        epochs=draw(st.integers(1, 500)),
        mini_batch_size=draw(st.integers(1, 512)),
        learning_rate=draw(st.floats(0, 1, exclude_min=True)),
        lr_scheduler_step=tuple(sorted(draw(st.sets(st.integers(1, 500))))),
        lr_scheduler_factor=draw(st.floats(0, 1, exclude_min=True, exclude_max=True)),
        optimizer=draw(st.sampled_from(["sgd", "adam", "rmsprop", "adadelta"])),
        momentum=draw(st.floats(0, 1, exclude_min=True, exclude_max=True)),
        weight_decay=draw(st.floats(0, 1, exclude_min=True, exclude_max=True)),
        nms_threshold=draw(st.floats(0, 1, exclude_min=True)),
        early_stopping=draw(st.booleans()),
        early_stopping_patience=draw(st.integers(1, 50)),
        early_stopping_tolerance=draw(st.floats(0, 1)),
    )


@given(params=hyperparameters())
def test_what_comes_out_is_a_model_and_its_parameters(params: BuiltinParams) -> None:
    """Whatever the service takes, gluoncv takes the translation of; as text, too, the way it is sent."""
    said = becomes(translate(params, {}))
    model = said.pop("model")
    found = set_fields(MODELS[model].params, said, kind="parameter")
    assert isinstance(found, GluoncvParams)
    require(model, found)
    assert (found.epochs, found.batch_size, found.image_size) == (
        params.epochs, params.mini_batch_size, params.image_shape
    )  # fmt: skip
    assert abs(NETWORKS[model].size - params.image_shape) < 150 or params.image_shape > 512
    as_text = {name: text(value) for name, value in msgspec.structs.asdict(params).items()}
    assert set_fields(BuiltinParams(), as_text, kind="hyperparameter") == params


def test_everything_said_is_known_here() -> None:
    for words in EXAMPLES:
        said = becomes(translate(read(words), {}))
        assert set(said) - {"model"} <= set(GluoncvParams.__struct_fields__)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("image_shape=299", "image_shape='299'.* >= 300"),
        ("base_network=vgg16", "base_network='vgg16'.*one of 'vgg-16', 'resnet-50'"),
        ("learning_rate=0", "learning_rate='0'.* > 0"),
        ("lr_scheduler_factor=1", "lr_scheduler_factor='1'.* < 1"),
        ("weight_decay=0", "weight_decay='0'.* > 0"),
        ("use_pretrained_model=2", "use_pretrained_model='2'"),
        ("early_stopping=perhaps", "early_stopping='perhaps'"),
        ("optimizer=adamw", "optimizer='adamw'"),
        ("epochs=0", "epochs='0'.* >= 1"),
    ],
)
def test_values_the_service_would_not_take(words: str, message: str) -> None:
    with pytest.raises(InvalidValue, match=message):
        read(words)


def test_text_as_the_service_sends_it() -> None:
    found = read("early_stopping=True use_pretrained_model=0 lr_scheduler_step=3,6 mini_batch_size=16")
    assert (found.early_stopping, found.use_pretrained_model, found.lr_scheduler_step, found.mini_batch_size) == (
        True, 0, (3, 6), 16
    )  # fmt: skip
    assert set_fields(BuiltinParams(), {"lr_scheduler_step": "10, 20"}, kind="").lr_scheduler_step == (10, 20)


def test_weights_beside() -> None:
    assert notes(weights="runs/first")["use_pretrained_model"].becomes == {"weights": "runs/first"}
    assert "anchor_sizes" not in notes(weights="runs/first")["base_network"].becomes
    for weights in ("imagenet", None):
        assert notes(weights=weights)["use_pretrained_model"].becomes == {"weights": "imagenet"}
        assert "anchor_sizes" in notes(weights=weights)["base_network"].becomes
    for weights in ("none", "auto"):
        with pytest.raises(UsageError, match=f"weights={weights} .* contradicts use_pretrained_model=1"):
            Trainer(like=LIKE, weights=weights).explain()


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("^(conv1_|conv2_).*", ["conv1_1", "conv1_2", "conv2_1", "conv2_2"]),
        ("conv5", ["conv5_1", "conv5_2", "conv5_3"]),
        ("fc", ["fc6", "fc7"]),
        (".*", list(VGG_LAYERS)),
    ],
)
def test_frozen_layers(pattern: str, layers: list[str]) -> None:
    freeze = notes(f"freeze_layer_pattern={pattern}")["freeze_layer_pattern"].becomes["freeze"]
    expected = {f"{VGG_LAYERS[layer]}.{kind}" for layer in layers for kind in ("weight", "bias")}
    every = [f"features.stages.{s}.{i}.{kind}" for s in range(6) for i in range(12) for kind in ("weight", "bias")]
    assert {name for name in every if re.match(freeze, name)} == expected
    weights = notes("freeze_layer_pattern=.*_weight$")["freeze_layer_pattern"].becomes["freeze"]
    assert not re.match(weights, "features.stages.0.0.bias")


FREEZE = """
import json, sys
from detkit_gluoncv.networks import build, freeze, parameters
net = build(sys.argv[1], ["a"])
shapes = {name: list(parameters(net)[name].shape) for name in freeze(net, sys.argv[2])}
print(json.dumps(shapes))
"""


@pytest.mark.parametrize("model", ["ssd_300_vgg16_atrous", "ssd_512_vgg16_atrous"])
def test_the_layers_are_those_of_gluoncv(model: str) -> None:
    """In the order of VGG-16, with its numbers of channels."""
    try:
        python = plugins.backend("gluoncv").interpreter(None)  # type: ignore[attr-defined]
    except PluginError as error:
        pytest.skip(str(error))
    pattern = notes("freeze_layer_pattern=.*_weight$")["freeze_layer_pattern"].becomes["freeze"]
    done = subprocess.run([python, "-c", FREEZE, model, pattern], capture_output=True, text=True, check=True)
    shapes = json.loads(done.stdout.splitlines()[-1])
    assert list(shapes) == [f"{here}.weight" for here in VGG_LAYERS.values()]
    assert [shape[0] for shape in shapes.values()] == [64, 64, 128, 128, *[256] * 3, *[512] * 6, 1024, 1024]


def test_compared_with_the_data(tiny: Dataset) -> None:
    channels = {"train": tiny, "validation": tiny[:4]}
    assert check(read("num_classes=2 num_training_samples=7"), channels) == []
    told = [str(note) for note in check(BuiltinParams(), channels)]
    assert told[0] == "num_classes: the data has 2 classes (disc, square); the paid job needs num_classes=2"
    assert re.match("num_training_samples: the data has 7 training images.*needs num_training_samples=7", told[1])
    wrong = check(read("num_classes=20 num_training_samples=9 label_width=7"), channels)
    busiest = int(tiny.boxes_per_image().max())
    assert [(note.hyperparameter, note.fidelity) for note in wrong] == [
        ("num_classes=20", "refused"), ("num_training_samples=9", "refused"), ("label_width=7", "refused")
    ]  # fmt: skip
    assert wrong[-1].why.endswith(f"label_width={2 + 5 * busiest} or more")
    enough = read(f"num_classes=2 num_training_samples=7 label_width={2 + 5 * busiest}")
    assert check(enough, channels) == []


def test_images_without_boxes_are_told(with_an_empty_one: Dataset) -> None:
    """The service's files cannot hold them, so whoever writes the files leaves them out, and counts again."""
    (note,) = check(read("num_classes=2 num_training_samples=8"), {"train": with_an_empty_one})
    assert note.fidelity == "exact"
    assert note.why.startswith("1 training and 0 validation images have no boxes")
    assert note.why.endswith("num_training_samples=7")
    channels = {"train": with_an_empty_one.take(range(7)), "validation": with_an_empty_one}
    (note,) = check(read("num_classes=2 num_training_samples=7"), channels)
    assert note.why.startswith("0 training and 1 validation images")


def test_the_busiest_image_may_be_in_validation(tiny: Dataset) -> None:
    counts = tiny.boxes_per_image()
    quiet = tiny.take([int(counts.argmin())])
    note = check(read("num_classes=2 num_training_samples=1 label_width=7"), {"train": quiet, "validation": tiny})[0]
    assert note.why.endswith(f"label_width={2 + 5 * int(counts.max())} or more")
    assert check(read("num_classes=2 num_training_samples=1 label_width=7"), {"train": quiet, "test": tiny}) == []


def test_names_of_the_service_itself() -> None:
    with pytest.raises(UnknownName, match="'_kvstore';.* the service sets names that begin with _ itself"):
        Trainer(like=LIKE).explain(_kvstore="device")
    with pytest.raises(UnknownName, match="'force_padding_label_width'; did you mean 'label_width'"):
        Trainer(like=LIKE).explain(force_padding_label_width=350)
    with pytest.raises(UnknownName, match="'mini_batch'; did you mean 'mini_batch_size'"):
        Trainer(like=LIKE).explain(mini_batch=16)


def test_refused_before_anything_is_looked_for() -> None:
    with pytest.raises(UsageError, match=r"(?s)2 hyperparameter.*kv_store=dist_sync.*") as caught:
        Trainer(like=LIKE, base_network="resnet-50", freeze_layer_pattern="conv0", kv_store="dist_sync").fit("nowhere")
    assert "freeze_layer_pattern=conv0: the layers of resnet-50 have other names here" in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 8}, r"batch_size=8 \(from the call\) contradicts mini_batch_size=32"),
        ({"batch_size": 8, "mini_batch_size": 16}, "batch_size=8 .* contradicts mini_batch_size=16"),
        ({"iterations": 8}, "iterations=8 .* contradicts epochs=30"),
        ({"lr_scheduler": "cosine"}, "lr_scheduler=cosine .* contradicts lr_scheduler_step= "),
        ({"image_size": 512}, "image_size=512 .* contradicts image_shape=300"),
        ({"warmup_epochs": 1}, "warmup_epochs=1 .* contradicts what is always so in sagemaker"),
        ({"gradient_clip": 1}, "gradient_clip=1 .* contradicts what is always so"),
        ({"freeze": "features"}, "freeze=features .* contradicts freeze_layer_pattern"),
        (
            {"model": "gluoncv/ssd_512_resnet50_v1"},
            "contradicts base_network=vgg-16 and image_shape=300 .* which is model=ssd_300_vgg16_atrous here",
        ),
    ],
)
def test_contradictions(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Trainer(like=LIKE).explain(**settings)


def test_what_it_does_not_speak_of_is_free() -> None:
    found = Trainer(like=LIKE, seed=3, validate_every="2 epochs", max_detections=50, threads=1, batch_size=32).explain()
    rows = {row.name: row.value for row in found.rows}
    assert (rows["seed"], rows["validate_every"], rows["max_detections"], rows["threads"]) == (3, "2 epochs", 50, 1)
    assert found.model == "ssd_300_vgg16_atrous"


def test_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "detkit.yaml").write_text(f"like: {LIKE}\nbase_network: resnet-50\n")
    done = _detkit("explain", "mini_batch_size=16", "image_shape=512", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["like"], found["backend"], found["model"]) == (LIKE, "gluoncv", "ssd_512_resnet50_v1")
    rows = {row["name"]: row for row in found["hyperparameters"]}
    assert rows["mini_batch_size"] == {
        "name": "mini_batch_size", "value": 16, "becomes": {"batch_size": 16}, "fidelity": "exact", "why": "",
        "origin": "the call",
    }  # fmt: skip
    assert rows["base_network"]["origin"].endswith("detkit.yaml")
    settings = {row["name"]: row for row in found["settings"]}
    assert (settings["batch_size"]["value"], settings["batch_size"]["origin"]) == (16, "mini_batch_size")
    (tmp_path / "detkit.yaml").unlink()
    shown = _detkit("explain", "--like", LIKE, "mini_batch_size=16", "kv_store=dist_sync")
    assert shown.returncode == 1
    assert re.search(r"kv_store +dist_sync +the call +refused +there is one host", shown.stdout)
    assert re.search(r"mini_batch_size +16 +the call +batch_size=16 +exact", shown.stdout)
    refused = _detkit("train", "data", "--like", LIKE, "kv_store=dist_sync")
    assert (refused.returncode, "kv_store=dist_sync: there is one host here" in refused.stderr) == (2, True)


def _detkit(*words: str) -> subprocess.CompletedProcess[str]:
    wide = {**os.environ, "COLUMNS": "200"}
    command = [sys.executable, "-m", "detkit.cli", *words]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=wide)


def test_declared_lightly() -> None:
    assert plugins.backend("gluoncv").dialects == (DIALECT,)
    code = "import detkit_gluoncv, sys; print([name for name in ('mxnet', 'gluoncv') if name in sys.modules])"
    heavy = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert heavy == "[]\n"


def test_split_data_is_compared_after_the_split(tiny: Dataset) -> None:
    """What counts is the images that are trained on."""
    (note,) = check(read("num_classes=2 num_training_samples=8"), {"train": tiny[:4], "validation": tiny[4:]})
    assert note.why.endswith("write num_training_samples=4")
