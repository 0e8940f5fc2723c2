"""The documentation does what it says: every block of every page runs, and what it lists is what the code has.

Pages are run one by one, each in an empty folder, its blocks in order: ``python`` in one namespace, ``console`` line
by line through bash. Comments of the page, unseen by its readers, say what else there is to know::

    <!-- data: FOLDER [N [SEED]] -->     draw a data set of N pictures there before going on
    <!-- environment: NAME=VALUE ... --> set variables for the rest of the page, to make a training short
    <!-- account: simulated -->          lead the rest of the page to a simulated AWS account that has our container
    <!-- wheel: FOLDER -->               build this distribution of the repository, for `pip install` to find it
    <!-- file: NAME -->                  the next block is the content of a file
    <!-- printed -->                     the next block is what the one before it printed; ... stands for anything
    <!-- not run here: REASON -->        the next block is left alone

A command that ends with ``# exits N`` has to leave with that code, every other one with 0.
"""

from __future__ import annotations

import configparser
import contextlib
import doctest
import importlib.util
import inspect
import io
import json
import os
import re
import subprocess
import sys
import typing
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from unittest import mock
from xml.etree import ElementTree

import msgspec
import pytest
import yaml

import detkit
from detkit import hookspecs, job, params, plugins, studies, tuning
from detkit.formats import COLUMNS
from detkit.shapes import write_shapes

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ALONE = {"account", "data", "environment", "wheel"}
MARKS = {*ALONE, "file", "printed", "not run here"}
LANGUAGES = {"python", "console", "text", "yaml", "json", "toml", "ini", "xml"}
TIMEOUT_S = 240


@dataclass(frozen=True)
class Block:
    """A fenced block, or a mark that stands alone (one of `ALONE`)."""

    line: int
    language: str
    code: str
    marks: Mapping[str, str]


def blocks(page: Path) -> Iterator[Block]:
    """Yield what a page asks for, in order; a mark that nobody knows is a mistake."""
    marks: dict[str, str] = {}
    lines = iter(enumerate(page.read_text().splitlines(), start=1))
    for number, line in lines:
        mark = re.fullmatch(r"\s*<!-- ([a-z ]+?)(?:: (.*?))? ?-->", line)
        fence = re.fullmatch(r"( *)```(\w*)", line)
        if mark and mark[1] in ALONE:
            yield Block(number, mark[1], mark[2], {})
        elif mark and mark[1] in MARKS:
            marks[mark[1]] = mark[2] or ""
        elif fence:
            inside = []
            for _, text in lines:
                if text.strip() == "```":
                    break
                inside.append(text.removeprefix(fence[1]))
            else:
                raise AssertionError(f"{page}:{number}: this block never ends")
            yield Block(number, fence[2], "\n".join(inside) + "\n", marks)
            marks = {}
        elif line.strip():
            assert not marks, f"{page}:{number}: expected a block after {marks}"


def commands(code: str) -> list[str]:
    """Return the commands of a ``console`` block; lines that go on end with a backslash and continue after ``> ``."""
    found: list[str] = []
    for line in code.splitlines():
        if line.startswith("$ "):
            found.append(line[2:])
        elif line.startswith("> ") and found:
            found[-1] += "\n" + line[2:]
        else:
            raise AssertionError(f"a console block holds commands only, each after '$ ': {line!r}")
    return found


def page_name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


class Reader:
    """Somebody who does what one page says."""

    def __init__(self, page: Path, folder: Path, environment: pytest.MonkeyPatch) -> None:
        self.page, self.folder, self.environment = page, folder, environment
        self.names: dict[str, object] = {"__name__": "__main__"}
        self.printed = ""
        self.closing = contextlib.ExitStack()

    def read(self) -> None:
        with self.closing:
            for block in blocks(self.page):
                self.do(block)

    def do(self, block: Block) -> None:
        where = f"{page_name(self.page)}:{block.line}"
        if block.language == "data":
            folder, *rest = block.code.split()
            count, seed = (*map(int, rest), *(12, 0)[len(rest) :])
            write_shapes(self.folder / folder, num_images=count, seed=seed)
        elif block.language == "environment":
            for pair in block.code.split():
                self.environment.setenv(*pair.split("=", 1))
        elif block.language == "account":
            self.open_account()
        elif block.language == "wheel":
            wheels = self.folder.parent / "wheels"
            self.environment.setenv("PIP_FIND_LINKS", str(wheels))
            self.run_command(f"pip wheel --wheel-dir {wheels} {ROOT / block.code}", where)
        elif "file" in block.marks:
            check_syntax(block, where)
            target = self.folder / block.marks["file"]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(block.code)
        elif "printed" in block.marks:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            checker = doctest.OutputChecker()
            assert checker.check_output(block.code, self.printed, flags), f"{where}: printed was\n{self.printed}"
        elif "not run here" in block.marks:
            check_syntax(block, where)
        elif block.language == "python":
            self.printed = self.run_python(block)
        elif block.language == "console":
            self.printed = "".join(self.run_command(command, where) for command in commands(block.code))
        else:
            check_syntax(block, where)

    def open_account(self) -> None:
        from detkit_sagemaker.testing import Simulator

        container = [sys.executable, "-m", "detkit_sagemaker.container"]
        account = Simulator(images={"detkit:latest": container}, folder=self.folder.parent / "aws")
        for name, value in self.closing.enter_context(account).environment.items():
            self.environment.setenv(name, value)

    def run_python(self, block: Block) -> str:
        # The empty lines in front let a traceback point at the line of the page.
        code = compile("\n" * block.line + block.code, str(self.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as out, warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)  # what detkit has to say of a training this short
            exec(code, self.names)
        return out.getvalue()

    def run_command(self, command: str, where: str) -> str:
        wanted = re.search(r"# exits (\d+)$", command)
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
        told = f"{where}: {command}\nleft with {done.returncode}\n{done.stdout}\n{done.stderr}"
        assert done.returncode == (int(wanted[1]) if wanted else 0), told
        return done.stdout


def check_syntax(block: Block, where: str) -> None:
    """Parse what is not run."""
    if block.language == "python":
        compile(block.code, where, "exec")
    elif block.language == "console":
        assert commands(block.code), where
    elif block.language == "yaml":
        yaml.safe_load(block.code)
    elif block.language == "json":
        json.loads(block.code)
    elif block.language == "xml":
        ElementTree.fromstring(block.code)
    elif block.language == "ini":
        configparser.ConfigParser().read_string(block.code)
    elif block.language == "toml" and sys.version_info >= (3, 11):
        import tomllib

        tomllib.loads(block.code)


@pytest.fixture
def reader_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[typing.Callable[[Path], Reader]]:
    """Make a reader with an empty folder, an empty home, and nothing of detkit in the environment."""
    home, here, site = (tmp_path / name for name in ("home", "here", "site"))
    for folder in (home, here, site):
        folder.mkdir()
    for name in list(os.environ):
        if name.startswith(("AWS_", "DETKIT_", "PYTEST_", "XDG_")) or name == "COV_CORE_SOURCE":
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(home),
        "TORCH_HOME": str(home / "torch"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        # `pip install FOLDER` is run as it stands, but into a folder of its own and without the network.
        "PYTHONPATH": str(site),
        "PIP_TARGET": str(site),
        "PIP_NO_DEPS": "1",
        "PIP_NO_INDEX": "1",
        "PIP_NO_BUILD_ISOLATION": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "TERM": "dumb",
        # Two pages at a time on two cores: threads that wait for each other would take several times as long.
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(here)
    plugins.registry.cache_clear()
    with mock.patch.dict(os.environ):  # blocks set variables too
        yield lambda page: Reader(page, here, monkeypatch)
    plugins.registry.cache_clear()


@pytest.mark.skipif(
    importlib.util.find_spec("detkit_torchvision") is None,
    reason="pages are run where the torchvision plugin is, in `tox -e docs`",
)
@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_page_runs(page: Path, reader_of: typing.Callable[[Path], Reader]) -> None:
    reader_of(page).read()


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_blocks_are_marked(page: Path) -> None:
    """Every block names a language that is run or parsed, and every block left out says why."""
    for block in blocks(page):
        where = f"{page_name(page)}:{block.line}"
        assert block.language in LANGUAGES | ALONE, f"{where}: language {block.language!r}"
        if "not run here" in block.marks:
            assert len(block.marks["not run here"]) > 10, f"{where}: say why it is not run"


def test_readme_says_what_ci_runs() -> None:
    readme = [command for block in blocks(ROOT / "README.md") for command in commands_of(block)]
    last = (ROOT / ".ci/run").read_text().strip().splitlines()[-1]
    assert last in readme
    (install,) = [command for command in readme if "detkit demo" in command]
    named = re.findall(r"(?:-c|install|\.) (?!-)(\S*/\S*)", install)
    assert named == ["constraints/torch.txt", "plugins/detkit-torchvision"]
    assert all((ROOT / name).exists() for name in named)


def test_readme_lists_every_model() -> None:
    for name in ("detkit_torchvision", "detkit_echo"):
        pytest.importorskip(name, reason="the table lists the models of both plugins")
    assert models() in (ROOT / "README.md").read_text(), f"the table should be:\n{models()}"


def models() -> str:
    """Return the table of models as the two plugins of this repository declare them."""
    installed = [plugins.backend(name) for name in ("torchvision", "echo")]
    rows = [f"| `{one.name}/{model}` | {spec.summary} |" for one in installed for model, spec in one.models.items()]
    return "\n".join(["| model | what it is |", "|---|---|", *rows]) + "\n"


def commands_of(block: Block) -> list[str]:
    return commands(block.code) if block.language == "console" else []


def markdown_files() -> list[Path]:
    kept = [path for path in ROOT.rglob("*.md") if not any(p.startswith(".") for p in path.relative_to(ROOT).parts)]
    return sorted(path for path in kept if not {"runs", "shared", "build"} & set(path.relative_to(ROOT).parts))


@pytest.mark.parametrize("page", markdown_files(), ids=page_name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r"(?:src|href)=\"([^\"]+)\"", text)
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page_name(page)} links to {target}, which is not there"
        if anchor:
            assert anchor in anchors(file), f"{page_name(page)} links to {target}: no such heading"


def anchors(page: Path) -> set[str]:
    """Return the headings of a page the way GitHub makes links of them."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "changes").glob("*.md")], ids=page_name)
def test_no_registry_is_named(page: Path) -> None:
    """Where packages come from is the reader's choice; an address in a page outlives it."""
    assert not re.search(r"pypi\.org|pythonhosted|anaconda\.(org|com)|--(extra-)?index-url", page.read_text())


def test_every_page_is_on_the_map() -> None:
    index = ROOT / "docs/index.md"
    linked = {(index.parent / target).resolve() for target in re.findall(r"\]\(([^)#\s]+)", index.read_text())}
    assert {page for page in (ROOT / "docs").rglob("*.md") if page != index} <= linked


def test_formats_page_says_what_each_carries() -> None:
    lines = (ROOT / "docs/reference/formats.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    rows = {row[0].strip("`"): row[1:] for row in cells if len(row) == len(COLUMNS) + 1}
    formats = {name: known for name, known in plugins.formats().items() if known.read.__module__.startswith("detkit.")}
    assert list(rows) == list(formats)
    for name, known in formats.items():
        for column, cell in zip(COLUMNS, rows[name], strict=True):
            optional = column in known.write_options.__struct_fields__
            expected = {"yes", "simple ones"} if column in known.carries else {"option" if optional else "no"}
            assert cell in expected, (name, column, cell)


def test_every_code_of_a_finding_is_documented() -> None:
    page = (ROOT / "docs/how-to/check-your-data.md").read_text()
    source = "\n".join(
        file.read_text() for part in ("formats", "checking") for file in (ROOT / "src/detkit" / part).glob("*.py")
    )
    raised = r'(?:code="|(?:[a-z]_|\b)error\(\s*"|\bnote\([^"]*"|\b(?:finding|warning)\((?:i, |j, )?\s*")'
    named = raised + r'([a-z]+(?:-[a-z]+)*)"'
    codes = set(re.findall(named, source))
    assert {"outside", "near-duplicate", "class-typo", "not-normalised", "malformed"} <= codes
    assert sorted(code for code in codes - {"note"} if f"`{code}`" not in page) == []


def test_every_hook_is_documented() -> None:
    page = (ROOT / "docs/how-to/write-a-backend.md").read_text()
    hooks = [hook for name, hook in vars(hookspecs).items() if name.startswith("detkit_")]
    assert hooks
    for hook in hooks:
        signature = f"{hook.__name__}({', '.join(inspect.signature(hook).parameters)})"
        assert f"### `{signature}`" in page, f"write-a-backend.md does not document {signature}"


def test_every_public_name_is_documented() -> None:
    assert first_cells("python-api.md", "Names") == detkit.__all__


def test_every_field_is_documented() -> None:
    for struct, page in {
        job.Manifest: "manifest.md",
        job.WeightsOrigin: "manifest.md",
        job.Artifact: "manifest.md",
        job.Event: "run-directory.md",
        job.Job: "run-directory.md",
        studies.StudyRecord: "run-directory.md",
        tuning.Search: "run-directory.md",
    }.items():
        assert first_cells(page, f"`{struct.__name__}`") == list(struct.__struct_fields__), struct


def test_every_hyperparameter_is_documented() -> None:
    page = (ROOT / "docs/reference/hyperparameters.md").read_text()
    assert hyperparameters() in page, f"the table should be:\n{hyperparameters()}"


def hyperparameters() -> str:
    """Return the table of canonical names as `detkit.params` has them."""
    struct = msgspec.defstruct("Canonical", [(name, hint) for name, hint in params.CANONICAL.items()])
    described = params.describe(struct)
    (schema,) = msgspec.json.schema(struct)["$defs"].values()
    lines = ["| name | value | meaning |", "|---|---|---|"]
    for name, about in schema["properties"].items():
        lines.append(f"| `{name}` | {kind(about)} | {described[name]} |")
    return "\n".join(lines) + "\n"


def kind(about: Mapping[str, typing.Any]) -> str:
    """Say in words what JSON schema says of a value."""
    if "anyOf" in about:
        return " or ".join(sorted((kind(one) for one in about["anyOf"]), key=lambda text: text.startswith("`")))
    if "enum" in about:
        return ", ".join(f"`{value}`" for value in sorted(about["enum"]))
    if "pattern" in about:
        return "`N epochs` or `N iterations`"
    if about.get("type") == "array" and about["items"]["type"] == "number":
        return "numbers"
    words = {
        "integer": "whole number", "number": "number", "string": "text", "null": "none", "array": "whole numbers"
    }  # fmt: skip
    limits = {"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"}
    ends = [f"{word} {about[key]:g}" for key, word in limits.items() if key in about and about[key] < 1e6]
    return " ".join([words[about["type"]], *ends])


def first_cells(page: str, heading: str) -> list[str]:
    """Return the first column of the first table below a heading, without back-quotes."""
    text = (ROOT / "docs/reference" / page).read_text()
    section = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", text, flags=re.MULTILINE | re.DOTALL)
    assert section, f"{page} has no heading {heading}"
    first_table = re.search(r"(?:^\|.*\n)+", section[1], flags=re.MULTILINE)
    assert first_table, f"{page}: no table below {heading}"
    return re.findall(r"^\| `(\w+)` \|", first_table[0], flags=re.MULTILINE)
