"""``detkit convert``, ``split``, ``merge``, ``sample`` and ``remap``: from one data set on disk to another."""

import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from detkit.cli import messages
from detkit.cli.runs import Json
from detkit.cli.words import sort_words

if TYPE_CHECKING:
    from detkit.data import Dataset
    from detkit.formats import Format

_OPTIONS = "[--option VALUE]"

From = Annotated[str | None, typer.Option("--from", metavar="FORMAT", help="DATA's format; recognised if absent.")]
To = Annotated[str | None, typer.Option("--to", metavar="FORMAT", help="OUT's format; that of DATA if absent.")]
Images = Annotated[
    str, typer.Option("--images-as", metavar="link|copy", help="Images of OUT: links to DATA's, or copies.")
]
Seed = Annotated[int, typer.Option(metavar="N", help="Another seed, another choice.")]


def convert(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=f"DATA[:SPLIT] OUT {_OPTIONS}", help="What to read, and a new folder.", show_default=False
        ),
    ] = None,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="OUT's format, see docs/reference/formats.md.")],
    source: From = None,
    images: Images = "link",
    as_json: Json = False,
) -> None:
    """Write a data set in another format.

    Says what the other format cannot carry. Options are those of the two formats, such as `--origin 0` of voc.
    """
    job = _Job.of(context, words, 2, "DATA OUT", source=source, to=to, images=images)
    job.write(job.read(0), as_json=as_json)


def split(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=f"DATA OUT [train=0.64 val=0.16 test=0.2] {_OPTIONS}",
            help="What to read, a new folder, and each split's share.",
            show_default=False,
        ),
    ] = None,
    seed: Seed = 0,
    group_by: Annotated[
        str | None,
        typer.Option(
            metavar="KEY|REGEX",
            help="Keep images together whose records agree in a key, or whose names begin alike.",
        ),
    ] = None,
    anew: Annotated[bool, typer.Option("--anew", help="Cut data that has splits into others.")] = False,
    source: From = None,
    to: To = None,
    images: Images = "link",
    as_json: Json = False,
) -> None:
    """Cut a data set into splits that have their share of every class.

    Each split has its exact share of images, rounded to whole ones; with `--group-by`, as near as whole groups allow.
    """
    from dataclasses import replace

    import numpy as np

    from detkit.errors import InvalidValue, UsageError

    shares, rest = _assignments(words, context)
    job = _Job.of(context, rest, 2, "DATA OUT", source=source, to=to, images=images)
    data = job.read(0)
    if data.split_indices and not anew:
        listed = ", ".join(f"{name} ({len(at)})" for name, at in data.split_indices.items())
        raise UsageError(f"{job.places[0]} came with the splits {listed}; cut it anew with --anew")
    wanted = _shares(shares or {"train": "0.64", "val": "0.16", "test": "0.2"})
    if not abs(sum(wanted.values()) - 1) <= 1e-6:
        raise InvalidValue("shares", shares, f"numbers that sum to 1, not {sum(wanted.values()):g}")
    parts = data.split_positions(*wanted.values(), seed=seed, group_by=group_by)
    cut = {name: np.array(part, dtype=np.int64) for name, part in zip(wanted, parts, strict=True)}
    job.write(replace(data, split_indices=cut), as_json=as_json, splitting=True)


def merge(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=f"DATA DATA... OUT {_OPTIONS}", help="What to read, and a new folder.", show_default=False
        ),
    ] = None,
    prefix: Annotated[
        bool, typer.Option("--prefix-names", help="Put the name of each DATA before its images' names.")
    ] = False,
    source: From = None,
    to: To = None,
    images: Images = "link",
    as_json: Json = False,
) -> None:
    """Put several data sets together, classes matched by name, splits of one name joined."""
    from detkit.curation import merge

    job = _Job.of(context, words, None, "DATA DATA... OUT", source=source, to=to, images=images)
    data = [job.read(i) for i in range(len(job.places) - 1)]
    prefixes = _prefixes(job.places[:-1]) if prefix else None
    job.write(merge(data, prefixes=prefixes), as_json=as_json)


def sample(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=f"DATA[:SPLIT] OUT {_OPTIONS}", help="What to read, and a new folder.", show_default=False
        ),
    ] = None,
    size: Annotated[float, typer.Option(metavar="N", help="A number of images, or a share such as 0.1.")],
    seed: Seed = 0,
    source: From = None,
    to: To = None,
    images: Images = "link",
    as_json: Json = False,
) -> None:
    """Take some images of a data set, each class in its proportion."""
    from detkit.curation import sample

    job = _Job.of(context, words, 2, "DATA OUT", source=source, to=to, images=images)
    job.write(sample(job.read(0), size, seed=seed), as_json=as_json)


def remap(
    context: typer.Context,
    *,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            metavar=f"DATA OUT OLD=NEW... {_OPTIONS}",
            help="What to read, a new folder, and each class that gets another name.",
            show_default=False,
        ),
    ] = None,
    drop: Annotated[
        list[str] | None, typer.Option(metavar="CLASS", help="Leave the boxes of this class out; repeatable.")
    ] = None,
    source: From = None,
    to: To = None,
    images: Images = "link",
    as_json: Json = False,
) -> None:
    """Rename classes, merge those that get the same name, leave some out. Images stay."""
    from detkit.curation import remap
    from detkit.errors import UsageError

    names, rest = _assignments(words, context)
    if not names and not drop:
        raise UsageError("nothing to change; write OLD=NEW for a class to rename, or --drop CLASS")
    job = _Job.of(context, rest, 2, "DATA OUT", source=source, to=to, images=images)
    data = job.read(0)
    changed = remap(data, names, drop=drop or [])
    if len(changed.boxes) < len(data.boxes):
        messages.tell(f"{len(data.boxes) - len(changed.boxes)} boxes of {', '.join(drop or [])} are left out")
    job.write(changed, as_json=as_json)


class _Job:
    """Places to read from and the one to write to, formats, and their options, as the words of a command say."""

    def __init__(self, places: Sequence[str], settings: Mapping[str, str], **given: str | None) -> None:
        self.places = places
        self._settings = dict(settings)
        self._source, self._to, self._images = given["source"], given["to"], given["images"]
        self._used: set[str] = set()
        self._formats: list[Format] = []

    @classmethod
    def of(
        cls, context: typer.Context, words: Sequence[str] | None, number: int | None, usage: str, **given: str | None
    ) -> "_Job":
        """Sort the words; ``number`` is how many places are expected, None for three or more."""
        from detkit.errors import InvalidValue, UsageError

        flags = [name.lstrip("-") for parameter in context.command.params for name in parameter.opts]
        sorted_words = sort_words([*(words or []), *context.args], flags, f"{context.info_name} {usage}")
        places = sorted_words.positions
        if len(places) != number if number is not None else len(places) < 3:
            found = f"found {', '.join(places)}" if places else "found none"
            raise UsageError(f"expected {usage}; {found}. the last one is a new folder")
        if given["images"] not in {"link", "copy"}:
            raise InvalidValue("images-as", given["images"], "link or copy")
        return cls(places, sorted_words.settings, **given)

    def read(self, i: int) -> "Dataset":
        """Read the i-th place with those settings that its format has."""
        from detkit.io import read_dataset, recognise
        from detkit.progress import shown

        format = recognise(self.places[i], self._source)
        self._formats.append(format)
        with shown(sys.stderr.isatty()):
            return read_dataset(self.places[i], format.name, **self._for(format.options))

    def write(self, data: "Dataset", *, as_json: bool, splitting: bool = False) -> None:
        """Write to the last place and tell what came out, as it is read back.

        A setting that nobody has is refused before; so is a format without splits where these are what is wanted.
        """
        from detkit.errors import UnknownName, UsageError
        from detkit.io import read_dataset, write_dataset
        from detkit.plugins import formats
        from detkit.progress import shown

        name = self._to or self._formats[0].name
        target = formats().get(name)
        settings = {} if target is None else self._for(target.write_options)
        unused = set(self._settings) - self._used
        if unused:
            both = [*self._formats, *([] if target is None else [target])]
            known = [n for f in both for n in (*_names(f.options), *_names(f.write_options))]
            raise UnknownName(f"option of {' or '.join(f.name for f in both)}", sorted(unused)[0], set(known))
        if data.split_indices and target is not None and splitting and "split_indices" not in target.carries:
            raise UsageError(
                f"{name} has no splits; write another format with --to, or sample each part with `DATA:SPLIT`"
            )
        out = Path(self.places[-1]).absolute()
        if any(out.is_relative_to(folder) for folder in self._folders()):
            raise UsageError(f"{self.places[-1]} lies inside the data that is read; choose a folder beside it")
        with shown(sys.stderr.isatty()):
            place = write_dataset(data, self.places[-1], name, images=self._images, **settings)  # type: ignore[arg-type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what had to be assumed about data that is just written
            written = read_dataset(place, name)
        _report(place, name, written, as_json=as_json)

    def _folders(self) -> list[Path]:
        paths = [Path(place) for place in self.places[:-1]]
        paths = [path if path.exists() else Path(str(path).rpartition(":")[0]) for path in paths]
        return [path.absolute() for path in paths if path.is_dir()]

    def _for(self, options: Any) -> dict[str, str]:
        mine = {name: value for name, value in self._settings.items() if name in _names(options)}
        self._used |= set(mine)
        return mine


def _prefixes(places: Sequence[str]) -> list[str]:
    """Return a folder's name for each place, with as much of the path before it as tells them apart."""
    parts = [[*Path(place).absolute().parts[1:-1], Path(place).name.replace(":", "-")] for place in places]
    depth = 1
    while depth < max(map(len, parts)) and len({tuple(part[-depth:]) for part in parts}) < len(parts):
        depth += 1
    return ["-".join(part[-depth:]) for part in parts]


def _names(options: Any) -> list[str]:
    return list(options.__struct_fields__)


def _assignments(words: Sequence[str] | None, context: typer.Context) -> tuple[dict[str, str], list[str]]:
    """Take ``NAME=VALUE`` out of the words; a name may be any text, such as a class name with a blank."""
    from detkit.errors import UsageError

    found: dict[str, str] = {}
    rest: list[str] = []
    everything = [*(words or []), *context.args]
    context.args = []
    for before, word in zip(["", *everything], everything, strict=False):
        of_flag = before.startswith("--") and "=" not in before
        name, sign, value = word.partition("=")
        if not sign or not name or word.startswith("-") or of_flag or Path(word).exists():
            rest.append(word)
        elif name in found:
            raise UsageError(f"{name} is given twice: {found[name]!r} and {value!r}")
        else:
            found[name] = value
    return found, rest


def _shares(given: Mapping[str, str]) -> dict[str, float]:
    from detkit.errors import InvalidValue

    shares: dict[str, float] = {}
    for name, text in given.items():
        try:
            shares[name] = float(text)
        except ValueError:
            raise InvalidValue(name, text, "the share of a split is a number, for example train=0.8") from None
    return shares


def _report(place: "Path | str", format: str, data: "Dataset", *, as_json: bool) -> None:
    splits = {name: len(at) for name, at in data.split_indices.items()}
    if as_json:
        messages.print_json(
            {
                "folder": place,
                "format": format,
                "images": len(data),
                "boxes": len(data.boxes),
                "classes": data.boxes_per_class(),
                "splits": splits,
            }
        )
        return
    print(f"{messages.shown(place)}: {format}, {len(data)} images, {len(data.boxes)} boxes")
    if splits:
        print("splits   " + ", ".join(f"{name} {count}" for name, count in splits.items()))
    print("classes  " + ", ".join(f"{name} {count}" for name, count in data.boxes_per_class().items()))
