"""The user's own modules: copied into a run, imported in its worker, and run for nobody who has not given them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from detkit import Dataset, Model, Predictor, Run, Trainer, evaluate, export, trust, usercode
from detkit.catalog import open_run
from detkit.errors import InvalidValue, RunFailed, UnknownName, UsageError, UserCodeFailed
from detkit.files import write_json
from detkit.job import Code
from detkit.processes import WorkerDetector
from detkit.usercode import UserCode

pytestmark = pytest.mark.usefixtures("clean")

LOUDER = """
import os
from my_parts.names import WORD
from detkit_echo import engine

print(f"{WORD} from {__name__}", flush=True)
before = engine.thumbnail
engine.thumbnail = lambda image: before(image) * 0.5  # what is remembered, and looked for, is half as bright
"""
"""A module without which echo finds nothing well: it changes what both training and prediction do."""


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    """What a test imports of its own modules is forgotten, and echo is what it was."""
    from detkit_echo import engine

    modules, finders, opened, thumbnail = set(sys.modules), list(sys.meta_path), set(usercode._opened), engine.thumbnail
    yield
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]
    sys.meta_path[:], usercode._finder.code, usercode._opened = finders, None, opened
    engine.thumbnail = thumbnail


def write(folder: Path, **files: str) -> Path:
    """Write modules; two underscores in a name stand for a slash."""
    for name, content in files.items():
        file = folder / f"{name.replace('__', '/')}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return folder


@pytest.fixture
def code(clean: Path) -> Path:
    return write(clean / "src", my_heads=LOUDER, my_parts__names="WORD = 'hello'\n")


@pytest.fixture
def trained(code: Path, tiny: Dataset) -> Run:
    return Trainer(model="echo/memory", epochs=8, code=code, imports=["my_heads"]).fit(tiny, tiny, quiet=True)


@pytest.fixture(scope="module")
def plain(tiny: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run without code of its own."""
    folder = tmp_path_factory.mktemp("plain")
    return Trainer(model="echo/memory", epochs=1).fit(tiny, quiet=True, name=str(folder / "run"))


def scores_of(predictor: Predictor, tiny: Dataset) -> list[float]:
    with predictor:
        return [score for found in predictor.predict(tiny) for score in found.scores]


def elsewhere(words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Do something on an account that has trained nothing."""
    return subprocess.run(
        [sys.executable, "-m", "detkit.cli", *words.split()],
        env={**os.environ, "DETKIT_CACHE": os.path.abspath("another-cache"), **variables},
        capture_output=True,
        text=True,
    )


def test_training_imports_what_was_copied(trained: Run, code: Path) -> None:
    assert "hello from my_heads" in trained.workspace.log_file.read_text()
    copied = trained.workspace.code
    assert sorted(p.relative_to(copied).as_posix() for p in copied.rglob("*.py")) == [
        "my_heads.py",
        "my_parts/names.py",
    ]
    assert not (copied / "my_heads.py").samefile(code / "my_heads.py")
    found = trained.model.manifest.code
    assert found is not None
    assert (found.digest, found.imports) == (UserCode.read(code).digest, ["my_heads"])
    assert trained.job.code == found
    assert not list(copied.rglob("*.pyc"))


def test_the_model_is_opened_with_it(trained: Run, tiny: Dataset, code: Path) -> None:
    """In this process and in one of its own; later changes of the folder change nothing."""
    (code / "my_heads.py").write_text("raise SystemExit('edited')\n")
    here = scores_of(Predictor(trained), tiny)
    assert Path(sys.modules["my_heads"].__file__ or "").is_relative_to(trained.path)
    assert scores_of(Predictor(trained, isolate=True), tiny) == here
    assert min(here) > 0.9  # without the module, twice as bright pictures would be compared
    assert evaluate(trained, tiny, allow_seen=True)["AP50"] > 0.9


def test_other_code_of_the_same_name_gets_a_process_of_its_own(trained: Run, tiny: Dataset, clean: Path) -> None:
    other = write(clean / "other", my_heads="print('the other')\n")
    second = Trainer(model="echo/memory", epochs=8, code=other, imports=["my_heads"]).fit(tiny, quiet=True)
    third = Trainer(model="echo/memory", epochs=8, code=write(clean / "third", my_third="")).fit(tiny, quiet=True)
    with Predictor(trained, score_threshold=0.0):
        for run in (second, third):  # a process has one code, also where the names differ
            with Predictor(run, score_threshold=0.0) as predictor:
                assert len(predictor(tiny.paths[0]))
                assert isinstance(predictor._detector, WorkerDetector)
        assert Path(sys.modules["my_heads"].__file__ or "").is_relative_to(trained.path)
        with pytest.raises(UsageError, match="needs a process of its own"):
            usercode.load(second.job.code, second.workspace.code)


def test_a_bare_model_needs_the_code(trained: Run, tiny: Dataset, code: Path, clean: Path) -> None:
    bare = shutil.copytree(trained.path / "model", clean / "bare")
    with pytest.raises(UsageError, match=r"was trained with code of its own .*code='FOLDER'.*--code FOLDER"):
        Predictor(bare)
    with pytest.raises(UsageError, match="was trained with code of its own"):
        evaluate(bare, tiny, allow_seen=True, fresh=True)
    assert "my_heads" not in sys.modules
    expected = scores_of(Predictor(trained), tiny)
    assert scores_of(Predictor(bare, code=code), tiny) == expected
    assert scores_of(Predictor(Model(bare, code=code), isolate=True), tiny) == expected
    assert evaluate(bare, tiny, allow_seen=True, code=code)["AP50"] > 0.9
    with pytest.raises(UsageError, match="yet to be opened"), Predictor(trained, score_threshold=0.0) as opened:
        evaluate(opened, tiny, code=code)


def test_other_code_than_that_of_the_training(trained: Run, clean: Path) -> None:
    bare = shutil.copytree(trained.path / "model", clean / "bare")
    other = write(clean / "other", my_heads="raise AssertionError('this ran')\n")
    expected = trained.model.manifest.code
    assert expected is not None
    both = f"{UserCode.read(other).digest[:12]}.*{expected.digest[:12]}"
    with pytest.raises(UsageError, match=f"is not that of the training.*{both}"):
        Predictor(bare, code=other)


@pytest.mark.parametrize("how", ["edited", "added", "removed"])
def test_tampered_code_is_not_run(trained: Run, how: str, tiny: Dataset) -> None:
    if how == "edited":
        (trained.workspace.code / "my_heads.py").write_text("raise AssertionError('this ran')\n")
    elif how == "added":
        write(trained.workspace.code, my_more="")
    else:
        (trained.workspace.code / "my_heads.py").unlink()
    for isolate in (False, True):
        with pytest.raises(UsageError, match="is not that of the training"):
            Predictor(trained, isolate=isolate)
    assert "my_heads" not in sys.modules


STRANGERS: dict[str, dict[str, Any]] = {
    "imports": {"code": Code(imports=["evil"])},
    "an import of a part": {"code": Code(imports=["evilpack.evil"])},
    "engine": {"engine": "evil:Engine"},
}
OPEN = {
    "open": "detkit.Predictor('model')",
    "in a worker": "detkit.Predictor('model', isolate=True)",
    "export": "from detkit import plugins; plugins.backend('echo').export(detkit.Model('model'), 'x', 'out')",
    "from elsewhere": "import sys, os; sys.path.append(there := os.getcwd()); os.chdir('/'); "
    "detkit.Predictor(there + '/model')",
}


@pytest.mark.parametrize("what", STRANGERS)
@pytest.mark.parametrize("how", OPEN)
def test_a_strangers_modules_are_not_run(what: str, how: str, plain: Run, clean: Path) -> None:
    """A manifest names modules which came with the model, and it is opened where Python would find them."""
    archive, ran = clean / "archive", clean / "ran"
    shutil.copytree(plain.path / "model", archive / "model")
    write_json(archive / "model/detkit.json", msgspec.structs.replace(plain.model.manifest, **STRANGERS[what]))
    write(archive, evil=f"open({str(ran)!r}, 'w')\n", evilpack__evil=f"open({str(ran)!r}, 'w')\n")
    variables = {"PYTHONPATH": str(archive)} if how == "in a worker" else {}
    done = subprocess.run(
        [sys.executable, "-c", f"import detkit; {OPEN[how]}"],
        env={**os.environ, **variables},
        cwd=archive,
        capture_output=True,
        text=True,
    )
    assert not ran.exists()
    assert done.returncode
    assert ("names the engine 'evil:Engine'" if what == "engine" else "may have come with the model") in done.stderr


def test_a_strangers_modules_are_those_that_are_here(plain: Run, clean: Path) -> None:
    """What is installed, and what the program has imported itself, can be named."""
    write(clean, my_loaded="")
    shutil.copytree(plain.path / "model", clean / "model")
    imports = Code(imports=["json.tool", "detkit_echo.engine", "my_loaded"])
    write_json(clean / "model/detkit.json", msgspec.structs.replace(plain.model.manifest, code=imports))
    program = "import my_loaded, detkit; detkit.Predictor('model', score_threshold=0.0).close()"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_bytecode_beside_the_code_is_not_run(trained: Run, tiny: Dataset) -> None:
    """It is in no digest, so nothing may be imported from it: not even where it claims to be of the very file."""
    import importlib._bootstrap_external as bootstrap

    file = trained.workspace.code / "my_parts/names.py"
    stat = file.stat()
    harmful = compile("raise AssertionError('this ran')", str(file), "exec")
    cached = Path(bootstrap.cache_from_source(str(file)))
    cached.parent.mkdir()
    cached.write_bytes(bootstrap._code_to_timestamp_pyc(harmful, int(stat.st_mtime), stat.st_size))
    assert len(scores_of(Predictor(trained), tiny))


def test_a_strangers_run_is_opened_by_nobody_who_has_not_read_it(trained: Run, tiny: Dataset, code: Path) -> None:
    """A whole run in the folder of runs, its code unchanged: it is still not this account's."""
    image = tiny.paths[0]
    done = elsewhere(f"predict {trained.name} {image}")
    assert done.returncode == 2
    assert "not given to detkit on this account" in done.stderr
    assert f"--code {trained.workspace.code}" in done.stderr
    assert "hello" not in done.stdout + done.stderr
    allowed = elsewhere(f"predict {trained.name} {image} --code {trained.workspace.code}")
    assert allowed.returncode == 0, allowed.stderr
    assert "hello from my_heads" in allowed.stdout
    assert elsewhere(f"predict {trained.name} {image}").returncode == 2  # allowed once is not allowed for good


def test_a_strangers_run_is_not_resumed(code: Path, tiny: Dataset) -> None:
    write(code, my_heads="raise RuntimeError('this ran')\n")
    with pytest.raises(RunFailed):
        Trainer(model="echo/memory", code=code, imports=["my_heads"]).fit(tiny, quiet=True, name="mine")
    done = elsewhere("train --resume mine")
    assert done.returncode == 2
    assert "was not given to detkit on this account" in done.stderr
    assert "--resume" in done.stderr
    assert "--code" in done.stderr


@pytest.mark.parametrize("cache", [None, "off"])
def test_a_run_goes_on_where_nothing_is_remembered(code: Path, tiny: Dataset, cache: str | None) -> None:
    """Of an emptied cache, without one, or on another account: naming the code allows it."""
    write(code, my_heads="import os\nassert 'FAIL' not in os.environ\n")
    variables = {} if cache is None else {"DETKIT_CACHE": cache}
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunFailed):
        patch.setenv("FAIL", "1")
        Trainer(model="echo/memory", epochs=1, code=code, imports=["my_heads"]).fit(tiny, quiet=True, name="mine")
    write(code.parent / "other", my_heads="")
    assert elsewhere("train --resume mine", **variables).returncode == 2
    other = elsewhere("train --resume mine --code other", **variables)
    assert (other.returncode, "is not that of the training" in other.stderr) == (2, True)
    done = elsewhere("train --resume mine --code src", **variables)
    assert done.returncode == 0, done.stderr
    assert open_run("mine").status == "finished"


def test_resuming_with_code_that_the_run_has_not(tiny: Dataset, code: Path) -> None:
    run = Trainer(model="echo/memory", epochs=1).fit(tiny, quiet=True)
    with pytest.raises(UsageError, match="was started without code of its own; leave out code="):
        Trainer().resume(run, epochs=2, code=code)


def test_resume_after_a_stop(code: Path, tiny: Dataset) -> None:
    """It ends like a run that was never stopped, with the code that it was started with."""
    slow = Trainer(model="echo/memory", epochs=6, seconds_per_step=0.05, code=code, imports=["my_heads"])
    run = slow.start(tiny, tiny, leash=True)
    for event in run.events():
        if event.kind == "metric" and (event.step or 0) > len(tiny):
            break
    run.stop()
    assert run.status == "stopped"
    (code / "my_heads.py").write_text("raise SystemExit('edited')\n")
    resumed = Trainer().resume(run, seconds_per_step=0, quiet=True)
    assert resumed.workspace.log_file.read_text().count("hello from my_heads") == 2
    write(code, my_heads=LOUDER)
    whole = slow.fit(tiny, tiny, seconds_per_step=0, quiet=True)
    model = "memory.npz"
    assert resumed.model.manifest.artifacts[model] == whole.model.manifest.artifacts[model]


def test_a_longer_run_has_the_code_too(trained: Run) -> None:
    longer = Trainer().resume(trained, epochs=9, quiet=True)
    assert longer.model.manifest.code == trained.model.manifest.code
    assert "hello from my_heads" in longer.workspace.log_file.read_text()


def test_forgetting_of_a_model_with_other_code(trained: Run, tiny: Dataset) -> None:
    """One process scores both models, so it is said at the start that there is no table, and no images are laid out."""
    run = Trainer(model="echo/memory", epochs=1, weights=trained).fit(tiny, tiny, quiet=True)
    told = [str(event.values.get("message")) for event in run.events(follow=False) if event.kind == "log"]
    assert not any("will be told" in line for line in told)
    assert any("takes other code than this run has" in line for line in told)
    assert run.workspace.dataset("retention") is None


def test_a_single_file(clean: Path, tiny: Dataset) -> None:
    """Modules beside it are not part of it."""
    write(clean / "src", my_one="print('only me', flush=True)\n", my_two="")
    trainer = Trainer(model="echo/memory", epochs=1, code=clean / "src/my_one.py", imports=["my_one"])
    run = trainer.fit(tiny, quiet=True)
    assert [path.name for path in run.workspace.code.iterdir()] == ["my_one.py"]
    bare = shutil.copytree(run.path / "model", clean / "bare")
    with Predictor(bare, code=clean / "src/my_one.py", score_threshold=0.0, isolate=True) as predictor:
        predictor(tiny.paths[0])
    with pytest.raises(RunFailed, match="no module 'my_two'"):
        trainer.fit(tiny, imports=["my_two"], quiet=True)


def test_an_installed_module(tiny: Dataset) -> None:
    run = Trainer(model="echo/memory", epochs=1, imports="json.tool, detkit_echo.engine").fit(tiny, quiet=True)
    found = run.model.manifest.code
    assert found is not None
    assert (found.digest, found.imports) == ("", ["json.tool", "detkit_echo.engine"])
    assert not run.workspace.code.exists()
    with Predictor(run, score_threshold=0.0) as predictor:
        predictor(tiny.paths[0])
    with pytest.raises(UsageError, match="without code of its own"):
        Predictor(run, score_threshold=0.0, code=".")


@pytest.mark.parametrize(
    ("imports", "error", "words"),
    [
        (["my_parts.nome"], UnknownName, "did you mean 'my_parts.names'.*known: my_heads, my_parts.names"),
        (["my_heads.nothing"], UnknownName, "no module of imports= in .*my_heads.nothing"),
        (["my-heads.py"], InvalidValue, "names of modules"),
        (7, InvalidValue, "names of modules"),
        ("my_heads,", InvalidValue, "names of modules"),
    ],
)
def test_imports_that_are_none(code: Path, tiny: Dataset, imports: object, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Trainer(model="echo/memory", code=code, imports=imports).fit(tiny)  # type: ignore[arg-type]
    assert not Path("runs").exists()
    assert "my_heads" not in sys.modules


@pytest.mark.parametrize("name", ["my_head", "json.nothing"])
def test_imports_that_the_worker_does_not_find(name: str, code: Path, tiny: Dataset) -> None:
    """Its interpreter may have other modules than this one, so it is the one who knows."""
    with pytest.raises(
        RunFailed, match=f"no module '{name}' in the run's code, nor in .*folder that it lies in to code="
    ):
        Trainer(model="echo/memory", code=code, imports=[name]).fit(tiny, quiet=True)


@pytest.mark.parametrize(
    ("module", "place"),
    [
        ("import nothing_of_this_name\n", "my_heads.py, line 1: ModuleNotFoundError: No module named 'nothing_of"),
        ("\n\n1 / 0\n", "my_heads.py, line 3: ZeroDivisionError"),
        ("def (:\n", "my_heads.py, line 1: SyntaxError"),
        ("import sys\nsys.exit(3)\n", "my_heads.py, line 2: SystemExit: 3"),
        ("from my_parts import deep\n", "my_parts/deep.py, line 2: KeyError: 'x'"),
    ],
)
def test_code_that_fails_on_import(module: str, place: str, clean: Path, tiny: Dataset) -> None:
    code = write(clean / "src", my_heads=module, my_parts__deep="\n{}['x']\n")
    with pytest.raises(RunFailed, match=f"importing my_heads failed at {place}") as caught:
        Trainer(model="echo/memory", code=code, imports=["my_heads"]).fit(tiny, quiet=True, name="failing")
    assert "start a new run" in str(caught.value)


@pytest.mark.parametrize("name", ["json", "numpy", "detkit_echo", "detkit"])
def test_names_of_installed_modules(name: str, code: Path, tiny: Dataset, clean: Path) -> None:
    """As a module, as a package, and as a folder that would be one."""
    for number, shape in enumerate((f"{name}.py", f"{name}/__init__.py", f"{name}/part.py")):
        shadowing = write(clean / str(number), my_heads="")
        (shadowing / shape).parent.mkdir(exist_ok=True)
        (shadowing / shape).touch()
        with pytest.raises(UsageError, match=rf"have the names of others that are installed: {name} \(.*rename yours"):
            Trainer(model="echo/memory", code=shadowing).fit(tiny)


def test_names_of_modules_that_are_loaded(code: Path) -> None:
    """The worker's interpreter may have others than the one that looked."""
    write(code, numpy="")
    with pytest.raises(UsageError, match="this one has other modules numpy"):
        usercode.load(Code(digest=UserCode.read(code).digest), code)


def test_a_module_that_changes_under_way(code: Path, clean: Path) -> None:
    """What runs, and what is copied, is what the digest is of: not what was written or added meanwhile."""
    write(code, my_parts__later="", my_parts__data="")
    found = UserCode.read(code)
    usercode.load(Code(digest=found.digest, imports=["my_parts.names"]), code)
    write(
        code, my_parts__later="raise AssertionError('this ran')\n", my_parts__new="raise AssertionError('this ran')\n"
    )
    for how in (lambda: usercode.import_module("my_parts.later"), lambda: found.copy_to(clean / "copy")):
        with pytest.raises(UsageError, match=r"later\.py was changed after detkit had looked at it"):
            how()
    with pytest.raises(UserCodeFailed, match="no module 'my_parts.new'"):
        usercode.import_module("my_parts.new")
    usercode.import_module("my_parts.data")


def test_own_modules_on_the_path(code: Path, tiny: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script beside the modules can import them as well: they are the user's own, not others of the same name."""
    monkeypatch.syspath_prepend(code)
    import my_parts.names  # type: ignore[import-not-found]

    trainer = Trainer(model="echo/memory", epochs=1, code=code, imports=["my_heads"])
    run = trainer.fit(tiny, quiet=True)
    with Predictor(run, score_threshold=0.0) as predictor:  # in a worker, as `my_parts` of the script is here
        predictor(tiny.paths[0])
    assert Path(my_parts.names.__file__).is_relative_to(code)
    assert trainer.fit(tiny, quiet=True).status == "finished"


def test_what_is_left_out(code: Path, clean: Path) -> None:
    before = UserCode.read(code)
    for name in (".git/config", ".env", "__pycache__/x.pyc", "venv/pyvenv.cfg", "venv/x.py", "runs/a/run.json"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text("x")
    os.mkfifo(code / "pipe")
    assert UserCode.read(code) == before
    (code / "anchors.json").write_text("{}")
    assert sorted(UserCode.read(code).files) == ["anchors.json", "my_heads.py", "my_parts/names.py"]
    assert UserCode.read(code).digest != before.digest


@pytest.mark.parametrize("target", ["../secret.txt", "..", "/etc", "nowhere", "my_parts/..", "."])
def test_links_out_of_the_folder(target: str, code: Path, clean: Path) -> None:
    (clean / "secret.txt").write_text("secret")
    (code / "link").symlink_to(target)
    with pytest.raises(UsageError, match=r"link is a symbolic link to .*put a copy in its place"):
        UserCode.read(code)


def test_links_within_the_folder(code: Path, clean: Path) -> None:
    (code / "my_alias.py").symlink_to("my_heads.py")
    (code / "my_other").symlink_to("my_parts")
    found = UserCode.read(code)
    assert {"my_alias.py", "my_other/names.py"} < set(found.files)
    found.copy_to(clean / "copy")
    assert not (clean / "copy/my_alias.py").is_symlink()
    assert UserCode.read(clean / "copy").digest == found.digest


def test_too_large(code: Path, tiny: Dataset) -> None:
    with (code / "big.bin").open("wb") as file:
        file.truncate(usercode.MOST_BYTES)
    with pytest.raises(UsageError, match=r"3 files of 50\.0 MB; at most 10000 of 50 MB"):
        Trainer(model="echo/memory", code=code).fit(tiny)


@pytest.mark.parametrize("place", ["nowhere", "text.txt", "empty"])
def test_no_code(place: str, clean: Path, tiny: Dataset) -> None:
    (clean / "text.txt").write_text("")
    (clean / "empty").mkdir()
    with pytest.raises(UsageError, match="expected .*of your modules"):
        Trainer(model="echo/memory", code=place).fit(tiny)


def test_command_line_environment_and_file(code: Path, tiny: Dataset, clean: Path) -> None:
    from detkit import write_dataset

    write_dataset(tiny, clean / "data")
    typed = elsewhere("train data data --model echo/memory --name typed --code src --import my_heads epochs=1")
    assert typed.returncode == 0, typed.stderr
    assert elsewhere(f"predict typed {tiny.paths[0]}").returncode == 0  # this account has trained it
    bare = shutil.copytree("runs/typed/model", "bare")
    assert elsewhere(f"evaluate {bare} data --allow-seen --fresh").returncode == 2
    assert elsewhere(f"evaluate {bare} data --allow-seen --code src").returncode == 0
    environment = {"DETKIT_CODE": "src", "DETKIT_IMPORTS": "my_heads,my_parts.names"}
    told = elsewhere("train data data --model echo/memory --name told epochs=1", **environment)
    assert told.returncode == 0, told.stderr
    (clean / "detkit.yaml").write_text("code: src\nimports: [my_heads]\n")
    written = elsewhere("train data data --model echo/memory --name written epochs=1")
    assert written.returncode == 0, written.stderr
    codes = [Model(f"runs/{name}/model").manifest.code for name in ("typed", "told", "written")]
    assert codes[0] == codes[2] != codes[1]
    again = elsewhere("train --resume typed --import my_heads")
    assert again.returncode == 2
    assert "leave out --import" in again.stderr


def test_find_function(code: Path) -> None:
    write(code, my_heads="def light(network): ...\ndef broken(): return 1 / 0\nwidth = 3\n")
    found = UserCode.read(code)
    usercode.load(Code(digest=found.digest, imports=["my_heads"]), code)
    assert usercode.find_function("my_heads:light", "modify").__name__ == "light"
    with pytest.raises(UnknownName, match=r"function \(modify=my_heads:lite\) in .*my_heads.py.*did you mean 'light'"):
        usercode.find_function("my_heads:lite", "modify")
    with pytest.raises(UnknownName, match="width"):
        usercode.find_function("my_heads:width", "modify")
    with pytest.raises(UserCodeFailed, match="no module 'my_head' in the run's code.*code="):
        usercode.find_function("my_head:light", "modify")
    for wrong in ("my_heads", "my_heads:", "my heads:light", ":light"):
        with pytest.raises(InvalidValue, match="module:function"):
            usercode.find_function(wrong, "modify")
    with pytest.raises(ZeroDivisionError) as caught:
        usercode.find_function("my_heads:broken", "modify")()
    told = str(usercode.failure("it", caught.value))
    assert "failed at my_heads.py, line 2: ZeroDivisionError" in told
    assert "new run" not in told  # that is advice for a training


def test_export_needs_the_code(trained: Run, clean: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Echo exports nothing itself, so it is asked past its declaration: the code comes first."""
    from detkit import plugins

    backend = plugins.backend("echo")
    bare = Model(shutil.copytree(trained.path / "model", clean / "bare"))
    with pytest.raises(UsageError, match="was trained with code of its own"):
        backend.export(bare, "onnx", clean / "out")
    with pytest.raises(UsageError, match="cannot be exported"):
        backend.export(Model(bare.path, code=clean / "src"), "onnx", clean / "out")
    assert "my_heads" in sys.modules
    with pytest.raises(UsageError, match="does not write"):
        export(bare.path, "onnx", clean / "out", code=clean / "src")


def test_what_somebody_else_noted_does_not_count(trained: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    trust._given.clear()
    assert trust.of_model(trained.model) is not None
    monkeypatch.setattr(os, "getuid", lambda: 987654)
    with pytest.raises(UsageError, match="not given to detkit on this account"):
        trust.of_model(trained.model)


def test_without_a_cache_the_process_that_trained_remembers(
    code: Path, tiny: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETKIT_CACHE", "off")
    run = Trainer(model="echo/memory", epochs=1, code=code, imports=["my_heads"]).fit(tiny, quiet=True)
    assert trust.of_model(run.model) is not None
    trust._given.clear()
    with pytest.raises(UsageError, match="not given to detkit"):
        trust.of_model(run.model)


def test_a_missing_module_that_nobody_asks_for_is_explained() -> None:
    """Their names say nothing of what brings them."""
    told = str(usercode.failure("importing my_heads", ModuleNotFoundError("No module named 'cv2'", name="cv2")))
    assert told.endswith("No module named 'cv2'; OpenCV is installed with `pip install opencv-python-headless`")
    told = str(usercode.failure("importing my_heads", ModuleNotFoundError("No module named 'x'", name="x")))
    assert told.endswith("No module named 'x'")
