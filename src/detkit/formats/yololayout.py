"""Where a YOLO data set keeps its images, labels, splits and class names.

Three layouts: a ``data.yaml`` that names them, ``images/`` beside ``labels/``, and both within a folder for each split.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from detkit.errors import InvalidData
from detkit.formats.findings import raise_errors
from detkit.formats.imagefiles import is_file, is_folder, leaves, stem, walk
from detkit.formats.rows import CLASS_FILE
from detkit.formats.splits import SPLIT_FOLDERS
from detkit.formats.textlines import file_error, find_below, line_error, read_lines, read_number, read_text
from detkit.images import EXTENSIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detkit.formats.findings import Finding

SPLIT_KEYS = ("train", "val", "valid", "validation", "test", "minival", "trainval")
"""Keys of data.yaml that are splits; others stand below ``splits``, which only detkit reads."""

_LARGEST_YAML = 4 << 20
"""Bytes; PyYAML takes seconds for more."""


@dataclass
class Layout:
    """What is where; paths are relative to ``root``, with forward slashes."""

    root: Path
    splits: dict[str, dict[str, str]] = field(default_factory=dict)
    """The images of each split, and how they are called in it; the split is "" where the data is in one piece."""
    classes: tuple[str, ...] | None = None
    """As data.yaml names them."""
    names_file: Path | None = None
    """Where they stand otherwise."""
    image_folders: list[str] = field(default_factory=list)


def twin(image: str) -> str:
    """Return the label file of an image: the last folder ``images`` becomes ``labels``, the ending ``.txt``.

    >>> twin("images/train/a.jpg"), twin("train/images/a.b.png"), twin("pictures/a.jpg")
    ('labels/train/a.txt', 'train/labels/a.b.txt', 'pictures/a.txt')
    """
    return f"{stem(twin_folder(image))}.txt"


def twin_folder(name: str) -> str:
    """Return a path, or that of a folder with a slash at its end, with ``labels`` for its last folder ``images``."""
    return "/labels/".join(f"/{name}".rsplit("/images/", 1))[1:]


def find_yaml(path: Path) -> Path | None:
    """Return the file itself, or a folder's ``data.yaml``, else its only YAML file with class names and splits."""
    if path.is_file():
        return path if path.suffix.lower() in {".yaml", ".yml"} else None
    files = [f for f in sorted(path.iterdir()) if f.suffix.lower() in {".yaml", ".yml"} and is_file(f)]
    likely = [file for file in files if is_yolo_yaml(file)]
    preferred = [file for file in likely if file.stem == "data"] or likely
    if len(preferred) > 1:
        raise InvalidData(
            f"{path} holds several descriptions of a data set: {', '.join(file.name for file in preferred)}; "
            "name the one to read"
        )
    return preferred[0] if preferred else None


def is_yolo_yaml(file: Path) -> bool:
    """Return whether a YAML file has the keys ``names`` or ``nc``, and ``train``, ``val`` or ``test``."""
    try:
        with file.open("rb") as stream:
            content = stream.read(_LARGEST_YAML)
    except OSError:
        return False
    keys = {line.partition(b":")[0].strip(b"\"' \t\r\xef\xbb\xbf") for line in content.split(b"\n") if line[:1].strip()}
    return bool(keys & {b"names", b"nc"}) and bool(keys & {b"train", b"val", b"test"})


def plain_folders(root: Path) -> dict[str, str]:
    """Return the image folders of a data set without data.yaml, and the split that each is; the split may be ""."""
    if (root / "images").is_dir() and (root / "labels").is_dir():
        tops = [folder.name for folder in sorted((root / "images").iterdir())]
        tops = [name for name in tops if not name.startswith(".")]
        if len(tops) > 1 and {name.lower() for name in tops} <= SPLIT_FOLDERS:
            return {f"images/{name}": name for name in tops}
        return {"images": ""}
    folders = sorted(entry for entry in root.iterdir() if entry.name.lower() in SPLIT_FOLDERS)
    return {f"{f.name}/images": f.name for f in folders if (f / "images").is_dir() and (f / "labels").is_dir()}


def find_layout(path: Path, findings: list[Finding]) -> Layout:
    """Find out what is where. Raises `InvalidData` where there is no YOLO data set."""
    yaml_file = find_yaml(path)
    if yaml_file is not None:
        return _YamlFile(yaml_file, findings).layout()
    folders = plain_folders(path) if path.is_dir() else {}
    if not folders:
        raise InvalidData(
            f"{path}: no YOLO data set; looked for data.yaml, images/ beside labels/, and both within "
            "train/, valid/ and test/"
        )
    layout = Layout(path, image_folders=list(folders))
    for folder, split in folders.items():
        layout.splits[split] = dict(_images_below(path, folder))
    _call_apart(layout)
    if not is_file(path / CLASS_FILE):
        others = [file for file in (*sorted(path.glob("*.names")), path / "labels" / CLASS_FILE) if is_file(file)]
        if len(others) > 1:
            listed = ", ".join(str(file.relative_to(path)) for file in others)
            raise InvalidData(f"{path} has several files of class names: {listed}; keep one, as {CLASS_FILE}")
        layout.names_file = others[0] if others else None
    return layout


def orphans(layout: Layout, images: set[str]) -> list[Finding]:
    """Return an error for each label file that has no image, neither among those read nor beside them."""
    stems = {stem(image) for image in images}
    found: list[Finding] = []
    for folder in layout.image_folders:
        labels = twin_folder(f"{folder}/").rstrip("/")
        if labels == folder or not (layout.root / labels).is_dir():
            continue
        # Lists may leave out images that are there.
        present = stems | {stem(image) for image, _ in _images_below(layout.root, folder)}
        for name in walk(layout.root / labels):
            if name.endswith(".txt") and f"{folder}/{name[:-4]}" not in present and name != CLASS_FILE:
                message = f"there is no image {folder}/{name[:-4]}.*; bring it back, or remove this file"
                found.append(file_error("orphan-labels", layout.root / labels / name, message))
    return found


def _images_below(root: Path, folder: str) -> Iterator[tuple[str, str]]:
    for name in walk(root / folder):
        if f".{name.rpartition('.')[2].lower()}" in EXTENSIONS:
            yield (f"{folder}/{name}" if folder else name), name


def _call_apart(layout: Layout) -> None:
    """Where two images have one name, or one image two, call all by their path without ``images``."""
    named = {pair for images in layout.splits.values() for pair in images.items()}
    if len(named) == len({image for image, _ in named}) == len({name for _, name in named}):
        return
    for images in layout.splits.values():
        for image in images:
            images[image] = "/".join(f"/{image}".rsplit("/images/", 1)).lstrip("/")


class _YamlFile:
    """data.yaml as nodes, which know their lines and keep texts such as ``no`` and ``1.10`` as they were written."""

    def __init__(self, file: Path, findings: list[Finding]) -> None:
        self.file, self.findings = file, findings
        self.keys: dict[str, Any] = {}
        for key, value in self._pairs(self._compose()):
            self.keys[key] = value

    def layout(self) -> Layout:
        """Resolve everything that the file names."""
        here, base = self.file.parent, self._base()
        layout = Layout(here)
        if "kpt_shape" in self.keys:
            self._error("key-points", self.keys["kpt_shape"], "labels of key points are not read; expected boxes")
        layout.classes = self._names()
        places = {key: self._texts(self.keys[key]) for key in SPLIT_KEYS if key in self.keys}
        if "splits" in self.keys:
            places |= {key: self._texts(value) for key, value in self._pairs(self.keys["splits"])}
        places = {key: entries for key, entries in places.items() if entries}
        if not places:
            self.findings.append(
                file_error("no-splits", self.file, "it names no images; expected train: and val: with a folder each")
            )
        resolved = {key: [self._place(here / base, text, node) for text, node in at] for key, at in places.items()}
        if len(resolved) > 1 and len({tuple(found) for found in resolved.values()}) == 1:
            # Trainers insist on train and val; the same place twice is data in one piece.
            resolved = {"": next(iter(resolved.values()))}
        for split, found in resolved.items():
            images: dict[str, str] = {}
            for place in filter(None, found):
                images |= self._listed(layout, base, place) if is_file(here / place) else self._folder(layout, place)
            layout.splits[split] = images
        layout.image_folders = list(dict.fromkeys(layout.image_folders))
        _call_apart(layout)
        return layout

    def _compose(self) -> Any:
        import yaml

        try:
            if self.file.stat().st_size > _LARGEST_YAML:
                raise InvalidData(f"{self.file} has more than {_LARGEST_YAML} bytes; expected a short description")
            return yaml.compose(read_text(self.file, self.findings), Loader=yaml.SafeLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            self.findings.append(
                line_error("malformed", self.file, mark.line + 1 if mark else 1, f"no valid YAML: {error.problem}")
            )
        except (yaml.YAMLError, RecursionError) as error:
            why = "nested too deeply" if isinstance(error, RecursionError) else " ".join(str(error).split())
            self.findings.append(file_error("malformed", self.file, f"no valid YAML: {why}"))
        raise_errors(self.findings)
        raise AssertionError("a finding was added")

    def _error(self, code: str, node: Any, message: str) -> None:
        self.findings.append(line_error(code, self.file, node.start_mark.line + 1, message))

    def _pairs(self, node: Any) -> Iterator[tuple[str, Any]]:
        """Yield the keys of a mapping with their values; a key that is there twice is a finding."""
        if node is None or node.id != "mapping":
            where = 1 if node is None else node.start_mark.line + 1
            self.findings.append(line_error("malformed", self.file, where, "expected `name: value` pairs"))
            return
        seen = set()
        for key, value in node.value:
            if key.id != "scalar":
                self._error("malformed", key, "expected a name before the colon")
            elif key.value in seen:
                self._error("duplicate-key", key, f"{key.value!r} is there already; give it once")
            else:
                seen.add(key.value)
                yield key.value, value

    def _texts(self, node: Any) -> list[tuple[str, Any]]:
        """Return the texts of a scalar, or of a list of them, that hold anything."""
        nodes = node.value if node.id == "sequence" else [node]
        for item in nodes:
            if item.id != "scalar":
                self._error("malformed", item, "expected a text, or a list of texts")
        return [
            (item.value.strip(), item)
            for item in nodes
            if item.id == "scalar" and item.value.strip() not in ("", "~", "null")
        ]

    def _base(self) -> str:
        """Return the folder that ``path`` names, below the one of this file."""
        here = self.file.parent
        given = self._texts(self.keys["path"]) if "path" in self.keys else []
        if not given:
            return ""
        text, node = given[0]
        below = find_below(here, text, is_folder)
        if below is not None:
            return below
        if text.replace("\\", "/").rstrip("/").rpartition("/")[2] == here.resolve().name:
            return ""
        what = "leads out of the folder of this file" if leaves(text) else "is no folder beside this file"
        self._error("outside-folder", node, f"path {text!r} {what}; remove the line, or put this file into that folder")
        return ""

    def _names(self) -> tuple[str, ...] | None:
        if "names" not in self.keys:
            return None
        node = self.keys["names"]
        before = len(self.findings)
        if node.id == "mapping":
            pairs = list(self._pairs(node))
            ids = [read_number(key) for key, _ in pairs]
            if sorted(ids) != list(range(len(ids))):
                found = ", ".join(key for key, _ in pairs[:8])
                self._error("bad-names", node, f"names need the ids 0 to {len(ids) - 1}, each once; found {found}")
            nodes = [value for _, (_, value) in sorted(zip(ids, pairs, strict=True), key=lambda pair: pair[0])]
        elif node.id == "sequence":
            nodes = node.value
        else:
            self._error("bad-names", node, "expected a list of class names, or `id: name` pairs")
            nodes = []
        names: list[str] = []
        for item in nodes:
            name = item.value.strip() if item.id == "scalar" else ""
            if not name:
                self._error("no-name", item, "expected the name of a class")
            elif name in names:
                self._error("duplicate-name", item, f"the name {name!r} is there already, as class {names.index(name)}")
            names.append(name)
        if "nc" in self.keys:
            nc = self.keys["nc"]
            if nc.id != "scalar" or read_number(nc.value) != len(names):
                said = nc.value if nc.id == "scalar" else nc.id
                self._error("wrong-count", nc, f"nc is {said}, and there are {len(names)} names; mend one of them")
        # Whatever is wrong stops reading; labels are still looked into.
        return tuple(names) if len(self.findings) == before else tuple(str(i) for i in range(len(names)))

    def _place(self, root: Path, text: str, node: Any) -> str | None:
        """Return a folder or list of images below a folder; None where it is not there, which is a finding."""
        name = text
        while find_below(root, name, _exists) is None and name.startswith("../"):
            name = name[3:]  # Roboflow writes ../train/images for a folder beside data.yaml, and Ultralytics obliges
        below = find_below(root, name, _exists)
        if below is None:
            code = "outside-folder" if leaves(name) else "missing-folder"
            what = f"{text!r} is neither a folder nor a list of images below {root}"
            self._error(code, node, what)
        elif is_file(root / below) and not below.endswith(".txt"):
            self._error("missing-folder", node, f"{text!r} is a file; expected a folder, or a .txt list of images")
            return None
        return None if below is None else (root / below).relative_to(self.file.parent).as_posix()

    def _folder(self, layout: Layout, folder: str) -> dict[str, str]:
        layout.image_folders.append(folder)
        return dict(_images_below(layout.root, folder))

    def _listed(self, layout: Layout, base: str, name: str) -> dict[str, str]:
        """Return the images of a list; each is called by what follows its first folder ``images``."""
        file, images = layout.root / name, {}
        for number, line in read_lines(file, self.findings):
            image = None
            for folder in dict.fromkeys((file.parent, layout.root / base)):
                below = find_below(folder, line)
                if below is not None:
                    image = (folder / below).relative_to(layout.root).as_posix()
                    break
            if image is None:
                code = "outside-folder" if leaves(line) else "missing-image"
                what = f"{line!r} names no image below {layout.root}"
                self.findings.append(line_error(code, file, number, what))
            elif image in images:
                self.findings.append(line_error("image-twice", file, number, f"{line!r} is there already"))
            else:
                head, images_folder, tail = f"/{image}".partition("/images/")
                images[image] = tail if images_folder else image
                if images_folder:
                    layout.image_folders.append(f"{head}/images"[1:])
        return images


def _exists(path: Path) -> bool:
    return is_file(path) or is_folder(path)
