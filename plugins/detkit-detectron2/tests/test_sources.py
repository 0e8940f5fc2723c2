"""Finding Detectron2: installed, in a checkout, or not at all; each time with one sentence about what to do."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import detkit
from detkit import plugins
from detkit.errors import PluginError, RunFailed, UsageError, UserCodeFailed
from detkit.testing import tiny_dataset
from detkit_detectron2 import sources

# What a checkout looks like: the package, the zoo's files beside it, and folders that nobody wants to import.
CHECKOUT = {
    "detectron2/__init__.py": '__version__ = "0.6"\n',
    "detectron2/config/__init__.py": "",
    "detectron2/config/defaults.py": """
from .config import CfgNode as CN
_C = CN()
_C.VERSION = 2
_C.SOLVER = CN()
_C.SOLVER.WARMUP_FACTOR = 1.0 / 1000
_C.SOLVER.STEPS = (30000,)
_C.SOLVER.CLIP = CN({"ENABLED": False})
""",
    "detectron2/_C.cpython-311-x86_64-linux-gnu.so": "compiled for another torch",
    "detectron2/model_zoo/__init__.py": "",
    "configs/COCO-Detection/one.yaml": "VERSION: 2\n",
    "configs/Base.yaml": "VERSION: 2\n",
    "tools/__init__.py": "",
    "LICENSE": "Apache License",
}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for name, text in CHECKOUT.items():
        file = tmp_path / "checkout" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return tmp_path / "checkout"


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A Python without Detectron2, and where none was imported before."""
    monkeypatch.delenv(sources.VARIABLE, raising=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "detectron2").is_dir()])
    importlib.invalidate_caches()
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] == "detectron2"]:
        del sys.modules[name]


@pytest.mark.usefixtures("nobody")
class TestFound:
    def test_in_a_checkout(self, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is imported to find it, and none of the folders beside the package can be imported."""
        monkeypatch.setenv(sources.VARIABLE, str(checkout))
        assert sources.package() == checkout / "detectron2"
        assert sources.configs() == checkout / "configs"
        assert sources.defaults() == {
            "VERSION": 2,
            "SOLVER.WARMUP_FACTOR": 0.001,
            "SOLVER.STEPS": (30000,),
            "SOLVER.CLIP.ENABLED": False,
        }
        assert "detectron2" not in sys.modules
        assert importlib.import_module("detectron2").__version__ == "0.6"
        assert not any(name in sys.path for name in (str(checkout), str(checkout / "detectron2")))

    def test_nowhere(self) -> None:
        assert sources.package() is None
        assert sources.defaults() is None
        for ask in (sources.load, sources.configs):
            with pytest.raises(PluginError, match=r"there is no Detectron2 in .*--source PATH.*DETKIT_DETECTRON2=PATH"):
                ask()

    def test_a_folder_that_is_no_checkout(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(sources.VARIABLE, str(tmp_path))
        for ask in (sources.load, sources.package, detkit.Trainer(model="detectron2/faster_rcnn_tiny").explain):
            with pytest.raises(PluginError, match="which is no checkout of Detectron2: it has no detectron2/__init__"):
                ask()

    def test_a_checkout_that_does_not_run(self, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(sources.VARIABLE, str(checkout))
        with pytest.raises(
            PluginError, match=r"checkout/detectron2 cannot be imported by .*No module named 'detectron2"
        ):
            sources.load()
        shutil.rmtree(checkout / "configs")
        with pytest.raises(PluginError, match="has no configuration files of the zoo"):
            sources.configs()


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ModuleNotFoundError("no", name="cv2"), "OpenCV: pip install opencv-python-headless"),
        (ModuleNotFoundError("no", name="pkg_resources"), "which setuptools 82 and later do not have: pip install"),
        (ModuleNotFoundError("no", name="yacs.config"), r"no module 'yacs'. install what it needs: pip install '"),
        (ImportError("detectron2/_C.so: undefined symbol: _ZN3c10"), r"undefined symbol.*built for another torch"),
        (RuntimeError("operator torchvision::nms does not exist"), "a torchvision that belongs to this torch"),
    ],
    ids=["OpenCV", "setuptools", "a requirement", "another torch", "another torchvision"],
)
def test_why_it_cannot_be_imported(
    error: Exception, message: str, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sources.VARIABLE, str(checkout))
    with pytest.raises(PluginError, match=message):
        raise PluginError(sources.explain(error))


def test_a_checkout_is_packed_without_what_is_compiled(checkout: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("of nobody else")
    (checkout / "detectron2/leak.txt").symlink_to(tmp_path / "secret")
    (checkout / "detectron2/model_zoo/linked.yaml").symlink_to(checkout / "configs/Base.yaml")
    packed = sources.read_checkout(checkout)
    assert (packed.name, packed.version) == ("detectron2", "0.6")
    assert sorted(packed.files) == [
        "detectron2/__init__.py",
        "detectron2/config/__init__.py",
        "detectron2/config/defaults.py",
        "detectron2/model_zoo/__init__.py",
        "detectron2/model_zoo/configs/Base.yaml",
        "detectron2/model_zoo/configs/COCO-Detection/one.yaml",
        "detectron2/model_zoo/linked.yaml",
    ]
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*pip, str(packed.write_wheel(tmp_path))], check=True)
    code = "from detkit_detectron2 import sources; print(sources.configs(), len(sources.defaults()))"
    path = os.pathsep.join([str(site), *sys.path])
    kept = {name: value for name, value in os.environ.items() if name != sources.VARIABLE}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**kept, "PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [str(site / "detectron2/model_zoo/configs"), "4"], done.stderr
    for folder in (tmp_path, checkout / "detectron2", tmp_path / "nowhere"):
        with pytest.raises(UsageError, match="--source names .*, which is no checkout of Detectron2"):
            sources.read_checkout(folder)


def test_the_environment_is_made_of_a_checkout() -> None:
    backend = plugins.backend("detectron2")
    assert backend.installation == sources.INSTALL  # type: ignore[attr-defined]
    environment = backend.environment  # type: ignore[attr-defined]
    assert environment.checkout is sources.read_checkout
    assert all("==" in line for line in environment.requirements)


def test_user_code_that_imports_what_detectron2_does_not_ask_for(worker_python: str, tmp_path: Path) -> None:
    """It may import Detectron2 before the engine does, from a checkout, too; what is missing is named."""
    code = tmp_path / "code"
    code.mkdir()
    (code / "my_heads.py").write_text("import detectron2.modeling\nraise ModuleNotFoundError('No cv2', name='cv2')\n")
    data = tiny_dataset(tmp_path / "tiny")
    trainer = detkit.Trainer(model="detectron2/faster_rcnn_tiny", code=str(code), imports=["my_heads"], iterations=1)
    with pytest.raises((UserCodeFailed, RunFailed), match=r"my_heads\.py, line 2: .*opencv-python-headless"):
        trainer.fit(data, quiet=True)
