"""The distribution, built and installed into a folder of its own: what a user of it meets.

It is not installed where the other tests run, because a metric adds its numbers to every evaluation.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1]

EVALUATED = """
import json, sys
from pathlib import Path

import detkit
from detkit import plugins
from detkit.testing import tiny_dataset

data = tiny_dataset(Path("images"))
run = detkit.Trainer(model="echo/memory", epochs=12).fit(data, data, quiet=True)
in_training = [name for name in run.metrics if "LRP" in name]
perfect = detkit.evaluate(run, data, allow_seen=True)
others = detkit.evaluate(run, tiny_dataset(Path("others"), seed=9, num_images=30))
print(json.dumps({
    "in_training": in_training,
    "names": list(perfect),
    "perfect": dict(perfect),
    "others": dict(others),
    "told": repr(others),
    "provider": plugins.registry().providers["metric", "olrp"],
    "higher_is_better": plugins.metrics()["olrp"].higher_is_better,
}))
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel, as an installer would, and install it; returns the folder."""
    pytest.importorskip("hatchling", reason="builds the wheel; nothing is fetched from the network")
    folder = tmp_path_factory.mktemp("lrp") / "site"
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index", "--quiet",
         "--disable-pip-version-check", "--target", folder, SOURCE],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def run(site: Path, cwd: Path, code: str) -> str:
    """Run Python code in a process that has the plugin; returns what it printed."""
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    environment = {**os.environ, "PYTHONPATH": path, "DETKIT_CACHE": str(cwd / "cache")}
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", code],
        cwd=cwd, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_evaluation_has_its_numbers(site: Path, tmp_path: Path) -> None:
    pytest.importorskip("detkit_echo")
    told = json.loads(run(site, tmp_path, EVALUATED).splitlines()[-1])
    assert told["provider"] == "lrp"
    assert told["higher_is_better"] is False
    assert told["names"][-4:] == ["oLRP", "oLRP_loc", "oLRP_fp", "oLRP_fn"]
    assert told["perfect"]["AP"] == pytest.approx(1)
    assert told["perfect"]["oLRP"] == pytest.approx(0, abs=1e-9)
    assert told["others"]["AP"] < 0.9
    assert 0.1 < told["others"]["oLRP"] <= 1
    assert "oLRP_loc" in told["told"]
    assert told["in_training"] == []


def test_importing_it_is_cheap(site: Path, tmp_path: Path) -> None:
    assert run(site, tmp_path, "import sys, detkit_lrp; print('numpy' in sys.modules)").strip() == "False"
